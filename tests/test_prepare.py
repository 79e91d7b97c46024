"""From a sample sheet to a tile table: what is in it, what is planned, and real sections."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import openslide
import pandas as pd
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image
from prepared_tables import CONFIG, add_count, copy_of, edit_counts, read_everything, run, write_sheet

from ingest.prepare import dry_run, prepare
from mclstexp import storage
from mclstexp.config import Config, override
from mclstexp.data.schema import REJECT_SCHEMA, load_genes, load_manifest
from mclstexp.data.table import read_columns, read_counts, read_sentence, read_thumbnail
from mclstexp.errors import SourceError
from mclstexp.slides.codec import decode_tile

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
ROOT = Path(__file__).parents[1]


def test_tiles_are_the_slides_pixels(cohort, two, tmp_path):
    run(two, tmp_path / "out")
    entry = load_manifest(str(tmp_path / "out")).section("P1S1")
    slide = openslide.OpenSlide(str(Path(cohort).parent / "P1S1.tif"))
    for index in range(len(entry.row_groups)):
        for spot in read_sentence(str(tmp_path / "out"), entry, index).to_pylist():
            corner = (int(np.floor(spot["x_px"])) - 16, int(np.floor(spot["y_px"])) - 16)
            expected = np.asarray(slide.read_region(corner, 0, (32, 32)))[..., :3]
            np.testing.assert_array_equal(decode_tile(spot["image"]), expected)


def test_rows_are_the_selected_spots_with_their_counts(cohort, two, tmp_path):
    root = str(tmp_path / "out")
    manifest = run(two, root).manifest
    entry = manifest.section("P1S1")
    folder = Path(cohort).parent
    counts = pd.read_csv(folder / "P1S1.tsv.gz", sep="\t", index_col=0)
    selection = pd.read_csv(folder / "P1S1_selection.tsv", sep="\t").query("selected == 1")
    selection.index = selection.x.astype(str) + "x" + selection.y.astype(str)
    table = read_columns(root, entry, ["spot_id", "patient_id", "array_row", "array_col", "x_px", "x_um"]).to_pandas()
    assert sorted(table.spot_id) == sorted(selection.index)
    assert set(table.patient_id) == {"P1"}
    expected = selection.loc[table.spot_id]
    assert table.array_col.tolist() == expected.x.tolist()
    assert table.array_row.tolist() == expected.y.tolist()
    assert table.x_px.tolist() == expected.pixel_x.tolist()
    assert table.x_um.tolist() == expected.pixel_x.tolist(), "the cohort has 1 um/px"
    genes = load_genes(root, manifest)["gene_id"].to_pylist()
    found = pd.DataFrame(read_counts(root, entry).toarray(), table.spot_id, genes)
    pd.testing.assert_frame_equal(
        found[counts.columns], counts.loc[table.spot_id], check_dtype=False, check_names=False
    )


def test_labels_and_the_slides_picture_are_carried(own_two, cohort, tmp_path):
    run(own_two, tmp_path / "plain")
    with open(own_two, newline="") as file:
        rows = [row | {"labels": {"P1S1": "labels.tsv"}.get(row["section_id"], "")} for row in csv.DictReader(file)]
    labels = "x\ty\tlabel\n4.02\t4.98\tinvasive cancer\n5.1\t5\t\n99\t99\telsewhere\nNA\tNA\tlost\n"
    (tmp_path / "cohort" / "labels.tsv").write_text(labels)
    sheet = write_sheet(tmp_path / "cohort", rows)
    report = run(sheet, tmp_path / "plain")
    assert set(report.redone) == {"P1S1", "P2S1"}
    entry = report.manifest.section("P1S1")
    table = read_columns(str(tmp_path / "plain"), entry, ["array_col", "array_row", "label"]).to_pylist()
    labelled = {(spot["array_col"], spot["array_row"]): spot["label"] for spot in table if spot["label"]}
    assert labelled == {(4, 5): "invasive cancer"}
    assert [entry.num_labelled, report.manifest.section("P2S1").num_labelled] == [1, 0]
    picture = read_thumbnail(str(tmp_path / "plain"), entry)
    with openslide.OpenSlide(str(Path(cohort).parent / "P1S1.tif")) as slide:
        whole = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    assert max(picture.shape) <= 1024
    assert picture.shape[0] == pytest.approx(len(whole) / entry.thumbnail_scale, abs=1)
    step = round(entry.thumbnail_scale)
    assert np.abs(picture.astype(int) - whole[::step, ::step]).mean() < 10
    (tmp_path / "cohort" / "labels.tsv").write_text("spot_id\tlabel\nAAACG-1\tinvasive cancer\n")
    with pytest.raises(SourceError, match=r"P1S1.*labels.tsv: none of its 1 rows names one of the section's"):
        run(sheet, tmp_path / "plain")


def test_manifest_describes_the_table(tiles, cohort):
    manifest = load_manifest(tiles)
    assert [entry.section_id for entry in manifest.sections] == ["P1S1", "P1S2", "P2S1", "P2S2", "P3S1", "P3S2", "P4S1"]
    assert (manifest.tile_size_px, manifest.mpp, manifest.tile_size_um, manifest.sentence_length) == (32, 1.0, 32.0, 16)
    slide = manifest.section("P4S1")
    assert (slide.measured, slide.patient_id, slide.site) == (False, "P4", "synthetic")
    assert slide.num_spots + slide.rejected["no_tissue"] == (slide.width_px // 32) * (slide.height_px // 32)
    measured = manifest.section("P1S1")
    assert measured.measured
    assert measured.max_array == 5
    lengths = [group.num_rows for group in measured.row_groups]
    assert max(lengths) <= 16
    assert max(lengths) - min(lengths) <= 1
    assert sum(len(names) for names in read_everything(tiles).values()) == sum(e.num_spots for e in manifest.sections)


def _blank_around(pixels, column, row):
    """Returns whether a tile and half a tile around it show no stain: a mask is smooth over some micrometres."""
    top, left = (max(0, 32 * index - 16) for index in (row, column))
    around = pixels[top : 32 * row + 48, left : 32 * column + 48].astype(int)
    return (around.max(axis=2) - around.min(axis=2)).max() <= 40


def test_slides_are_cut_into_a_grid_over_their_tissue(tiles, cohort):
    entry = load_manifest(tiles).section("P4S1")
    columns = ["array_col", "array_row", "x_px", "y_px", "tissue_fraction", "count"]
    table = read_columns(tiles, entry, columns).to_pandas()
    assert (table.x_px == table.array_col * 32 + 16).all()
    assert (table.y_px == table.array_row * 32 + 16).all()
    assert table.tissue_fraction.min() >= 0.1
    assert table["count"].isna().all()
    pixels = tifffile.imread(Path(cohort).parent / "P4S1.tif", level=0)
    kept, num_blank = set(zip(table.array_col, table.array_row, strict=True)), 0
    for column in range(9):
        for row in range(9):
            tile = pixels[row * 32 : row * 32 + 32, column * 32 : column * 32 + 32].astype(int)
            stained = (tile.max(axis=2) - tile.min(axis=2) > 40).mean()
            if stained > 0.5:
                assert (column, row) in kept
            if stained == 0 and _blank_around(pixels, column, row):
                assert (column, row) not in kept
                num_blank += 1
    assert num_blank > 0


def test_rejects_are_listed_with_the_reason(cohort, tmp_path):
    sheet = copy_of(cohort, tmp_path / "cohort", ["P1S1"])
    path = tmp_path / "cohort" / "P1S1_selection.tsv"
    selection = pd.read_csv(path, sep="\t")
    selection.loc[0, ["pixel_x", "selected"]] = [-5, 1]
    selection.loc[1, ["pixel_x", "pixel_y", "selected"]] = [150, 3, 1]
    selection.loc[2, ["pixel_x", "pixel_y", "selected"]] = [17, 17, 1]
    selection.loc[3, "selected"] = 0
    selection.drop(index=4).to_csv(path, sep="\t", index=False)
    edit_counts(sheet, "P1S1", lambda table: table.drop(index="5x0"))
    root = str(tmp_path / "out")
    entry = run(sheet, root).manifest.sections[0]
    expected = {
        "0x0": "outside_image",
        "1x0": "crosses_edge",
        "2x0": "no_tissue",
        "3x0": "not_selected",
        "4x0": "no_position",
        "5x0": "no_counts",
    }
    rejects = pq.read_table(storage.join(root, entry.rejects_file))
    assert rejects.schema.equals(REJECT_SCHEMA)
    found = dict(zip(rejects["spot_id"].to_pylist(), rejects["reason"].to_pylist(), strict=True))
    assert found == expected
    assert entry.rejected == dict.fromkeys(sorted(expected.values()), 1)
    assert entry.num_spots == 30


def test_other_resolutions_come_from_the_level_that_has_them(cohort, two, tmp_path):
    run(two, tmp_path / "out", **{"tiles.mpp": 2.0, "tiles.size_px": 16})
    manifest = load_manifest(str(tmp_path / "out"))
    assert (manifest.mpp, manifest.tile_size_um) == (2.0, 32.0)
    slide = openslide.OpenSlide(str(Path(cohort).parent / "P1S1.tif"))
    assert slide.level_downsamples == (1.0, 2.0)
    for spot in read_sentence(str(tmp_path / "out"), manifest.section("P1S1"), 0).to_pylist():
        corner = (int(spot["x_px"]) - 16, int(spot["y_px"]) - 16)
        expected = np.asarray(slide.read_region(corner, 1, (16, 16)))[..., :3]
        np.testing.assert_array_equal(decode_tile(spot["image"]), expected)


def test_a_blank_slide_has_no_spots_and_stops_no_other(cohort, tmp_path):
    sheet = copy_of(cohort, tmp_path / "cohort", ["P1S1", "P4S1"])
    Image.new("RGB", (300, 300), "white").save(tmp_path / "cohort" / "P4S1.tif")
    entry = run(sheet, tmp_path / "out").manifest.section("P4S1")
    assert (entry.num_spots, entry.row_groups, entry.rejected) == (0, (), {"no_tissue": 81})
    assert read_everything(str(tmp_path / "out"))["P4S1"] == []
    assert read_columns(str(tmp_path / "out"), entry, ["spot_id"]).num_rows == 0


# ---------------------------------------------------------------- plan and job


def test_plan_says_what_would_be_done_and_does_nothing(own_two, tmp_path):
    out = str(tmp_path / "out")
    text = dry_run(own_two, out, CONFIG)
    assert "to cut     2 section(s)" in text
    assert "32 px at 1 um/px = 32 um" in text
    assert storage.list_files(out) == []
    run(own_two, out)
    edit_counts(own_two, "P2S1", add_count)
    text = dry_run(own_two, out, override(CONFIG, {}))
    assert "unchanged  1 section(s)" in text
    assert "P2S1: patient P2, legacy_st, 1 um/px, exact crops" in text
    assert "resampled, 2 slide px per tile px" in dry_run(own_two, out, override(CONFIG, {"tiles.mpp": 2.0}))


def test_dry_run_of_the_job_starts_no_cluster(two, tmp_path):
    command = [sys.executable, ROOT / "jobs" / "prepare.py", "--samples", two, "--out", tmp_path / "out", "--dry-run"]
    environment = os.environ | {"RAY_ADDRESS": "127.0.0.1:1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "to cut     2 section(s)" in done.stdout
    assert "min_tissue: 0.1" in done.stdout
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- real sections


@pytest.mark.slow
@pytest.mark.skipif("MCLSTEXP_DATA" not in os.environ, reason="MCLSTEXP_DATA names no folder of real data")
def test_real_sections(tmp_path):
    data = Path(os.environ["MCLSTEXP_DATA"])
    manifest = prepare(str(data / "samples.csv"), str(tmp_path / "out"), Config()).manifest
    found = {e.section_id: e.num_spots + e.rejected.get("no_tissue", 0) for e in manifest.sections}
    assert found == {"B4": 283, "C2": 187, "C3": 180, "C4": 184, "C5": 181}
    assert all(e.rejected.get("no_tissue", 0) <= 3 for e in manifest.sections)
    assert manifest.mpp == 0.69
    read_everything(str(tmp_path / "out"))
    slide = {"section_id": "C5", "patient_id": "C", "format": "slide", "image": str(data / "slides" / "C5_aperio.svs")}
    entry = prepare(write_sheet(tmp_path, [slide]), str(tmp_path / "slide"), Config()).manifest.sections[0]
    assert 250 < entry.num_spots < 450
    assert entry.num_spots + entry.rejected["no_tissue"] == (9272 // 224) * (9901 // 224)
