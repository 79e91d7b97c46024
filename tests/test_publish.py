"""Publishing of staged slides, against what was staged: the library that users have reads every file back."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image
from staged_slides import CONFIDENCE, INFO, PANEL, Slide

from mclstexp import storage
from mclstexp.errors import StorageError
from mclstexp.prediction import ledger, publish, run
from mclstexp.prediction.cohort import Cohort
from mclstexp.prediction.parts import SlideRecord
from mclstexp.prediction.pipeline import NOTHING_LEFT, WorkerCounts
from mclstexp.prediction.plan import CohortPlan, SlideSource
from mclstexp.prediction.publish import PICTURES, Outcome, finish_slide, publish_slide
from mclstexp.prediction.writers.slide import OutputInfo, PredictedSlide, Writer
from mclstexp.settings import TilesConfig


@pytest.fixture(scope="module")
def slides(staged: dict[str, Slide]) -> dict[str, Slide]:
    return staged


@pytest.fixture(scope="module")
def out(slides: dict[str, Slide], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    for slide in slides.values():
        publish_slide(str(slide.staging), str(folder), INFO)
    return folder


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _require_equal(found: pd.Series, expected: pd.Series) -> None:
    """The same values, and none where there are none, whatever their pandas types."""
    pairs = [each.astype(object).to_numpy() for each in (found, expected)]
    missing = [pd.isna(values) for values in pairs]
    assert np.array_equal(*missing), found.name
    assert np.array_equal(*(values[~none] for values, none in zip(pairs, missing, strict=True))), found.name


@pytest.mark.parametrize("name", ["A", "B", "C"])
def test_the_table_is_what_was_staged_without_missing_tiles(slides: dict[str, Slide], out: Path, name: str) -> None:
    slide, file = slides[name], pq.ParquetFile(out / f"{name}.parquet")
    frame = file.read().to_pandas()
    complete = slide.grid[slide.complete].reset_index(drop=True)
    assert list(frame)[:3] == ["section_id", "patient_id", "spot_id"]
    assert list(frame)[10:] == [*CONFIDENCE, "out_of_distribution", *PANEL.gene_id]
    assert set(frame["section_id"]) == {name}
    assert set(frame["patient_id"]) == {f"{name} of µ"}
    for column in complete:
        _require_equal(frame[column], complete[column])
    for column in CONFIDENCE:
        assert np.array_equal(frame[column], getattr(slide.answer, column)[slide.complete])
    assert frame[list(PANEL.gene_id)].to_numpy().dtype == np.float32
    assert np.array_equal(frame[list(PANEL.gene_id)], slide.answer.values[slide.complete])
    assert np.array_equal(frame["out_of_distribution"], slide.answer.similarity[slide.complete] < 0.3)
    groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    assert sum(groups) == slide.complete.sum()
    assert groups[:-1] == [slide.complete[:4096].sum()] * (len(groups) - 1)
    metadata = {key.decode(): value.decode() for key, value in file.schema_arrow.metadata.items()}
    assert metadata["genes"].split(",") == list(PANEL.gene_id)
    assert metadata["symbols"].split(",") == list(PANEL.symbol)
    wanted = {"unit": INFO.unit, "model_digest": INFO.model_digest, "tile_size_px": "32", "mpp": "0.5"}
    wanted |= {"slide_fingerprint": f"print of {name}", "missing_tiles": str((~slide.complete).sum())}
    assert metadata | wanted == metadata


@pytest.mark.parametrize("name", ["A", "B", "C"])
@pytest.mark.parametrize("backed", [None, "r"])
def test_anndata_opens_the_same_values(slides: dict[str, Slide], out: Path, name: str, backed: str) -> None:
    slide, frame = slides[name], pq.read_table(out / f"{name}.parquet").to_pandas()
    data = anndata.read_h5ad(out / f"{name}.h5ad", backed=backed)
    assert data.X.dtype == np.float32
    assert np.array_equal(data.X[:], frame[list(PANEL.gene_id)])
    assert list(data.obs_names) == frame["spot_id"].tolist()
    assert list(data.obs) == [column for column in frame if column not in ("spot_id", *PANEL.gene_id)]
    for column in data.obs:
        _require_equal(data.obs[column], frame[column])
    assert np.array_equal(data.obsm["spatial"], frame[["x_px", "y_px"]])
    assert list(data.var_names) == list(PANEL.gene_id)
    assert data.var["symbol"].tolist() == list(PANEL.symbol)
    assert data.var["ensembl_id"].tolist() == list(PANEL.ensembl_id)
    origin = data.uns["prediction"]
    in_table = {key.decode(): value.decode() for key, value in pq.read_schema(out / f"{name}.parquet").metadata.items()}
    assert {key: in_table[key] for key in origin if key != "spatial_unit"} | {
        "spatial_unit": "px at slide level 0"
    } == origin
    picture = data.uns["spatial"][name]
    rgb, factors = picture["images"]["hires"], picture["scalefactors"]
    assert np.array_equal(rgb, np.asarray(Image.open(slide.staging / "thumbnail.jpg")))
    assert factors["tissue_hires_scalef"] * slide.record.width_px == pytest.approx(rgb.shape[1], abs=1)
    assert factors["spot_diameter_fullres"] == 32 * slide.record.scale
    if backed:
        data.file.close()


def test_the_preview_is_copied_as_it_is(slides: dict[str, Slide], out: Path) -> None:
    assert (out / "previews" / "A.jpg").read_bytes() == (slides["A"].staging / "preview.jpg").read_bytes()


def test_a_slide_without_tiles_has_a_preview_and_nothing_of_an_earlier_image(
    slides: dict[str, Slide], tmp_path: Path
) -> None:
    staging, folder = tmp_path / "C-key", tmp_path / "out"
    shutil.copytree(slides["C"].staging, staging)
    publish_slide(str(staging), str(folder), INFO)
    for path in PICTURES:
        storage.write(str(folder / path.format(slide_id="C")), b"drawn")
    assert len(_files(folder)) == 6
    empty = slides["C"].record.model_copy(update={"num_tiles": 0})
    (staging / "slide.json").write_text(empty.model_dump_json())
    (staging / "thumbnail.jpg").unlink()  # a slide without tiles needs none
    assert publish_slide(str(staging), str(folder), INFO) == empty
    assert list(_files(folder)) == ["previews/C.jpg"]


def test_each_writer_publishes_one_file(
    slides: dict[str, Slide], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_names(path: Path, slide: PredictedSlide) -> None:
        path.write_text("\n".join(pq.read_table(slide.table)["spot_id"].to_pylist()))

    monkeypatch.setattr(publish, "WRITERS", (*publish.WRITERS, Writer("names/{slide_id}.txt", write_names)))
    staging = tmp_path / "C-key"
    shutil.copytree(slides["C"].staging, staging)
    publish_slide(str(staging), str(tmp_path / "out"), INFO)
    assert set(_files(tmp_path / "out")) == {"C.parquet", "C.h5ad", "previews/C.jpg", "names/C.txt"}
    assert (tmp_path / "out" / "names" / "C.txt").read_text().split("\n") == slides["C"].grid["spot_id"].tolist()
    (staging / "slide.json").write_text(slides["C"].record.model_copy(update={"num_tiles": 0}).model_dump_json())
    publish_slide(str(staging), str(tmp_path / "out"), INFO)
    assert list(_files(tmp_path / "out")) == ["previews/C.jpg"]


@pytest.mark.slow
def test_the_same_bytes_later_in_another_process_and_folder(
    slides: dict[str, Slide], out: Path, tmp_path: Path
) -> None:
    time.sleep(1.1)  # times in files have seconds
    shutil.copytree(slides["A"].staging, tmp_path / "elsewhere" / "A-key")
    script = (
        "import sys; from staged_slides import INFO; from mclstexp.prediction.publish import publish_slide;"
        "publish_slide(sys.argv[1], sys.argv[2], INFO)"
    )
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{root / 'platform'}:{root}:{root / 'tests'}"}
    command = [sys.executable, "-c", script, str(tmp_path / "elsewhere" / "A-key"), str(tmp_path / "out")]
    subprocess.run(command, env=environment, check=True)
    again = _files(tmp_path / "out")
    assert set(again) == {"A.parquet", "A.h5ad", "previews/A.jpg"}
    digests = [{name: hashlib.sha256(files[name]).hexdigest() for name in again} for files in (again, _files(out))]
    assert digests[0] == digests[1]


def test_from_and_to_object_storage(slides: dict[str, Slide], out: Path, s3: str) -> None:
    storage.upload_folder(slides["A"].staging, f"{s3}/staging/A", last="slide.json")
    publish_slide(f"{s3}/staging/A", f"{s3}/out", INFO)
    published = {uri.removeprefix(f"{s3}/out/"): storage.read(uri) for uri in storage.list_files(f"{s3}/out")}
    assert published == {name: data for name, data in _files(out).items() if Path(name).stem == "A"}


def test_a_new_table_removes_the_pictures_of_the_old_one(slides: dict[str, Slide], tmp_path: Path) -> None:
    for path in PICTURES:
        for name in ("A", "B"):
            storage.write(str(tmp_path / path.format(slide_id=name)), b"drawn")
    publish_slide(str(slides["A"].staging), str(tmp_path), INFO)
    assert {path for path in _files(tmp_path) if "A" in path} == {"A.parquet", "A.h5ad", "previews/A.jpg"}
    assert {path for path in _files(tmp_path) if "B" in path} == {path.format(slide_id="B") for path in PICTURES}


@pytest.fixture
def staging(slides: dict[str, Slide], tmp_path: Path) -> Path:
    """A staging folder that finishing may remove."""
    shutil.copytree(slides["A"].staging, tmp_path / "staging" / "A-key")
    return tmp_path / "staging" / "A-key"


def _finish(staging: Path, out: Path, *other_keys: str) -> Outcome:
    return finish_slide("A", str(staging), str(out), INFO, ("key", *other_keys))


def test_finishing_publishes_enters_the_answer_and_clears_staging(
    slides: dict[str, Slide], staging: Path, out: Path, tmp_path: Path
) -> None:
    outcome = _finish(staging, tmp_path / "out")
    record, entry = slides["A"].record, ledger.entry(str(tmp_path / "out"), "A")
    assert outcome == Outcome("A", entry)
    assert entry is not None
    assert (entry.state, entry.key, entry.fingerprint) == ("done", "key", record.fingerprint)
    assert (entry.num_tiles, entry.missing_tiles, entry.reason) == (600, 7, "")
    assert not staging.exists()
    expected = {name: data for name, data in _files(out).items() if Path(name).stem == "A"}
    assert _published(tmp_path / "out") == expected


def _published(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in _files(folder).items() if not name.startswith(("ledger/", "staging/"))}


@pytest.mark.parametrize("step", ["claim_slide", "upload", "commit", "remove_staging"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_finishing_task_that_was_killed_can_be_repeated(
    staging: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, after: bool
) -> None:
    """As Ray repeats a task whose process died, before or after any step."""
    module = {"upload": storage, "remove_staging": publish}.get(step, ledger)
    original = getattr(module, step)

    def killed(*arguments: object, **options: object) -> None:
        if after:
            original(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, step, killed)
        with pytest.raises(KeyboardInterrupt):
            _finish(staging, tmp_path / "out")
    left = ledger.entry(str(tmp_path / "out"), "A")
    outcome = _finish(staging, tmp_path / "out")
    assert outcome == Outcome("A", ledger.entry(str(tmp_path / "out"), "A"))
    if left is not None and left.state == "done":
        assert outcome.entry == left, "the first answer stays"
    expected = {name: data for name, data in _files(out).items() if Path(name).stem == "A"}
    assert _published(tmp_path / "out") == expected


def test_an_answer_that_another_run_gave_is_adopted_and_its_files_stay(staging: Path, tmp_path: Path) -> None:
    assert _finish(staging, tmp_path / "first").entry is not None  # removes the staging folder: nothing else reads it
    existing = ledger.Entry(slide_id="A", key="assumed", state="done", finished="earlier")
    commit_as_another_run(tmp_path / "out", existing)
    assert _finish(staging, tmp_path / "out", "assumed") == Outcome("A", existing)
    assert _published(tmp_path / "out") == {}


def commit_as_another_run(out: Path, entry: ledger.Entry) -> None:
    claim = ledger.Entry(slide_id=entry.slide_id, key=entry.key, state="publishing")
    version = ledger.claim_slide(str(out), claim, over=ledger.stored(str(out), entry.slide_id))
    ledger.commit(str(out), entry, version)


@pytest.mark.parametrize("key", ["theirs", "key"])
def test_a_claim_that_is_lost_is_a_fault_unless_the_answer_is_the_same(
    staging: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    theirs, original = ledger.Entry(slide_id="A", key=key, state="done", finished="earlier"), publish.publish_slide

    def publish_beside_another_run(staging: str, out: str, info: OutputInfo) -> SlideRecord:
        record = original(staging, out, info)
        commit_as_another_run(Path(out), theirs)
        return record

    with monkeypatch.context() as patch:
        patch.setattr(publish, "publish_slide", publish_beside_another_run)
        outcome = _finish(staging, tmp_path / "out")
    if key == "key":
        assert outcome == Outcome("A", theirs)
        return
    assert (outcome.entry, outcome.has_claimed) == (None, True)
    assert "another run was replacing its files" in outcome.fault
    again = _finish(staging, tmp_path / "out")
    assert again.entry is not None
    assert ledger.entry(str(tmp_path / "out"), "A") == again.entry


def test_faults_before_and_after_the_claim_are_told_apart(
    staging: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*arguments: object, **options: object) -> None:
        raise StorageError("the store answered 503")

    for step, has_claimed in (("read_with_version", False), ("read", True), ("upload", True)):
        with monkeypatch.context() as patch:
            patch.setattr(storage, step, away)
            outcome = _finish(staging, tmp_path / "out")
        assert outcome == Outcome("A", fault="the store answered 503", has_claimed=has_claimed)
    (staging / "tiles" / "00001.safetensors").unlink()
    missing = _finish(staging, tmp_path / "out")
    assert (missing.has_claimed, "00001.safetensors is missing" in missing.fault) == (True, True)


@pytest.mark.parametrize(
    ("left", "stays"),
    [
        (None, False),
        (ledger.Entry(slide_id="A", key="earlier", state="done").model_dump_json(), True),
        (ledger.Entry(slide_id="A", key="ours", state="publishing").model_dump_json(), False),
    ],
    ids=["nothing", "prediction", "claim"],
)
def test_an_earlier_prediction_stays_if_finishing_tasks_die_before_the_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str | None, stays: bool
) -> None:
    out, image, entry = str(tmp_path / "out"), tmp_path / "slide.svs", tmp_path / "out" / "ledger" / "A.json"
    image.write_bytes(b"x")
    entry.parent.mkdir(parents=True)
    if left is not None:
        entry.write_text(left)
    plan = CohortPlan(out, TilesConfig(), 0.5, "model", str(tmp_path), 0)
    cohort = Cohort([SlideSource("A", "P", "", str(image), None)], plan)
    row = {"slide_id": "A", "state": NOTHING_LEFT, "staging": f"{out}/staging/A-key", "num_parts": 1}

    def dead(reference: object) -> None:
        raise ray.exceptions.WorkerCrashedError

    monkeypatch.setattr(run, "pipeline", lambda *arguments: SimpleNamespace(iter_rows=lambda: iter([row])))
    monkeypatch.setattr(run, "_MAX_PAUSE_S", 0.0)
    monkeypatch.setattr(ray, "wait", lambda references, num_returns, timeout: (references, []))
    monkeypatch.setattr(ray, "get", dead)
    report = run.Report()
    context = run.RunContext(None, cohort, out, INFO, WorkerCounts(1, 1, False))
    cohort_run = run.CohortRun(context, report, lambda: None)
    task = SimpleNamespace(remote=lambda *arguments: object())
    cohort_run._finishing._finish = SimpleNamespace(options=lambda **options: task)
    cohort_run.run(["A"])
    assert report.entries["A"].state == "failed"
    assert "publishing it failed" in report.entries["A"].reason
    assert (entry.read_text() == left) is stays
