"""Whom a prediction came from adds up to the prediction."""

import numpy as np
import pytest

from mclstexp.model.bank import Bank
from mclstexp.model.retrieval import explain, retrieve
from mclstexp.settings import RetrievalConfig

CONFIGS = [
    RetrievalConfig(k=8, temperature=0.1),
    RetrievalConfig(k=8, weighting="mean"),
    RetrievalConfig(k=8, weighting="inverse_square", distance="l1"),
]
GENES = ("GNAS", "ERBB2", "GATA3")


@pytest.fixture
def bank() -> Bank:
    rng = np.random.default_rng(0)
    keys, payload = (rng.normal(size=(50, width)).astype(np.float32) for width in (6, len(GENES)))
    sections = np.array([f"S{spot % 5}" for spot in range(50)], object)
    patients = np.array([f"P{spot % 2}" for spot in range(50)], object)
    return Bank.of(keys, payload, sections, patients, np.array([f"spot{spot}" for spot in range(50)], object))


QUERY = np.random.default_rng(1).normal(size=6).astype(np.float32)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.weighting)
def test_all_votes_together_are_the_prediction(bank: Bank, config: RetrievalConfig) -> None:
    voters = explain(QUERY, bank, config, top=99, genes={name: place for place, name in enumerate(GENES)})
    said = retrieve(QUERY[None], bank, config)
    assert len(voters) == config.k
    assert voters["weight"].sum() == pytest.approx(1, abs=1e-12)
    assert voters["weight"].to_numpy() @ voters[list(GENES)].to_numpy() == pytest.approx(said.prediction[0], rel=1e-5)
    assert voters["similarity"].max() == said.similarity[0]
    assert 1 / (voters["weight"] ** 2).sum() == pytest.approx(said.effective_donors[0], rel=1e-6)
    assert voters.groupby("patient_id")["weight"].sum().max() == pytest.approx(said.donor_share[0], rel=1e-6)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.weighting)
def test_the_strongest_votes_come_first_and_name_their_spots(bank: Bank, config: RetrievalConfig) -> None:
    voters, few = explain(QUERY, bank, config, top=8), explain(QUERY, bank, config, top=3)
    assert few.equals(voters.head(3))
    assert list(voters.columns) == ["section_id", "patient_id", "spot_id", "similarity", "weight"]
    assert voters["weight"].is_monotonic_decreasing
    unit = bank.keys / np.linalg.norm(bank.keys, axis=1, keepdims=True)
    cosine = unit @ QUERY / np.linalg.norm(QUERY)
    rows = [int(name.removeprefix("spot")) for name in voters["spot_id"]]
    assert set(rows) == set(np.argsort(-cosine)[:8])
    assert voters["similarity"].to_numpy() == pytest.approx(cosine[rows], abs=1e-6)
    assert voters["section_id"].tolist() == [f"S{row % 5}" for row in rows]
    assert voters["patient_id"].tolist() == [f"P{row % 2}" for row in rows]
