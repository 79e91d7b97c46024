"""Fits the program model to training sections: programs, ridge, retrieval's share and level, each choice out of fold.

Nothing here sees a validation or test section. Features are streamed section by section and more than once, so that
memory goes with their width and not with the number of spots; expression and scores of all spots are in memory.

Shapes: N training spots, G genes, F features, R programs, D width of keys.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mclstexp.data.genes import Normaliser
from mclstexp.model.blend import ProgramModel
from mclstexp.model.left_out import LeftOut, leave_out
from mclstexp.model.level import fit_level
from mclstexp.model.nearest import directions, nearest
from mclstexp.model.neighbours import neighbour_means, pitch_um
from mclstexp.model.program_ridge import fit_program_ridge
from mclstexp.model.programs import centred_within, fit_programs
from mclstexp.model.retrieval import fixed_number_weights
from mclstexp.model.standardise import Standardiser, fit_standardiser
from mclstexp.model.thinning import thinned_target

NEIGHBOUR_PITCHES = 0.75
"""Width of the Gaussian over neighbours, in pitches of the training spots."""
KEY_WIDTH = 256
EFFECTIVE_DONORS, NUM_SEARCHED = 50, 400
SHARE = 0.25
"""Retrieval's share where fewer than three patients could choose it."""
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class MeasuredSpots:
    """One training section."""

    section_id: str
    patient_id: str
    xy_um: np.ndarray
    """(n, 2)."""
    counts: np.ndarray
    """Raw counts of the panel's genes, (n, G)."""
    totals: np.ndarray
    """Count over all genes, (n,)."""

    def expression(self, target: Normaliser) -> np.ndarray:
        """Returns the section's expression, float32 (n, G)."""
        return target.apply(self.counts, self.totals, self.counts.sum(axis=0, dtype=np.float64))


@dataclass(frozen=True)
class FeatureBlocks:
    """Which features belong together."""

    widths: tuple[int, ...]
    """Features of each block."""
    near: tuple[int, ...]
    """Blocks whose means over neighbours count, by index."""
    level: int
    """Block that the level sees."""

    def columns(self, blocks: Sequence[int]) -> np.ndarray:
        """Returns the columns of some blocks, int64."""
        ends = np.cumsum(self.widths)
        return np.concatenate([np.arange(ends[block] - self.widths[block], ends[block]) for block in blocks])


def fit_blend(
    sections: Sequence[MeasuredSpots],
    features: Callable[[str], np.ndarray],
    blocks: FeatureBlocks,
    target: Normaliser,
    share: float | None = None,
) -> tuple[ProgramModel, np.ndarray]:
    """Returns the fitted model and the keys of its bank, float32 (N, D), in the order of the sections' spots."""
    section_id = _repeated(sections, "section_id")
    folds = leave_out(_repeated(sections, "patient_id"), section_id, np.concatenate([each.xy_um for each in sections]))

    # What is answered: program scores of the thinned target
    expression = np.concatenate([each.expression(target) for each in sections])
    thin = [thinned_target(each.counts, each.totals, each.section_id, target) for each in sections]
    centred = centred_within(np.concatenate(thin), section_id)
    programs = fit_programs(centred)
    scores = programs.scores(centred)

    # What is seen: own blocks, and means over neighbours
    near_columns, level_columns = blocks.columns(blocks.near), blocks.columns([blocks.level])
    width_um = NEIGHBOUR_PITCHES * pitch_um([each.xy_um for each in sections])
    own = fit_standardiser((features(each.section_id) for each in sections), blocks.widths)
    near_widths = [blocks.widths[index] for index in blocks.near]
    near = fit_standardiser(
        (_near(features(each.section_id), each, near_columns, width_um)[0] for each in sections), near_widths
    )

    def seen() -> Iterator[np.ndarray]:
        for each in sections:
            values = features(each.section_id)
            yield np.concatenate(
                [own.apply(values), _standard_near(values, each, near, near_columns, width_um)], axis=1
            )

    ridge = fit_program_ridge(seen, scores, section_id, folds)
    standard = np.concatenate([own.apply(features(each.section_id)) for each in sections])
    key_weights = _leading_directions(standard).astype(np.float32)
    keys = standard.astype(np.float32) @ key_weights
    retrieved = _left_out_retrieval(keys, scores, folds)

    # How they are blended
    ridge_within, retrieved_within = (centred_within(each, section_id) for each in (ridge.left_out, retrieved))
    truth = centred_within(expression, section_id)
    scale = float(np.sqrt((ridge_within**2).mean() / (retrieved_within**2).mean()))
    share = SHARE if share is None else share
    blended = programs.expression((1 - share) * ridge_within + share * scale * retrieved_within)
    blended = centred_within(blended, section_id)
    slope = float((blended * truth).sum() / (blended**2).sum())
    level = fit_level(standard[:, level_columns], expression, section_id, folds)
    num_own = len(own.mean)
    model = ProgramModel(
        own=own,
        near=near,
        near_columns=near_columns,
        level_columns=level_columns,
        neighbour_um=width_um,
        own_weights=slope * (1 - share) * ridge.weights[:num_own],
        near_weights=slope * (1 - share) * ridge.weights[num_own:],
        key_weights=key_weights,
        retrieved_scale=slope * share * scale,
        donor_scores=scores.astype(np.float32),
        share=share,
        programs=programs,
        level=level,
    )
    return model, keys


def _repeated(sections: Sequence[MeasuredSpots], name: str) -> np.ndarray:
    return np.concatenate([np.full(len(each.totals), getattr(each, name), object) for each in sections])


def _near(
    values: np.ndarray, section: MeasuredSpots, columns: np.ndarray, width_um: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the means over neighbours of spots that have any, and which do, bool (n,)."""
    means, has_any = neighbour_means(values[:, columns], section.xy_um, width_um)
    return means[has_any], has_any


def _standard_near(
    values: np.ndarray, section: MeasuredSpots, near: Standardiser, columns: np.ndarray, width_um: float
) -> np.ndarray:
    """Returns standardised means over neighbours, (n, F'); 0, the training mean, for spots without neighbours."""
    means, has_any = _near(values, section, columns, width_um)
    standard = np.zeros((len(values), len(columns)))
    standard[has_any] = near.apply(means, clip=False)
    return standard


def _leading_directions(standard: np.ndarray) -> np.ndarray:
    """Returns the leading right singular vectors of standardised features, (F, D)."""
    if len(standard) <= standard.shape[1]:
        values, vectors = np.linalg.eigh(standard @ standard.T)
        vectors = standard.T @ vectors[:, ::-1][:, :KEY_WIDTH]
        return vectors / np.maximum(np.linalg.norm(vectors, axis=0), 1e-12)
    return np.linalg.eigh(standard.T @ standard)[1][:, ::-1][:, :KEY_WIDTH]


def _left_out_retrieval(keys: np.ndarray, scores: np.ndarray, folds: LeftOut) -> np.ndarray:
    """Returns the scores that each spot retrieves from the spots outside its fold, (N, R)."""
    retrieved = np.zeros(scores.shape)
    for index in range(folds.num_folds):
        outside, inside = folds.sides(index)
        ids, similarity = nearest(keys[inside], directions(keys[outside]), NUM_SEARCHED)
        weight = fixed_number_weights(similarity, EFFECTIVE_DONORS)
        retrieved[inside] = np.einsum("qk,qkr->qr", weight, scores[outside][ids])
    return retrieved
