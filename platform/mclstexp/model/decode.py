"""From what a slide's tiles leave behind to their expression, when all tiles of the slide are known.

Works without torch and scikit-learn, so that the tasks that finish slides start fast.

Shapes: n tiles, R programs, C components of the level, G genes.
"""

from dataclasses import dataclass

import numpy as np

from mclstexp.model.level import Level
from mclstexp.model.neighbours import neighbour_means


@dataclass(frozen=True)
class TileScores:
    """What n complete tiles of a slide leave behind for its end."""

    values: np.ndarray
    """Scores by the tile itself, of ridge and retrieval, then those that it gives its neighbours, float32 (n, 2R)."""
    sums: np.ndarray
    """The tiles' components of the level, summed, float64 (C,)."""


@dataclass(frozen=True)
class SlideDecoder:
    """Turns what a slide's tiles leave behind into expression; small, and works without torch."""

    neighbour_um: float
    """Width of the Gaussian over neighbours, in micrometres."""
    decoder: np.ndarray
    """Turns scores into expression, float64 (R, G)."""
    level: Level

    @property
    def num_values(self) -> int:
        """Numbers 2R that a tile leaves behind."""
        return 2 * len(self.decoder)

    @property
    def num_sums(self) -> int:
        """Number of components C of the level."""
        return self.level.components.shape[1]

    def scores(self, tiles: TileScores, xy_um: np.ndarray) -> np.ndarray:
        """Returns the scores of a slide's tiles with their neighbours', centred over the slide, float64 (n, R).

        Args:
            tiles: all complete tiles of the slide.
            xy_um: their centres in micrometres, (n, 2).
        """
        own, given = self._halves(tiles.values)
        scores = neighbour_means(given, xy_um, self.neighbour_um)[0]
        scores += own
        if len(scores):
            scores -= scores.mean(axis=0)
        return scores

    def slide_level(self, tiles: TileScores) -> np.ndarray:
        """Returns the mean expression of a slide, float64 (G,), by all its complete tiles."""
        return self.level.of(tiles.sums / max(1, len(tiles.values)))

    def expression(self, scores: np.ndarray, slide_level: np.ndarray) -> np.ndarray:
        """Returns predicted expression, float32 (n, G).

        Args:
            scores: as `scores` returns them, or some rows, (n, R).
            slide_level: as the method `slide_level` returns it, (G,).
        """
        found = scores @ self.decoder
        found += slide_level
        return found.astype(np.float32)

    def predict(self, tiles: TileScores, xy_um: np.ndarray) -> np.ndarray:
        """Returns the expression of a whole slide by its complete tiles, float32 (n, G); `xy_um` as in `scores`."""
        return self.expression(self.scores(tiles, xy_um), self.slide_level(tiles))

    def predict_apart(self, values: np.ndarray) -> np.ndarray:
        """Returns what tiles, (n, 2R) as in `TileScores`, predict without their slide, float32 (n, G).

        Each is on its own, without neighbours, at the training level.
        """
        return self.expression(self._halves(values)[0], self.level.mean)

    def _halves(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        num_programs = len(self.decoder)
        return values[:, :num_programs], values[:, num_programs:]
