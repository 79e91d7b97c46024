"""Tile geometry and the curve, against brute force and a recursive Hilbert curve."""

import numpy as np
import pytest

from mclstexp.slides.tiles import (
    curve_order,
    cut_evenly,
    grid,
    hilbert_distance,
    inside,
    tile_corner,
    tile_names,
    tile_scale,
)


def hilbert_cells(order):
    """The classic recursive construction: cells of a 2^order square in curve order."""
    if order == 0:
        return [(0, 0)]
    half = 2 ** (order - 1)
    smaller = hilbert_cells(order - 1)
    first = [(y, x) for x, y in smaller]
    last = [(2 * half - 1 - y, half - 1 - x) for x, y in smaller]
    middle = [(x, y + half) for x, y in smaller] + [(x + half, y + half) for x, y in smaller]
    return first + middle + last


@pytest.mark.parametrize("order", [1, 2, 3, 6])
def test_hilbert_distance_is_the_recursive_curve(order):
    cells = np.array(hilbert_cells(order))
    np.testing.assert_array_equal(hilbert_distance(cells[:, 0], cells[:, 1], order), np.arange(4**order))


def test_sentences_are_compact_neighbourhoods():
    """Of 32 x 32 spots, 64 in reading order would span all 32 columns; along the curve they span about 8 x 8."""
    y, x = (axis.ravel().astype(float) for axis in np.mgrid[:32, :32])
    sentences = cut_evenly(curve_order(x, y), 64)
    assert max(max(np.ptp(x[rows]), np.ptp(y[rows])) for rows in sentences) == 7
    assert sorted(np.concatenate(sentences)) == list(range(32 * 32))


@pytest.mark.parametrize(
    ("number", "longest", "expected"), [(0, 8, []), (1, 8, [1]), (8, 8, [8]), (9, 8, [5, 4]), (25, 8, [7, 6, 6, 6])]
)
def test_cut_is_even(number, longest, expected):
    assert [len(run) for run in cut_evenly(np.arange(number), longest)] == expected


def test_curve_of_few_or_equal_points():
    assert curve_order(np.zeros(0), np.zeros(0)).tolist() == []
    assert curve_order(np.array([5.0]), np.array([7.0])).tolist() == [0]
    assert sorted(curve_order(np.full(3, 5.0), np.full(3, 7.0)).tolist()) == [0, 1, 2]


@pytest.mark.parametrize(("target", "source", "scale"), [(0.7, 0.69, 1.0), (0.69, 0.7, 1.0), (0.69, 0.69, 1.0)])
def test_resolutions_within_two_percent_are_native(target, source, scale):
    assert tile_scale(target, source) == scale


@pytest.mark.parametrize(("target", "source"), [(0.71, 0.69), (0.5, 0.25), (0.5, 1.0)])
def test_other_resolutions_are_resampled(target, source):
    assert tile_scale(target, source) == target / source


def test_native_tiles_are_centred_on_the_floor_of_the_position():
    centre = np.array([100.0, 100.49, 100.99, 101.0])
    assert tile_corner(centre, 224, 1.0).tolist() == [-12, -12, -12, -11]
    assert tile_corner(centre, 5, 1.0).tolist() == [98, 98, 98, 99]
    assert tile_corner(centre, 10, 2.5).tolist() == [87.5, 87.5, 87.5, 88.5]


def test_inside_means_the_whole_tile():
    left = np.array([-1, 0, 76, 77, 0])
    top = np.array([0, 0, 0, 0, 27])
    assert inside(left, top, 24, 100, 50).tolist() == [False, True, True, False, False]


@pytest.mark.parametrize(("size", "scale"), [(32, 1.0), (5, 1.0), (32, 2.0), (32, 1.37), (16, 3.3)])
def test_grid_covers_the_slide_without_overlap(size, scale):
    width, height = 500, 333
    column, row, x, y = grid(width, height, size, scale)
    left, top, edge = tile_corner(x, size, scale), tile_corner(y, size, scale), size * scale
    assert inside(left, top, edge, width, height).all()
    assert len({*zip(column.tolist(), row.tolist(), strict=True)}) == len(column)
    covered = np.zeros((height, width), int)
    for l, t in zip(left, top, strict=True):  # noqa: E741
        covered[int(np.ceil(t)) : int(np.floor(t + edge)), int(np.ceil(l)) : int(np.floor(l + edge))] += 1
    assert covered.max() == 1
    assert (covered == 1).mean() > 0.8
    assert left.min() < 1
    assert top.min() < 1


def test_native_grid_fills_it_exactly():
    column, row, x, y = grid(64, 32, 16, 1.0)
    assert len(column) == 8
    assert tile_corner(x, 16, 1.0).tolist() == (column * 16).tolist()
    assert tile_corner(y, 16, 1.0).tolist() == (row * 16).tolist()


@pytest.mark.parametrize("overlap", [0.25, 0.5, 0.9])
@pytest.mark.parametrize(("size", "scale"), [(32, 1.0), (32, 1.37), (16, 3.3)])
def test_neighbours_share_their_overlap(size, scale, overlap):
    width, height, edge = 300, 211, size * scale
    column, row, x, y = grid(width, height, size, scale, overlap)
    left, top = tile_corner(x, size, scale), tile_corner(y, size, scale)
    assert inside(left, top, edge, width, height).all()
    names = tile_names(column, row)
    assert len(set(names)) == len(names)
    assert names[1] == "1x0"
    step = edge * (1 - overlap)
    assert np.abs(left - column * step).max() < 1.0 + 1e-9
    assert np.abs(top - row * step).max() < 1.0 + 1e-9
    assert width - (left.max() + edge) < step + 1
    assert height - (top.max() + edge) < step + 1


def test_overlap_never_gives_two_tiles_one_position():
    _, _, x, y = grid(40, 40, 16, 1.0, 0.999)
    assert len({*zip(x.tolist(), y.tolist(), strict=True)}) == len(x) == 25**2


def test_slide_smaller_than_a_tile_has_no_grid():
    assert len(grid(100, 100, 224, 1.0)[0]) == 0
