"""A tile table prepared again: what is redone, and what survives a crash or a rival."""

import csv
import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import tifffile
from prepared_tables import add_count, copy_of, edit_counts, files, read_everything, run, write_sheet

from ingest import prepare as prepare_module
from mclstexp import storage
from mclstexp.data.schema import GENE_SCHEMA, MANIFEST, load_genes, load_manifest
from mclstexp.data.table import read_counts, read_sentence
from mclstexp.errors import ConflictError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


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
        selection = pd.read_csv(folder / "P2S1_selection.tsv", sep="\t")
        selection.assign(pixel_x=selection.pixel_x + 1).to_csv(folder / "P2S1_selection.tsv", sep="\t", index=False)
    elif what == "image":
        pixels = tifffile.imread(folder / "P2S1.tif")
        pixels[0, 0] = 0
        tifffile.imwrite(folder / "P2S1.tif", pixels)
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


def test_a_table_of_before_genes_were_named_as_now_is_cut_again(two, tmp_path):
    out = tmp_path / "out"
    first = run(two, out).manifest
    genes = load_genes(str(out), first)
    counts = {entry.section_id: read_counts(str(out), entry, len(genes)).toarray() for entry in first.sections}
    names = [[f"GRCh38_{name}" if name else "" for name in column] for column in genes.to_pydict().values()]
    old = pa.table(names, GENE_SCHEMA)
    pq.write_table(old, out / first.genes_file)
    tree = json.loads((out / MANIFEST).read_text()) | {"schema_version": 3}
    tree["genes_sha256"] = hashlib.sha256((out / first.genes_file).read_bytes()).hexdigest()
    for section in tree["sections"]:
        section["fingerprint"] = f"{section['fingerprint'].split('-')[0]}-earlier"
        del section["genes"], section["counts_digest"]
    (out / MANIFEST).write_text(json.dumps(tree))

    report = run(two, out)
    named = load_genes(str(out), report.manifest)
    assert named["gene_id"].to_pylist() == [*old["gene_id"].to_pylist(), *genes["gene_id"].to_pylist()]
    for name, expected in counts.items():
        again = read_counts(str(out), report.manifest.section(name), len(named)).toarray()
        np.testing.assert_array_equal(again, np.hstack([np.zeros_like(expected), expected]))


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
prepare(sheet, out, override(Config(), {"tiles.size_px": 24, "tiles.sentence_length": 16}))
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


@pytest.mark.parametrize("where", ["local", "s3"])
def test_of_two_writers_one_wins(two, tmp_path, request, monkeypatch, where):
    out = str(tmp_path / "out") if where == "local" else request.getfixturevalue("s3") + "/out"
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
