"""Prediction while its processes are killed or its store fails: the files are those of a calm run.

One kill of each kind: finishing task, reader, embedder, node, S3 server, driver.
"""

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
from predicted_cohort import GOOD, PredictedCohort, digests, job, ledger_entries, predict
from s3_server import S3Server

from mclstexp import storage
from mclstexp.errors import StorageError
from mclstexp.model.version import ModelVersion
from mclstexp.prediction import finishing, ledger, publish, run

pytestmark = [pytest.mark.ray, pytest.mark.slow]
READER, EMBEDDER = "(Read)", "(Answer)"
"""Words in the titles of their processes."""


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
    """Does something in a thread, as soon as a condition holds."""

    def wait() -> None:
        deadline = time.monotonic() + 300
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.005)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_faults_while_slides_are_finished_cost_no_slide(
    predicted: Path, model: ModelVersion, slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other runs claim one slide and are done with another, the store fails once, and a finishing task is killed."""
    (tmp_path / "slides").mkdir()
    for name in GOOD:
        shutil.copy(slides / f"{name}.tif", tmp_path / "slides")
    attempts, finish_slides = tmp_path / "attempts", publish.finish_slides
    attempts.mkdir()

    def disturbed_commit(out: str, new: ledger.Entry, claimed: str) -> None:
        name = new.slide_id
        attempt = len(list(attempts.glob(f"{name}-*"))) + 1
        (attempts / f"{name}-{attempt}").touch()
        if (name, attempt) in (("big1", 1), ("small", 1)):
            theirs = ledger.Entry(slide_id=name, key="theirs", state="publishing")
            version = ledger.claim_slide(out, theirs, over=ledger.stored(out, name))
            if name == "small":
                storage.publish(f"{out}/ledger/small.json", _entry(theirs, state="done"), version)
        if (name, attempt) == ("big1", 2):
            raise StorageError("the store answered 503")
        if (name, attempt) == ("big2", 1):
            os.kill(os.getpid(), signal.SIGKILL)
        storage.publish(f"{out}/ledger/{name}.json", _entry(new), claimed)

    def _entry(entry: ledger.Entry, **changes: object) -> bytes:
        return entry.model_copy(update=changes).model_dump_json(indent=1).encode()

    def finish(*arguments: object) -> list[publish.Outcome]:
        with pytest.MonkeyPatch.context() as patch:  # in the task's process
            patch.setattr(ledger, "commit", disturbed_commit)
            return finish_slides(*arguments)

    monkeypatch.setattr(finishing, "finish_slides", finish)
    monkeypatch.setattr(run, "_MAX_PAUSE_S", 0.1)
    report = predict(model, tmp_path / "slides", tmp_path / "out")
    assert report.counts() == {"done": 3}
    tries = Counter(path.name.partition("-")[0] for path in attempts.iterdir())
    assert tries == {"big1": 3, "small": 2, "big2": 2}
    assert ledger_entries(tmp_path / "out") == {name: report.entries[name].model_dump() for name in GOOD}
    files, expected = digests(tmp_path / "out"), digests(predicted)
    del expected["previews/blank.jpg"]
    assert files == expected


def test_a_killed_reader_and_a_killed_embedder_change_nothing(
    model: ModelVersion, slides: Path, predicted: Path, tmp_path: Path
) -> None:
    killed: list[str] = []

    def kill(step: str) -> None:
        for process in _processes(step):
            process.kill()
            killed.append(step)

    killers = [
        _when(lambda: _processes(READER) and list(tmp_path.rglob("grid.parquet")), lambda: kill(READER)),
        _when(lambda: _processes(EMBEDDER) and list(tmp_path.rglob("*.safetensors")), lambda: kill(EMBEDDER)),
    ]
    report = predict(model, slides, tmp_path)
    for killer in killers:
        killer.join()
    assert set(killed) == {READER, EMBEDDER}, "the faults must have hit"
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
            lost[:] = [*_processes(READER, node), *_processes(EMBEDDER, node)]
            return bool(lost) and bool(list(tmp_path.rglob("grid.parquet")))

        killer = _when(is_at_work, lambda: _kill_node(node))
        report = predict(model, slides, tmp_path, num_cpus=5)  # two of each actor, spread over both nodes
        killer.join()
    assert lost, "the node must have been at work"
    if "failed" in report.counts():
        report = predict(model, slides, tmp_path)
    assert (set(report.faults()), digests(tmp_path)) == ({"broken"}, digests(predicted))


def test_an_s3_server_that_dies_and_comes_back_changes_nothing(
    model: ModelVersion, slides: Path, predicted: Path, s3: str, s3_server: S3Server, tmp_path: Path
) -> None:
    under_way: list[bool] = []

    def restart() -> None:
        under_way.append(not storage.exists(f"{s3}/ledger/big2.json"))
        s3_server.kill()
        s3_server.start()

    killer = _when(lambda: [uri for uri in storage.list_files(f"{s3}/staging") if "/tiles/" in uri], restart)
    try:
        report = predict(model, slides, s3)
    except StorageError:  # it states what could not be read or written
        killer.join()
        report = predict(model, slides, s3)
    killer.join()
    if "failed" in report.counts():
        report = predict(model, slides, s3)
    assert (under_way, set(report.faults())) == ([True], {"broken"})
    for uri in storage.list_files(s3):
        target = tmp_path / uri.removeprefix(f"{s3}/")
        target.parent.mkdir(parents=True, exist_ok=True)
        storage.download(uri, target)
    assert digests(tmp_path) == digests(predicted)
    assert not (tmp_path / "staging").exists()


def test_a_killed_job_can_be_resumed_even_by_two_at_once(
    model: ModelVersion, slides: Path, predicted: Path, tmp_path: Path
) -> None:
    command, options = job(tmp_path, model, slides)
    first = subprocess.Popen(command, start_new_session=True, **options)
    killer = _when(lambda: list(tmp_path.rglob("*.safetensors")), lambda: os.killpg(first.pid, signal.SIGKILL))
    killer.join()
    first.wait()
    assert not (tmp_path / "out" / "ledger" / "big2.json").exists(), "it must have been killed midway"
    again = subprocess.Popen(command, **options)
    report = predict(model, slides, tmp_path / "out")
    printed, _ = again.communicate(timeout=1500)
    assert again.returncode == 2, printed
    assert "1 slide(s) could not be predicted" in printed
    assert "broken: " in printed
    assert list(report.faults()) == ["broken"]
    assert digests(tmp_path / "out") == digests(predicted)
