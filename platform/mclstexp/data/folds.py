"""Which sections train, validate and test, and the guard against leaks between them.

Under `patient` no patient stands on two sides; under `reference` (as published) sections are left out and their
siblings may train, which every result then says.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mclstexp.data.schema import Manifest
from mclstexp.errors import SplitError
from mclstexp.settings import SplitConfig


@dataclass(frozen=True)
class Split:
    """Section ids, sorted; sections without counts are in none."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


def make_split(manifest: Manifest, config: SplitConfig) -> Split:
    """Returns the split of a table's measured sections.

    Raises:
        SplitError: an unknown section or patient, a held-out patient that would also train or validate, validation
            patients both named and drawn, or nothing left to train on.
    """
    patient_of = {entry.section_id: entry.patient_id for entry in manifest.sections if entry.measured}
    patients = set(patient_of.values())
    _known(config.test_sections, patient_of, "split.test_sections")
    _known(config.test_patients, patients, "split.test_patients")
    _known(config.validation_patients, patients, "split.validation_patients")
    if config.validation_patients and config.num_validation_patients:
        raise SplitError("name split.validation_patients, or let split.num_validation_patients draw them, not both")
    test = {name for name, patient in patient_of.items() if patient in config.test_patients}
    test |= set(config.test_sections)
    validating = set(config.validation_patients) or _drawn(config, patients - {patient_of[name] for name in test})
    validation = {name for name, patient in patient_of.items() if patient in validating} - test
    train = set(patient_of) - test - validation
    _no_leak(config, patient_of, test, train | validation)
    if not train:
        raise SplitError(f"no section is left to train on: {len(test)} are held out, {len(validation)} validate")
    return Split(*(tuple(sorted(side)) for side in (train, validation, test)))


def _known(asked: Iterable[str], known: Iterable[str], setting: str) -> None:
    known = sorted(known)
    for name in asked:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise SplitError(f"{setting}: {name} is not a measured one of this tile table; {hint}")


def _drawn(config: SplitConfig, patients: set[str]) -> set[str]:
    """Returns the validation patients that `num_validation_patients` asks for, of those that no test holds."""
    count = config.num_validation_patients
    spare = len(patients) - (config.protocol == "patient")  # under `reference` siblings of the tested may be left
    if count and count > spare:
        raise SplitError(
            f"split.num_validation_patients={count} leaves no patient to train on: beside the held-out ones there are "
            f"{len(patients)} ({', '.join(sorted(patients))}); lower it"
        )
    return set(np.random.default_rng(0).permutation(sorted(patients))[:count].tolist())


def _no_leak(config: SplitConfig, patient_of: dict[str, str], test: set[str], seen: set[str]) -> None:
    held_out = {patient_of[name] for name in test}
    both = sorted(held_out & set(config.validation_patients))
    if both:
        raise SplitError(
            f"split.validation_patients and the test data share {', '.join(both)}; name others or, where each patient "
            "is tested in turn, let split.num_validation_patients draw them anew for each fold"
        )
    siblings = sorted(name for name in seen if patient_of[name] in held_out)
    if siblings and config.protocol == "patient":
        patients = ", ".join(sorted({patient_of[name] for name in siblings}))
        raise SplitError(
            f"sections {', '.join(siblings)} of held-out patient {patients} would train; name the patient in "
            "split.test_patients, or set split.protocol=reference to allow it as published"
        )
