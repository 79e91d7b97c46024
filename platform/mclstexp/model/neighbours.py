"""Gaussian means over the neighbours of each tile, the tile itself left out.

A linear function of the neighbours' features is the mean of what each neighbour gives, so that a tile need hand its
neighbours only a few numbers. Sums are taken in a fixed order, whatever the number of tiles at once.

Shapes: N tiles of a slide, C numbers for each tile.
"""

import numpy as np
from scipy.sparse import csr_array
from scipy.spatial import KDTree

REACH = 4.0
"""Neighbours count up to this many widths away; beyond, a weight is under 4e-4."""
MIN_DISTANCE_UM = 1.0
"""Nearer tiles are the same place."""
_AT_ONCE = 512


def neighbour_means(values: np.ndarray, xy_um: np.ndarray, width_um: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the means over each tile's neighbours, float64 (N, C), and whether it has any, bool (N,).

    Weights are exp(-d^2 / 2 w^2) of the distance d between centres; means of tiles without neighbours are 0.

    Args:
        values: (N, C).
        xy_um: centres in micrometres, (N, 2).
        width_um: width w of the Gaussian.
    """
    means, has_any = np.zeros(values.shape), np.zeros(len(values), bool)
    if not len(values):
        return means, has_any
    tree = KDTree(xy_um)
    for start in range(0, len(values), _AT_ONCE):
        rows = slice(start, start + _AT_ONCE)
        weights, near = _weights(tree, np.asarray(xy_um, np.float64), rows, width_um)
        totals = np.asarray(weights.sum(axis=1)).ravel()
        has_any[rows] = totals > 0
        means[rows] = (weights @ values[near].astype(np.float64)) / np.where(totals > 0, totals, 1)[:, None]
    return means, has_any


def _weights(tree: KDTree, xy_um: np.ndarray, rows: slice, width_um: float) -> tuple[csr_array, np.ndarray]:
    """Returns the weights of the M tiles around some tiles, sparse (n, M), and which these are, ascending (M,)."""
    found = tree.query_ball_point(xy_um[rows], REACH * width_um, return_sorted=True)
    starts = np.cumsum([0, *map(len, found)])
    others = np.concatenate([np.asarray(each, np.int64) for each in found])
    centres = np.repeat(xy_um[rows], np.diff(starts), axis=0)
    squared = ((xy_um[others] - centres) ** 2).sum(axis=1)
    weight = np.exp(-0.5 * squared / width_um**2) * (squared > MIN_DISTANCE_UM**2)
    near, column = np.unique(others, return_inverse=True)
    return csr_array((weight, column, starts), shape=(len(found), len(near))), near


def pitch_um(sections: list[np.ndarray]) -> float:
    """Returns the median distance from a spot to its nearest other, over sections with centres (n, 2) in um."""
    nearest = [KDTree(xy).query(xy, k=2)[0][:, 1] for xy in sections if len(xy) > 1]
    return float(np.median(np.concatenate(nearest)))
