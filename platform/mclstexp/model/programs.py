"""Gene programs: the leading principal components of expression within sections, in which a model answers.

A thousand noisy genes vary in few directions that an image can show; a score is a spot's coordinate along one of them.
Loadings come from the genes that all training sections measure. Other genes are decoded from the scores by a ridge on
the spots that measure them.

Shapes: N spots, G genes, R programs.
"""

from dataclasses import dataclass

import numpy as np

NUM_PROGRAMS = 16
"""Programs of a model; 4 to 32 differ by at most .006 in mean correlation."""
_PENALTY = 0.01
"""Penalty of a gene that is decoded by a ridge, as a share of the scores' mean square."""


@dataclass(frozen=True)
class Programs:
    """Directions in expression."""

    loadings: np.ndarray
    """Orthonormal columns that turn expression into scores, float64 (G, R); 0 for a gene that a section lacks."""
    decoder: np.ndarray
    """Turns scores into expression, float64 (R, G): the loadings transposed, or a gene's ridge."""

    def scores(self, centred: np.ndarray) -> np.ndarray:
        """Returns scores, float64 (N, R), of expression less its section's mean, (N, G); NaN where not measured."""
        return np.nan_to_num(centred).astype(np.float64) @ self.loadings

    def expression(self, scores: np.ndarray) -> np.ndarray:
        """Returns expression less its section's mean, float64 (N, G), of scores (N, R)."""
        return scores @ self.decoder


def fit_programs(centred: np.ndarray, num_programs: int = NUM_PROGRAMS) -> Programs:
    """Returns the leading right singular vectors of expression less its section's mean (Pearson 1901).

    There are fewer where spots or genes are fewer. Signs are fixed: the largest loading of a program is positive.

    Args:
        centred: expression less its section's mean, (N, G); NaN for a gene that a spot's section does not measure.
        num_programs: programs asked for.
    """
    measured = ~np.isnan(centred)
    everywhere = measured.all(axis=0)
    gram = _gram(np.where(everywhere, centred, 0))
    num_programs = min(num_programs, int(everywhere.sum()), max(1, len(centred) - 1))
    loadings = np.linalg.eigh(gram)[1][:, ::-1][:, :num_programs]
    loadings *= np.sign(loadings[np.abs(loadings).argmax(axis=0), np.arange(num_programs)])
    loadings[~everywhere] = 0
    programs = Programs(loadings, loadings.T.copy())
    scores = programs.scores(centred)
    for gene in np.flatnonzero(~everywhere & measured.any(axis=0)):
        spots = measured[:, gene]
        seen = scores[spots]
        penalty = _PENALTY * np.trace(seen.T @ seen) / num_programs
        programs.decoder[:, gene] = np.linalg.solve(
            seen.T @ seen + penalty * np.eye(num_programs), seen.T @ centred[spots, gene].astype(np.float64)
        )
    return programs


def centred_within(values: np.ndarray, section_id: np.ndarray) -> np.ndarray:
    """Returns values (N, ...) less their mean in each section, float64; NaN stays NaN."""
    centred = np.array(values, np.float64)
    for name in np.unique(section_id):
        rows = section_id == name
        centred[rows] -= centred[rows].mean(axis=0)
    return centred


def _gram(values: np.ndarray) -> np.ndarray:
    """Returns the sums of products, float64 (G, G), a few thousand spots at a time."""
    total = np.zeros((values.shape[1],) * 2)
    for start in range(0, len(values), 4096):
        block = values[start : start + 4096].astype(np.float64)
        total += block.T @ block
    return total
