"""Fits the program model to training sections: ridge, level, and the shares of retrieval and towers, each out of fold.

Nothing here sees a test section, and a validation section only to choose shares.

Shapes: N training spots, G genes, F features, R programs, D width of keys.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from mclstexp.data.measured import MeasuredSection
from mclstexp.model.blend import ProgramModel
from mclstexp.model.choose_blend import Blend, ValidationSlide, choose_left_out, choose_on_validation, tower_shares
from mclstexp.model.left_out_retrieval import LeftOutRetrieval, left_out_retrieval
from mclstexp.model.level import Level, fit_level
from mclstexp.model.neighbours import neighbour_means
from mclstexp.model.program_ridge import ProgramRidge, fit_program_ridge
from mclstexp.model.programs import centred_within
from mclstexp.model.spot_keys import SpotKeys, TrainedTowers
from mclstexp.model.standardise import Standardiser, fit_standardiser
from mclstexp.model.tower_keys import TowerKeys
from mclstexp.model.training_spots import Features, TrainingSpots
from mclstexp.progress import Show, hidden
from mclstexp.settings import RetrievalConfig

NEIGHBOUR_PITCHES = 0.75
"""Width of the Gaussian over neighbours, in pitches of the training spots."""
_WHAT, _STEPS = "fitting programs: steps", 4
_EPSILON = 1e-12


@dataclass(frozen=True)
class _Neighbourhood:
    """The means over neighbours that the ridge sees."""

    spots: TrainingSpots
    columns: np.ndarray
    width_um: float

    @cached_property
    def near(self) -> Standardiser:
        widths = [self.spots.blocks.widths[block] for block in self.spots.blocks.near]
        return fit_standardiser((self._means(each, self.spots.features)[0] for each in self.spots.sections), widths)

    def seen(self, draw: Features | None = None) -> Iterator[np.ndarray]:
        """Yields what the ridge sees of each section: own features, and means over neighbours, (n, F + F').

        They are those of the plain tiles, or of one draw: of a spot and of its neighbours.
        """
        for own, section in zip(self.spots.standard(draw), self.spots.sections, strict=True):
            means, has_any = self._means(section, draw or self.spots.features)
            near = np.zeros((len(own), len(self.columns)))  # the training mean, for spots without neighbours
            near[has_any] = self.near.apply(means, clip=False)
            yield np.concatenate([own, near], axis=1)

    def _means(self, section: MeasuredSection, features: Features) -> tuple[np.ndarray, np.ndarray]:
        """Returns the means of spots that have neighbours, and which do, bool (n,)."""
        near = features(section.section_id)[:, self.columns]
        means, has_any = neighbour_means(near, section.xy_um, self.width_um)
        return means[has_any], has_any


@dataclass(frozen=True)
class FittedPrograms:
    """A program model, and what its calibration needs."""

    model: ProgramModel
    keys: np.ndarray
    """Keys of the bank, float32 (N, D), in the order of the sections' spots."""
    left_out: np.ndarray
    """Expression of each spot as predicted without its fold, float32 (N, G)."""
    left_out_scores: np.ndarray
    """The scores behind it, less their section's mean, float64 (N, R)."""
    retrieved: LeftOutRetrieval


def fit_program_model(
    spots: TrainingSpots,
    retrieval: RetrievalConfig,
    towers: TrainedTowers | None = None,
    validation: Sequence[ValidationSlide] = (),
    show: Show = hidden,
) -> FittedPrograms:
    """Returns the program model of the training sections.

    Args:
        spots: the training sections.
        retrieval: how spots are searched and weighted.
        towers: trained on them; None: spots are found by their features alone.
        validation: sections of validation patients.
        show: takes progress by step.
    """
    show(_WHAT, 0, _STEPS, "ridge")
    around = _Neighbourhood(spots, spots.blocks.columns(spots.blocks.near), NEIGHBOUR_PITCHES * spots.pitch_um)
    of_draws = [partial(around.seen, draw) for draw in spots.augmented]
    ridge = fit_program_ridge(around.seen, spots.scores, spots.section_id, spots.folds, of_draws)

    show(_WHAT, 1, _STEPS, "level")
    level, left_out_levels = _level(spots)

    show(_WHAT, 2, _STEPS, "retrieval")
    keys = SpotKeys(spots, towers)
    retrieved = {
        share: left_out_retrieval(partial(keys.without, tower_share=share), spots.scores, spots.folds, retrieval)
        for share in tower_shares(spots, towers is not None, bool(validation))
    }
    of_ridge = centred_within(ridge.left_out, spots.section_id)
    of_retrieval = {share: centred_within(each.scores, spots.section_id) for share, each in retrieved.items()}
    scales = {share: _size(of_ridge) / max(_size(each), _EPSILON) for share, each in of_retrieval.items()}

    def model(blend: Blend) -> ProgramModel:
        return _program_model(around, ridge, level, keys, blend)

    show(_WHAT, 3, _STEPS, "shares")
    if validation:
        blend = choose_on_validation(validation, keys, scales, model, retrieval)
    else:
        blend = choose_left_out(spots, of_ridge, of_retrieval, scales)
    within = (1 - blend.share) * of_ridge + blend.share * blend.scale * of_retrieval[blend.tower_share]
    slope = _slope(spots, spots.programs.expression(within))
    fitted = model(replace(blend, slope=slope))
    left_out = (left_out_levels + slope * spots.programs.expression(within)).astype(np.float32)
    return FittedPrograms(fitted, keys.whole(blend.tower_share), left_out, slope * within, retrieved[blend.tower_share])


def _level(spots: TrainingSpots) -> tuple[Level, np.ndarray]:
    """Returns the level, and that of each spot's section as predicted without its fold, float64 (N, G)."""
    columns = spots.blocks.columns([spots.blocks.level])
    drawn, standard = spots.drawn()
    augmented = [spots.drawn(draw)[1][:, columns] for draw in spots.augmented]
    level, of_folds = fit_level(
        standard[:, columns],
        spots.expression[drawn],
        spots.patient_id[drawn],
        spots.section_id[drawn],
        spots.folds.of(drawn),
        augmented,
    )
    return level, np.stack(
        [of_folds.get(key, level.mean) for key in zip(spots.folds.fold, spots.section_id, strict=True)]
    )


def _program_model(
    around: _Neighbourhood, ridge: ProgramRidge, level: Level, keys: SpotKeys, blend: Blend
) -> ProgramModel:
    spots, num_own = around.spots, len(around.spots.own.mean)
    weights = blend.slope * (1 - blend.share) * ridge.weights
    towers = None
    if blend.tower_share:
        assert keys.towers is not None, "only trained towers have a share"
        towers = TowerKeys(blend.tower_share, keys.towers.head)
    return ProgramModel(
        own=spots.own,
        near=around.near,
        near_columns=around.columns,
        level_columns=spots.blocks.columns([spots.blocks.level]),
        neighbour_um=around.width_um,
        own_weights=weights[:num_own],
        near_weights=weights[num_own:],
        key_weights=keys.directions,
        retrieved_scale=blend.slope * blend.share * blend.scale,
        donor_scores=spots.scores.astype(np.float32),
        share=blend.share,
        programs=spots.programs,
        level=level,
        towers=towers,
    )


def _size(values: np.ndarray) -> float:
    return float(np.sqrt((values**2).mean()))


def _slope(spots: TrainingSpots, predicted: np.ndarray) -> float:
    """Returns the slope of measured on predicted expression within sections, (N, G)."""
    truth = centred_within(spots.expression, spots.section_id)
    measured = ~np.isnan(truth)
    return float((predicted * truth)[measured].sum() / max((predicted**2)[measured].sum(), _EPSILON))
