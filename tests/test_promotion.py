"""Who becomes champion: only a model that won on patients that the champion does not know."""

from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest

from mclstexp import tracking
from mclstexp.config import Config, override
from tuning import promotion
from tuning.promotion import Difference, Promotion, promote
from tuning.space import Choice
from tuning.sweep import FINISHED, Sweep, Trial
from tuning.trial import TrialPlan

BEST = Trial("t", {"retrieval.k": 20}, FINISHED, 2, 0.3, "")
VALIDATION = "P2"


class _Registry:
    """A sweep whose best model has version 2, where version 1 is champion."""

    def __init__(self, folder: Path) -> None:
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
def registry(tmp_path_factory: pytest.TempPathFactory) -> _Registry:
    """A registry with two versions."""
    return _Registry(tmp_path_factory.mktemp("registry"))


@pytest.fixture
def decided(registry: _Registry, monkeypatch: pytest.MonkeyPatch) -> _Registry:
    """The registry, with a best trial that needs no training to be compared."""
    entry = SimpleNamespace(patient_id=VALIDATION)
    run = SimpleNamespace(
        config=registry.config,
        split=SimpleNamespace(validation=("V1",)),
        manifest=SimpleNamespace(section=lambda name: entry),
    )
    monkeypatch.setattr(promotion, "open_trial", lambda *_: run)
    monkeypatch.setattr(promotion, "_register", lambda run: "2")
    monkeypatch.setattr(tracking, "fetch_model", lambda *_: str(registry.folder))
    monkeypatch.setattr(promotion, "_replicates", lambda *_: [])
    monkeypatch.setattr(promotion, "_pairs", lambda *_: [])
    return registry


@pytest.mark.parametrize(("low", "champion"), [(0.05, "2"), (-0.01, "1"), (0.0, "1")])
def test_champion_moves_where_the_whole_interval_lies_above_zero(
    decided: _Registry, monkeypatch: pytest.MonkeyPatch, low: float, champion: str
) -> None:
    monkeypatch.setattr(promotion.ModelVersion, "load", lambda folder: None)
    monkeypatch.setattr(promotion, "_obstacle", lambda run, champion: "")
    monkeypatch.setattr(promotion, "compare", lambda *_: Difference(0.1, low, 0.2))
    said, aliases = decided.promote()
    assert aliases == {"champion": champion, "challenger": "2"}
    assert said.is_champion == (champion == "2")
    assert decided.client.get_model_version("mclstexp", "2").tags["promotion.reason"] == said.reason


def test_a_champion_that_knows_the_validation_patients_is_not_compared(
    decided: _Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = SimpleNamespace(training=SimpleNamespace(patients=("P1", VALIDATION)))
    monkeypatch.setattr(promotion.ModelVersion, "load", lambda folder: known)
    said, aliases = decided.promote()
    assert aliases == {"champion": "1", "challenger": "2"}
    assert f"it was trained on the validation patients {VALIDATION}" in said.reason


def test_a_champion_that_cannot_be_read_stays_and_the_reason_is_kept(decided: _Registry) -> None:
    said, aliases = decided.promote()  # the champion's folder holds no model version
    assert aliases == {"champion": "1", "challenger": "2"}
    assert said.reason.startswith("not compared with version 1: ")
    assert decided.client.get_model_version("mclstexp", "2").tags["promotion"] == "false"
