"""Retrieval against a dense NumPy reference written from the method's text."""

import numpy as np
import pytest

from mclstexp.errors import ModelError
from mclstexp.model import retrieval
from mclstexp.model.bank import Bank
from mclstexp.model.nearest import KEY_BLOCK, Keys, nearest
from mclstexp.settings import RetrievalConfig
from mclstexp.training import validation
from mclstexp.training.validation import ValidationSection


def _bank(num_keys: int, seed: int = 0) -> Bank:
    rng = np.random.default_rng(seed)
    patients = np.array([f"P{i % 3}" for i in range(num_keys)], object)
    names = np.array([str(i) for i in range(num_keys)], object)
    keys, payload = (rng.normal(size=(num_keys, width)).astype(np.float32) for width in (8, 5))
    return Bank.of(keys, payload, patients, patients, names)


def _queries(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 8)).astype(np.float32)


def _reference(queries: np.ndarray, bank: Bank, config: RetrievalConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (prediction, effective donors, share of the largest patient), one query at a time."""
    rows = []
    for query in queries.astype(np.float64):
        keys = bank.keys.astype(np.float64)
        cosine = keys @ query / np.linalg.norm(keys, axis=1) / np.linalg.norm(query)
        best = np.lexsort((np.arange(len(keys)), -cosine))[: config.k]
        if config.weighting == "softmax":
            weight = np.exp(cosine[best] / config.temperature)
        else:
            gap = np.abs(keys[best] - query)
            distance = gap.sum(1) if config.distance == "l1" else np.sqrt((gap**2).sum(1))
            weight = 1 / distance**2
        weight /= weight.sum()
        share = max(weight[bank.patient_id[best] == patient].sum() for patient in set(bank.patient_id))
        rows.append((weight @ bank.payload[best], 1 / (weight**2).sum(), share))
    prediction, donors, shares = zip(*rows, strict=True)
    return np.stack(prediction), np.array(donors), np.array(shares)


@pytest.mark.parametrize(
    "config",
    [
        RetrievalConfig(k=7, temperature=0.1),
        RetrievalConfig(k=1, temperature=0.1),
        RetrievalConfig(k=7, weighting="inverse_square", distance="l1"),
        RetrievalConfig(k=40, weighting="inverse_square", distance="l2"),
    ],
    ids=lambda config: f"{config.weighting}-{config.k}-{config.distance}",
)
@pytest.mark.parametrize("key_block", [16, 65_536])
def test_it_equals_the_dense_reference(
    config: RetrievalConfig, key_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, queries = _bank(40), _queries(9)
    monkeypatch.setattr(Keys.nearest, "__defaults__", (key_block,))
    monkeypatch.setattr(retrieval.weighted_mean, "__defaults__", (key_block,))
    found = retrieval.retrieve(queries, bank, config)
    prediction, donors, share = _reference(queries, bank, config)
    np.testing.assert_allclose(found.prediction, prediction, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.effective_donors, donors, rtol=1e-3)
    np.testing.assert_allclose(found.donor_share, share, rtol=1e-3)


def test_an_answer_does_not_depend_on_the_other_queries() -> None:
    bank, queries, config = _bank(300), _queries(600), RetrievalConfig(k=9, temperature=0.05)
    together = retrieval.retrieve(queries, bank, config)
    for start, stop in ((0, 1), (255, 257), (599, 600)):
        alone = retrieval.retrieve(queries[start:stop], bank, config)
        assert (alone.prediction == together.prediction[start:stop]).all()
        assert (alone.similarity == together.similarity[start:stop]).all()


def test_neighbours_in_several_blocks_of_keys_are_added_block_by_block() -> None:
    bank, queries = _bank(2 * KEY_BLOCK + 999), _queries(20)
    config = RetrievalConfig(k=60, temperature=0.02)
    found = retrieval.neighbours(queries, bank, config)
    assert set((found.ids // KEY_BLOCK).ravel().tolist()) == {0, 1, 2}
    weight = retrieval.weights(found, config)
    expected = np.einsum("qk,qkg->qg", weight, bank.payload[found.ids].astype(np.float64))
    np.testing.assert_allclose(retrieval.retrieve(queries, bank, config).prediction, expected, rtol=1e-6)


def test_a_query_on_a_key_takes_its_payload() -> None:
    bank = _bank(20)
    config = RetrievalConfig(k=5, weighting="inverse_square", distance="l2")
    np.testing.assert_allclose(retrieval.retrieve(bank.keys, bank, config).prediction, bank.payload, atol=1e-4)


def test_mean_weighs_all_neighbours_alike() -> None:
    bank, queries = _bank(50), _queries(3)
    found = retrieval.retrieve(queries, bank, RetrievalConfig(k=7, weighting="mean"))
    ids, _ = nearest(queries, bank.directions, 7)
    np.testing.assert_allclose(found.prediction, bank.payload[ids].mean(axis=1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.effective_donors, 7, rtol=1e-5)


def test_no_queries_have_no_answers() -> None:
    found = retrieval.retrieve(_queries(0), _bank(20), RetrievalConfig(k=3, temperature=0.1))
    assert {name: values.shape for name, values in vars(found).items()} == {
        "prediction": (0, 5),
        "similarity": (0,),
        "effective_donors": (0,),
        "donor_share": (0,),
    }


def test_k_beyond_the_bank_is_refused_or_by_default_lowered() -> None:
    with pytest.raises(ModelError, match=r"retrieval\.k=50 exceeds the bank's 20 spots"):
        retrieval.resolve(RetrievalConfig(k=50), 20)
    assert retrieval.resolve(RetrievalConfig(), 20).k == 20
    assert retrieval.resolve(RetrievalConfig(), 2000).k == retrieval.DEFAULT_K


def test_choice_finds_the_settings_that_predict_best() -> None:
    """Truth follows the ten nearest keys evenly, so that few neighbours at a high temperature are best."""
    rng = np.random.default_rng(3)
    bank = _bank(500)
    queries = rng.normal(size=(200, 8)).astype(np.float32)
    truth = retrieval.retrieve(queries, bank, RetrievalConfig(k=10, temperature=0.5)).prediction
    sections = [ValidationSection("P", queries, truth)]
    chosen = validation.choose(sections, bank, RetrievalConfig())
    assert (chosen.k, chosen.temperature) == (10, 0.5)
    assert validation.choose(sections, bank, RetrievalConfig(k=3)).k == 3


def test_choice_looks_within_sections_and_weighs_patients_alike() -> None:
    """One large section of P likes few neighbours, two small ones of Q many; a level of its own tells nothing."""
    rng = np.random.default_rng(3)
    bank = _bank(500)
    likes = [("P", 300, 10, 0.0), ("Q", 60, 400, 50.0), ("Q", 60, 400, 90.0), ("R", 60, 400, 0.0)]
    sections = []
    for patient, num, k, level in likes:
        queries = rng.normal(size=(num, 8)).astype(np.float32)
        said = retrieval.retrieve(queries, bank, RetrievalConfig(k=k, temperature=0.5)).prediction
        sections.append(ValidationSection(patient, queries, said + level))
    best = {}
    for k in (10, 400):
        config, of_patients = RetrievalConfig(k=k, temperature=0.5), {}
        for section in sections:
            said = retrieval.retrieve(section.queries, bank, config).prediction
            genes = np.argsort(-section.truth.mean(axis=0))[:50]
            pcc = [np.corrcoef(section.truth[:, gene], said[:, gene])[0, 1] for gene in genes]
            of_patients.setdefault(section.patient_id, []).append(np.mean(pcc))
        best[k] = np.mean([np.mean(values) for values in of_patients.values()])
    assert abs(best[10] - best[400]) > 0.02, "the choice must not be a toss-up"
    config = RetrievalConfig(temperature=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "TRIED_K", (10, 400))
        assert validation.choose(sections, bank, config).k == max(best, key=best.__getitem__)
