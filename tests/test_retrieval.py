"""Retrieval against a dense NumPy reference that sorts every score."""

import numpy as np
import pytest

from mclstexp.errors import ModelError
from mclstexp.inference import retrieval
from mclstexp.inference.bank import Bank
from mclstexp.inference.retrieval import choose, nearest, resolve, retrieve
from mclstexp.settings import RetrievalConfig

RNG = np.random.default_rng(0)


def _bank(keys: np.ndarray, num_genes: int = 7, num_patients: int = 3) -> Bank:
    patients = np.array([f"P{i % num_patients}" for i in range(len(keys))], object)
    spots = np.array([f"spot{i}" for i in range(len(keys))], object)
    payload = np.random.default_rng(len(keys)).normal(size=(len(keys), num_genes)).astype(np.float32)
    return Bank(keys.astype(np.float32), payload, patients, patients, spots)


def _random(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def _dense_cosines(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    queries, keys = queries.astype(np.float64), keys.astype(np.float64)
    return queries @ keys.T / np.linalg.norm(queries, axis=1)[:, None] / np.linalg.norm(keys, axis=1)


def _dense_answer(query: np.ndarray, bank: Bank, config: RetrievalConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (prediction, weights, neighbours) of one query, straight from the definitions."""
    cosine = _dense_cosines(query[None], bank.keys)[0]
    chosen = sorted(range(len(cosine)), key=lambda i: (-cosine[i], i))[: config.k]
    raw = []
    for i in chosen:
        gap = np.abs(query.astype(np.float64) - bank.keys[i])
        distance = gap.sum() if config.distance == "l1" else (gap**2).sum() ** 0.5
        softmax = config.weighting == "softmax"
        raw.append(np.exp(cosine[i] / config.temperature) if softmax else distance**-2.0)
    weights = np.array(raw) / sum(raw)
    return sum(w * bank.payload[i].astype(np.float64) for w, i in zip(weights, chosen, strict=True)), weights, chosen


@pytest.mark.parametrize(
    ("weighting", "distance"), [("softmax", "l2"), ("inverse_square", "l1"), ("inverse_square", "l2")]
)
@pytest.mark.parametrize(("num_queries", "num_keys", "k"), [(1, 1, 1), (5, 40, 7), (300, 500, 50), (20, 33, 33)])
def test_answers_equal_the_dense_reference(
    weighting: str, distance: str, num_queries: int, num_keys: int, k: int
) -> None:
    queries, bank = _random(num_queries, 16), _bank(_random(num_keys, 16))
    config = RetrievalConfig(k=k, weighting=weighting, distance=distance, temperature=0.1)
    found = retrieve(queries, bank, config)
    for row in range(num_queries):
        prediction, weights, chosen = _dense_answer(queries[row], bank, config)
        assert found.prediction[row] == pytest.approx(prediction, abs=2e-5)
        assert found.similarity[row] == pytest.approx(_dense_cosines(queries[row : row + 1], bank.keys).max(), abs=1e-6)
        assert found.effective_donors[row] == pytest.approx(1 / (weights**2).sum(), rel=1e-4)
        patients = bank.patient_id[chosen]
        largest = max(weights[patients == name].sum() for name in set(patients))
        assert found.donor_share[row] == pytest.approx(largest, abs=1e-5)
    assert {values.dtype for values in vars(found).values()} == {np.dtype(np.float32)}


def test_blocks_of_keys_change_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys = _random(30, 8), _random(100, 8)
    ids, scores = nearest(queries, keys, 20)
    monkeypatch.setattr(retrieval, "KEY_BLOCK", 13)
    ids_in_blocks, scores_in_blocks = nearest(queries, keys, 20)
    assert np.array_equal(ids_in_blocks, ids)
    assert scores_in_blocks == pytest.approx(scores, abs=1e-6)


def test_a_query_is_answered_the_same_alone_and_among_others() -> None:
    queries, bank = _random(600, 24), _bank(_random(900, 24))
    config = RetrievalConfig(k=10, temperature=0.1)
    together = retrieve(queries, bank, config)
    for part in (slice(0, 1), slice(255, 258), slice(599, 600)):
        alone = retrieve(queries[part], bank, config)
        for name, values in vars(alone).items():
            assert np.array_equal(values, getattr(together, name)[part]), name


@pytest.mark.parametrize("block", [4, 65_536])
def test_ties_go_to_the_lower_key(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "KEY_BLOCK", block)
    keys = np.tile(np.array([[0.0, 1.0], [1.0, 0.0]], np.float32), (6, 1))  # odd keys are alike, and so are even ones
    ids, scores = nearest(np.array([[2.0, 0.0], [0.0, 3.0]], np.float32), keys, 4)
    assert ids.tolist() == [[1, 3, 5, 7], [0, 2, 4, 6]]
    assert scores.tolist() == [[1.0] * 4] * 2
    ids, _ = nearest(np.array([[1.0, 0.5]], np.float32), keys, 8)
    assert ids.tolist() == [[1, 3, 5, 7, 9, 11, 0, 2]]


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_a_key_on_the_query_takes_all_the_weight_instead_of_dividing_by_zero(distance: str) -> None:
    bank = _bank(_random(10, 4))
    found = retrieve(bank.keys[3:4], bank, RetrievalConfig(k=10, weighting="inverse_square", distance=distance))
    assert found.prediction[0] == pytest.approx(bank.payload[3], abs=1e-5)
    assert found.effective_donors[0] == pytest.approx(1.0)
    assert found.donor_share[0] == pytest.approx(1.0)


def test_inverse_square_reads_lengths_that_cosine_ignores() -> None:
    keys = np.array([[1.0, 0.0], [10.0, 0.0]], np.float32)
    found = retrieve(
        np.array([[2.0, 0.0]], np.float32), _bank(keys), RetrievalConfig(k=2, weighting="inverse_square", distance="l2")
    )
    assert found.effective_donors[0] == pytest.approx(1 / ((64 / 65) ** 2 + (1 / 65) ** 2), rel=1e-5)


def test_more_neighbours_than_the_bank_has_are_refused_when_asked_for_and_cut_by_default() -> None:
    with pytest.raises(ModelError, match=r"retrieval\.k=31 exceeds the bank's 30 spots; use at most 30"):
        resolve(RetrievalConfig(k=31), 30)
    assert resolve(RetrievalConfig(), 30).k == 30
    assert resolve(RetrievalConfig(), 3000).k == retrieval.DEFAULT_K
    assert resolve(RetrievalConfig(k=30, temperature=0.3), 30) == RetrievalConfig(k=30, temperature=0.3)


def _noisy_validation(num_keys: int = 600) -> tuple[np.ndarray, np.ndarray, Bank]:
    """Payload is a smooth function of the key plus noise, so that a mean over several neighbours is best."""
    rng = np.random.default_rng(1)
    keys, queries = rng.normal(size=(num_keys, 3)), rng.normal(size=(80, 3))
    mix = rng.normal(size=(3, 60))
    bank = _bank(keys, 60)
    unit_keys, unit_queries = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (keys, queries))
    payload = (unit_keys @ mix + 2 * rng.normal(size=(num_keys, 60)) + 5).astype(np.float32)
    truth = (unit_queries @ mix + 5).astype(np.float32)
    return queries.astype(np.float32), truth, Bank(bank.keys, payload, bank.section_id, bank.patient_id, bank.spot_id)


def _heg50_pcc(truth: np.ndarray, prediction: np.ndarray) -> float:
    highest = np.argsort(-truth.mean(axis=0))[:50]
    return float(np.mean([np.corrcoef(truth[:, gene], prediction[:, gene])[0, 1] for gene in highest]))


def test_choose_takes_the_best_of_all_it_tries() -> None:
    queries, truth, bank = _noisy_validation()
    chosen = choose(queries, truth, bank, RetrievalConfig())
    tried = {
        (k, temperature): _heg50_pcc(
            truth, retrieve(queries, bank, RetrievalConfig(k=k, temperature=temperature)).prediction
        )
        for k in retrieval.TRIED_K
        for temperature in retrieval.TRIED_TEMPERATURES
    }
    best = max(tried.values())
    assert tried[chosen.k, chosen.temperature] == pytest.approx(best, abs=1e-6)
    assert best > tried[10, 0.01] + 0.05, "the choice must matter for this test to mean anything"


def test_choose_leaves_alone_what_is_set() -> None:
    queries, truth, bank = _noisy_validation()
    assert choose(queries, truth, bank, RetrievalConfig(k=3, temperature=0.7)).k == 3
    assert choose(queries, truth, bank, RetrievalConfig(temperature=0.7)).temperature == 0.7
    published = choose(queries, truth, bank, RetrievalConfig(weighting="inverse_square"))
    assert published.k in retrieval.TRIED_K
    small = _bank(_random(6, 3), 60)
    assert choose(queries, truth, small, RetrievalConfig()).k == 6
