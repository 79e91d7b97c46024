"""From slides to rows of parts: every part once, pixels as the model's tiles were stored, faults as rows."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import round_slide
import tifffile
from PIL import Image
from random_version import random_version
from round_slide import MPP, SIZE, TILE, tissue_image

from mclstexp import storage
from mclstexp.errors import ResourceError, SourceError
from mclstexp.prediction import pipeline
from mclstexp.prediction.cohort import POSITION_SCHEMA
from mclstexp.prediction.inspect import inspect
from mclstexp.prediction.parts import GRID, PART_TILES, num_parts, part_name
from mclstexp.prediction.pipeline import (
    FAILED,
    NOTHING_LEFT,
    QUARANTINED,
    STRETCH_PARTS,
    TILES,
    Inspect,
    Read,
    Row,
    WorkerCounts,
    Write,
    worker_counts,
)
from mclstexp.prediction.plan import SlideSource
from mclstexp.settings import TilesConfig
from mclstexp.slides.codec import decode_tile, encode_tile
from mclstexp.slides.slide import Slide

ROOT = Path(__file__).parents[1]
make_plan = partial(round_slide.make_plan, tiles=TilesConfig(size_px=TILE, min_tissue=0.3, jpeg_quality=85))


def write_slide(path, image, mpp=MPP):
    unit = {"resolution": (1e4 / mpp,) * 2, "resolutionunit": "CENTIMETER"} if mpp else {}
    tifffile.imwrite(path, image, tile=(128, 128), photometric="rgb", compression="deflate", **unit)


def slide_of(folder, name, image, **options):
    write_slide(folder / f"{name}.tif", image, **options)
    return SlideSource(name, f"P{name}", "", str(folder / f"{name}.tif"), None)


def rows_of(source):
    fields = {name: [value] for name, value in vars(source).items() if name != "mpp"}
    return {name: np.array(value, object) for name, value in fields.items()} | {
        "mpp": np.array([np.nan if source.mpp is None else source.mpp])
    }


def read_all(source, plan, reader=None):
    """All rows of one slide, as task and actor give them, without Ray."""
    reader = reader or Read(plan)
    return [flat(row) for stretch in Inspect(plan)(rows_of(source)) for row in reader(stretch)]


def flat(row):
    return {name: values[0] for name, values in row.items()}


def expected_tiles(image, staging, part):
    table = pq.read_table(pa.BufferReader(storage.read(storage.join(staging, GRID))))
    rows = slice(part * PART_TILES, (part + 1) * PART_TILES)
    tiles = []
    for x, y in zip(table["x_px"].to_numpy()[rows], table["y_px"].to_numpy()[rows], strict=True):
        left, top = int(x) - TILE // 2, int(y) - TILE // 2
        tiles.append(decode_tile(encode_tile(image[top : top + TILE, left : left + TILE], "jpeg", 85)))
    return np.stack(tiles)


def require_part(row, image):
    """Its tiles are the image's crops after the same JPEG, the rest is zero."""
    expected = expected_tiles(image, row["staging"], row["part"])
    assert row["pixels"].shape == (PART_TILES, TILE, TILE, 3)
    assert row["pixels"].dtype == np.uint8
    assert row["num_tiles"] == len(expected)
    np.testing.assert_array_equal(row["pixels"][: len(expected)], expected)
    assert not row["pixels"][len(expected) :].any()
    assert row["complete"].tolist() == [index < len(expected) for index in range(PART_TILES)]


@pytest.fixture
def pixels():
    """In the place of the model: answers with a part's pixels themselves."""

    class Pixels:
        def __init__(self, *model):
            pass

        def __call__(self, batch):
            row = Row.of(batch)
            assert row.complete[: row.num_tiles].all()
            assert not row.complete[row.num_tiles :].any()
            return replace(row, pixels=None, complete=None, answer=row.pixels[: row.num_tiles].tobytes()).batch()

    return Pixels


@pytest.mark.ray
@pytest.mark.slow
def test_a_cohort_gives_one_row_per_part_and_per_fault(ray_session, tmp_path, monkeypatch, pixels):
    images = {name: tissue_image(seed) for seed, name in enumerate(("a", "b", "done"))}
    sources = {name: slide_of(tmp_path, name, image) for name, image in images.items()}
    sources["empty"] = slide_of(tmp_path, "empty", np.full((SIZE, SIZE, 3), 240, np.uint8))
    sources["no_mpp"] = slide_of(tmp_path, "no_mpp", images["a"], mpp=None)
    sources["cut"] = slide_of(tmp_path, "cut", images["a"])
    cut = Path(sources["cut"].image)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    sources["gone"] = replace(sources["a"], slide_id="gone", image=str(tmp_path / "gone.tif"))
    plan = make_plan(tmp_path)
    half, done = inspect(sources["b"], plan), inspect(sources["done"], plan)
    storage.write(storage.join(half.staging, part_name(1)), b"x")
    for part in range(num_parts(done.record.num_tiles)):
        storage.write(storage.join(done.staging, part_name(part)), b"x")

    monkeypatch.setattr(pipeline, "Answer", pixels)
    stream = pipeline.pipeline(list(sources.values()), plan, random_version(), WorkerCounts(2, 1, False))
    rows = [flat(row) for row in stream.iter_batches(batch_size=1, batch_format="numpy")]

    tiles = [row for row in rows if row["state"] == TILES]
    total = num_parts(half.record.num_tiles)
    assert total >= 3
    parts = {name: sorted(int(row["part"]) for row in tiles if row["slide_id"] == name) for name in sources}
    assert parts.pop("a") == list(range(int(next(row["num_left"] for row in tiles if row["slide_id"] == "a"))))
    assert parts.pop("b") == [part for part in range(total) if part != 1]
    assert not any(parts.values())
    for row in tiles:
        expected = expected_tiles(images[row["slide_id"]], row["staging"], row["part"])
        assert storage.read(storage.join(row["staging"], part_name(row["part"]))) == expected.tobytes()
        assert row["num_tiles"] == len(expected)
        assert not {"pixels", "complete", "answer"} & set(row)
    others = {row["slide_id"]: row for row in rows if row["state"] != TILES}
    assert len(others) == len(rows) - len(tiles)
    assert {name: row["state"] for name, row in others.items()} == {
        "done": NOTHING_LEFT,
        "empty": NOTHING_LEFT,
        "no_mpp": QUARANTINED,
        "cut": QUARANTINED,
        "gone": FAILED,
    }
    assert "no resolution" in others["no_mpp"]["reason"]
    assert "cut.tif" in others["cut"]["reason"]
    assert others["done"]["staging"] == done.staging
    assert (others["done"]["num_left"], others["empty"]["num_left"]) == (0, 0)
    assert all((row["num_tiles"], row["part"]) == (0, -1) for row in others.values())


def test_a_large_slide_is_cut_into_stretches(tmp_path):
    source = slide_of(tmp_path, "a", tissue_image())
    stretches = [flat(row) for row in Inspect(make_plan(tmp_path, overlap=0.75))(rows_of(source))]
    parts = [[int(part) for part in row["parts"].split()] for row in stretches]
    assert len(stretches) >= 2
    assert [len(row) for row in parts[:-1]] == [STRETCH_PARTS] * (len(stretches) - 1)
    assert [part for row in parts for part in row] == list(range(stretches[0]["num_left"]))


def test_a_plain_image_is_a_single_stretch_and_then_closed(tmp_path):
    image, plan = tissue_image(), make_plan(tmp_path, overlap=0.75)
    Image.fromarray(image).save(tmp_path / "a.png")
    source = SlideSource("a", "P", "", str(tmp_path / "a.png"), MPP)
    (row,) = (flat(row) for row in Inspect(plan)(rows_of(source)))
    assert len(row["parts"].split()) == row["num_left"] > STRETCH_PARTS
    reader = Read(plan)
    assert len(read_all(source, plan, reader)) == row["num_left"]
    assert reader._reader._slide is None


def test_tiles_without_pixels_are_marked(tmp_path):
    source = slide_of(tmp_path, "a", tissue_image())
    with tifffile.TiffFile(source.image, mode="r+b") as tiff:
        tag = tiff.pages[0].tags["TileByteCounts"]
        tag.overwrite([0, *tag.value[1:]])
    given = {"a": pa.table([["0", "1"], [20.0, 300.0], [20.0, 300.0]], schema=POSITION_SCHEMA)}
    (row,) = read_all(source, make_plan(tmp_path, positions=given))
    assert row["num_tiles"] == 2
    assert row["complete"][:3].tolist() == [False, True, False]
    assert not row["pixels"][0].any()


def test_png_tiles_stay_exact(tmp_path):
    image = tissue_image()
    source = slide_of(tmp_path, "a", image)
    given = {"a": pa.table([["0"], [300.0], [200.0]], schema=POSITION_SCHEMA)}
    tiles = TilesConfig(size_px=TILE, encoding="png")
    (row,) = read_all(source, make_plan(tmp_path, positions=given, tiles=tiles))
    np.testing.assert_array_equal(row["pixels"][0], image[192:208, 292:308])


def failing(monkeypatch, calls):
    """Lets the given calls of read_tile (counted from 0) fail."""
    original, count = Slide.read_tile, iter(range(10**9))

    def read_tile(self, **corner):
        if next(count) in calls:
            raise SourceError("a failed read")
        return original(self, **corner)

    monkeypatch.setattr(Slide, "read_tile", read_tile)


def test_a_read_error_that_passes_costs_a_new_handle(tmp_path, monkeypatch):
    image = tissue_image()
    source, plan = slide_of(tmp_path, "a", image), make_plan(tmp_path)
    failing(monkeypatch, {300})
    reader = Read(plan)
    rows = read_all(source, plan, reader)
    assert {row["state"] for row in rows} == {TILES}
    for row in rows:
        require_part(row, image)


def test_a_read_error_that_stays_ends_the_slide_and_not_the_reader(tmp_path, monkeypatch):
    plan, reader = make_plan(tmp_path), None
    first, second = (slide_of(tmp_path, name, tissue_image()) for name in "ab")
    reader = Read(plan)
    with monkeypatch.context() as patch:
        failing(patch, {300, 301})
        rows = read_all(first, plan, reader)
    assert [(row["part"], row["state"], row["reason"]) for row in rows] == [
        (0, TILES, ""),
        (-1, QUARANTINED, "a failed read"),
    ]
    assert {row["state"] for row in read_all(second, plan, reader)} == {TILES}


def test_remote_slides_are_released_and_faults_of_the_store_may_pass(s3, tmp_path):
    image = tissue_image()
    local = slide_of(tmp_path, "a", image)
    storage.upload(local.image, f"{s3}/slides/a.tif")
    source = replace(local, image=f"{s3}/slides/a.tif")
    size = Path(local.image).stat().st_size
    plan = make_plan(tmp_path, out=f"{s3}/out", scratch_budget_bytes=size)
    reader = Read(plan)
    rows = read_all(source, plan, reader)
    assert [row["part"] for row in rows] == list(range(rows[0]["num_left"]))
    for row in rows:
        require_part(row, image)
        assert row["staging"].startswith(f"{s3}/out/staging/a-")
    other = replace(source, slide_id="b", image=f"{s3}/slides/b.tif")
    (missing,) = read_all(other, plan, reader)
    assert missing["state"] == FAILED
    storage.upload(local.image, other.image)  # fits only if nobody holds the first
    assert {row["state"] for row in read_all(other, plan, reader)} == {TILES}
    (refused,) = read_all(replace(source, slide_id="c"), replace(plan, scratch_budget_bytes=size - 1))
    assert (refused["state"], str(size) in refused["reason"]) == (FAILED, True)


def test_a_part_that_cannot_be_written_is_a_row_with_the_reason(tmp_path):
    row = Row("a", "a.tif", str(tmp_path / "staging"), part=3, num_tiles=2, num_left=1, answer=b"file")
    assert Write()(row.batch()) == replace(row, answer=None).batch()
    assert (tmp_path / "staging" / "tiles" / "00003.safetensors").read_bytes() == b"file"
    (tmp_path / "full").write_text("a file where the folder should be")
    failed = flat(Write()(replace(row, staging=str(tmp_path / "full")).batch()))
    assert (failed["state"], failed["num_tiles"]) == (FAILED, 2)
    assert "cannot write" in failed["reason"]
    untouched = replace(row, state=QUARANTINED, reason="damaged", part=-1, answer=b"")
    assert Write()(untouched.batch()) == replace(untouched, answer=None).batch()


def test_workers_share_the_cpus_that_inspection_leaves():
    assert worker_counts(3, 0) == WorkerCounts(num_readers=1, num_embedders=1, uses_gpu=False)
    assert worker_counts(8, 0) == WorkerCounts(num_readers=4, num_embedders=3, uses_gpu=False)
    assert worker_counts(8, 2) == WorkerCounts(num_readers=7, num_embedders=2, uses_gpu=True)
    assert worker_counts(64, 4) == WorkerCounts(num_readers=56, num_embedders=4, uses_gpu=True), "8 inspect"
    for too_few in ((2, 0), (1, 1)):
        with pytest.raises(ResourceError, match="prediction needs"):
            worker_counts(*too_few)


def test_tasks_start_without_torch():
    heavy = "('torch', 'mlflow', 'anndata')"
    code = f"import sys, mclstexp.prediction.pipeline; sys.exit(sum(name in sys.modules for name in {heavy}))"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


@pytest.mark.ray
@pytest.mark.slow
def test_a_slide_that_kills_its_readers_does_not_stop_the_others(ray_session, tmp_path, monkeypatch, pixels):
    class Deadly(Read):
        """A decoder that ends its process on one slide."""

        def __call__(self, rows):
            if rows["slide_id"][0].startswith("deadly"):
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(rows)

    monkeypatch.setattr(pipeline, "Read", Deadly)
    monkeypatch.setattr(pipeline, "Answer", pixels)
    names = ("deadly", "a", "b")
    sources = [slide_of(tmp_path, name, tissue_image()) for name in names]
    plan = make_plan(tmp_path)
    total = num_parts(inspect(sources[1], plan).record.num_tiles)
    # One reader: the others wait for the one that dies.
    rows = pipeline.pipeline(sources, plan, random_version(), WorkerCounts(1, 1, False)).take_all()
    assert sorted((row["slide_id"], row["part"]) for row in rows) == [(n, p) for n in "ab" for p in range(total)]
