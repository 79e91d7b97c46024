"""Exact retrieval: each query gets the weighted mean of its k nearest keys' payloads.

An answer does not depend on other queries, batches or the device: cosines are exact (`nearest.py`), and weighted
payloads are summed in a fixed order, key block by key block. The price is a sum on the CPU, one query at a time.

Shapes: Q queries, N keys, D embedding, G genes, k neighbours.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from mclstexp.errors import ModelError
from mclstexp.model.bank import Bank
from mclstexp.model.nearest import QUERY_BLOCK, Keys
from mclstexp.settings import RetrievalConfig

KEY_BLOCK = 65_536
"""Keys whose weighted payloads are summed together: the order of the sums depends on it."""
DEFAULT_K, DEFAULT_TEMPERATURE = 200, 0.1
FIXED_NUMBER_K = 400
"""Default of `k` where each query has a fixed effective number of donors: those behind have no weight to speak of."""
_MIN_DISTANCE = 1e-12
_NORMS = {"l1": 1, "l2": 2}
_LOG_TEMPERATURES, _BISECTIONS = (-9.0, 4.0), 30


@dataclass(frozen=True)
class Retrieved:
    """The bank's answer to Q queries, with measures of its certainty."""

    prediction: np.ndarray
    """float32 (Q, G), in the bank's unit."""
    similarity: np.ndarray
    """Cosine of the best match, float32 (Q,)."""
    effective_donors: np.ndarray
    """1 / sum of squared weights (Kish 1965), float32 (Q,)."""
    donor_share: np.ndarray
    """Total weight of the patient with the largest weight, float32 (Q,)."""
    spread: np.ndarray
    """How far the program scores of the donors lie apart (`blend.spread`), float32 (Q,); NaN without programs."""


def regressed(prediction: np.ndarray) -> Retrieved:
    """Returns predictions of a direct regression, float32 (Q, G); what needs neighbours or donors is NaN."""
    unknown = np.full(len(prediction), np.nan, np.float32)
    return Retrieved(prediction, unknown, unknown, unknown, unknown)


def resolve(config: RetrievalConfig, num_keys: int) -> RetrievalConfig:
    """Returns the settings with defaults for an empty `k` and `temperature`.

    Raises:
        ModelError: `k` is set and exceeds the number of keys.
    """
    if config.k is not None and config.k > num_keys:
        raise ModelError(f"retrieval.k={config.k} exceeds the bank's {num_keys} spots; use at most {num_keys}")
    default = FIXED_NUMBER_K if config.weighting == "fixed_number" else DEFAULT_K
    k = config.k or min(default, num_keys)
    return config.model_copy(update={"k": k, "temperature": config.temperature or DEFAULT_TEMPERATURE})


@dataclass(frozen=True)
class Neighbours:
    """Each query's nearest keys, best first; among equal cosines the lower key first."""

    ids: np.ndarray
    """Rows of the bank, int64 (Q, k)."""
    similarity: np.ndarray
    """Cosines, float32 (Q, k)."""
    distance: np.ndarray | None
    """Between un-normalised vectors, float64 (Q, k); None if the weighting does not need it."""

    def first(self, k: int) -> "Neighbours":
        """Returns each query's k nearest."""
        distance = None if self.distance is None else self.distance[:, :k]
        return Neighbours(self.ids[:, :k], self.similarity[:, :k], distance)


def retrieve(queries: np.ndarray, bank: Bank, config: RetrievalConfig, keys: Keys | None = None) -> Retrieved:
    """Returns the bank's answer to image embeddings, float32 (Q, D).

    Args:
        queries: embeddings of tiles.
        bank: the measured spots.
        config: as `resolve` returns it.
        keys: the bank's directions on the device that searches them (default: the CPU).
    """
    keys = keys or Keys(bank.directions)
    starts = range(0, max(1, len(queries)), QUERY_BLOCK)
    found = (neighbours(queries[start : start + QUERY_BLOCK], bank, config, keys) for start in starts)
    blocks = [vars(weigh(each, bank, config)) for each in found]
    return Retrieved(**{name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]})


def weigh(found: Neighbours, bank: Bank, config: RetrievalConfig) -> Retrieved:
    """Returns the answer that the neighbours of Q queries give."""
    weight = weights(found, config)
    patients, patient = np.unique(bank.patient_code[found.ids], return_inverse=True)
    by_patient = np.zeros((len(weight), len(patients)))
    np.add.at(by_patient, (np.arange(len(weight))[:, None], patient), weight)
    return Retrieved(
        prediction=weighted_mean(found.ids, weight, bank),
        similarity=found.similarity[:, 0],
        effective_donors=(1 / (weight**2).sum(axis=1)).astype(np.float32),
        donor_share=by_patient.max(axis=1, initial=0).astype(np.float32),
        spread=np.full(len(weight), np.nan, np.float32),
    )


def explain(
    query_D: np.ndarray, bank: Bank, config: RetrievalConfig, top: int, genes: Mapping[str, int] | None = None
) -> pd.DataFrame:
    """Returns the spots with the largest weights in a tile's prediction: one row per spot, by weight, then cosine.

    Columns: section_id, patient_id, spot_id; similarity (cosine, float32) and weight (float64), as in the prediction:
    over all k neighbours, weights sum to 1 and their `weighted_mean` is the prediction.

    Args:
        query_D: the tile's embedding, float32 (D,).
        bank: the bank of the prediction.
        config: as `resolve` returns it.
        top: largest number of rows; there are never more than k.
        genes: columns to add, by name, with their index in the payload: each spot's measured expression, in the bank's
            unit; NaN if its section does not measure the gene.
    """
    found = neighbours(query_D[None], bank, config)
    weight = weights(found, config)[0]
    order = np.argsort(-weight, kind="stable")[:top]
    rows = found.ids[0, order]
    donors = {name: getattr(bank, name)[rows] for name in ("section_id", "patient_id", "spot_id")}
    voters = pd.DataFrame(donors | {"similarity": found.similarity[0, order], "weight": weight[order]})
    return voters.assign(**{name: _measured_values(bank, rows, column) for name, column in (genes or {}).items()})


def neighbours(queries: np.ndarray, bank: Bank, config: RetrievalConfig, keys: Keys | None = None) -> Neighbours:
    """Returns the config.k nearest keys of each query, float32 (Q, D); `keys` as in `retrieve`."""
    ids, similarity = (keys or Keys(bank.directions)).nearest(queries, config.k or DEFAULT_K)
    if config.weighting != "inverse_square":
        return Neighbours(ids, similarity, None)
    return Neighbours(ids, similarity, _distances(queries, bank.keys, ids, _NORMS[config.distance]))


def weights(found: Neighbours, config: RetrievalConfig) -> np.ndarray:
    """Returns each neighbour's weight, float64 (Q, k); rows sum to 1.

    `softmax`: of cosine / temperature. `fixed_number`: see `fixed_number_weights`. `inverse_square`: 1 / d^2 of the
    un-normalised vectors, L1 or L2, as in mclSTExp (2024, https://arxiv.org/abs/2407.08216). `mean`: equal, as in BLEEP
    (2023, https://arxiv.org/abs/2306.01859).
    """
    if config.weighting == "fixed_number":
        return fixed_number_weights(found.similarity, config.effective_donors)
    if config.weighting == "softmax":
        logits = found.similarity.astype(np.float64) / (config.temperature or DEFAULT_TEMPERATURE)
        raw = np.exp(logits - logits.max(axis=1, keepdims=True))
    elif found.distance is None:
        raw = np.ones(found.ids.shape)
    else:
        raw = 1 / np.maximum(found.distance, _MIN_DISTANCE) ** 2
    return raw / raw.sum(axis=1, keepdims=True)


def fixed_number_weights(similarity: np.ndarray, number: float) -> np.ndarray:
    """Returns softmax weights with which each query has the same effective number of donors, float64 (Q, k).

    The number is 1 / sum of squared weights (Kish 1965). Each query's temperature is found by bisection, because
    cosines are peaked in few dimensions and flat in many: a fixed temperature would be a handful of donors here and the
    whole bank there. Where a query has fewer than twice as many neighbours, the number is half of these.

    Args:
        similarity: cosines of each query's neighbours, (Q, k).
        number: effective number of donors.
    """
    number = min(number, similarity.shape[1] / 2)
    logits = similarity.astype(np.float64) - similarity.max(axis=1, keepdims=True, initial=-1)
    low, high = np.full((len(logits), 1), _LOG_TEMPERATURES[0]), np.full((len(logits), 1), _LOG_TEMPERATURES[1])
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        weight = np.exp(logits / np.exp(middle))
        is_peaked = weight.sum(axis=1, keepdims=True) ** 2 < number * (weight**2).sum(axis=1, keepdims=True)
        low, high = np.where(is_peaked, middle, low), np.where(is_peaked, high, middle)
    return weight / weight.sum(axis=1, keepdims=True)


def weighted_mean(ids: np.ndarray, weight: np.ndarray, bank: Bank, key_block: int = KEY_BLOCK) -> np.ndarray:
    """Returns each query's expression, float32 (Q, G): the weighted mean over the neighbours that measure the gene.

    If none of the k neighbours measures a gene, it is the gene's mean over all spots of the bank that do.

    Args:
        ids: rows of the bank, int64 (Q, k).
        weight: as `weights` returns them, float64 (Q, k).
        bank: the measured spots.
        key_block: as in `_weighted_sum`.
    """
    total = _weighted_sum(ids, weight, bank.payload, key_block)
    if bank.measured is None:
        return total.astype(np.float32)
    by_section = np.zeros((len(ids), len(bank.measured)))
    np.add.at(by_section, (np.arange(len(ids))[:, None], bank.section_code[ids]), weight)
    measured = bank.measured.astype(np.float64)
    share = np.array([np.einsum("s,sg->g", row, measured) for row in by_section]).reshape(total.shape)
    if (share == 0).any():
        total, share = np.where(share == 0, bank.mean_payload, total), np.where(share == 0, 1, share)
    return (total / share).astype(np.float32)


def _weighted_sum(ids: np.ndarray, weight: np.ndarray, payload: np.ndarray, key_block: int) -> np.ndarray:
    """Returns each query's weighted sum of its neighbours' payloads, float64 (Q, G).

    Sums are taken in double precision within each block of keys, then added in the order of the blocks.

    Args:
        ids: rows of the bank, int64 (Q, k).
        weight: float64 (Q, k).
        payload: of the whole bank, (N, G).
        key_block: keys in a block.
    """
    total = np.zeros((len(ids), payload.shape[1]))
    for query, blocks in enumerate(ids // key_block):
        for block in np.unique(blocks):
            chosen = blocks == block
            rows = payload[ids[query, chosen]]
            total[query] += np.einsum("k,kg->g", weight[query, chosen], rows)  # unlike @, in a fixed order
    return total


def _measured_values(bank: Bank, rows: np.ndarray, column: int) -> np.ndarray:
    """Returns a gene's payload in some rows of the bank, float32; NaN where the section does not measure it."""
    values = bank.payload[rows, column]
    if bank.measured is None:
        return values
    return np.where(bank.measured[bank.section_code[rows], column], values, np.float32(np.nan))


def _distances(queries: np.ndarray, keys: np.ndarray, ids: np.ndarray, order: int) -> np.ndarray:
    """Returns each query's distances to its neighbours in the norm of this order, float64 (Q, k)."""
    distances = np.empty(ids.shape)
    for row, (query, neighbour_ids) in enumerate(zip(queries, ids, strict=True)):
        distances[row] = np.linalg.norm(keys[neighbour_ids].astype(np.float64) - query, order, axis=1)
    return distances
