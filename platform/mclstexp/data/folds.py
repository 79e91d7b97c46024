"""Which sections train, validate and test, and the guard against leaks between them.

Under the protocol `patient` no patient is on two sides. Under `reference` (as published) sections are held out while
others of the same patient may train, a leak that every result then states.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from mclstexp.data.schema import Manifest
from mclstexp.errors import SplitError
from mclstexp.messages import did_you_mean, some_of
from mclstexp.settings import SplitConfig


@dataclass(frozen=True)
class Split:
    """Sorted section ids of each side; sections without counts are on none."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


def make_split(manifest: Manifest, config: SplitConfig) -> Split:
    """Returns the split of a table's measured sections.

    Raises:
        SplitError: a section or patient is unknown, a held-out patient would also train or validate, validation
            patients are both named and drawn, two sides have the same counts, or no section is left to train on.
    """
    patient_of = {entry.section_id: entry.patient_id for entry in manifest.sections if entry.measured}
    patients = set(patient_of.values())
    _require_known(config.test_sections, patient_of, "section", "split.test_sections")
    _require_known(config.test_patients, patients, "patient", "split.test_patients")
    _require_known(config.validation_patients, patients, "patient", "split.validation_patients")
    if config.validation_patients and config.num_validation_patients:
        raise SplitError("set split.validation_patients or split.num_validation_patients, not both")
    test = {name for name, patient in patient_of.items() if patient in config.test_patients}
    test |= set(config.test_sections)
    validating = set(config.validation_patients) or _drawn(config, patients - {patient_of[name] for name in test})
    validation = {name for name, patient in patient_of.items() if patient in validating} - test
    train = set(patient_of) - test - validation
    _require_no_leak(config, patient_of, test, train | validation)
    _require_no_twins(manifest, (train, validation, test))
    if not train:
        raise SplitError(f"no section is left to train on: {len(test)} are held out, {len(validation)} validate")
    return Split(*(tuple(sorted(side)) for side in (train, validation, test)))


def similar_patients(patients: Mapping[str, str]) -> list[str]:
    """Returns a warning for each group of patients whose ids differ only in case, separators or leading zeros.

    Args:
        patients: the patient of each section.
    """
    sections: defaultdict[str, list[str]] = defaultdict(list)
    for section, patient in sorted(patients.items()):
        sections[patient].append(section)
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for patient in sorted(sections):
        alike[_plain_id(patient)].append(f"{patient} ({some_of(sections[patient])})")
    return [
        f"patients {' and '.join(same)} differ only in case, separators or leading zeros; if they are one patient, "
        "give them one patient_id: else the patient may be in training and test"
        for same in alike.values()
        if len(same) > 1
    ]


def _plain_id(patient: str) -> str:
    """Returns an id without case, separators and leading zeros; its numbers stay apart (1-12 is not 11-2)."""
    plain = ""
    for part in re.findall(r"[a-z]+|\d+", patient.lower()):
        number = part.isdecimal()
        plain += "-" * (number and plain[-1:].isdecimal()) + (part.lstrip("0") or "0" if number else part)
    return plain or patient


def _require_no_twins(manifest: Manifest, sides: Iterable[set[str]]) -> None:
    """Refuses sections on different sides whose counts are the same, also those of one patient."""
    digests = {entry.section_id: entry.counts_digest for entry in manifest.sections if entry.counts_digest}
    first: dict[str, tuple[int, str]] = {}
    for number, side in enumerate(sides):
        for name in sorted(side & digests.keys()):
            other, twin = first.setdefault(digests[name], (number, name))
            if other != number:
                raise SplitError(
                    f"sections {twin} and {name} have the same counts and are on different sides of the split: put "
                    "them on one side, or remove one from the sheet and prepare it again"
                )


def _require_known(names: Iterable[str], known: Iterable[str], what: str, setting: str) -> None:
    known = sorted(known)
    for name in names:
        if name not in known:
            raise SplitError(f"{setting}: the tile table has no measured {what} {name}; {did_you_mean(name, known)}")


def _drawn(config: SplitConfig, patients: set[str]) -> set[str]:
    """Returns `num_validation_patients` of the given patients, who are not held out for the test."""
    count = config.num_validation_patients
    spare = len(patients) - (config.protocol == "patient")  # under `reference` other sections of theirs may train
    if count and count > spare:
        raise SplitError(
            f"split.num_validation_patients={count} leaves no patient to train on: {len(patients)} are not held out "
            f"({', '.join(sorted(patients))}); lower it"
        )
    return set(np.random.default_rng(0).permutation(sorted(patients))[:count].tolist())


def _require_no_leak(config: SplitConfig, patient_of: dict[str, str], test: set[str], seen: set[str]) -> None:
    held_out = {patient_of[name] for name in test}
    both = sorted(held_out & set(config.validation_patients))
    if both:
        raise SplitError(
            f"split.validation_patients and the test data share {', '.join(both)}; name others or, if each patient is "
            "tested in turn, let split.num_validation_patients draw them for each fold"
        )
    siblings = sorted(name for name in seen if patient_of[name] in held_out)
    if siblings and config.protocol == "patient":
        patients = ", ".join(sorted({patient_of[name] for name in siblings}))
        raise SplitError(
            f"sections {', '.join(siblings)} of held-out patient {patients} would train; name the patient in "
            "split.test_patients, or set split.protocol=reference to allow it as published"
        )
