"""What the files of a section state about its layout: positions of all spots, scale and small pictures of the image."""

import json

import anndata
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from section_reading import read
from visium_folders import HD_MPP, MPP, SECTION, hd, section, v1_h5, v1_mtx, write_spatial

from ingest.plan import source_digests
from ingest.readers.files import read_preview, source_files
from mclstexp.data.sheet import SectionRow


def add_pictures(folder):
    for name, size in {"hires": (240, 200), "lowres": (72, 60)}.items():
        Image.new("RGB", size).save(folder / f"spatial/tissue_{name}_image.png")
    write_spatial(folder / "spatial", "tissue_positions_list.csv", {"tissue_lowres_scalef": 0.03})
    return folder


def test_visium_states_pictures_that_it_has(tmp_path):
    row = section(tmp_path, add_pictures(v1_mtx(tmp_path / "S1")))
    expected = [("tissue_hires_image.png", 240, 200, 0.1), ("tissue_lowres_image.png", 72, 60, 0.03)]
    for found in (read(row, tmp_path), read_preview(row, str(tmp_path))):
        assert list(found.layout.pictures) == expected
        assert found.layout.spot_diameter_px == 65 / MPP
        assert found.layout.mpp is None
        np.testing.assert_allclose(found.layout.xy_px, np.stack([SECTION.x, SECTION.y], 1), rtol=1e-12)
        np.testing.assert_array_equal(found.layout.array_xy, np.stack([SECTION.column, SECTION.row], 1))


def test_a_picture_without_its_scale_states_nothing(tmp_path):
    folder = add_pictures(v1_h5(tmp_path / "S1"))
    (folder / "spatial/scalefactors_json.json").write_text(json.dumps({"spot_diameter_fullres": 130.0}))
    assert read(section(tmp_path, folder), tmp_path).layout.pictures == ()


def test_a_scale_without_its_picture_has_no_size(tmp_path):
    found = read(section(tmp_path, v1_h5(tmp_path / "S1")), tmp_path)
    assert found.layout.pictures == (("tissue_hires_image.png", 0, 0, 0.1),)


def test_hd_states_its_resolution(tmp_path):
    assert read(section(tmp_path, hd(tmp_path / "S1")), tmp_path).layout.mpp == HD_MPP


def test_pictures_that_arrive_later_do_not_change_the_digest(tmp_path):
    folder = v1_mtx(tmp_path / "S1")
    row = section(tmp_path, folder)
    before, files = source_digests([row], {})[0], source_files(row)
    for name in ("hires", "lowres"):
        Image.new("RGB", (24, 20)).save(folder / f"spatial/tissue_{name}_image.png")
    assert source_digests([row], {})[0] == before
    assert source_files(row).keys() - files.keys() == {"hires", "lowres"}


def h5ad_row(path):
    return SectionRow(section_id="S1", patient_id="P1", image=str(path), format="h5ad", expression=str(path))


@pytest.mark.parametrize(
    ("factors", "images", "expected"),
    [
        (
            {"spot_diameter_fullres": 130.0, "tissue_hires_scalef": 0.1, "tissue_lowres_scalef": 0.03},
            {"hires": (200, 240, 3), "lowres": (60, 72, 3)},
            (
                None,
                130.0,
                (
                    ("uns['spatial']['S1']['images']['hires']", 240, 200, 0.1),
                    ("uns['spatial']['S1']['images']['lowres']", 72, 60, 0.03),
                ),
            ),
        ),
        (
            {"tissue_downscaled_fullres_scalef": 0.1, "spot_diameter_fullres": np.float32(30)},
            {"downscaled_fullres": (20, 24, 3)},
            (None, 30.0, (("uns['spatial']['S1']['images']['downscaled_fullres']", 24, 20, 0.1),)),
        ),
        (
            {"microns_per_pixel": 0.27, "bin_size_um": 16.0},
            {"fullres": (30, 40)},
            (0.27, None, (("uns['spatial']['S1']['images']['fullres']", 40, 30, 1.0),)),
        ),
        (
            {"tissue_hires_scalef": 0.1},
            {},
            (None, None, (("uns['spatial']['S1']['images']['hires']", 0, 0, 0.1),)),
        ),
        pytest.param(
            {"spot_diameter_fullres": np.nan, "tissue_hires_scalef": 0.0},
            {"hires": (2, 3, 3)},
            (None, None, ()),
            marks=pytest.mark.odd,
        ),
        pytest.param({"spot_diameter_fullres": "unknown"}, {}, (None, None, ()), marks=pytest.mark.odd),
    ],
)
def test_h5ad_states_what_uns_has(tmp_path, factors, images, expected):
    obs = pd.DataFrame({"array_row": SECTION.row, "array_col": SECTION.column}, index=SECTION.barcode)
    data = anndata.AnnData(np.ones((64, 2), np.float32), obs, pd.DataFrame(index=["GNAS", "FASN"]))
    data.obsm["spatial"] = np.stack([SECTION.x, SECTION.y], 1)
    images = {name: np.zeros(shape, np.uint8) for name, shape in images.items()}
    data.uns["spatial"] = {"S1": {"images": images, "scalefactors": factors}}
    data.write_h5ad(tmp_path / "a.h5ad")
    row = h5ad_row(tmp_path / "a.h5ad")
    for layout in (read(row, tmp_path).layout, read_preview(row, str(tmp_path)).layout):
        assert (layout.mpp, layout.spot_diameter_px, layout.pictures) == expected
        np.testing.assert_array_equal(layout.xy_px, data.obsm["spatial"])
        np.testing.assert_array_equal(layout.array_xy, np.stack([SECTION.column, SECTION.row], 1))
