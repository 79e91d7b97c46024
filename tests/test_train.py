"""Training end to end with real workers: it ends where it should, however often it is killed on the way."""

import itertools
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from safetensors.numpy import load_file

from mclstexp import tracking
from mclstexp.config import Config, override
from mclstexp.training.complete import train_to_end
from mclstexp.training.run import open_run

ROOT = Path(__file__).parents[1]
EVERY, EPOCHS, SENTENCES, STEPS_PER_EPOCH = 2, 5, 12, 6
SETTINGS = {
    "genes.num_genes": 20,
    "split.test_patients": "P3",
    "model.image_encoder": "small_cnn",
    "model.spot_width": 16,
    "model.spot_layers": 1,
    "train.num_workers": 2,
    "train.epochs": EPOCHS,
    "train.batch_sentences": 2,
    "train.checkpoint_every": EVERY,
    "train.keep_checkpoints": 1000,
    "train.precision": "fp32",
    "cluster.object_store_mb": 256,
}


FIRST = {"tracking.uri": "sqlite:///mlflow.db"}
RESUMED = {"tracking.uri": "sqlite:///other.db", "train.max_failures": 1, "cluster.wait_s": 5}
"""Settings that no result depends on, changed when the killed run is started again."""


def _start(folder: Path, tiles: str, changed: dict[str, object]) -> subprocess.Popen[str]:
    settings = SETTINGS | changed
    options = ["--config", os.devnull] + [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "--data", tiles, "--out", str(folder / "runs")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_ADDRESS")}
    return subprocess.Popen(
        command + options,
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _states(folder: Path) -> list[dict[str, object]]:
    """The states of all checkpoints of the only run."""
    states = []
    for file in sorted(folder.glob("runs/*/checkpoint_*/state.json")):
        with suppress(json.JSONDecodeError):  # it is being written
            states.append(json.loads(file.read_text()))
    return states


def _wait_for_checkpoints(job: subprocess.Popen[str], folder: Path, count: int) -> None:
    deadline = time.monotonic() + 240
    while len(_states(folder)) < count:
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline, "no checkpoint appeared in time"
        time.sleep(0.05)


def _kill_a_training_worker(job: subprocess.Popen[str]) -> None:
    family = psutil.Process(job.pid).children(recursive=True)
    workers = [process for process in family if "RayTrainWorker" in " ".join(process.cmdline())]
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGKILL)


def _kill_the_driver(job: subprocess.Popen[str]) -> list[psutil.Process]:
    """Kills the driver and, because they would train on for a moment, the training workers, their controller first."""
    family = psutil.Process(job.pid).children(recursive=True)
    os.kill(job.pid, signal.SIGKILL)
    for name in ("TrainController", "RayTrainWorker"):
        for process in family:
            with suppress(psutil.NoSuchProcess):
                if name in " ".join(process.cmdline()):
                    process.kill()
    job.wait()
    return family


def _holds_work(process: psutil.Process) -> bool:
    """Ray's own agents outlive their node by minutes and hold nothing; its raylet and workers must not."""
    try:
        return "Agent" not in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def killed_run(tiles: str, mlflow_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a name whose second worker was killed, then its driver, and that was then started again."""
    folder = tmp_path_factory.mktemp("killed")
    for database in ("mlflow.db", "other.db"):
        shutil.copy(mlflow_template, folder / database)
    job = _start(folder, tiles, FIRST)
    _wait_for_checkpoints(job, folder, 3)
    _kill_a_training_worker(job)
    before = len(_states(folder))
    _wait_for_checkpoints(job, folder, before + 3)
    orphans = _kill_the_driver(job)
    assert _states(folder)[-1]["step"] < EPOCHS * STEPS_PER_EPOCH, "killed too late to prove anything"
    _, alive = psutil.wait_procs([process for process in orphans if _holds_work(process)], timeout=240)
    assert not alive, f"orphans: {alive}"
    job = _start(folder, tiles, RESUMED)
    output, _ = job.communicate(timeout=900)
    assert job.returncode == 0, output
    assert output.strip().splitlines()[-1] == "model version models:/mclstexp/1"
    assert len(list((folder / "runs").iterdir())) == 1, "it started again under another name"
    return folder


@pytest.mark.ray
@pytest.mark.slow
def test_no_sentence_is_skipped_or_repeated_along_the_surviving_checkpoints(killed_run: Path) -> None:
    states = _states(killed_run)
    survived = [state for state, later in zip(states, [*states[1:], None], strict=True) if _continues(state, later)]
    assert survived[-1]["epoch"] == EPOCHS - 1
    assert survived[-1]["step"] == EPOCHS * STEPS_PER_EPOCH
    for epoch in range(EPOCHS):
        line = [state["consumed"] for state in survived if state["epoch"] == epoch]
        assert len(line[-1]) == len(set(line[-1])) == SENTENCES
        for earlier, later in itertools.pairwise(line):
            assert later[: len(earlier)] == earlier


def _continues(state: dict[str, object], later: dict[str, object] | None) -> bool:
    return later is None or later["step"] > state["step"]


@pytest.mark.ray
@pytest.mark.slow
def test_steps_done_twice_are_at_most_one_checkpoint_interval(killed_run: Path) -> None:
    query = "select step from metrics where key = 'loss' order by timestamp, rowid"
    steps = []
    for name in ("mlflow.db", "other.db"):
        with sqlite3.connect(killed_run / name) as database:
            steps += [step for (step,) in database.execute(query)]
    assert max(steps) == steps[-1] == EPOCHS * STEPS_PER_EPOCH
    again = [earlier - later for earlier, later in itertools.pairwise(steps) if later <= earlier]
    assert all(repeated < EVERY for repeated in again)


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_run_ends_with_the_weights_of_a_calm_one(killed_run: Path, calm_run: Path) -> None:
    (run,) = (killed_run / "runs").iterdir()
    killed, calm = (load_file(folder / "model" / "weights.safetensors") for folder in (run, calm_run))
    assert killed.keys() == calm.keys()
    for name, values in calm.items():
        assert killed[name] == pytest.approx(values, rel=1e-4, abs=1e-5), name


@pytest.fixture(scope="module")
def calm_run(tiles: str, mlflow_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with the same settings, under the session's Ray."""
    folder = tmp_path_factory.mktemp("calm")
    shutil.copy(mlflow_template, folder / "mlflow.db")
    config = _config(**{"tracking.uri": f"sqlite:///{folder}/mlflow.db"})
    run = open_run(tiles, str(folder), "calm", config, _track)
    train_to_end(run, lambda step, metrics: None)
    return folder / "calm"


def _track(config: Config, name: str, recorded: str | None) -> str:
    return tracking.start_run(config, name, {}, recorded)


def _config(**changed: object) -> Config:
    return override(Config(), SETTINGS | {"split.test_patients": ["P3"]} | changed)


@pytest.mark.ray
@pytest.mark.slow
def test_the_record_has_the_settings_that_cut_the_tables_tiles(calm_run: Path) -> None:
    query = "select key, value from params where key in ('tiles.size_px', 'tiles.sentence_length')"
    with sqlite3.connect(calm_run.parent / "mlflow.db") as database:
        assert dict(database.execute(query)) == {"tiles.size_px": "32", "tiles.sentence_length": "16"}


@pytest.mark.ray
@pytest.mark.slow
def test_a_finished_run_knows_how_similar_tiles_of_other_sections_are(calm_run: Path) -> None:
    record = json.loads((calm_run / "model" / "model.json").read_text())
    assert len(record["training"]["sections"]) > 1
    assert -1 <= record["ood_similarity"] < 1
