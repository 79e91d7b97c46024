"""Retrieval against a dense NumPy reference written from the method's description, and its explanation of a tile."""

import numpy as np
import pytest

from mclstexp.errors import ModelError
from mclstexp.model import retrieval
from mclstexp.model.bank import Bank
from mclstexp.model.nearest import nearest
from mclstexp.model.retrieval import KEY_BLOCK
from mclstexp.settings import RetrievalConfig

EXPLAINED = [
    RetrievalConfig(k=8, temperature=0.1),
    RetrievalConfig(k=8, weighting="mean"),
    RetrievalConfig(k=8, weighting="inverse_square", distance="l1"),
]
GENES = ("GNAS", "ERBB2", "GATA3")
QUERY = np.random.default_rng(1).normal(size=6).astype(np.float32)


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


def test_a_query_equal_to_a_key_gets_its_payload() -> None:
    bank = _bank(20)
    config = RetrievalConfig(k=5, weighting="inverse_square", distance="l2")
    np.testing.assert_allclose(retrieval.retrieve(bank.keys, bank, config).prediction, bank.payload, atol=1e-4)


def test_mean_gives_all_neighbours_equal_weight() -> None:
    bank, queries = _bank(50), _queries(3)
    found = retrieval.retrieve(queries, bank, RetrievalConfig(k=7, weighting="mean"))
    ids, _ = nearest(queries, bank.directions, 7)
    np.testing.assert_allclose(found.prediction, bank.payload[ids].mean(axis=1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.effective_donors, 7, rtol=1e-5)


def test_no_queries_give_empty_answers() -> None:
    found = retrieval.retrieve(_queries(0), _bank(20), RetrievalConfig(k=3, temperature=0.1))
    assert {name: values.shape for name, values in vars(found).items()} == {
        "prediction": (0, 5),
        "similarity": (0,),
        "effective_donors": (0,),
        "donor_share": (0,),
        "spread": (0,),
    }


def test_k_beyond_the_bank_is_refused_and_a_default_lowered() -> None:
    with pytest.raises(ModelError, match=r"retrieval\.k=50 exceeds the bank's 20 spots"):
        retrieval.resolve(RetrievalConfig(k=50), 20)
    assert retrieval.resolve(RetrievalConfig(), 20).k == 20
    assert retrieval.resolve(RetrievalConfig(), 2000).k == retrieval.DEFAULT_K


@pytest.fixture
def named_bank() -> Bank:
    rng = np.random.default_rng(0)
    keys, payload = (rng.normal(size=(50, width)).astype(np.float32) for width in (6, len(GENES)))
    sections = np.array([f"S{spot % 5}" for spot in range(50)], object)
    patients = np.array([f"P{spot % 2}" for spot in range(50)], object)
    return Bank.of(keys, payload, sections, patients, np.array([f"spot{spot}" for spot in range(50)], object))


@pytest.mark.parametrize("config", EXPLAINED, ids=lambda config: config.weighting)
def test_explained_weights_and_payloads_give_the_prediction(named_bank: Bank, config: RetrievalConfig) -> None:
    voters = retrieval.explain(
        QUERY, named_bank, config, top=99, genes={name: column for column, name in enumerate(GENES)}
    )
    found = retrieval.retrieve(QUERY[None], named_bank, config)
    assert len(voters) == config.k
    assert voters["weight"].sum() == pytest.approx(1, abs=1e-12)
    assert voters["weight"].to_numpy() @ voters[list(GENES)].to_numpy() == pytest.approx(found.prediction[0], rel=1e-5)
    assert voters["similarity"].max() == found.similarity[0]
    assert 1 / (voters["weight"] ** 2).sum() == pytest.approx(found.effective_donors[0], rel=1e-6)
    assert voters.groupby("patient_id")["weight"].sum().max() == pytest.approx(found.donor_share[0], rel=1e-6)


@pytest.mark.parametrize("config", EXPLAINED, ids=lambda config: config.weighting)
def test_an_explanation_names_the_spots_of_largest_weight_first(named_bank: Bank, config: RetrievalConfig) -> None:
    voters, few = (
        retrieval.explain(QUERY, named_bank, config, top=8),
        retrieval.explain(QUERY, named_bank, config, top=3),
    )
    assert few.equals(voters.head(3))
    assert list(voters.columns) == ["section_id", "patient_id", "spot_id", "similarity", "weight"]
    assert voters["weight"].is_monotonic_decreasing
    unit = named_bank.keys / np.linalg.norm(named_bank.keys, axis=1, keepdims=True)
    cosine = unit @ QUERY / np.linalg.norm(QUERY)
    rows = [int(name.removeprefix("spot")) for name in voters["spot_id"]]
    assert set(rows) == set(np.argsort(-cosine)[:8])
    assert voters["similarity"].to_numpy() == pytest.approx(cosine[rows], abs=1e-6)
    assert voters["section_id"].tolist() == [f"S{row % 5}" for row in rows]
    assert voters["patient_id"].tolist() == [f"P{row % 2}" for row in rows]


def _partial(bank: Bank) -> Bank:
    """The bank, whose sections S1 and S3 do not measure the first gene, and none but S0 the second."""
    payload = bank.payload.copy()
    payload[np.isin(bank.section_id, ["S1", "S3"]), 0] = np.nan
    payload[bank.section_id != "S0", 1] = np.nan
    return Bank.of(bank.keys, payload, bank.section_id, bank.patient_id, bank.spot_id)


@pytest.mark.odd
@pytest.mark.parametrize("config", EXPLAINED, ids=lambda config: config.weighting)
def test_only_donors_that_measure_a_gene_vote_on_it(named_bank: Bank, config: RetrievalConfig) -> None:
    bank = _partial(named_bank)
    queries = np.random.default_rng(5).normal(size=(30, 6)).astype(np.float32)
    found = retrieval.neighbours(queries, named_bank, config)
    weight, num_unknown = retrieval.weights(found, config), 0
    expected = np.empty((30, 3))
    for query in range(30):
        for gene in range(3):
            sections = {0: ["S0", "S2", "S4"], 1: ["S0"], 2: ["S0", "S1", "S2", "S3", "S4"]}[gene]
            votes = np.isin(named_bank.section_id[found.ids[query]], sections)
            own = named_bank.payload[found.ids[query], gene].astype(np.float64)
            if votes.any():
                expected[query, gene] = (weight[query] * own)[votes].sum() / weight[query][votes].sum()
            else:
                num_unknown += 1
                expected[query, gene] = named_bank.payload[np.isin(named_bank.section_id, sections), gene].mean()
    assert 0 < num_unknown < 20
    answer = retrieval.retrieve(queries, bank, config)
    np.testing.assert_allclose(answer.prediction, expected, rtol=1e-5, atol=1e-6)
    whole = retrieval.retrieve(queries, named_bank, config)
    np.testing.assert_array_equal(answer.similarity, whole.similarity)
    np.testing.assert_array_equal(answer.donor_share, whole.donor_share)
    alone = [retrieval.retrieve(queries[[row]], bank, config).prediction[0] for row in range(30)]
    np.testing.assert_array_equal(alone, answer.prediction)


@pytest.mark.odd
def test_an_explanation_shows_no_value_that_a_donor_did_not_measure(named_bank: Bank) -> None:
    columns = {name: column for column, name in enumerate(GENES)}
    voters = retrieval.explain(QUERY, _partial(named_bank), EXPLAINED[0], top=8, genes=columns)
    whole = retrieval.explain(QUERY, named_bank, EXPLAINED[0], top=8, genes=columns)
    lacking = {"GNAS": voters["section_id"].isin(["S1", "S3"]), "ERBB2": voters["section_id"] != "S0"}
    for gene in GENES:
        is_unknown = lacking.get(gene, voters["weight"] < 0)
        assert voters[gene].isna().tolist() == is_unknown.tolist()
        np.testing.assert_array_equal(voters[gene][~is_unknown], whole[gene][~is_unknown])
    assert lacking["GNAS"].any()
    assert not lacking["GNAS"].all()
