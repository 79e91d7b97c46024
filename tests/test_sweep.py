"""Sweeps with real processes: bad trials stop early or fail alone, a killed sweep goes on, the champion is defended."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from untrained import untrained_version

from mclstexp import tracking
from mclstexp.config import Config, load_config, override
from tuning.sweep import FAILED, FINISHED, STOPPED

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parents[1]
SETTINGS = {
    "genes.num_genes": 20,
    "split.test_patients": ["P3"],
    "split.validation_patients": ["P2"],
    "model.image_encoder": "small_cnn",
    "model.spot_width": 16,
    "model.spot_layers": 1,
    "model.learn_temperature": False,
    "train.epochs": 2,
    "train.max_failures": 0,
    "train.batch_sentences": 2,
    "train.precision": "fp32",
    "tune.grace_epochs": 1,
    "tune.reduction": 2,
    "tune.block_um": 64,
}
TIMEOUT_S = 600


def _command(tiles: str, folder: Path, name: str, *more: str) -> list[str]:
    settings = SETTINGS | {"cluster.object_store_mb": 256}  # and MLflow where it is by default, in the working folder
    texts = {key: ",".join(value) if isinstance(value, list) else str(value) for key, value in settings.items()}
    options = [part for key, value in texts.items() for part in (f"--{key}", value)]
    places = ["--data", tiles, "--space", str(folder / "space.yaml"), "--out", str(folder), "--name", name]
    return [sys.executable, str(ROOT / "jobs" / "tune.py"), *places, *options, *more]


def _start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_ADDRESS")}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **streams)


def _finish(command: list[str], folder: Path) -> str:
    job = _start(command, folder)
    said, _ = job.communicate(timeout=TIMEOUT_S)
    assert job.returncode == 0, said
    return said


def _kill_after_a_trial(job: subprocess.Popen[str], folder: Path) -> None:
    """Kills the driver with SIGKILL when one trial has all its epochs and another has begun."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        runs = list((folder / "trials").glob("*"))
        history = (folder / "tune").glob("experiment_state-*.json")
        if len(runs) > 1 and any("TERMINATED" in file.read_text() for file in history):
            break
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()


def _first_trial(folder: Path) -> dict[str, int]:
    """Returns the files of the trial of k = 20, which has none to be stopped for, with the time of their writing."""
    records = (path for path in (folder / "trials").glob("*/run.json") if "-seed" not in path.parent.name)
    (run,) = (path.parent for path in records if json.loads(path.read_text())["identity"]["retrieval"]["k"] == 20)
    return {str(path): path.stat().st_mtime_ns for path in run.glob("checkpoint_*/*")}


def _register_champion(tiles: str, folder: Path) -> None:
    """Makes an untrained model that knows neither the validation nor the test patient the champion."""
    settings = {name: value for name, value in SETTINGS.items() if not name.startswith(("tune", "train.max"))}
    config = override(Config(), {"tracking.uri": f"sqlite:///{folder}/mlflow.db"})
    (folder / "champion").mkdir()
    untrained_version(tiles, settings | {"retrieval.k": 20, "retrieval.temperature": 0.1}).save(folder / "champion")
    tracking.register(config.tracking, tracking.start_run(config, "champion", {}), str(folder / "champion"), {})


def test_a_killed_sweep_goes_on_without_its_worse_trials_and_its_best_model_challenges_the_champion(
    tiles: str, tmp_path: Path
) -> None:
    _register_champion(tiles, tmp_path)
    (tmp_path / "space.yaml").write_text("retrieval.k: [20, 30, 100000, 1]\n")
    command = _command(tiles, tmp_path, "first", "--search", "grid", "--promote", "--tune.max_concurrent", "1")
    folder = tmp_path / "first"
    _kill_after_a_trial(_start(command, tmp_path), folder)
    before = _first_trial(folder)
    said = _finish(command, tmp_path)
    assert before
    assert _first_trial(folder) == before, "a finished trial was repeated"
    table = pd.read_csv(folder / "trials.csv")
    state = dict(zip(table["retrieval.k"], table["state"], strict=True))
    assert list(state) == list(table["retrieval.k"])
    assert state[20] == state[30] == FINISHED
    assert state[1] == STOPPED, "of a bank's single best spot the correlation is lower"
    assert state[100_000] == FAILED
    assert "retrieval.k=100000 exceeds the bank's" in table.set_index("retrieval.k")["reason"][100_000]
    _assert_tracked(tmp_path, table)
    best = load_config(folder / "best.yaml")
    assert best.retrieval.k == table.query("state == 'finished'")["retrieval.k"].iloc[0]
    assert best.split.validation_patients == ("P2",)
    assert (folder / "parallel.png").is_file()
    assert (folder / "curves.png").is_file()

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    reason = client.get_model_version("mclstexp", "2").tags["promotion.reason"]
    interval = re.match(r"PCC over the 50 highest genes, against version 1: \S+ \(95 % from (\S+) to \S+\)", reason)
    assert interval, reason
    is_better = float(interval[1]) > 0
    alias = "challenger and champion" if is_better else "challenger only"
    assert f"version 2 of mclstexp is {alias}: {reason}" in said
    aliases = client.get_registered_model("mclstexp").aliases
    expected = {"champion": "2" if is_better else "1", "challenger": "2"}
    assert {name: str(version) for name, version in aliases.items()} == expected


def _assert_tracked(folder: Path, table: pd.DataFrame) -> None:
    """Each trial is a child run with its parameters, its curve and its score card, and none was started twice."""
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (experiment,) = (found for found in client.search_experiments() if found.name == "mclstexp")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    children = {name: run for name, run in runs.items() if "mlflow.parentRunId" in run.data.tags}
    best = table.query("state == 'finished'")["trial"].iloc[0]
    replicates = {f"{best}-seed{seed}" for seed in (1, 2, 3)}
    assert set(table["trial"]) | replicates == set(children)
    for row in table.query("state != 'failed'").to_dict("records"):
        run = children[row["trial"]]
        assert run.data.params["retrieval.k"] == str(row["retrieval.k"])
        assert run.info.status == ("FINISHED" if row["state"] == FINISHED else "KILLED")
        assert run.data.metrics["validation/model/mse"] > 0
        history = client.get_metric_history(run.info.run_id, "validation_pcc")
        assert len({metric.step for metric in history}) >= row["epochs"]
