"""Sections: the targets that are scored, and result files, also of sections too small to have a pitch."""

from pathlib import Path

import anndata
import numpy as np
import pytest

from mclstexp.data.genes import GenePanel, Normaliser
from mclstexp.data.measured import MeasuredSection, normalise_section
from mclstexp.evaluation.sections import TARGETS, SectionResult, scored_targets, section_path, write_section_result
from mclstexp.report.maps import map_size_in, window


def test_targets_by_hand() -> None:
    counts, totals = np.array([[1, 3], [4, 0]], np.float32), np.array([10.0, 8.0])
    expected = {
        "per_spot": np.log(1 + 1e4 * np.array([[1 / 10, 3 / 10], [4 / 8, 0]])),
        "per_spot_panel": np.log10(1 + 1e4 * np.array([[1 / 4, 3 / 4], [1, 0]])),
        "per_gene": np.log10(1 + 1e4 * np.array([[1 / 5, 1], [4 / 5, 0]])),
    }
    assert list(TARGETS) == list(expected)
    for name, target in TARGETS.items():
        np.testing.assert_allclose(normalise_section(target, counts, totals), expected[name], rtol=1e-6)


@pytest.mark.parametrize(("name", "unit"), [("per_spot", "ln"), ("per_gene", "log10")])
def test_the_models_own_target_comes_first_and_once(name: str, unit: str) -> None:
    found = scored_targets(TARGETS[name], TARGETS[name])
    assert list(found) == [name, *({"per_spot", "per_gene"} - {name})]
    assert found[name].unit().startswith(unit)


def test_a_target_without_a_name_is_called_by_its_unit() -> None:
    own = Normaliser("per_spot_all", 1e6, "e")
    assert list(scored_targets(own, own)) == [own.unit(), "per_spot", "per_gene"]


def test_the_unit_of_the_models_input_is_a_target_too() -> None:
    published = TARGETS["per_gene"], TARGETS["per_spot_panel"]
    assert list(scored_targets(*published)) == ["per_gene", "per_spot", "per_spot_panel"]


@pytest.mark.parametrize("num_spots", [1, 2])
def test_a_section_of_one_spot_is_written_and_can_be_drawn(tmp_path: Path, num_spots: int) -> None:
    xy_px = np.array([[500.0, 700.0], [790.0, 700.0]])[:num_spots]
    names, label = np.array(["1x2", "2x2"], object)[:num_spots], np.array([None, None], object)[:num_spots]
    truth = np.arange(3.0 * num_spots).reshape(num_spots, 3)
    section = MeasuredSection("S1", "S", names, 0.69 * xy_px, xy_px, label, truth, truth.sum(axis=1))
    panel = GenePanel.from_names(["GNAS", "FASN", "ERBB2"])
    result = SectionResult(section, panel, truth, truth + 1, np.full((20, 24, 3), 200, np.uint8), 80.0)
    write_section_result(tmp_path, result, {"protocol": "patient"})
    data = anndata.read_h5ad(tmp_path / section_path("S1"))
    np.testing.assert_array_equal(data.layers["measured"], truth)
    assert data.uns["spatial"]["S1"]["scalefactors"]["spot_diameter_fullres"] == (50.0 if num_spots == 1 else 145.0)
    (left, top), (right, bottom) = window(xy_px)
    assert left < 500 < right
    assert top < 700 < bottom
    assert np.isfinite(map_size_in(xy_px)).all()
