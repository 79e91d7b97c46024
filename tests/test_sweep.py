"""Sweeps: who validates, who is stopped when, and whole sweeps with real processes.

Bad trials stop early or fail alone, a killed sweep goes on, and its best model challenges the champion.
"""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from small_table import make_table
from untrained import untrained_version

from mclstexp import tracking
from mclstexp.config import Config, load_config, override
from mclstexp.data.schema import Manifest, load_manifest
from mclstexp.errors import ConfigError, SplitError
from mclstexp.model import towers
from mclstexp.training.validation import VALIDATION_PCC
from tuning import sweep
from tuning.forecast import spot_seconds
from tuning.space import Choice, Range, Space
from tuning.sweep import (
    FAILED,
    FINISHED,
    STOPPED,
    Halving,
    ReleaseStopped,
    ShowTrials,
    Sweep,
    default_name,
    halving,
    with_validation,
)
from tuning.trial import EPOCHS, TrialPlan

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
    paths = [
        "--config",
        os.devnull,
        "--data",
        tiles,
        "--space",
        str(folder / "space.yaml"),
        "--out",
        str(folder),
        "--name",
        name,
    ]
    return [sys.executable, str(ROOT / "jobs" / "tune.py"), *paths, *options, *more]


def _start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_ADDRESS")}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **streams)


def _finish(command: list[str], folder: Path) -> str:
    job = _start(command, folder)
    output, _ = job.communicate(timeout=TIMEOUT_S)
    assert job.returncode == 0, output
    return output


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


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_sweep_goes_on_without_its_worse_trials_and_its_best_model_challenges_the_champion(
    tiles: str, tmp_path: Path, mlflow_template: Path
) -> None:
    shutil.copy(mlflow_template, tmp_path / "mlflow.db")
    _register_champion(tiles, tmp_path)
    (tmp_path / "space.yaml").write_text("retrieval.k: [20, 30, 100000, 1]\n")
    command = _command(tiles, tmp_path, "first", "--search", "grid", "--promote", "--tune.max_concurrent", "1")
    folder = tmp_path / "first"
    _kill_after_a_trial(_start(command, tmp_path), folder)
    before = _first_trial(folder)
    output = _finish(command, tmp_path)
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
    assert f"version 2 of mclstexp is {alias}: {reason}" in output
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


def _manifest(folder: Path, patients: str) -> Manifest:
    counts = np.ones((4, 8), np.int32)
    return make_table(folder, {f"{patient}1": counts for patient in patients})


def test_a_quarter_of_the_training_patients_validate_and_none_that_is_tested(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path, "ABCDEFGHI")
    config = override(Config(), {"split.test_patients": ["I"]})
    found = with_validation(manifest, config)
    assert len(set(found.split.validation_patients) & set("ABCDEFGH")) == len(found.split.validation_patients) == 2
    assert (found.train.validate_every, found.train.patience) == (1, 0)
    named = override(config, {"split.validation_patients": ["C"]})
    assert with_validation(manifest, named).split.validation_patients == ("C",)


def test_a_tested_patient_whose_other_sections_train_does_not_validate(tmp_path: Path) -> None:
    counts = np.ones((4, 8), np.int32)
    manifest = make_table(tmp_path, dict.fromkeys(("A1", "A2", "B1", "C1"), counts))
    config = override(Config(), {"split.protocol": "reference", "split.test_sections": ["A1"]})
    assert len(with_validation(manifest, config).split.validation_patients) == 1
    more = override(config, {"split.num_validation_patients": 3})
    with pytest.raises(SplitError, match=r"2 are not held out \(B, C\)"):
        with_validation(manifest, more)


@pytest.mark.parametrize(
    ("status", "last", "has_ended"),
    [
        ("TERMINATED", {"epochs": 9}, True),
        ("TERMINATED", {"epochs": 3, "done": True}, True),  # by the scheduler
        ("TERMINATED", {"epochs": 3, "done": False}, False),  # by an interrupt
        ("TERMINATED", None, False),
        ("RUNNING", {"epochs": 3}, False),
        ("ERROR", None, True),
    ],
)
def test_an_interrupted_trial_has_not_ended(status: str, last: dict | None, has_ended: bool) -> None:
    record = SimpleNamespace(status=status, last_result=last, ERROR="ERROR")
    assert sweep._has_ended(record, 9) == has_ended


@pytest.mark.parametrize("batching", ["sentences", "random_spots"])
@pytest.mark.parametrize("predictor", ["retrieval", "regression"])
def test_the_forecast_times_a_step_that_encodes_only_where_trials_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, predictor: str, batching: str
) -> None:
    manifest = _manifest(tmp_path, "ABC")
    changes = {"model.predictor": predictor, "train.batching": batching, "model.position": "none"}
    config = override(Config(), SETTINGS | changes)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    assert spot_seconds(config, manifest) > 0
    monkeypatch.setattr(towers, "build_encoder", None)
    assert spot_seconds(override(config, {"model.freeze_encoder": True}), manifest) > 0
    with pytest.raises(TypeError):
        spot_seconds(config, manifest)


PROGRAMS = {
    "model.freeze_encoder": True,
    "model.predictor": "programs",
    "model.image_directions": 8,
    "model.embedding_dim": 16,
}


def test_the_forecast_times_the_towers_of_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    assert spot_seconds(override(Config(), SETTINGS | PROGRAMS), _manifest(tmp_path, "ABC")) > 0


def test_all_trials_have_the_epochs_that_the_fewest_steps_take(tmp_path: Path) -> None:
    changes = {"train.epochs": 2, "train.min_steps": 7, "train.batch_sentences": 100}
    found = with_validation(_manifest(tmp_path, "ABC"), override(Config(), PROGRAMS | changes))
    assert (found.train.epochs, found.train.min_steps) == (7, 0)  # of one step each


def test_one_patient_is_not_enough(tmp_path: Path) -> None:
    config = override(Config(), {"split.test_patients": ["B"]})
    with pytest.raises(SplitError, match=r"num_validation_patients=1 leaves no patient.* 1 are not held out \(A\)"):
        with_validation(_manifest(tmp_path, "AB"), config)


def test_a_recipe_without_epochs_leaves_a_sweep_nothing_to_compare(tmp_path: Path) -> None:
    changed = {"model.predictor": "programs", "model.freeze_encoder": True, "train.epochs": 0}
    with pytest.raises(ConfigError, match=r"train\.epochs=0 leaves a sweep nothing .*jobs/configs/finetune\.yaml"):
        with_validation(_manifest(tmp_path, "ABC"), override(Config(), changed))


SPACE: Space = {"model.temperature": Range(0.05, 2.0, log=True), "model.spot_layers": Choice((1, 2))}
FREE: dict[str, object] = {
    "cluster.wait_s": 60.0,
    "tracking.uri": "http://mlflow:5000",
    "train.num_workers": 2,
    "train.max_failures": 0,
    "tune.max_concurrent": 1,
    "tune.retry_failed": True,
}


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Gives the default name of a sweep with some settings changed."""
    monkeypatch.setattr(sweep.cluster, "config_for_tasks", lambda config: config)
    (tmp_path / "table").mkdir()
    manifest = _manifest(tmp_path / "table", "ABC")

    def name(space: Space = SPACE, search: str = "random", trials: int = 3, **changed: object) -> str:
        config = override(Config(), {"train.batch_sentences": 2, "tiles.jpeg_quality": 90} | changed)
        return default_name(str(tmp_path / "sweeps"), manifest, config, space, search, trials)

    return name


@pytest.mark.parametrize("setting", [*FREE, "all"])
def test_a_sweep_without_a_name_goes_on_under_settings_that_its_results_do_not_depend_on(
    named: Callable[..., str], setting: str
) -> None:
    assert named(**(FREE if setting == "all" else {setting: FREE[setting]})) == named()


def test_a_sweep_without_a_name_is_another_one_with_another_space_search_length_or_setting(
    named: Callable[..., str],
) -> None:
    others = [named({"retrieval.k": Choice((1, 2))}), named(search="optuna"), named(trials=4)]
    others += [named(**{setting: 1}) for setting in ("train.seed", "tune.seed", "tune.grace_epochs")]
    assert len({named(), *others}) == 1 + len(others)


def test_a_sweep_goes_on_under_the_default_name_of_earlier_versions(named: Callable[..., str], tmp_path: Path) -> None:
    config = override(Config(), {"train.batch_sentences": 2, "tiles.jpeg_quality": 90})
    manifest = load_manifest(str(tmp_path / "table"))
    former = f"sweep-fd59f790e3aa-{manifest.digest()[:6]}-df4c18-random3"
    assert named() != former
    record = {**sweep._request(manifest, config, SPACE, "random", 3), "mlflow_run_id": "run"}
    (tmp_path / "sweeps" / former).mkdir(parents=True)
    (tmp_path / "sweeps" / former / sweep.RECORD).write_text(json.dumps(record))
    assert named() == former
    assert named(**{"train.seed": 1}) != former


@pytest.mark.parametrize(
    ("former", "today"),
    [
        (b"ctuning.halving\nHalving\n.", Halving),
        (b"ctuning.progress\nShowTrials\n.", ShowTrials),
        (b"ctuning.release\nReleaseStopped\n.", ReleaseStopped),
    ],
)
def test_what_earlier_versions_pickled_for_a_resume_is_found_in_todays_module(
    former: bytes, today: type, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in ("tuning.halving", "tuning.progress", "tuning.release"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sweep, "_has_begun", lambda sweep: True)
    monkeypatch.setattr(sweep, "at_once", lambda config: 1)
    monkeypatch.setattr(sweep.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(sweep.tune.Tuner, "restore", lambda *_, **__: pickle.loads(former))
    plan = TrialPlan("table", str(tmp_path), Config(), "run")
    assert sweep._tuner(Sweep(plan, str(tmp_path), SPACE, "random", 3)) is today


STOP, CONTINUE = "STOP", "CONTINUE"


def _scheduler(epochs: int, grace: int, reduction: int) -> Halving:
    settings = {"train.epochs": epochs, "tune.grace_epochs": grace, "tune.reduction": reduction}
    made = halving(override(Config(), settings))
    made.set_search_properties(VALIDATION_PCC, "max")
    return made


def _report(scheduler: Halving, name: str, epoch: int, score: float) -> str:
    trial = SimpleNamespace(trial_id=name)
    if name not in scheduler._trial_info:
        scheduler.on_trial_add(None, trial)
    return scheduler.on_trial_result(None, trial, {EPOCHS: epoch, VALIDATION_PCC: score})


def test_of_three_at_a_rung_the_best_goes_on() -> None:
    scheduler = _scheduler(30, 4, 3)
    assert scheduler.rungs() == {4, 12}
    assert [_report(scheduler, name, 3, score) for name, score in (("a", 0.1), ("b", 0.0))] == [CONTINUE] * 2
    decisions = [_report(scheduler, name, 4, score) for name, score in (("a", 0.3), ("b", 0.2), ("c", 0.1), ("d", 0.4))]
    assert decisions == [CONTINUE, STOP, STOP, CONTINUE]
    assert _report(scheduler, "a", 5, 0.0) == CONTINUE
    assert [_report(scheduler, name, 12, score) for name, score in (("d", 0.5), ("a", 0.4))] == [CONTINUE, STOP]


def test_trials_that_had_passed_their_rungs_before_a_resume_are_not_judged_there_again() -> None:
    scheduler = _scheduler(30, 4, 3)
    assert {_report(scheduler, name, 26, score) for name, score in (("a", 0.3), ("b", 0.2), ("c", 0.1))} == {CONTINUE}
    assert _report(scheduler, "d", 12, 0.05) == CONTINUE, "the first to come to this rung"


def test_no_trial_is_stopped_at_its_last_epoch() -> None:
    scheduler = _scheduler(4, 1, 2)
    assert 4 in scheduler.rungs()
    assert {_report(scheduler, name, 4, score) for name, score in (("a", 0.3), ("b", 0.2), ("c", 0.1))} == {CONTINUE}
    scheduler.on_trial_complete(None, SimpleNamespace(trial_id="a"), {EPOCHS: 4, VALIDATION_PCC: 0.3})
