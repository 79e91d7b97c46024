"""From a sample sheet to a tile table: what is in it, what is redone, and what survives a crash or a rival."""

import csv
import gzip
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import openslide
import pandas as pd
import pyarrow.parquet as pq
import pytest
import ray
import tifffile
from PIL import Image

from ingest import prepare as prepare_module
from ingest.prepare import plan, prepare
from mclstexp import storage
from mclstexp.config import Config, override
from mclstexp.data.images import decode_tile
from mclstexp.data.schema import MANIFEST, REJECT_SCHEMA, load_genes, load_manifest
from mclstexp.data.table import read_columns, read_counts, read_sentence, read_thumbnail
from mclstexp.errors import ConfigError, ConflictError, SheetError, SourceError, TableError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
SETTINGS = {"tiles.size_px": 32, "tiles.sentence_length": 16, "tiles.encoding": "png"}
CONFIG = override(Config(), SETTINGS)
ROOT = Path(__file__).parents[1]


def copy_of(cohort, folder, names, **changes):
    """Copies some sections of the cohort, with other cells where `changes` says so; returns the sheet."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(cohort, newline="") as file:
        rows = [row | changes for row in csv.DictReader(file) if row["section_id"] in names]
    for row in rows:
        for column in ("image", "expression", "positions", "labels"):
            if row[column]:
                shutil.copy(Path(cohort).parent / row[column], folder / row[column])
    return write_sheet(folder, rows)


def write_sheet(folder, rows):
    with open(folder / "samples.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return str(folder / "samples.csv")


def edit_counts(sheet, section_id, edit):
    path = Path(sheet).parent / f"{section_id}.tsv.gz"
    table = edit(pd.read_csv(path, sep="\t", index_col=0))
    path.write_bytes(gzip.compress(table.to_csv(sep="\t").encode()))


def add_count(table):
    table.iloc[7, 3] += 1
    return table


def run(sheet, out, **settings):
    return prepare(sheet, str(out), override(CONFIG, settings), progress=False)


def read_everything(root):
    """Reads and verifies every sentence; returns the spot ids by section."""
    manifest = load_manifest(root)
    load_genes(root, manifest)
    spots = {}
    for entry in manifest.sections:
        tables = [read_sentence(root, entry, index) for index in range(len(entry.row_groups))]
        spots[entry.section_id] = [name for table in tables for name in table["spot_id"].to_pylist()]
        assert len(spots[entry.section_id]) == entry.num_spots
    return spots


def files(root):
    return {uri: storage.version(uri) for uri in storage.list_files(str(root)) if not uri.endswith(".lock")}


@pytest.fixture(scope="module")
def two(cohort, tmp_path_factory):
    """The sheet of two measured sections of different patients."""
    return copy_of(cohort, tmp_path_factory.mktemp("two"), ["P1S1", "P2S1"])


@pytest.fixture
def own_two(cohort, tmp_path):
    """The same, to be changed."""
    return copy_of(cohort, tmp_path / "cohort", ["P1S1", "P2S1"])


# ---------------------------------------------------------------- content


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
    places = pd.read_csv(folder / "P1S1_selection.tsv", sep="\t").query("selected == 1")
    places.index = places.x.astype(str) + "x" + places.y.astype(str)
    table = read_columns(root, entry, ["spot_id", "patient_id", "array_row", "array_col", "x_px", "x_um"]).to_pandas()
    assert sorted(table.spot_id) == sorted(places.index)
    assert set(table.patient_id) == {"P1"}
    expected = places.loc[table.spot_id]
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
    with pytest.raises(SourceError, match=r"P1S1.*labels.tsv: none of its 1 rows is of one of the section's"):
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
    """Tells whether a tile and half a tile around it show no stain: a mask is smooth over some micrometres."""
    top, left = (max(0, 32 * place - 16) for place in (row, column))
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
    places = pd.read_csv(path, sep="\t")
    places.loc[0, ["pixel_x", "selected"]] = [-5, 1]
    places.loc[1, ["pixel_x", "pixel_y", "selected"]] = [150, 3, 1]
    places.loc[2, ["pixel_x", "pixel_y", "selected"]] = [17, 17, 1]
    places.loc[3, "selected"] = 0
    places.drop(index=4).to_csv(path, sep="\t", index=False)
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


# ---------------------------------------------------------------- what is redone


def test_second_run_does_nothing(two, tmp_path):
    out = tmp_path / "out"
    first = run(two, out)
    assert (first.redone, first.unchanged, first.removed) == (("P1S1", "P2S1"), (), ())
    before, times = files(out), {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
    second = run(two, out)
    assert (second.redone, second.unchanged) == ((), ("P1S1", "P2S1"))
    assert files(out) == before
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
    assert second.manifest == first.manifest


def test_sources_that_only_moved_are_not_redone(cohort, own_two, tmp_path):
    run(own_two, tmp_path / "out")
    moved = copy_of(cohort, tmp_path / "elsewhere", ["P1S1", "P2S1"])
    assert run(moved, tmp_path / "out").redone == ()


@pytest.mark.parametrize("what", ["counts", "positions", "image", "patient"])
def test_only_the_changed_section_is_redone(own_two, tmp_path, what):
    out, folder = tmp_path / "out", Path(own_two).parent
    before = run(own_two, out).manifest
    if what == "counts":
        edit_counts(own_two, "P2S1", add_count)
    elif what == "positions":
        places = pd.read_csv(folder / "P2S1_selection.tsv", sep="\t")
        places.assign(pixel_x=places.pixel_x + 1).to_csv(folder / "P2S1_selection.tsv", sep="\t", index=False)
    elif what == "image":
        shutil.copy(folder / "P1S1.tif", folder / "P2S1.tif")
    else:
        text = Path(own_two).read_text()
        Path(own_two).write_text(text.replace("P2S1,P2,", "P2S1,P9,"))
    report = run(own_two, out)
    assert (report.redone, report.unchanged) == (("P2S1",), ("P1S1",))
    assert report.manifest.section("P1S1") == before.section("P1S1")
    assert report.manifest.section("P2S1").file != before.section("P2S1").file
    read_everything(str(out))
    if what == "patient":
        assert report.manifest.section("P2S1").patient_id == "P9"


def test_changed_tile_settings_redo_all(two, tmp_path):
    run(two, tmp_path / "out")
    for settings in ({"tiles.size_px": 24}, {"tiles.sentence_length": 8}, {"tiles.min_tissue": 0.2}):
        report = run(two, tmp_path / "out", **settings)
        assert report.redone == ("P1S1", "P2S1")
        assert run(two, tmp_path / "out", **settings).redone == ()
    assert run(two, tmp_path / "out", **settings, **{"tiles.allow_upsampling": True}).redone == ()


def test_sections_leave_with_the_sheet_and_their_files_one_run_later(own_two, cohort, tmp_path):
    out = tmp_path / "out"
    old = run(own_two, out).manifest.section("P2S1")
    with open(own_two, newline="") as file:
        rows = list(csv.DictReader(file))
    write_sheet(Path(own_two).parent, rows[:1])
    report = run(own_two, out)
    assert (report.redone, report.unchanged, report.removed) == ((), ("P1S1",), ("P2S1",))
    assert list(read_everything(str(out))) == ["P1S1"]
    read_sentence(str(out), old, 0)  # a reader of the last manifest can finish
    write_sheet(Path(own_two).parent, rows)
    again = run(own_two, out).manifest
    assert not storage.exists(storage.join(str(out), old.file))
    named = {entry.file for entry in again.sections} | {entry.rejects_file for entry in again.sections}
    assert {f"{path.parent.name}/{path.name}" for path in out.rglob("P*.parquet")} == named


def test_gene_table_only_grows(own_two, tmp_path):
    out = str(tmp_path / "out")
    first = run(own_two, out).manifest
    genes = load_genes(out, first)["gene_id"].to_pylist()
    old, counts = first.section("P2S1"), read_counts(out, first.section("P1S1")).toarray()

    def other_genes(table):
        return table.rename(columns={genes[0]: "ENSG00000141736.14"}).iloc[:, ::-1]

    edit_counts(own_two, "P2S1", other_genes)
    second = run(own_two, out).manifest
    assert load_genes(out, second)["gene_id"].to_pylist() == [*genes, "ENSG00000141736"]
    assert load_genes(out, second)["ensembl_id"].to_pylist()[-1] == "ENSG00000141736"
    np.testing.assert_array_equal(read_counts(out, second.section("P1S1")).toarray()[:, :-1], counts)
    moved = read_counts(out, second.section("P2S1")).toarray()
    before = read_counts(out, old, len(genes)).toarray()
    np.testing.assert_array_equal(moved[:, -1], before[:, 0])
    np.testing.assert_array_equal(moved[:, 1:-1], before[:, 1:])
    assert moved[:, 0].sum() == 0


# ---------------------------------------------------------------- crash and rivals


KILLED = """
import sys, time
import ray
from ingest.prepare import prepare
from mclstexp import storage
from mclstexp.config import Config, override
sheet, out, address = sys.argv[1:]
ray.init(address=address, log_to_driver=False)
storage.publish = lambda *_: time.sleep(600)
prepare(sheet, out, override(Config(), {"tiles.size_px": 24, "tiles.sentence_length": 16}), progress=False)
"""


@pytest.mark.slow
def test_killed_midway_the_old_table_stays_and_the_next_run_completes(two, tmp_path):
    out = tmp_path / "out"
    old = run(two, out).manifest
    before = set(out.glob("tiles/*"))
    address = ray.get_runtime_context().gcs_address
    with subprocess.Popen([sys.executable, "-c", KILLED, two, str(out), address]) as victim:
        deadline = time.monotonic() + 60
        while set(out.glob("tiles/*.parquet")) == before:
            assert victim.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        victim.send_signal(signal.SIGKILL)
    left_behind = set(out.glob("tiles/*")) - before
    assert left_behind, "nothing was half done: the fault did not hit"
    assert load_manifest(str(out)) == old
    read_everything(str(out))
    report = run(two, out, **{"tiles.size_px": 24})
    assert report.redone == ("P1S1", "P2S1")
    assert report.manifest.tile_size_px == 24
    read_everything(str(out))
    assert not left_behind & set(out.glob("tiles/*.parquet"))


@pytest.mark.parametrize("place", ["local", "s3"])
def test_of_two_writers_one_wins(two, tmp_path, request, monkeypatch, place):
    out = str(tmp_path / "out") if place == "local" else request.getfixturevalue("s3") + "/out"
    run(two, out)
    both_ready, publish, outcomes = threading.Barrier(2, timeout=60), prepare_module._publish, {}

    def publish_together(*arguments):
        both_ready.wait()
        return publish(*arguments)

    def write(size):
        try:
            outcomes[size] = run(two, out, **{"tiles.size_px": size}).manifest
        except ConflictError as error:
            outcomes[size] = error

    monkeypatch.setattr(prepare_module, "_publish", publish_together)
    writers = [threading.Thread(target=write, args=(size,)) for size in (24, 28)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    won = [size for size, outcome in outcomes.items() if not isinstance(outcome, ConflictError)]
    assert len(outcomes) == 2
    assert len(won) == 1
    assert load_manifest(out) == outcomes[won[0]]
    assert load_manifest(out).tile_size_px == won[0]
    read_everything(out)
    monkeypatch.undo()
    loser = next(size for size in outcomes if size not in won)
    assert run(two, out, **{"tiles.size_px": loser}).redone == ("P1S1", "P2S1")
    read_everything(out)


def test_a_writer_that_started_later_keeps_its_files(own_two, tmp_path, monkeypatch):
    """While one writer cleans up, another has read the new manifest and written files: they must survive."""
    out = str(tmp_path / "out")
    run(own_two, out)
    run(own_two, out, **{"tiles.size_px": 24})
    delete, second = storage.delete, {}

    def second_writer_first(uri):
        if not second:
            second["report"] = None
            second["report"] = run(own_two, out, **{"tiles.size_px": 20})
        delete(uri)

    monkeypatch.setattr(storage, "delete", second_writer_first)
    run(own_two, out, **{"tiles.size_px": 28})
    assert load_manifest(out) == second["report"].manifest
    assert load_manifest(out).tile_size_px == 20
    read_everything(out)


def test_files_of_others_are_left_alone(two, tmp_path):
    out = tmp_path / "out"
    (out / "tiles").mkdir(parents=True)
    (out / "tiles" / "notes.txt").write_text("mine")
    (out / "other").mkdir()
    (out / "other" / f"x-{'0' * 32}.parquet").write_text("mine")
    (out / "tiles" / f"P1S1-{'0' * 32}.parquet").write_text("left by a killed run")
    run(two, out)
    assert (out / "tiles" / "notes.txt").exists()
    assert (out / "other" / f"x-{'0' * 32}.parquet").exists()
    assert not (out / "tiles" / f"P1S1-{'0' * 32}.parquet").exists()


def test_object_storage_from_end_to_end(own_two, s3):
    folder = Path(own_two).parent
    for path in folder.iterdir():
        storage.upload(path, f"{s3}/cohort/{path.name}")
    out = f"{s3}/tables/one"
    first = run(f"{s3}/cohort/samples.csv", out)
    assert first.redone == ("P1S1", "P2S1")
    assert {name: len(spots) for name, spots in read_everything(out).items()} == {"P1S1": 36, "P2S1": 36}
    assert run(f"{s3}/cohort/samples.csv", out).redone == ()
    edit_counts(own_two, "P2S1", add_count)
    storage.upload(folder / "P2S1.tsv.gz", f"{s3}/cohort/P2S1.tsv.gz")
    assert run(f"{s3}/cohort/samples.csv", out).redone == ("P2S1",)
    read_everything(out)


def test_a_blank_slide_has_no_spots_and_stops_nobody(cohort, tmp_path):
    sheet = copy_of(cohort, tmp_path / "cohort", ["P1S1", "P4S1"])
    Image.new("RGB", (300, 300), "white").save(tmp_path / "cohort" / "P4S1.tif")
    entry = run(sheet, tmp_path / "out").manifest.section("P4S1")
    assert (entry.num_spots, entry.row_groups, entry.rejected) == (0, (), {"no_tissue": 81})
    assert read_everything(str(tmp_path / "out"))["P4S1"] == []
    assert read_columns(str(tmp_path / "out"), entry, ["spot_id"]).num_rows == 0


# ---------------------------------------------------------------- refusals


def test_a_section_that_fails_does_not_stop_the_others(own_two, tmp_path):
    def spoil(table):
        return table.add(np.where(table.index == "2x3", 0.5, 0.0), axis=0)

    edit_counts(own_two, "P2S1", spoil)
    with pytest.raises(
        SourceError, match=r"1 of 2 section\(s\).*(?s:.*)section P2S1: P2S1.tsv.gz: gene \w+ of spot 2x3"
    ):
        run(own_two, tmp_path / "out")
    assert list(read_everything(str(tmp_path / "out"))) == ["P1S1"]


def test_a_section_that_can_no_longer_be_cut_keeps_its_last_version(own_two, tmp_path):
    run(own_two, tmp_path / "out")
    before = load_manifest(str(tmp_path / "out")).section("P1S1")
    slide = Path(own_two).parent / "P1S1.tif"
    intact = slide.read_bytes()
    tifffile.imwrite(slide, np.full((64, 64, 3), 255, np.uint8))
    with pytest.raises(SourceError, match="P1S1"):
        run(own_two, tmp_path / "out")
    assert load_manifest(str(tmp_path / "out")).section("P1S1") == before
    slide.write_bytes(intact + b"\0")
    assert run(own_two, tmp_path / "out").redone == ("P1S1",)


def test_a_new_section_of_nearly_the_same_resolution_leaves_the_others_alone(cohort, tmp_path):
    sheet = copy_of(cohort, tmp_path / "cohort", ["P1S1", "P1S2"])
    run(sheet, tmp_path / "out")
    new = Path(copy_of(cohort, tmp_path / "new", ["P2S1"], mpp="0.995")).read_text()
    (row,) = csv.DictReader(new.splitlines())
    for column in ("image", "expression", "positions", "labels"):
        shutil.copy(tmp_path / "new" / row[column], tmp_path / "cohort")
    with open(sheet, "a", newline="") as file:
        csv.DictWriter(file, row.keys()).writerow(row)
    assert run(sheet, tmp_path / "out").redone == ("P2S1",)


def test_faults_in_headers_end_the_run_before_any_work(own_two, tmp_path):
    folder = Path(own_two).parent
    (folder / "P1S1.tif").write_bytes((folder / "P1S1.tif").read_bytes()[:300])
    edit_counts(own_two, "P2S1", lambda table: table.set_axis([table.columns[0]] * table.shape[1], axis=1))
    with pytest.raises(
        SourceError, match=r"2 section\(s\)(?s:.*)section P1S1: image P1S1.tif(?s:.*)section P2S1: .*gene"
    ):
        run(own_two, tmp_path / "out")
    assert storage.list_files(str(tmp_path / "out")) == []


def test_sheet_faults_come_before_everything(tmp_path):
    (tmp_path / "samples.csv").write_text("section_id,patient_id,format,image\n../x,P,slide,none.tif\n")
    with pytest.raises(SheetError, match=r"2 fault\(s\)"):
        run(str(tmp_path / "samples.csv"), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "settings", "error", "reason"),
    [
        ({"mpp": "1.2"}, {}, SourceError, r"section P1S1: mpp is 1\.2 in the sheet and 1 in its image"),
        ({}, {"tiles.mpp": 0.5}, ConfigError, "would enlarge P1S1 by 2"),
        ({"spot_diameter_um": "100"}, {}, SourceError, "section P1S1: its spots lie 32 um apart"),
    ],
)
def test_resolutions_that_do_not_fit_are_refused(cohort, tmp_path, changes, settings, error, reason):
    sheet = copy_of(cohort, tmp_path / "cohort", ["P1S1"], **changes)
    with pytest.raises(error, match=reason):
        run(sheet, tmp_path / "out", **settings)
    assert not storage.exists(str(tmp_path / "out" / MANIFEST))


def test_upsampling_can_be_allowed_and_mpp_comes_from_the_file(cohort, tmp_path):
    sheet = copy_of(cohort, tmp_path / "cohort", ["P1S1"], mpp="")
    manifest = run(sheet, tmp_path / "out", **{"tiles.mpp": 0.5, "tiles.allow_upsampling": True}).manifest
    assert (manifest.mpp, manifest.sections[0].source_mpp) == (0.5, 1.0)
    read_everything(str(tmp_path / "out"))


def test_no_resolution_anywhere_is_refused(cohort, tmp_path):
    sheet = copy_of(cohort, tmp_path / "cohort", ["P1S1"], mpp="")
    path = tmp_path / "cohort" / "P1S1.tif"
    tifffile.imwrite(path, tifffile.imread(path, level=0), photometric="rgb", tile=(256, 256))
    with pytest.raises(SourceError, match="section P1S1: neither the sheet nor its image says the resolution"):
        run(sheet, tmp_path / "out")


def test_sections_of_different_resolution_need_a_target(cohort, tmp_path):
    sheet = copy_of(cohort, tmp_path / "cohort", ["P1S1", "P2S1"])
    text = Path(sheet).read_text().splitlines()
    Path(sheet).write_text("\n".join([*text[:2], text[2].replace(",1.0,", ",1.04,")]) + "\n")
    with pytest.raises(ConfigError, match=r"tiles\.mpp is empty.*P1S1 has 1 um/px, P2S1 1\.04"):
        run(sheet, tmp_path / "out")


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda t: t.assign(pixel_x=t.pixel_x + 5000), "only 0 of 36 spots lie on its image"),
        (lambda t: t.assign(pixel_x=t.pixel_x * 0.1 + 16, pixel_y=t.pixel_y * 0.1 + 16), "on tissue"),
    ],
)
def test_positions_of_another_image_are_refused(cohort, tmp_path, edit, reason):
    sheet = copy_of(cohort, tmp_path / "cohort", ["P1S1"], spot_diameter_um="")
    path = tmp_path / "cohort" / "P1S1_selection.tsv"
    edit(pd.read_csv(path, sep="\t")).to_csv(path, sep="\t", index=False)
    with pytest.raises(SourceError, match=reason):
        run(sheet, tmp_path / "out")


def test_a_table_of_another_schema_version_is_not_overwritten(two, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / MANIFEST).write_text('{"schema_version": 99}')
    with pytest.raises(TableError, match=r"schema version 99.*or remove"):
        run(two, out)
    assert (out / MANIFEST).read_text() == '{"schema_version": 99}'


# ---------------------------------------------------------------- plan and job


def test_plan_says_what_would_be_done_and_does_nothing(own_two, tmp_path):
    out = str(tmp_path / "out")
    text = plan(own_two, out, CONFIG)
    assert "to cut     2 section(s)" in text
    assert "32 px at 1 um/px = 32 um" in text
    assert storage.list_files(out) == []
    run(own_two, out)
    edit_counts(own_two, "P2S1", add_count)
    text = plan(own_two, out, override(CONFIG, {}))
    assert "unchanged  1 section(s)" in text
    assert "P2S1: patient P2, legacy_st, 1 um/px, exact crops" in text
    assert "resampled, 2 slide px a tile px" in plan(own_two, out, override(CONFIG, {"tiles.mpp": 2.0}))


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
    manifest = prepare(str(data / "samples.csv"), str(tmp_path / "out"), Config(), progress=False).manifest
    found = {e.section_id: e.num_spots + e.rejected.get("no_tissue", 0) for e in manifest.sections}
    assert found == {"B4": 283, "C2": 187, "C3": 180, "C4": 184, "C5": 181}
    assert all(e.rejected.get("no_tissue", 0) <= 3 for e in manifest.sections)
    assert manifest.mpp == 0.69
    read_everything(str(tmp_path / "out"))
    slide = {"section_id": "C5", "patient_id": "C", "format": "slide", "image": str(data / "slides" / "C5_aperio.svs")}
    entry = prepare(
        write_sheet(tmp_path, [slide]), str(tmp_path / "slide"), Config(), progress=False
    ).manifest.sections[0]
    assert 250 < entry.num_spots < 450
    assert entry.num_spots + entry.rejected["no_tissue"] == (9272 // 224) * (9901 // 224)
