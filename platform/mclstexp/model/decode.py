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
    """What n tiles leave behind for the end of their slide."""

    own: np.ndarray
    """Scores by the tile itself, of ridge and retrieval, float32 (n, R)."""
    given: np.ndarray
    """Scores that each tile gives its neighbours, float32 (n, R)."""
    level: np.ndarray
    """Sum of the tiles' components of the level, float64 (C,)."""


@dataclass(frozen=True)
class SlideDecoder:
    """Turns what a slide's tiles leave behind into expression; small, and works without torch."""

    neighbour_um: float
    """Width of the Gaussian over neighbours, in micrometres."""
    decoder: np.ndarray
    """Turns scores into expression, float64 (R, G)."""
    level: Level

    @property
    def num_programs(self) -> int:
        """Number of programs R."""
        return len(self.decoder)

    def scores(self, own: np.ndarray, given: np.ndarray, xy_um: np.ndarray) -> np.ndarray:
        """Returns the scores of a slide's tiles with their neighbours', centred over the slide, float64 (n, R).

        Args:
            own, given: as in `TileScores`, of all complete tiles of the slide.
            xy_um: their centres in micrometres, (n, 2).
        """
        scores = own + neighbour_means(given, xy_um, self.neighbour_um)[0]
        return scores - scores.mean(axis=0) if len(scores) else scores

    def expression(self, scores: np.ndarray, slide_level: np.ndarray) -> np.ndarray:
        """Returns predicted expression, float32 (n, G).

        Args:
            scores: as `scores` returns them, or some rows, (n, R).
            slide_level: as `Level.of` returns it, (G,).
        """
        return (slide_level + scores @ self.decoder).astype(np.float32)

    def predict(self, tiles: TileScores, xy_um: np.ndarray) -> np.ndarray:
        """Returns the expression of a whole slide whose tiles are all complete, float32 (n, G)."""
        level = self.level.of(tiles.level / max(1, len(xy_um)))
        return self.expression(self.scores(tiles.own, tiles.given, xy_um), level)
