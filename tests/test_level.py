"""The level of a slide: its share and its error, against probes in plain NumPy that did not see the patient."""

from pathlib import Path

import numpy as np
import pytest
from plain_probe import plain_probe
from program_version import program_version

from mclstexp.model.left_out import leave_out
from mclstexp.model.level import LeftOutLevels, Level, fit_level
from mclstexp.model.version import ModelVersion

SECTIONS = ("A1", "A2", "B1", "C1", "D1", "E1")
NUM_SPOTS, NUM_FEATURES, NUM_GENES = 15, 3, 8


class _Spots:
    """Sections whose levels are shown by their features, or only by chance."""

    def __init__(self, is_shown: bool, sections: tuple[str, ...] = SECTIONS) -> None:
        rng = np.random.default_rng(0)
        self.section_id = np.repeat(np.array(sections, object), NUM_SPOTS)
        self.patient_id = np.array([name[0] for name in self.section_id], object)
        level = {name[0]: rng.normal(size=NUM_FEATURES) for name in sections}
        of_patient = np.stack([level[name] for name in self.patient_id])
        self.features = of_patient + 0.5 * rng.normal(size=of_patient.shape)
        weights = rng.normal(size=(NUM_FEATURES, NUM_GENES))
        other = {name[0]: rng.normal(size=NUM_GENES) for name in sections}
        unseen = np.stack([other[name] for name in self.patient_id])
        truth = self.features @ weights + unseen if is_shown else unseen
        self.expression = (truth + 0.8 * rng.normal(size=truth.shape)).astype(np.float32)
        self.folds = leave_out(self.patient_id, self.section_id, rng.normal(size=(len(truth), 2)))

    def fit(self) -> tuple[Level, LeftOutLevels]:
        return fit_level(self.features, self.expression, self.patient_id, self.section_id, self.folds)

    def differences(self, section: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The mean without the section's patient, and predicted and measured differences from it."""
        rows = self.section_id == section
        outside = self.patient_id != section[0]
        mean = np.nanmean(self.expression[outside], axis=0, dtype=np.float64)
        everywhere = ~np.isnan(self.expression[outside]).any(axis=0)
        _, found = plain_probe(self.features[outside], self.expression[outside][:, everywhere], self.features[rows])
        predicted = mean.copy()
        predicted[everywhere] = found.mean(axis=0)
        return mean, predicted - mean, self.expression[rows].mean(axis=0) - mean


def _slope(pairs: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> float:
    predicted, measured = (np.concatenate([pair[side] for pair in pairs]) for side in (1, 2))
    known = ~np.isnan(measured)
    return float(np.clip(np.linalg.lstsq(predicted[known, None], measured[known])[0][0], 0, 1))


@pytest.mark.parametrize("unmeasured", [0, 2])
def test_error_and_share_are_those_of_patients_left_out(unmeasured: int) -> None:
    """`unmeasured`: of one section's genes, which have no part in its error."""
    spots = _Spots(is_shown=True)
    spots.expression[spots.section_id == "C1", NUM_GENES - unmeasured :] = np.nan
    level, left_out = spots.fit()
    pairs = {name: spots.differences(name) for name in SECTIONS}
    share = _slope(list(pairs.values()))
    assert 0.2 < share < 1
    assert level.share == pytest.approx(share, abs=1e-5)
    assert len(left_out) == len(SECTIONS)
    for (_, name), found in left_out.items():
        mean, predicted, _ = pairs[name]
        np.testing.assert_allclose(found, mean + share * predicted, atol=1e-5)
    errors, mean_errors = {}, {}
    for patient in "ABCDE":
        others = _slope([pair for name, pair in pairs.items() if name[0] != patient])
        own = [pair for name, pair in pairs.items() if name[0] == patient]
        errors[patient] = np.mean([np.nanmean((others * predicted - measured) ** 2) for _, predicted, measured in own])
        mean_errors[patient] = np.mean([np.nanmean(measured**2) for *_, measured in own])
    assert level.error == pytest.approx(np.mean(list(errors.values())), rel=1e-4)
    assert level.mean_error == pytest.approx(np.mean(list(mean_errors.values())), rel=1e-4)
    assert level.error < level.mean_error


def test_a_level_that_left_out_patients_do_not_confirm_is_the_training_mean() -> None:
    level, left_out = _Spots(is_shown=False).fit()
    assert level.share == 0
    assert level.error == level.mean_error
    assert level.error is not None
    spots = _Spots(is_shown=False)
    for (_, name), found in left_out.items():
        np.testing.assert_allclose(found, spots.differences(name)[0], atol=1e-6)
    np.testing.assert_allclose(level.of(np.ones(level.components.shape[1])), spots.expression.mean(axis=0), atol=1e-5)


def test_two_patients_do_not_say_how_a_third_differs() -> None:
    level, _ = _Spots(is_shown=True, sections=("A1", "A2", "B1")).fit()
    assert (level.share, level.error, level.mean_error) == (1.0, None, None)
    assert level.errors() == {"level_mse": None, "level_mse_of_train_mean": None}


@pytest.mark.parametrize("is_known", [True, False])
def test_a_version_keeps_its_errors_and_those_that_it_does_not_know(tmp_path: Path, is_known: bool) -> None:
    version = program_version()
    level = version.programs.level
    assert level.error is not None  # of three patients
    if not is_known:
        level = Level(**(vars(level) | {"error": None, "mean_error": None}))
        version.programs = type(version.programs)(**(vars(version.programs) | {"level": level}))
    version.save(tmp_path)
    assert ModelVersion.load(tmp_path).programs.level.errors() == level.errors()
