"""What all readers share: the names of genes, and the resolution from an array of spots."""

import numpy as np
import pytest
from section_reading import named_gene

from ingest.layout import array_mpp


def test_the_stated_mapping_of_names():
    assert named_gene("ENSG00000087460.24") == ("ENSG00000087460", "", "ENSG00000087460")
    assert named_gene("GNAS", ensembl="ENSG00000087460.24") == ("ENSG00000087460", "GNAS", "ENSG00000087460")
    assert named_gene("Gnas", "ENSMUSG00000027523") == ("ENSMUSG00000027523", "Gnas", "ENSMUSG00000027523")
    assert named_gene("Gnas") == ("Gnas", "Gnas", "")
    assert named_gene("GNAS", ensembl="2778") == ("GNAS", "GNAS", "")


def grid():
    return np.array([(x, y) for x in range(6) for y in range(5)], float)


@pytest.mark.parametrize("mirrored", [1, -1])
@pytest.mark.parametrize("degrees", [0, 2, 90, 211])
def test_resolution_of_a_rotated_or_mirrored_array(degrees, mirrored):
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    pixel = (grid() * [mirrored, 1]) @ turn * 290 + [5000, 700]
    assert array_mpp(grid(), pixel, 200.0) == pytest.approx(200 / 290)


def test_resolution_of_a_chequerboard():
    """Arrays of 2,000 spots are chequerboards: neighbours are a diagonal apart."""
    array_xy = grid()[grid().sum(axis=1) % 2 == 0]
    array_xy = np.concatenate([array_xy, array_xy + np.array([6, 0])])
    assert array_mpp(array_xy, array_xy * 176.9, 150.0) == pytest.approx(150 / (176.9 * np.sqrt(2)))


def test_arrays_that_give_no_resolution():
    line = np.array([(x, 0) for x in range(30)], float)
    assert array_mpp(line, line * 290, 200.0) is None
    assert array_mpp(grid()[:15], grid()[:15] * 290, 200.0) is None
    assert array_mpp(grid(), np.ones((30, 2)), 200.0) is None
