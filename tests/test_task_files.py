"""Local files are named so that a task finds them, whatever folder it begins in."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from mclstexp.cluster import config_for_tasks, weights_for_tasks, with_absolute_paths
from mclstexp.config import Config, override
from tuning.cross_validation import Fold, Study, _for_tasks

ASKED = {"genes.panel": "panel.txt", "model.image_weights": "weights.pth", "tracking.uri": "sqlite:///mlflow.db"}


def _files(config: Config) -> tuple[str, str, str]:
    return config.genes.panel, config.model.image_weights, config.tracking.uri


def _expected(folder: Path) -> tuple[str, str, str]:
    return f"{folder}/panel.txt", f"{folder}/weights.pth", f"sqlite:///{folder}/mlflow.db"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The runtime environment of a job that runs in `tmp_path`, to be filled by the test."""
    runtime_env: dict[str, object] = {"py_modules": []}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(runtime_env=runtime_env))
    return runtime_env


def test_local_files_are_named_absolutely_and_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _files(with_absolute_paths(override(Config(), ASKED))) == _expected(tmp_path)
    elsewhere = {"model.image_weights": "s3://bucket/w.pth", "tracking.uri": "http://mlflow:5000"}
    assert with_absolute_paths(override(Config(), elsewhere)) == override(Config(), elsewhere)
    assert with_absolute_paths(override(Config(), {"tracking.uri": "http://mlflow:5000"})).genes.panel == "hvg"


def test_tasks_of_a_job_that_brings_its_folder_along_find_relative_names(job: dict[str, object]) -> None:
    job["working_dir"] = "gcs://package.zip"
    assert config_for_tasks(override(Config(), ASKED)) == override(Config(), ASKED)
    assert weights_for_tasks("weights.pth") == "weights.pth"


def test_a_fold_gets_absolute_names_those_of_a_floor_too(job: dict[str, object], tmp_path: Path) -> None:
    study = Study("/tiles", "/out", "patient", "run", "floor.pth", {})
    (fold,), told = _for_tasks([Fold("P1", override(Config(), ASKED))], study)
    assert (fold.name, _files(fold.config)) == ("P1", _expected(tmp_path))
    assert told.floor_weights == f"{tmp_path}/floor.pth"
    assert [weights_for_tasks(name) for name in (None, "imagenet")] == [None, "imagenet"]
