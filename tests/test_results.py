"""The results of a sweep: which trial is best, whether its file trains as it is, and pictures of odd sweeps."""

import shutil
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mclstexp import tracking
from mclstexp.config import Config, load_config, override
from mclstexp.errors import RunError
from tuning import pictures
from tuning.forecast import expected_epochs
from tuning.results import best_config, best_trial, publish, trial_table
from tuning.space import Choice, Range, Space
from tuning.sweep import FAILED, FINISHED, STOPPED, Sweep, Trial
from tuning.trial import TrialPlan

NAN = float("nan")
GRID: Space = {"model.temperature": Choice((0.1, 1.0)), "model.spot_layers": Choice((1, 2))}
TRIALS = [
    Trial("a", {"model.temperature": 0.1, "model.spot_layers": 1}, FINISHED, 9, 0.30, ""),
    Trial("b", {"model.temperature": 1.0, "model.spot_layers": 2}, STOPPED, 3, 0.40, ""),
    Trial("c", {"model.temperature": 0.1, "model.spot_layers": 2}, FINISHED, 9, 0.35, ""),
    Trial("d", {"model.temperature": 1.0, "model.spot_layers": 1}, FAILED, 0, NAN, "out of memory"),
]


def test_the_best_had_all_its_epochs() -> None:
    assert best_trial(TRIALS).name == "c"
    with pytest.raises(RunError, match="d: failed out of memory"):
        best_trial(TRIALS[1::2])


def test_the_table_has_every_trial_best_first_and_the_failed_last() -> None:
    table = trial_table(TRIALS)
    assert list(table["trial"]) == ["b", "c", "a", "d"]
    assert table.loc[3, "reason"] == "out of memory"


def test_a_sweep_without_a_winner_leaves_its_table(tmp_path: Path, mlflow_template: Path) -> None:
    shutil.copy(mlflow_template, tmp_path / "mlflow.db")
    config = override(Config(), {"tracking.uri": f"sqlite:///{tmp_path}/mlflow.db"})
    run_id = tracking.start_run(config, "sweep", {})
    sweep = Sweep(TrialPlan("tiles", str(tmp_path), config, run_id), str(tmp_path), GRID, "grid", 2)
    with pytest.raises(RunError, match="no trial of 2 ended with a score"):
        publish(sweep, TRIALS[1::2])
    assert list(pd.read_csv(tmp_path / "trials.csv")["trial"]) == ["b", "d"]
    assert mlflow.MlflowClient(config.tracking.uri).get_run(run_id).info.status == "FAILED"


def test_the_best_settings_are_a_file_that_training_takes(tmp_path: Path) -> None:
    config = override(Config(), {"train.epochs": 9, "split.validation_patients": ["P2"]})
    (tmp_path / "best.yaml").write_text(best_config(best_trial(TRIALS), config))
    loaded = load_config(tmp_path / "best.yaml")
    assert loaded == override(config, TRIALS[2].settings)


def test_halving_spends_what_its_rungs_say() -> None:
    config = override(Config(), {"train.epochs": 27, "tune.grace_epochs": 3, "tune.reduction": 3})
    assert expected_epochs(config, 9) == 9 * 3 + 3 * 6 + 1 * 18
    assert expected_epochs(override(config, {"tune.grace_epochs": 30}), 9) == 9 * 27


DRAWN: Space = {"model.temperature": Range(0.05, 2.0, log=True), "model.spot_layers": Choice((1, 2))}


@pytest.mark.parametrize("space", [GRID, DRAWN])
@pytest.mark.parametrize("trials", [TRIALS, TRIALS[:1], TRIALS[2:]])
def test_pictures_are_drawn_whatever_became_of_the_trials(tmp_path: Path, space: Space, trials: list[Trial]) -> None:
    table = trial_table(trials)
    curve = pd.DataFrame({"step": [1, 2], "loss": [2.0, 1.0], "validation_pcc": [NAN, 0.3]})
    pictures.draw_parallel(tmp_path / "parallel.png", table, space, "heading")
    assert pictures.draw_temperature_depth(tmp_path / "map.png", table, space, "heading")
    pictures.draw_curves(tmp_path / "curves.png", {"a": curve, "none": curve.iloc[:0]}, "heading")
    for name in ("parallel", "map", "curves"):
        assert np.asarray(Image.open(tmp_path / f"{name}.png")).std() > 1


def test_lists_of_mixed_kinds_are_drawn(tmp_path: Path) -> None:
    space: Space = {"retrieval.k": Choice((5, None)), "model.temperature": Choice((0.1, 1))}
    points = [(5, 0.1), (None, 1), (5, 1)]
    trials = [
        Trial(str(k), {"retrieval.k": k, "model.temperature": warm}, FINISHED, 9, 0.1 * index, "")
        for index, (k, warm) in enumerate(points)
    ]
    pictures.draw_parallel(tmp_path / "parallel.png", trial_table(trials), space, "heading")
    assert (tmp_path / "parallel.png").is_file()


def test_no_map_where_temperature_or_depth_is_fixed(tmp_path: Path) -> None:
    space: Space = {"model.temperature": Choice((0.1, 1.0))}
    assert not pictures.draw_temperature_depth(tmp_path / "map.png", trial_table(TRIALS), space, "heading")
    assert not (tmp_path / "map.png").exists()
