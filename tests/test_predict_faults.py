"""Prediction while its processes are killed or its store fails: the files are those of a calm run."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from predicted_cohort import PredictedCohort, digests, job, ledger_entries, predict
from s3_server import S3Server

from mclstexp import storage
from mclstexp.errors import StorageError
from mclstexp.model.version import ModelVersion
from mclstexp.prediction import ledger

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def model(predicted_cohort: PredictedCohort) -> ModelVersion:
    return predicted_cohort.model


@pytest.fixture(scope="module")
def slides(predicted_cohort: PredictedCohort) -> Path:
    return predicted_cohort.slides


@pytest.fixture(scope="module")
def predicted(predicted_cohort: PredictedCohort) -> Path:
    """All slides predicted in one calm run."""
    return predicted_cohort.out


def _processes(word: str, of: psutil.Process | None = None) -> list[psutil.Process]:
    """Ray workers of this session, or of one of its nodes, with a word in their title."""
    found = []
    for process in (of or psutil.Process()).children(recursive=True):
        with suppress(psutil.Error):
            if word in " ".join(process.cmdline()):
                found.append(process)
    return found


def _when(condition: Callable[[], object], act: Callable[[], None]) -> threading.Thread:
    """Does something as soon as a condition holds, meanwhile."""

    def wait() -> None:
        deadline = time.monotonic() + 300
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.005)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_passing_faults_of_the_store_and_runs_with_other_settings_cost_no_slide(
    predicted: Path, model: ModelVersion, slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run claims one slide while this one publishes it, and is done with another, with pictures of its own."""
    names = ("big1", "small")
    (tmp_path / "slides").mkdir()
    for name in names:
        shutil.copy(slides / f"{name}.tif", tmp_path / "slides")
    original, out, tries = ledger.commit, str(tmp_path / "out"), Counter()

    def commit(out: str, new: ledger.Entry, claimed: str) -> None:
        tries[new.slide_id] += 1
        turn = new.slide_id, tries[new.slide_id]
        if turn in (("big1", 1), ("small", 1)):
            mine = ledger.entry(out, new.slide_id)
            key = "theirs" if new.slide_id == "big1" else new.key
            theirs = ledger.Entry(slide_id=new.slide_id, key=key, state="publishing", genes="G")
            version = ledger.claim_slide(out, theirs, over=mine)
            if new.slide_id == "small":
                original(out, new.model_copy(update={"genes": "G"}), version)
        if turn == ("big1", 2):
            raise StorageError("the store said 503")
        original(out, new, claimed)

    monkeypatch.setattr(ledger, "commit", commit)
    report = predict(model, tmp_path / "slides", out, (model.panel.names()[2],))
    assert (report.counts(), tries) == ({"done": 2}, {"big1": 3, "small": 2})
    assert ledger_entries(tmp_path / "out") == {name: report.entries[name].model_dump() for name in names}
    files, expected = digests(tmp_path / "out"), digests(predicted)
    assert files == {path: digest for path, digest in expected.items() if path in files}
    assert {"small.parquet", "overviews/small.png", "geojson/small.geojson"} < set(files)


def test_a_killed_embedder_changes_nothing(model: ModelVersion, slides: Path, predicted: Path, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill() -> None:
        for process in _processes("_Predict"):
            process.kill()
            killed.append(process.pid)

    killer = _when(lambda: list(tmp_path.rglob("*.safetensors")), kill)
    report = predict(model, slides, tmp_path, (model.panel.names()[2],))
    killer.join()
    assert killed, "the fault must have hit"
    assert report.counts() == {"done": 3, "empty": 1, "quarantined": 1}
    assert digests(tmp_path) == digests(predicted)


@contextmanager
def _second_node() -> Iterator[psutil.Process]:
    """A node process beside this session's Ray, with three CPUs."""
    import ray

    address = ray.get_runtime_context().gcs_address
    with tempfile.TemporaryDirectory(prefix="node-") as folder:  # a short path, for sockets
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={address}"]
        command += ["--num-cpus=3", f"--object-store-memory={200 * 2**20}", f"--temp-dir={folder}/r"]
        with open(Path(folder, "log"), "w") as log:
            node = psutil.Popen([*command, "--include-log-monitor=false"], stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 240
            while sum(entry["Alive"] for entry in ray.nodes()) < 2:
                assert time.monotonic() < deadline, Path(folder, "log").read_text()[-2000:]
                time.sleep(0.2)
            yield node
        finally:
            _kill_node(node)


def _kill_node(node: psutil.Process) -> None:
    """Kills a node with all that it runs, as a machine that is switched off."""
    with suppress(psutil.NoSuchProcess):
        family = [node, *node.children(recursive=True)]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=60)


def test_a_node_that_dies_changes_nothing(model: ModelVersion, slides: Path, predicted: Path, tmp_path: Path) -> None:
    lost: list[psutil.Process] = []

    with _second_node() as node:

        def is_at_work() -> bool:
            lost[:] = [*_processes("_Read)", node), *_processes("_Predict)", node)]
            return bool(lost) and bool(list(tmp_path.rglob("grid.parquet")))

        killer = _when(is_at_work, lambda: _kill_node(node))
        report = predict(model, slides, tmp_path, (model.panel.names()[2],))
        killer.join()
    assert lost, "the node must have been at work"
    if "failed" in report.counts():
        report = predict(model, slides, tmp_path, (model.panel.names()[2],))
    assert (set(report.faults()), digests(tmp_path)) == ({"broken"}, digests(predicted))


def test_an_s3_server_that_dies_and_comes_back_changes_nothing(
    model: ModelVersion, slides: Path, predicted: Path, s3: str, s3_server: S3Server, tmp_path: Path
) -> None:
    under_way: list[bool] = []

    def restart() -> None:
        under_way.append(not storage.exists(f"{s3}/ledger/big2.json"))
        s3_server.kill()
        s3_server.start()

    killer = _when(lambda: [uri for uri in storage.list_files(f"{s3}/staging") if "/parts/" in uri], restart)
    genes = (model.panel.names()[2],)
    try:
        report = predict(model, slides, s3, genes)
    except StorageError:  # it says what could not be read or written
        killer.join()
        report = predict(model, slides, s3, genes)
    killer.join()
    if "failed" in report.counts():
        report = predict(model, slides, s3, genes)
    assert (under_way, set(report.faults())) == ([True], {"broken"})
    for uri in storage.list_files(s3):
        target = tmp_path / uri.removeprefix(f"{s3}/")
        target.parent.mkdir(parents=True, exist_ok=True)
        storage.download(uri, target)
    assert digests(tmp_path) == digests(predicted)
    assert not (tmp_path / "staging").exists()


def test_a_killed_job_goes_on_even_where_two_go_on_at_once(
    model: ModelVersion, slides: Path, predicted: Path, tmp_path: Path
) -> None:
    command, options = job(tmp_path, model, slides, "--genes", model.panel.names()[2])
    first = subprocess.Popen(command, start_new_session=True, **options)
    killer = _when(lambda: list(tmp_path.rglob("*.safetensors")), lambda: os.killpg(first.pid, signal.SIGKILL))
    killer.join()
    first.wait()
    assert not (tmp_path / "out" / "ledger" / "big2.json").exists(), "it must have been killed midway"
    again = subprocess.Popen(command, **options)
    report = predict(model, slides, tmp_path / "out", (model.panel.names()[2],))
    said, _ = again.communicate(timeout=1500)
    assert again.returncode == 2, said
    assert "1 slide(s) could not be predicted" in said
    assert "broken: " in said
    assert list(report.faults()) == ["broken"]
    assert digests(tmp_path / "out") == digests(predicted)
