"""Which sections train, validate and test, and the guard against leaks between them.

Under `patient` no patient stands on two sides; under `reference` (as published) sections are left out and their
siblings may train, which every result then says.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

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
        SplitError: an unknown section or patient, a held-out patient that would also train or validate, or nothing
            left to train on.
    """
    patient_of = {entry.section_id: entry.patient_id for entry in manifest.sections if entry.measured}
    patients = set(patient_of.values())
    _known(config.test_sections, patient_of, "split.test_sections")
    _known(config.test_patients, patients, "split.test_patients")
    _known(config.validation_patients, patients, "split.validation_patients")
    test = {name for name, patient in patient_of.items() if patient in config.test_patients}
    test |= set(config.test_sections)
    validation = {name for name, patient in patient_of.items() if patient in config.validation_patients} - test
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


def _no_leak(config: SplitConfig, patient_of: dict[str, str], test: set[str], seen: set[str]) -> None:
    held_out = {patient_of[name] for name in test}
    both = sorted(held_out & set(config.validation_patients))
    if both:
        raise SplitError(f"split.validation_patients and the test data share {', '.join(both)}")
    siblings = sorted(name for name in seen if patient_of[name] in held_out)
    if siblings and config.protocol == "patient":
        patients = ", ".join(sorted({patient_of[name] for name in siblings}))
        raise SplitError(
            f"sections {', '.join(siblings)} of held-out patient {patients} would train; name the patient in "
            "split.test_patients, or set split.protocol=reference to allow it as published"
        )
