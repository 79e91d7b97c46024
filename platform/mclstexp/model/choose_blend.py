"""The shares of ridge, retrieval and towers in an answer, chosen on patients that were left out.

Shapes: N training spots, G genes, R programs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from mclstexp.data.measured import MeasuredSection
from mclstexp.model.blend import ProgramModel, with_squares
from mclstexp.model.left_out_retrieval import fitting, searched
from mclstexp.model.programs import centred_within
from mclstexp.model.spot_keys import SpotKeys
from mclstexp.model.training_spots import TrainingSpots
from mclstexp.settings import RetrievalConfig

SHARE, TOWER_SHARE = 0.25, 0.5
"""Retrieval's share of the answer, and the towers' of its similarity, where there are too few patients to choose."""
SHARES, TOWER_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.5, 1.0)
"""Shares that are tried on patients that were left out."""
_DIGITS = 6
"""Digits of a correlation that say something."""


@dataclass(frozen=True)
class Blend:
    """How ridge and retrieval are added: slope * ((1 - share) * ridge + share * scale * retrieved)."""

    tower_share: float
    """Of the towers in the similarity by which spots are found."""
    share: float
    """Of retrieval."""
    scale: float
    """Brings retrieved scores to the size of the ridge's."""
    slope: float = 1.0
    """Of measured on predicted expression."""


@dataclass(frozen=True)
class ValidationSlide:
    """A section of a validation patient."""

    section: MeasuredSection
    features: np.ndarray
    """Of its spots, float32 (n, F)."""


def tower_shares(spots: TrainingSpots, has_towers: bool, has_validation: bool) -> tuple[float, ...]:
    """Returns the towers' shares that are tried; one where there is nothing to choose by."""
    if not has_towers:
        return (0.0,)
    return TOWER_SHARES if has_validation or spots.folds.kind == "patients" else (TOWER_SHARE,)


def choose_left_out(
    spots: TrainingSpots, of_ridge: np.ndarray, of_retrieval: Mapping[float, np.ndarray], scales: Mapping[float, float]
) -> Blend:
    """Returns the blend that suits left-out training patients.

    Where whole patients are left out, it has the highest mean correlation within their sections; blocks and sections
    of one patient choose badly for another, so that with fewer patients retrieval has `SHARE`.

    Args:
        spots: the training sections.
        of_ridge: the ridge's scores out of fold, less their section's mean, (N, R).
        of_retrieval: the same of retrieval, by the towers' share.
        scales: as `Blend.scale`, by the towers' share.
    """
    if spots.folds.kind != "patients":
        (tower_share,) = of_retrieval
        return Blend(tower_share, SHARE, scales[tower_share])
    truth = centred_within(spots.expression, spots.section_id)

    def correlation(blend: Blend) -> float:
        scores = (1 - blend.share) * of_ridge + blend.share * blend.scale * of_retrieval[blend.tower_share]
        return _mean_correlation(spots.programs.expression(scores), truth, spots.section_id)

    return _best(scales, correlation)


def choose_on_validation(
    slides: Sequence[ValidationSlide],
    keys: SpotKeys,
    scales: Mapping[float, float],
    model: Callable[[Blend], ProgramModel],
    retrieval: RetrievalConfig,
) -> Blend:
    """Returns the blend that suits validation patients: the highest mean correlation within their sections.

    They are answered as slides are; patients count the same, however many sections each has.

    Args:
        slides: sections of validation patients.
        keys: of the training spots.
        scales: as `Blend.scale`, by the towers' share.
        model: returns the program model of a blend.
        retrieval: how spots are searched and weighted.
    """

    def answers(tower_share: float, share: float) -> list[np.ndarray]:
        bank = searched(keys.whole(tower_share), with_squares(keys.spots.scores))
        fitted, config = model(Blend(tower_share, share, scales[tower_share])), fitting(retrieval, bank)
        return [fitted.answer(each.features, each.section.xy_um, bank, config).prediction for each in slides]

    ridge, retrieved = answers(min(scales), 0.0), {tower_share: answers(tower_share, 1.0) for tower_share in scales}
    whole = [np.zeros(len(each.section)) for each in slides]
    truth = [
        centred_within(each.section.expression(keys.spots.target), section)
        for each, section in zip(slides, whole, strict=True)
    ]

    def correlation(blend: Blend) -> float:
        patients: dict[str, list[float]] = {}
        parts = zip(slides, whole, truth, ridge, retrieved[blend.tower_share], strict=True)
        for slide, section, measured, without, alone in parts:
            predicted = (1 - blend.share) * without + blend.share * alone  # an answer is linear in the share
            found = _mean_correlation(centred_within(predicted, section), measured, section)
            patients.setdefault(slide.section.patient_id, []).append(found)
        return float(np.mean([np.mean(each) for each in patients.values()]))

    return _best(scales, correlation)


def _best(scales: Mapping[float, float], correlation: Callable[[Blend], float]) -> Blend:
    """Returns the blend of the highest correlation; of those that agree but for rounding, the simplest."""
    tried = [Blend(tower_share, share, scales[tower_share]) for tower_share, share in product(scales, SHARES)]
    return max(tried, key=lambda blend: round(correlation(blend), _DIGITS))


def _mean_correlation(predicted: np.ndarray, truth: np.ndarray, section_id: np.ndarray) -> float:
    """Returns the mean over sections of the mean correlation over genes, of values centred within sections (N, G)."""
    means = []
    for name in np.unique(section_id):
        p, t = predicted[section_id == name], truth[section_id == name]
        size = np.sqrt((p**2).sum(axis=0) * (t**2).sum(axis=0))
        means.append(np.nanmean((p * t).sum(axis=0) / np.maximum(size, 1e-12)))
    return float(np.mean(means))
