"""The training sections as what is fitted to them sees them: features, expression, program scores and folds.

Features are streamed section by section and more than once, so that memory goes with their width and not with the
number of spots (`MAX_DRAWN` of them at most are held at once); expression and scores of all spots are in memory.

Shapes: N training spots, G genes, F features, R programs, D width of keys.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg import eigh

from mclstexp.data.genes import Normaliser
from mclstexp.data.measured import MeasuredSection
from mclstexp.model.left_out import MAX_FOLDS, LeftOut, leave_out
from mclstexp.model.neighbours import pitch_um
from mclstexp.model.programs import Programs, centred_within, fit_programs
from mclstexp.model.standardise import Standardiser, fit_standardiser
from mclstexp.model.thinning import thinned_target

KEY_WIDTH = 256
"""Width of keys: the leading directions of features, and the embedding of towers where there are any."""
MAX_DRAWN = 20_000
"""Spots that the directions of keys and the level are fitted to, at most."""
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
    max_folds: int = MAX_FOLDS
    """Folds at most."""

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
        xy_um = np.concatenate([each.xy_um for each in self.sections])
        return leave_out(self.patient_id, self.section_id, xy_um, self.max_folds)

    @cached_property
    def pitch_um(self) -> float:
        """Median distance from a spot to its nearest other, in micrometres."""
        return pitch_um([each.xy_um for each in self.sections])

    @cached_property
    def expression(self) -> np.ndarray:
        """In the target's unit, float32 (N, G)."""
        return np.concatenate([each.expression(self.target) for each in self.sections])

    @property
    def programs(self) -> Programs:
        """Of the thinned target."""
        return self._decomposed[0]

    @property
    def scores(self) -> np.ndarray:
        """Of each spot, float64 (N, R)."""
        return self._decomposed[1]

    @cached_property
    def _decomposed(self) -> tuple[Programs, np.ndarray]:
        thinned = np.concatenate([thinned_target(each, self.target) for each in self.sections])
        centred = centred_within(thinned, self.section_id)
        programs = fit_programs(centred)
        return programs, programs.scores(centred)

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
        step = -(-len(self.section_id) // max(1, MAX_DRAWN // (1 + len(self.augmented))))
        starts = np.cumsum([0, *map(len, self.sections)])
        parts = [each[-start % step :: step] for start, each in zip(starts, self.standard(draw), strict=False)]
        return np.arange(0, starts[-1], step), np.concatenate(parts)

    @cached_property
    def directions(self) -> np.ndarray:
        """The leading directions of standardised features, plain and augmented, float32 (F, D)."""
        parts = [self.drawn(draw)[1] for draw in (None, *self.augmented)]
        return _leading_directions(parts).astype(np.float32)


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
