"""Fits the program model to training sections: programs, ridge, retrieval's share and level, each choice out of fold.

Nothing here sees a validation or test section. Features are streamed section by section and more than once, so that
memory goes with their width and not with the number of spots (`MAX_DRAWN` of them at most are held at once);
expression, scores and keys of all spots are in memory.

Shapes: N training spots, G genes, F features, R programs, D width of keys.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from scipy.linalg import eigh

from mclstexp.data.genes import Normaliser
from mclstexp.data.measured import MeasuredSection
from mclstexp.model.bank import Bank
from mclstexp.model.blend import ProgramModel, spread, with_squares
from mclstexp.model.left_out import LeftOut, leave_out
from mclstexp.model.level import fit_level
from mclstexp.model.neighbours import neighbour_means, pitch_um
from mclstexp.model.program_ridge import ProgramRidge, fit_program_ridge
from mclstexp.model.programs import Programs, centred_within, fit_programs
from mclstexp.model.retrieval import resolve, retrieve
from mclstexp.model.standardise import Standardiser, fit_standardiser
from mclstexp.model.thinning import thinned_target
from mclstexp.progress import Show, hidden
from mclstexp.settings import RetrievalConfig

NEIGHBOUR_PITCHES = 0.75
"""Width of the Gaussian over neighbours, in pitches of the training spots."""
KEY_WIDTH = 256
"""Width of keys that are made of features: their leading directions."""
SHARE = 0.25
"""Retrieval's share where there are too few patients to choose it."""
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares that are tried on left-out patients."""
MAX_DRAWN = 20_000
"""Spots that the directions of keys and the level are fitted to, at most."""
_WHAT, _STEPS = "fitting programs: steps", 4
Features = Callable[[str], np.ndarray]
"""Returns a section's features in the order of its spots, float32 (n, F)."""


@dataclass(frozen=True)
class FeatureBlocks:
    """Which features belong together."""

    widths: tuple[int, ...]
    """Features of each block, a layer of a view."""
    near: tuple[int, ...]
    """Blocks whose means over neighbours count, by index; there may be none."""
    level: int
    """Block that the level sees."""

    def columns(self, blocks: Sequence[int]) -> np.ndarray:
        """Returns the columns of some blocks, int64."""
        ends = np.cumsum(self.widths)
        parts = [np.arange(ends[block] - self.widths[block], ends[block]) for block in blocks]
        return np.concatenate([np.zeros(0, np.int64), *parts])


@dataclass(frozen=True)
class TrainingSpots:
    """The training sections with their features."""

    sections: Sequence[MeasuredSection]
    features: Features
    """Of the plain tiles."""
    blocks: FeatureBlocks
    target: Normaliser
    augmented: Sequence[Features] = ()
    """Of each augmented draw of the tiles: ridge, keys' directions and level are fitted to them as to more spots, and
    nothing else sees them."""

    @cached_property
    def section_id(self) -> np.ndarray:
        """Strings, (N,)."""
        return np.concatenate([np.full(len(each), each.section_id, object) for each in self.sections])

    @cached_property
    def patient_id(self) -> np.ndarray:
        """Strings, (N,)."""
        return np.concatenate([np.full(len(each), each.patient_id, object) for each in self.sections])

    @cached_property
    def folds(self) -> LeftOut:
        """What is left out together."""
        return leave_out(self.patient_id, self.section_id, np.concatenate([each.xy_um for each in self.sections]))

    @cached_property
    def expression(self) -> np.ndarray:
        """In the target's unit, float32 (N, G)."""
        return np.concatenate([each.expression(self.target) for each in self.sections])

    @cached_property
    def own(self) -> Standardiser:
        """Of a spot's own features."""
        return fit_standardiser((self.features(each.section_id) for each in self.sections), self.blocks.widths)

    def standard(self, draw: Features | None = None) -> Iterator[np.ndarray]:
        """Yields the standardised own features of each section, (n, F): the plain ones, or those of a draw."""
        for each in self.sections:
            yield self.own.apply((draw or self.features)(each.section_id))

    def drawn(self, draw: Features | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns some spots, evenly over all, as indices (n,), and their features as `standard`, (n, F).

        They are at most `MAX_DRAWN` with all their draws. More would cost memory and gain nothing where a few hundred
        directions are fitted to them.
        """
        step = -(-len(self.section_id) * (1 + len(self.augmented)) // MAX_DRAWN)
        starts = np.cumsum([0, *map(len, self.sections)])
        parts = [each[-start % step :: step] for start, each in zip(starts, self.standard(draw), strict=False)]
        return np.arange(0, starts[-1], step), np.concatenate(parts)


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
    retrieved: "LeftOutRetrieval"


def fit_program_model(spots: TrainingSpots, retrieval: RetrievalConfig, show: Show = hidden) -> FittedPrograms:
    """Returns the program model of the training sections.

    Args:
        spots: the training sections.
        retrieval: how spots are searched and weighted.
        show: takes progress by step.
    """
    show(_WHAT, 0, _STEPS, "programs")
    thin = np.concatenate([thinned_target(each, spots.target) for each in spots.sections])
    centred = centred_within(thin, spots.section_id)
    programs = fit_programs(centred)
    scores = programs.scores(centred)

    show(_WHAT, 1, _STEPS, "ridge")
    around = _Neighbourhood(
        spots,
        spots.blocks.columns(spots.blocks.near),
        NEIGHBOUR_PITCHES * pitch_um([each.xy_um for each in spots.sections]),
    )
    of_draws = [partial(around.seen, draw) for draw in spots.augmented]
    ridge = fit_program_ridge(around.seen, scores, spots.section_id, spots.folds, of_draws)

    show(_WHAT, 2, _STEPS, "retrieval")
    drawn, standard = spots.drawn()
    augmented = [spots.drawn(draw)[1] for draw in spots.augmented]
    key_weights = _leading_directions([standard, *augmented]).astype(np.float32)
    keys = np.concatenate([each.astype(np.float32) @ key_weights for each in spots.standard()])
    retrieved = left_out_retrieval(keys, scores, spots.folds, retrieval)
    blend, within = _fit_blend(spots, programs, ridge, retrieved.scores)

    show(_WHAT, 3, _STEPS, "level")
    level_columns = spots.blocks.columns([spots.blocks.level])
    level, left_out_levels = fit_level(
        standard[:, level_columns],
        spots.expression[drawn],
        spots.section_id[drawn],
        spots.folds.of(drawn),
        [each[:, level_columns] for each in augmented],
    )
    levels = [left_out_levels.get(key, level.mean) for key in zip(spots.folds.fold, spots.section_id, strict=True)]
    num_own = len(spots.own.mean)
    weights_of_ridge = blend.slope * (1 - blend.share) * ridge.weights
    model = ProgramModel(
        own=spots.own,
        near=around.near,
        near_columns=around.columns,
        level_columns=level_columns,
        neighbour_um=around.width_um,
        own_weights=weights_of_ridge[:num_own],
        near_weights=weights_of_ridge[num_own:],
        key_weights=key_weights,
        retrieved_scale=blend.slope * blend.share * blend.scale,
        donor_scores=scores.astype(np.float32),
        share=blend.share,
        programs=programs,
        level=level,
    )
    left_out = (levels + programs.expression(within)).astype(np.float32)
    return FittedPrograms(model, keys, left_out, within, retrieved)


@dataclass(frozen=True)
class LeftOutRetrieval:
    """What each spot retrieves from the spots outside its fold."""

    scores: np.ndarray
    """float64 (N, R)."""
    spread: np.ndarray
    """How far their scores lie apart (`blend.spread`), float32 (N,)."""
    similarity: np.ndarray
    """Cosine of the best match, float32 (N,)."""


def left_out_retrieval(
    keys: np.ndarray, scores: np.ndarray, folds: LeftOut, config: RetrievalConfig
) -> LeftOutRetrieval:
    """Returns what spots with these keys, (N, D), and scores, (N, R), retrieve from the spots outside their folds.

    It is what `retrieve` gives a tile, by the same weights, so that what is fitted to it holds for slides.
    """
    payload = with_squares(scores)
    retrieved, best = np.zeros(payload.shape), np.zeros(len(keys), np.float32)
    for index in range(folds.num_folds):
        outside, inside = folds.sides(index)
        no_names = np.full(outside.sum(), "", object)  # who the donors are changes no answer
        bank = Bank.of(keys[outside], payload[outside], no_names, no_names, no_names)
        asked = config.model_copy(update={"k": min(config.k, len(bank)) if config.k else None})
        found = retrieve(keys[inside], bank, resolve(asked, len(bank)))
        retrieved[inside], best[inside] = found.prediction, found.similarity
    return LeftOutRetrieval(retrieved[:, :-1], spread(retrieved), best)


@dataclass(frozen=True)
class _Blend:
    """How ridge and retrieval are added: slope * ((1 - share) * ridge + share * scale * retrieved)."""

    share: float
    scale: float
    slope: float


def _fit_blend(
    spots: TrainingSpots, programs: Programs, ridge: ProgramRidge, retrieved: np.ndarray
) -> tuple[_Blend, np.ndarray]:
    """Returns the blend, and the scores within sections that it predicts out of fold, float64 (N, R).

    `scale` brings retrieved scores to the size of the ridge's; `slope` is that of measured on predicted expression.
    Where whole patients are left out, the share has the highest mean correlation within their sections; blocks and
    sections of one patient choose badly for another, so that with fewer patients it is `SHARE`.

    Args:
        spots: the training sections.
        programs: of the scores.
        ridge: has its scores out of fold.
        retrieved: scores out of fold, (N, R).
    """
    of_ridge, of_retrieval = (centred_within(each, spots.section_id) for each in (ridge.left_out, retrieved))
    truth = centred_within(spots.expression, spots.section_id)
    scale = float(np.sqrt((of_ridge**2).mean() / max((of_retrieval**2).mean(), 1e-12)))

    def blended(share: float) -> np.ndarray:
        return (1 - share) * of_ridge + share * scale * of_retrieval

    def correlation(share: float) -> float:
        return _mean_correlation(programs.expression(blended(share)), truth, spots.section_id)

    share = max(SHARES, key=correlation) if spots.folds.kind == "patients" else SHARE
    predicted, measured = programs.expression(blended(share)), ~np.isnan(truth)
    slope = float((predicted * truth)[measured].sum() / max((predicted**2)[measured].sum(), 1e-12))
    return _Blend(share, scale, slope), slope * blended(share)


def _mean_correlation(predicted: np.ndarray, truth: np.ndarray, section_id: np.ndarray) -> float:
    """Returns the mean over sections of the mean correlation over genes, of values centred within sections (N, G)."""
    means = []
    for name in np.unique(section_id):
        p, t = predicted[section_id == name], truth[section_id == name]
        size = np.sqrt((p**2).sum(axis=0) * (t**2).sum(axis=0))
        means.append(np.nanmean((p * t).sum(axis=0) / np.maximum(size, 1e-12)))
    return float(np.mean(means))


def _leading_directions(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the leading right singular vectors of standardised features, (n, F) each, (F, D)."""
    if sum(map(len, parts)) > parts[0].shape[1]:
        return _leading(sum((part.T @ part for part in parts), start=np.zeros(())))
    standard = np.concatenate(parts)
    turned = standard.T @ _leading(standard @ standard.T)
    return turned / np.maximum(np.linalg.norm(turned, axis=0), 1e-12)


def _leading(matrix: np.ndarray) -> np.ndarray:
    """Returns the eigenvectors of the largest eigenvalues of a symmetric matrix, largest first, in columns."""
    size = len(matrix)
    return eigh(matrix, subset_by_index=[max(0, size - KEY_WIDTH), size - 1])[1][:, ::-1]
