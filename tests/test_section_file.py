"""Result files of sections that are too small to have a pitch."""

from pathlib import Path

import anndata
import numpy as np
import pytest

from mclstexp.data.genes import GenePanel
from mclstexp.evaluation.sections import MeasuredSection, SectionResult, section_path, write_section_result
from mclstexp.report.maps import map_size_in, window


@pytest.mark.parametrize("num_spots", [1, 2])
def test_a_section_of_one_spot_is_written_and_can_be_drawn(tmp_path: Path, num_spots: int) -> None:
    place = np.array([[500.0, 700.0], [790.0, 700.0]])[:num_spots]
    names, label = np.array(["1x2", "2x2"], object)[:num_spots], np.array([None, None], object)[:num_spots]
    truth = np.arange(3.0 * num_spots).reshape(num_spots, 3)
    section = MeasuredSection("S1", "S", names, 0.69 * place, place, label, truth, truth.sum(axis=1))
    panel = GenePanel.from_names(["GNAS", "FASN", "ERBB2"])
    result = SectionResult(section, panel, truth, truth + 1, np.full((20, 24, 3), 200, np.uint8), 80.0)
    write_section_result(tmp_path, result, {"protocol": "patient"})
    data = anndata.read_h5ad(tmp_path / section_path("S1"))
    np.testing.assert_array_equal(data.layers["measured"], truth)
    assert data.uns["spatial"]["S1"]["scalefactors"]["spot_diameter_fullres"] == (50.0 if num_spots == 1 else 145.0)
    (left, top), (right, bottom) = window(place)
    assert left < 500 < right
    assert top < 700 < bottom
    assert np.isfinite(map_size_in(place)).all()
