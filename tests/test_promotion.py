"""Who becomes champion: only a model that won a paired comparison on patients that the champion does not know.

The comparison is tested against scipy on rows that are really repeated, and with known answers.
"""

import shutil
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pytest
from scipy.stats import pearsonr

from mclstexp import tracking
from mclstexp.config import Config, override
from mclstexp.errors import ConfigError
from tuning import promotion
from tuning.promotion import Difference, Pair, Promotion, compare, promote
from tuning.space import Choice
from tuning.sweep import FINISHED, Sweep, Trial
from tuning.trial import TrialPlan

BEST = Trial("t", {"retrieval.k": 20}, FINISHED, 2, 0.3, "")
VALIDATION = "P2"


class _Registry:
    """A sweep whose best model has version 2, where version 1 is champion."""

    def __init__(self, folder: Path, template: Path) -> None:
        shutil.copy(template, folder / "mlflow.db")
        self.folder, self.config = folder, override(Config(), {"tracking.uri": f"sqlite:///{folder}/mlflow.db"})
        run_id = tracking.start_run(self.config, "sweep", {})
        self.client = mlflow.MlflowClient(self.config.tracking.uri)
        self.client.create_registered_model("mclstexp")
        for _ in range(2):
            self.client.create_model_version("mclstexp", str(folder), run_id)
        plan = TrialPlan("tiles", str(folder), self.config, run_id)
        self.sweep = Sweep(plan, str(folder), {"retrieval.k": Choice((20,))}, "grid", 1)

    def promote(self) -> tuple[Promotion, dict[str, str]]:
        self.client.set_registered_model_alias("mclstexp", "champion", "1")
        self.client.delete_registered_model_alias("mclstexp", "challenger")
        decided = promote(self.sweep, BEST)
        aliases = self.client.get_registered_model("mclstexp").aliases
        return decided, {name: str(version) for name, version in aliases.items()}


@pytest.fixture(scope="module")
def registry(mlflow_template: Path, tmp_path_factory: pytest.TempPathFactory) -> _Registry:
    """A registry with two versions."""
    return _Registry(tmp_path_factory.mktemp("registry"), mlflow_template)


@pytest.fixture
def decided(registry: _Registry, monkeypatch: pytest.MonkeyPatch) -> _Registry:
    """The registry, with a best trial that needs no training to be compared."""
    run = SimpleNamespace(
        config=registry.config,
        split=SimpleNamespace(validation=("V1",)),
        manifest=SimpleNamespace(patients=lambda names: {VALIDATION}),
    )
    monkeypatch.setattr(promotion, "open_trial", lambda *_: run)
    monkeypatch.setattr(promotion, "_register", lambda run: "2")
    monkeypatch.setattr(tracking, "fetch_model", lambda *_: str(registry.folder))
    monkeypatch.setattr(promotion, "_replicates", lambda *_: [])
    monkeypatch.setattr(promotion, "_pairs", lambda *_: [])
    return registry


@pytest.mark.parametrize(("low", "champion"), [(0.05, "2"), (-0.01, "1"), (0.0, "1")])
def test_the_champion_changes_only_if_the_whole_interval_is_above_zero(
    decided: _Registry, monkeypatch: pytest.MonkeyPatch, low: float, champion: str
) -> None:
    monkeypatch.setattr(promotion.ModelVersion, "load", lambda folder: None)
    monkeypatch.setattr(promotion, "_obstacle", lambda run, champion: "")
    monkeypatch.setattr(promotion, "compare", lambda *_: Difference(0.1, low, 0.2))
    decision, aliases = decided.promote()
    assert aliases == {"champion": champion, "challenger": "2"}
    assert decision.is_champion == (champion == "2")
    assert decided.client.get_model_version("mclstexp", "2").tags["promotion.reason"] == decision.reason


def test_a_champion_that_knows_the_validation_patients_is_not_compared(
    decided: _Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = SimpleNamespace(training=SimpleNamespace(patients=("P1", VALIDATION)))
    monkeypatch.setattr(promotion.ModelVersion, "load", lambda folder: known)
    decision, aliases = decided.promote()
    assert aliases == {"champion": "1", "challenger": "2"}
    assert f"it was trained on the validation patients {VALIDATION}" in decision.reason


def test_a_champion_that_cannot_be_read_stays_and_the_reason_is_kept(decided: _Registry) -> None:
    decision, aliases = decided.promote()  # the champion's folder holds no model version
    assert aliases == {"champion": "1", "challenger": "2"}
    assert decision.reason.startswith("not compared with version 1: ")
    assert decided.client.get_model_version("mclstexp", "2").tags["promotion"] == "false"


def _grid(side: int, pitch_um: float = 200.0) -> np.ndarray:
    return np.indices((side, side)).reshape(2, -1).T * pitch_um


def _pair(rng: np.random.Generator, champion_noise: float, challenger_noise: float, replicates: int = 3) -> Pair:
    truth = rng.gamma(2.0, size=(400, 60))
    predicted = [
        truth + noise * rng.normal(size=truth.shape) for noise in (champion_noise, *[challenger_noise] * replicates)
    ]
    return Pair("P1", _grid(20), truth, predicted[0], np.stack(predicted[1:]))


def test_weights_are_repeated_rows() -> None:
    rng = np.random.default_rng(0)
    truth, predicted = rng.gamma(2.0, size=(30, 5)), rng.gamma(2.0, size=(30, 5))
    weights = rng.integers(0, 4, size=(3, 30))
    found = promotion._weighted_pcc(truth, predicted, weights.astype(float))
    for row, value in zip(weights, found, strict=True):
        repeated = np.repeat(np.arange(30), row)
        expected = [pearsonr(truth[repeated, gene], predicted[repeated, gene]).statistic for gene in range(5)]
        assert value == pytest.approx(np.mean(expected))


def test_a_constant_gene_counts_as_zero() -> None:
    truth = np.random.default_rng(0).gamma(2.0, size=(30, 2))
    predicted = truth.copy()
    predicted[:, 1] = 3.0
    assert promotion._weighted_pcc(truth, predicted, np.ones((1, 30))) == pytest.approx(0.5)


def test_all_spots_of_a_block_have_the_same_weight() -> None:
    xy_um = _grid(20)
    weights = promotion._block_weights(xy_um, 1000.0, np.random.default_rng(0))
    block = (xy_um // 1000).astype(int) @ [4, 1]
    assert len(set(block)) == 16
    for one in range(16):
        assert (weights[:, block == one] == weights[:, block == one][:, :1]).all()
    assert weights.sum(axis=1).mean() == pytest.approx(400, rel=0.01)


def test_a_better_model_is_better_and_an_equal_one_is_not() -> None:
    rng = np.random.default_rng(1)
    better = compare([_pair(rng, 3.0, 1.0)], 1000.0, seed=0)
    assert better.is_better
    assert better.low < better.mean < better.high
    promoted = [compare([_pair(rng, 2.0, 2.0)], 1000.0, seed=seed).is_better for seed in range(10)]
    assert sum(promoted) <= 2
    pair = _pair(rng, 2.0, 2.0)
    same = compare([Pair("P1", pair.xy_um, pair.truth, pair.champion, pair.champion[None])], 1000.0, seed=0)
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    assert not same.is_better


@pytest.mark.odd
def test_genes_that_the_section_does_not_measure_are_not_compared() -> None:
    pair = _pair(np.random.default_rng(0), champion_noise=2.0, challenger_noise=1.0)
    unknown = pair.truth.copy()
    unknown[:, ::3] = np.nan
    known = ~np.isnan(unknown[0])
    fewer = Pair("P1", pair.xy_um, pair.truth[:, known], pair.champion[:, known], pair.challengers[:, :, known])
    partial = Pair("P1", pair.xy_um, unknown, pair.champion, pair.challengers)
    assert compare([partial], 1000.0, seed=0) == compare([fewer], 1000.0, seed=0)


def test_one_lucky_training_of_three_is_not_enough() -> None:
    rng = np.random.default_rng(2)
    pair, lucky = _pair(rng, 2.0, 2.6), _pair(rng, 2.0, 0.5)
    trainings = np.stack([pair.truth + (lucky.challengers[0] - lucky.truth), *pair.challengers[1:]])
    mixed = compare([Pair("P1", pair.xy_um, pair.truth, pair.champion, trainings)], 1000.0, seed=0)
    assert mixed.mean > 0
    assert not mixed.is_better


def test_seeds_that_differ_more_than_tissue_promote_no_equal_model_too_often() -> None:
    rng = np.random.default_rng(4)
    promoted = 0
    for _ in range(60):
        luck = rng.normal(scale=0.4, size=3)
        truth = rng.gamma(2.0, size=(100, 60))
        predicted = [truth + (2.0 + shift) * rng.normal(size=truth.shape) for shift in (0.0, *luck)]
        pair = Pair("P1", _grid(10), truth, predicted[0], np.stack(predicted[1:]))
        promoted += compare([pair], 400.0, seed=0).is_better
    assert promoted <= 5  # of 60, expected is 1 in 40


def test_too_few_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tune\.block_um=4000 cuts a section into 1 blocks"):
        compare([_pair(np.random.default_rng(0), 2.0, 2.0)], 4000.0, seed=0)


def test_each_patient_has_the_same_weight_however_many_sections_it_has() -> None:
    rng = np.random.default_rng(3)
    good, bad = _pair(rng, 3.0, 1.0), _pair(rng, 1.0, 3.0)
    other = Pair("P2", *list(vars(bad).values())[1:])
    one, three = compare([good, other], 1000.0, seed=0), compare([good, good, good, other], 1000.0, seed=0)
    assert one.mean == pytest.approx(three.mean)
