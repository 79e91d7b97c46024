"""Settling many slides: shared tasks, requests and their order, the rate at a slow store, a process that dies."""

import os
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import boto3
import pytest
import ray
from botocore.config import Config as BotoConfig
from slow_server import slow_server
from staged_slides import INFO, Slide, stage

from mclstexp import object_store, storage
from mclstexp.prediction import finishing, ledger, run
from mclstexp.prediction.cohort import Cohort
from mclstexp.prediction.finishing import Finishing
from mclstexp.prediction.ledger import Entry
from mclstexp.prediction.pipeline import NOTHING_LEFT, WorkerCounts
from mclstexp.prediction.plan import CohortPlan, SlideSource, fingerprint
from mclstexp.prediction.publish import Outcome, Staged, finish_slide, finish_slides
from mclstexp.prediction.writers.slide import OutputInfo
from mclstexp.settings import TilesConfig

DELAY_S = 0.03
MIN_RATE = 20.0


def test_small_slides_share_a_task_and_a_large_one_has_its_own() -> None:
    finishing = Finishing("out", None, max_tasks=0)
    for number, num_parts in enumerate([1, 0, 14, 1, 40, 15, 2]):
        finishing.add(Staged(str(number), "", num_parts, ()))
    groups = [[slide.num_parts for slide in finishing._next()] for _ in range(5)]
    assert groups == [[1, 0, 14], [1], [40], [15], [2]]
    assert finishing._next() == []


def test_a_task_that_is_free_is_not_awaited_and_a_full_one_is() -> None:
    finishing = Finishing("out", None, max_tasks=0)
    for number in range(15):
        finishing.add(Staged(str(number), "", 1, ()))
        assert not finishing.is_full
    finishing.add(Staged("15", "", 1, ()))
    assert finishing.is_full


def test_claim_files_table_and_answer_come_in_this_order(
    staged: dict[str, Slide], s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.upload_folder(staged["C"].staging, f"{s3}/staging/C-key", last="slide.json")
    seen = _requests(s3, monkeypatch)
    assert finish_slide("C", f"{s3}/staging/C-key", s3, INFO, ("key",)).entry is not None

    staging = {f"GET staging/C-key/{name}" for name in ("slide.json", "thumbnail.jpg", "preview.jpg", "grid.parquet")}
    staging |= {"GET staging/C-key/tiles/00000.safetensors"}
    assert seen[:2] == ["GET ledger/C.json", "PUT ledger/C.json"]
    assert set(seen[2:7]) == staging
    assert seen[7] == "DELETE overviews/C.json"
    others = {"DELETE overviews/C.png", "DELETE geojson/C.geojson", "PUT previews/C.jpg", "PUT C.h5ad"}
    assert set(seen[8:12]) == others
    assert seen[12:15] == ["PUT C.parquet", "PUT ledger/C.json", "DELETE staging/C-key/slide.json"]
    assert len(seen) == 17, "a listing of the staging folder, and a request that empties it"
    assert storage.list_files(f"{s3}/staging") == []


def test_a_run_starts_with_one_request_per_image_and_one_per_entry(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("A.svs", "B.svs"):
        storage.write(f"{s3}/slides/{name}", b"x")
    entry = Entry(slide_id="A", key="key", state="done")
    storage.write(f"{s3}/ledger/A.json", entry.model_dump_json().encode())
    seen = _requests(s3, monkeypatch)
    size, etag = storage.size(f"{s3}/slides/A.svs"), str(storage.version(f"{s3}/slides/A.svs")).strip('"')
    assert fingerprint(f"{s3}/slides/A.svs") == f"{size}-{etag}"
    assert seen[2:] == ["HEAD slides/A.svs"]
    assert ledger.entries(s3, ["A", "B"]) == {"A": entry}
    assert seen[4:] == ["GET ledger/A.json"], "behind a listing"
    with pytest.raises(FileNotFoundError):
        fingerprint(f"{s3}/slides/none.svs")


def _requests(s3: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list to which each further request of this process is added."""
    bucket, seen, client = s3.removeprefix("s3://"), [], boto3.client("s3")
    client.meta.events.register(
        "before-send.s3", lambda request, **_: seen.append(f"{request.method} {request.url.partition(f'{bucket}/')[2]}")
    )
    monkeypatch.setattr(object_store, "client", lambda: client)
    return seen


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_small_slides_are_settled_quickly_at_a_slow_store(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's own loop and its tasks; each request to the store takes 30 ms more. Workers have started before.

    Only one slide of eight has tissue, so that the rate is that of waiting, not of a busy machine's CPUs.
    """
    names = [f"S{number:03d}" for number in range(160)]
    for number, name in enumerate(names):
        slide = stage(tmp_path / "staging", name, 6, 6)
        if number % 8:
            empty = slide.record.model_copy(update={"num_tiles": 0})
            (slide.staging / "slide.json").write_text(empty.model_dump_json())
        storage.upload_folder(slide.staging, f"{s3}/staging/{name}-key", last="slide.json")
    rows = [
        {"slide_id": name, "state": NOTHING_LEFT, "staging": f"{s3}/staging/{name}-key", "num_parts": 1}
        for name in names
    ]
    with slow_server(os.environ["AWS_ENDPOINT_URL"], DELAY_S) as endpoint:
        monkeypatch.setattr(finishing, "finish_slides", _with_endpoint(endpoint))
        settled = _cohort_run(s3, names, tmp_path)
        _settle(settled, rows[:40], monkeypatch)
        started = time.monotonic()
        _settle(settled, rows[40:], monkeypatch)
        rate = 120 / (time.monotonic() - started)
    entries = ledger.entries(s3, names)
    expected = {name: "empty" if number % 8 else "done" for number, name in enumerate(names)}
    assert {name: entry.state for name, entry in entries.items()} == expected
    assert storage.list_files(f"{s3}/staging") == []
    assert rate >= MIN_RATE


def _with_endpoint(endpoint: str):
    """`finish_slides` in a process whose client has another endpoint."""
    clients: dict[str, object] = {}

    def finish(slides: list[Staged], out: str, info: OutputInfo) -> list[Outcome]:
        if endpoint not in clients:
            config = BotoConfig(max_pool_connections=64)
            clients[endpoint] = boto3.client("s3", endpoint_url=endpoint, config=config)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(object_store, "client", lambda: clients[endpoint])
            return finish_slides(slides, out, info)

    return finish


def _cohort_run(out: str, names: list[str], folder: Path) -> run.CohortRun:
    (folder / "slide.svs").write_bytes(b"x")
    plan = CohortPlan(out, TilesConfig(), 0.5, "model", str(folder), 0)
    cohort = Cohort([SlideSource(name, "P", "", str(folder / "slide.svs"), None) for name in names], plan)
    vars(cohort)["_answer_keys"] = dict.fromkeys(names, ("key",))
    context = run.RunContext(None, cohort, out, ray.put(INFO), WorkerCounts(2, 2, False))
    return run.CohortRun(context, run.Report(), lambda: None)


def _settle(cohort_run: run.CohortRun, rows: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "pipeline", lambda *arguments: SimpleNamespace(iter_rows=lambda: iter(rows)))
    cohort_run.run([row["slide_id"] for row in rows])


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_slide_that_kills_its_process_stops_none_of_its_task(
    staged: dict[str, Slide], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, out = ledger.commit, str(tmp_path / "out")

    def deadly_commit(out: str, new: Entry, claimed: str) -> None:
        if new.slide_id == "B":
            os.kill(os.getpid(), signal.SIGKILL)
        commit(out, new, claimed)

    def finish(*arguments: object) -> list[Outcome]:
        with pytest.MonkeyPatch.context() as patch:  # in the task's process
            patch.setattr(ledger, "commit", deadly_commit)
            return finish_slides(*arguments)

    monkeypatch.setattr(finishing, "finish_slides", finish)
    monkeypatch.setattr(finishing, "MAX_RETRIES", 0)
    under_way = Finishing(out, ray.put(INFO), max_tasks=0)
    for name in "ABC":
        shutil.copytree(staged[name].staging, tmp_path / f"{name}-key")
        under_way.add(Staged(name, str(tmp_path / f"{name}-key"), 1, ("key",)))
    under_way._max_tasks = 2
    under_way._start()
    assert len(under_way._tasks) == 1, "all in one task"
    outcomes: dict[str, Outcome] = {}
    while not under_way.is_idle:
        outcomes |= {outcome.slide_id: outcome for outcome in under_way.collect(wait=True)}
    assert {name: outcome.entry is not None for name, outcome in outcomes.items()} == {"A": True, "B": False, "C": True}
    assert re.match("publishing it failed", outcomes["B"].fault)
    assert outcomes["B"].has_claimed
    assert {name: entry.state for name, entry in ledger.entries(out, "ABC").items()} == {
        **dict.fromkeys("AC", "done"),
        "B": "publishing",
    }
