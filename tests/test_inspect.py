"""One slide before its prediction: resolution, stain, tissue, tiles; what is written, read back and refused."""

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image
from round_slide import MPP, SIZE, TILE, make_plan, tissue_image

from mclstexp import storage
from mclstexp.errors import SourceError
from mclstexp.prediction.cohort import POSITION_SCHEMA
from mclstexp.prediction.inspect import inspect
from mclstexp.prediction.parts import GRID, GRID_SCHEMA, PARTS, PREVIEW, RECORD, THUMBNAIL
from mclstexp.prediction.plan import SlideSource, attempt_key, key
from mclstexp.settings import TilesConfig
from mclstexp.slides.slide import open_slide
from mclstexp.slides.tissue import find_tissue

real_data = pytest.mark.skipif("MCLSTEXP_DATA" not in os.environ, reason="MCLSTEXP_DATA names no folder of real data")


def write_slide(path, image, mpp=MPP):
    """A tiled TIFF of two levels, lossless."""
    with tifffile.TiffWriter(path) as tiff:
        for step in (1, 2):
            height, width = (edge // step for edge in image.shape[:2])
            level = image.reshape(height, step, width, step, 3).mean(axis=(1, 3)).round().astype(np.uint8)
            unit = {"resolution": (1e4 / mpp / step,) * 2, "resolutionunit": "CENTIMETER"} if mpp else {}
            tiff.write(
                level, tile=(128, 128), photometric="rgb", compression="deflate", subfiletype=int(step > 1), **unit
            )


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    path = tmp_path_factory.mktemp("slides") / "a.tif"
    write_slide(path, tissue_image())
    return SlideSource("a", "P", "site", str(path), None)


def read_grid(staging):
    return pq.read_table(pa.BufferReader(storage.read(storage.join(staging, GRID))))


def write_ome(path, image, **options):
    """An OME-TIFF as Xenium's own: JPEG 2000, its levels in SubIFDs, the resolution in XML alone."""
    sizes = {"PhysicalSizeX": MPP, "PhysicalSizeY": MPP}
    storage_tiles = {"tile": (128, 128), "photometric": "rgb", "compression": "jpeg2000"}
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(image, subifds=1, metadata={"axes": "YXS"} | sizes, **storage_tiles | options)
        half = image.reshape(SIZE // 2, 2, SIZE // 2, 2, 3).mean(axis=(1, 3)).round().astype(np.uint8)
        tiff.write(half, subfiletype=1, **storage_tiles | options)


@pytest.mark.odd
def test_an_ome_tiff_is_cut_as_the_same_slide_in_another_format(slide, tmp_path):
    write_ome(tmp_path / "a.ome.tif", tissue_image())
    plan = make_plan(tmp_path)
    ome = inspect(replace(slide, slide_id="ome", image=str(tmp_path / "a.ome.tif")), plan)
    tiff = inspect(slide, plan)
    assert (ome.record.mpp, ome.record.mpp_source, ome.record.reads_regions) == (MPP, "image", True)
    assert read_grid(ome.staging).equals(read_grid(tiff.staging))
    assert ome.record.tissue_area_mm2 == tiff.record.tissue_area_mm2


@pytest.mark.odd
def test_a_turned_slide_is_refused_with_what_to_do(slide, tmp_path):
    write_ome(tmp_path / "a.tif", tissue_image(), extratags=[(274, 3, 1, 6, True)])
    with pytest.raises(SourceError, match=r"a\.tif: its TIFF orientation is 6, .*upright"):
        inspect(replace(slide, image=str(tmp_path / "a.tif")), make_plan(tmp_path))


def test_what_is_found_and_written(slide, tmp_path):
    found = inspect(slide, make_plan(tmp_path))
    record, table = found.record, read_grid(found.staging)
    assert (record.slide_id, record.patient_id, record.site, record.image) == ("a", "P", "site", slide.image)
    assert (record.width_px, record.height_px, record.mpp_source, record.scale) == (SIZE, SIZE, "image", 1.0)
    assert record.mpp == pytest.approx(MPP)
    assert (record.missing_tiles, record.not_h_and_e, record.thumbnail_scale) == (0, "", 1.0)
    assert table.schema.equals(GRID_SCHEMA)
    assert pq.read_metadata(io.BytesIO(storage.read(storage.join(found.staging, GRID)))).metadata is None

    with open_slide(slide.image) as opened:
        mask = find_tissue(opened, record.mpp)
    assert record.tissue_area_mm2 == pytest.approx(np.pi * (0.4 * SIZE * MPP / 1000) ** 2, rel=0.05)
    assert record.tissue_area_mm2 == pytest.approx(mask.is_tissue.sum() * (mask.scale * record.mpp) ** 2 / 1e6)
    assert record.num_tiles == len(table)
    assert record.tile_area_mm2 == pytest.approx(len(table) * (TILE * MPP / 1000) ** 2, rel=1e-6)

    column, row, x, y = (table[name].to_numpy() for name in ("array_col", "array_row", "x_px", "y_px"))
    np.testing.assert_array_equal(x, column * TILE + TILE / 2)
    np.testing.assert_array_equal(y, row * TILE + TILE / 2)
    np.testing.assert_allclose(table["x_um"].to_numpy(), x * record.mpp)
    assert table["spot_id"].to_pylist() == [f"{c}x{r}" for c, r in zip(column, row, strict=True)]
    share = mask.share(*(np.indices((32, 32)).reshape(2, -1)[::-1] * float(TILE)), TILE)
    assert len(table) == (share >= 0.5).sum()
    np.testing.assert_array_equal(table["tissue_fraction"].to_numpy(), share[row * 32 + column])
    steps = np.hypot(np.diff(x), np.diff(y)) / TILE
    assert np.median(steps) == 1.0  # a curve, not a scan
    assert (steps > 1.5).mean() < 0.15


def test_pictures_show_slide_tissue_and_tiles(slide, tmp_path):
    found = inspect(slide, make_plan(tmp_path))
    pictures = {}
    for name in (THUMBNAIL, PREVIEW):
        pictures[name] = np.asarray(Image.open(io.BytesIO(storage.read(storage.join(found.staging, name))))).astype(int)
    assert np.abs(pictures[THUMBNAIL] - tissue_image()).mean() < 6
    changed = np.abs(pictures[PREVIEW] - pictures[THUMBNAIL]).sum(axis=2) > 30
    assert changed[SIZE // 2 - 100 : SIZE // 2 + 100, SIZE // 2 - 100 : SIZE // 2 + 100].mean() > 0.9
    assert changed[:40, :40].mean() < 0.01
    rim = np.hypot(*(np.indices((SIZE, SIZE)) - SIZE / 2)) / SIZE
    dark = pictures[PREVIEW].max(axis=2) < 110
    assert dark[(rim > 0.38) & (rim < 0.42)].sum() > 0.5 * 2 * np.pi * 0.4 * SIZE
    assert dark[rim > 0.44].mean() < 0.01


def test_tiles_are_cut_at_the_models_resolution_whatever_the_slides(slide, tmp_path):
    record = inspect(slide, make_plan(tmp_path, mpp=4.0)).record
    assert record.scale == pytest.approx(2.0)
    assert record.tile_area_mm2 == pytest.approx(record.num_tiles * (TILE * 4.0 / 1000) ** 2)
    with pytest.raises(SourceError, match=r"2 um/px and would be enlarged 2 times.*1 um/px \(1\.5 is allowed\)"):
        inspect(slide, make_plan(tmp_path, mpp=1.0))
    tiles = TilesConfig(size_px=TILE, min_tissue=0.5, allow_upsampling=True)
    assert inspect(slide, make_plan(tmp_path, mpp=1.0, tiles=tiles)).record.scale == pytest.approx(0.5)


def test_overlap(slide, tmp_path):
    once, twice = (inspect(slide, make_plan(tmp_path, overlap=overlap)) for overlap in (0.0, 0.5))
    assert once.staging != twice.staging
    assert twice.record.num_tiles == pytest.approx(4 * once.record.num_tiles, rel=0.1)
    assert len(set(read_grid(twice.staging)["spot_id"].to_pylist())) == twice.record.num_tiles


def positions(*centres, names=None):
    x, y = zip(*centres, strict=True)
    names = names or [str(number) for number in range(len(centres))]
    return {"a": pa.table([names, list(x), list(y)], schema=POSITION_SCHEMA)}


def test_given_positions(slide, tmp_path):
    """Tissue does not choose among them; those outside the slide or across its edge are left out."""
    given = positions((8.0, 8.0), (300.25, 200.5), (7.0, 8.0), (600.0, 50.0), (504.0, 504.0), names=list("abcde"))
    found = inspect(slide, make_plan(tmp_path, positions=given))
    table = read_grid(found.staging)
    centres = zip(*(table[name].to_pylist() for name in ("spot_id", "x_px", "y_px")), strict=True)
    assert {name: (x, y) for name, x, y in centres} == {"a": (8.0, 8.0), "b": (300.25, 200.5), "e": (504.0, 504.0)}
    assert table["array_row"].null_count == table["array_col"].null_count == found.record.num_tiles == 3
    assert found.record.left_out_positions == 2
    share = dict(zip(table["spot_id"].to_pylist(), table["tissue_fraction"].to_pylist(), strict=True))
    assert share == {"a": 0.0, "b": 1.0, "e": 0.0}


def test_positions_of_another_image_are_refused(slide, tmp_path):
    given = positions((8.0, 8.0), (7.0, 8.0), (600.0, 50.0), (50.0, 600.0))
    with pytest.raises(SourceError, match=r"of 4 given positions 2 are outside .* tiles of 1 cross its edge"):
        inspect(slide, make_plan(tmp_path, positions=given))


def test_a_slide_without_resolution_can_have_one_assumed(tmp_path):
    write_slide(tmp_path / "a.tif", tissue_image(), mpp=None)
    source = SlideSource("a", "P", "", str(tmp_path / "a.tif"), None)
    with pytest.raises(SourceError, match="no resolution"):
        inspect(source, make_plan(tmp_path))
    first, second = (inspect(source, make_plan(tmp_path, assume_mpp=mpp)) for mpp in (2.0, 2.5))
    assert (first.record.mpp, first.record.mpp_source) == (2.0, "assumed")
    assert second.record.mpp == 2.5
    assert first.staging != second.staging


def test_an_image_without_h_and_e_is_refused_unless_allowed(tmp_path):
    write_slide(tmp_path / "a.tif", 255 - tissue_image())
    source = SlideSource("a", "P", "", str(tmp_path / "a.tif"), None)
    with pytest.raises(SourceError, match=r"not H&E: .*%"):
        inspect(source, make_plan(tmp_path))
    found = inspect(source, make_plan(tmp_path, allow_other_stains=True))
    assert "%" in found.record.not_h_and_e
    with pytest.raises(SourceError, match="not H&E"):  # though it is staged
        inspect(source, make_plan(tmp_path))


def test_an_empty_slide_is_a_result(tmp_path):
    noise = np.random.default_rng(0).normal(240, 1.5, (SIZE, SIZE, 3)).astype(np.uint8)
    write_slide(tmp_path / "a.tif", noise)
    found = inspect(SlideSource("a", "P", "", str(tmp_path / "a.tif"), None), make_plan(tmp_path))
    assert found.record.num_tiles == found.record.tissue_area_mm2 == 0
    assert read_grid(found.staging).schema.equals(GRID_SCHEMA)


def test_a_damaged_slide_leaves_no_record(slide, tmp_path):
    whole = Path(slide.image).read_bytes()
    (tmp_path / "a.tif").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match=r"image a\.tif"):
        inspect(replace(slide, image=str(tmp_path / "a.tif")), make_plan(tmp_path))
    assert not [uri for uri in storage.list_files(str(tmp_path / "out")) if uri.endswith(RECORD)]


def test_an_inspected_slide_is_read_back_and_not_opened(slide, tmp_path, monkeypatch):
    first = inspect(slide, make_plan(tmp_path))
    monkeypatch.setattr("mclstexp.prediction.inspect.open_slide", None)
    assert inspect(slide, make_plan(tmp_path)) == first
    assert inspect(slide, make_plan(tmp_path, assume_mpp=0.5)) == first  # its own resolution is known


def test_without_its_record_a_slide_is_inspected_again_to_the_same_bytes(slide, tmp_path):
    found = inspect(slide, make_plan(tmp_path))
    before = {uri: storage.read(uri) for uri in storage.list_files(found.staging)}
    assert len(before) == 4
    storage.delete(storage.join(found.staging, RECORD))
    storage.write(storage.join(found.staging, GRID), b"half")
    inspect(slide, make_plan(tmp_path))
    assert {uri: storage.read(uri) for uri in storage.list_files(found.staging)} == before


def test_a_slide_with_a_record_of_another_version_is_inspected_again(slide, tmp_path):
    first = inspect(slide, make_plan(tmp_path))
    record = Path(first.staging, "slide.json")
    before = record.read_bytes()
    record.write_text(json.dumps(json.loads(before) | {"of_the_future": 1}))
    assert inspect(slide, make_plan(tmp_path)) == first
    assert record.read_bytes() == before
    Path(first.staging, "grid.parquet").unlink()
    assert inspect(slide, make_plan(tmp_path)) == first
    assert Path(first.staging, "grid.parquet").is_file()


def test_a_slide_that_moved_keeps_its_staging_folder_and_gets_its_new_uri(slide, tmp_path):
    first = inspect(slide, make_plan(tmp_path))
    storage.write(storage.join(first.staging, PARTS, "00000.safetensors"), b"x")
    moved = replace(slide, image=str(tmp_path / "moved.tif"))
    Path(moved.image).write_bytes(Path(slide.image).read_bytes())
    second = inspect(moved, make_plan(tmp_path))
    assert second.staging == first.staging
    assert second.record == first.record.model_copy(update={"image": moved.image})


def test_a_key_is_of_everything_that_the_answer_depends_on(slide, tmp_path):
    plan = make_plan(tmp_path)
    base = key(slide, "f", plan)
    assert len(base) == 16
    assert int(base, 16) >= 0
    others = [
        key(slide, "g", plan),
        key(replace(slide, mpp=2.0), "f", plan),
        key(replace(slide, patient_id="Q"), "f", plan),
        key(slide, "f", replace(plan, mpp=1.9)),
        key(slide, "f", replace(plan, overlap=0.5)),
        key(slide, "f", replace(plan, model_digest="other")),
        key(slide, "f", replace(plan, tiles=TilesConfig(size_px=TILE, min_tissue=0.4))),
        key(slide, "f", replace(plan, tiles=TilesConfig(size_px=TILE, min_tissue=0.5, jpeg_quality=80))),
        key(slide, "f", replace(plan, positions=positions((1.0, 2.0)))),
        key(slide, "f", replace(plan, positions=positions((1.0, 3.0)))),
        key(slide, "f", replace(plan, assume_mpp=0.5), assumed=True),
        key(slide, "f", replace(plan, assume_mpp=0.6), assumed=True),
    ]
    assert len({base, *others}) == 1 + len(others)
    upsampling = TilesConfig(size_px=TILE, min_tissue=0.5, allow_upsampling=True)
    allowed = [
        replace(plan, assume_mpp=0.5),
        replace(plan, allow_other_stains=True),
        replace(plan, tiles=upsampling),
    ]
    same = [*allowed, replace(plan, scratch="/x"), replace(plan, out="/y")]
    assert {key(slide, "f", other) for other in same} == {base}
    assert len({attempt_key(slide, "f", other) for other in [plan, *allowed]}) == 4


@real_data
@pytest.mark.slow
def test_real_slides(tmp_path):
    folder = Path(os.environ["MCLSTEXP_DATA"]) / "slides"

    def source(name):
        return SlideSource(name.partition(".")[0], "P", "", str(folder / name), None)

    plan = make_plan(tmp_path, tiles=TilesConfig(size_px=224, min_tissue=0.1), mpp=0.69)
    record = inspect(source("cmu_small_region.svs"), plan).record
    assert record.scale == pytest.approx(0.69 / 0.499)
    assert 0 < record.num_tiles <= 63  # whole tiles of 309 px on 2,220 x 2,967 px
    c5 = inspect(source("C5_aperio.svs"), plan).record
    assert c5.scale == 1.0
    assert 0.1 < c5.tissue_area_mm2 / (9272 * 9901 * 0.687**2 / 1e6) < 0.25
    assert c5.thumbnail_scale == pytest.approx(9901 / 1024)
    tcga = source("tcga-cr-7395-01a-01-ts1.svs")
    with pytest.raises(SourceError, match="no resolution"):
        inspect(tcga, plan)
    assumed = inspect(tcga, replace(plan, assume_mpp=0.5)).record
    assert (assumed.mpp, assumed.mpp_source, assumed.not_h_and_e) == (0.5, "assumed", "")
    assert assumed.num_tiles > 50
