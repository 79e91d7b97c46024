"""Exact retrieval: each query takes the weighted mean of its k nearest keys' payloads.

An answer depends neither on which other queries are asked, nor on how they are batched, nor on whether the bank is
held whole or in shards: scores are exact (`cosine`), and sums are taken in a fixed order (`shards`).

Shapes: Q queries, N keys, D embedding, G genes, k neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from mclstexp.errors import ModelError
from mclstexp.evaluation.metrics import heg_pcc, highest_genes, mean_by_patient
from mclstexp.inference.bank import Bank
from mclstexp.inference.cosine import QUERY_BLOCK
from mclstexp.inference.shards import LocalShards, Neighbours, Shards, merged, split_bank
from mclstexp.settings import RetrievalConfig

DEFAULT_K, DEFAULT_TEMPERATURE = 200, 0.1
TRIED_K = (10, 20, 50, 100, 200, 400)
TRIED_TEMPERATURES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_SMALLEST_DISTANCE = 1e-12
_NORMS = {"l1": 1, "l2": 2}


@dataclass(frozen=True)
class Retrieved:
    """What the bank says of Q queries, and how sure it may be."""

    prediction: np.ndarray
    """float32 (Q, G), in the bank's unit."""
    similarity: np.ndarray
    """Cosine of the best match, float32 (Q,)."""
    effective_donors: np.ndarray
    """1 / sum of squared weights (Kish 1965), float32 (Q,)."""
    donor_share: np.ndarray
    """Weight of the patient who gave most, float32 (Q,)."""


def regressed(prediction: np.ndarray) -> Retrieved:
    """Returns predictions of a direct regression, float32 (Q, G), which has neither neighbours nor donors: NaN."""
    unknown = np.full(len(prediction), np.nan, np.float32)
    return Retrieved(prediction, unknown, unknown, unknown)


def resolve(config: RetrievalConfig, num_keys: int) -> RetrievalConfig:
    """Returns the settings with `k` and `temperature` filled in.

    Raises:
        ModelError: `k` is set and exceeds the bank.
    """
    if config.k is not None and config.k > num_keys:
        raise ModelError(f"retrieval.k={config.k} exceeds the bank's {num_keys} spots; use at most {num_keys}")
    k = config.k or min(DEFAULT_K, num_keys)
    return config.model_copy(update={"k": k, "temperature": config.temperature or DEFAULT_TEMPERATURE})


def retrieve(queries: np.ndarray, bank: Bank | Shards, config: RetrievalConfig) -> Retrieved:
    """Returns the bank's answer to image embeddings, float32 (Q, D); `config` as `resolve` returns it.

    Shards of a bank answer as the bank does, to the bit.
    """
    shards = held(bank)
    starts = range(0, max(1, len(queries)), QUERY_BLOCK)
    blocks = [vars(_answer(queries[start : start + QUERY_BLOCK], shards, config)) for start in starts]
    return Retrieved(**{name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]})


def held(bank: Bank | Shards) -> Shards:
    """Returns a bank as shards: one that is held whole is a single one in this process."""
    return LocalShards(split_bank(bank, 1)) if isinstance(bank, Bank) else bank


def neighbours(queries: np.ndarray, shards: Shards, config: RetrievalConfig) -> Neighbours:
    """Returns the config.k best keys of each query, float32 (Q, D)."""
    k = config.k or DEFAULT_K
    order = _NORMS[config.distance] if config.weighting == "inverse_square" else None
    return merged(shards.nearest(queries, k, order), k)


def weights(found: Neighbours, config: RetrievalConfig) -> np.ndarray:
    """Returns each neighbour's weight, float64 (Q, k), rows summing to 1.

    `softmax`: of cosine / temperature. `inverse_square`: 1 / d^2 of the un-normalised vectors, L1 or L2, as
    mclSTExp does (2024, https://arxiv.org/abs/2407.08216). `mean`: all alike, as BLEEP does (2023,
    https://arxiv.org/abs/2306.01859).
    """
    if config.weighting == "softmax":
        logits = found.similarity.astype(np.float64) / (config.temperature or DEFAULT_TEMPERATURE)
        raw = np.exp(logits - logits.max(axis=1, keepdims=True))
    elif found.distance is None:
        raw = np.ones(found.ids.shape)
    else:
        raw = 1 / np.maximum(found.distance, _SMALLEST_DISTANCE) ** 2
    return raw / raw.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class ValidationSection:
    """A section of a validation patient."""

    patient_id: str
    queries: np.ndarray
    """Image embeddings, float32 (Q, D)."""
    truth: np.ndarray
    """Measured expression in the bank's unit, (Q, G)."""


def choose(sections: Sequence[ValidationSection], bank: Bank, config: RetrievalConfig) -> RetrievalConfig:
    """Returns the settings with the `k` and `temperature` of the highest mean PCC over the 50 highest genes.

    As on the score card, correlations are taken within a section over its own highest genes, and averaged by patient.
    Only what the configuration leaves open is chosen.
    """
    tried, means = _tried(sections, bank, config)
    return tried[int(means.argmax())]


def best_score(sections: Sequence[ValidationSection], bank: Bank, config: RetrievalConfig) -> float:
    """Returns the mean PCC over the 50 highest genes under the settings that `choose` would return."""
    return float(_tried(sections, bank, config)[1].max())


def _tried(
    sections: Sequence[ValidationSection], bank: Bank, config: RetrievalConfig
) -> tuple[list[RetrievalConfig], np.ndarray]:
    """Returns all settings that a configuration leaves open, and each one's score."""
    fixed = resolve(config, len(bank))
    all_k = [config.k] if config.k else [k for k in TRIED_K if k <= len(bank)] or [len(bank)]
    open_temperature = config.weighting == "softmax" and config.temperature is None
    temperatures = TRIED_TEMPERATURES if open_temperature else (fixed.temperature,)
    tried = [
        fixed.model_copy(update={"k": k, "temperature": temperature}) for k, temperature in product(all_k, temperatures)
    ]
    scores = np.array([_scores(section, bank, tried, max(all_k)) for section in sections])
    return tried, mean_by_patient([section.patient_id for section in sections], scores)


def _scores(section: ValidationSection, bank: Bank, tried: Sequence[RetrievalConfig], most: int) -> list[float]:
    """Returns the mean PCC over a section's own highest genes under each of the tried settings."""
    genes = highest_genes(section.truth)
    shards = LocalShards([replace(shard, payload=shard.payload[:, genes]) for shard in split_bank(bank, 1)])
    best = neighbours(section.queries, shards, tried[0].model_copy(update={"k": most}))
    means = []
    for config in tried:
        found = best.first(config.k or most)
        said = _mixed(found.ids, weights(found, config), shards)
        means.append(heg_pcc(section.truth[:, genes], said))
    return means


def _answer(queries: np.ndarray, shards: Shards, config: RetrievalConfig) -> Retrieved:
    """Returns the answer to at most QUERY_BLOCK queries."""
    found = neighbours(queries, shards, config)
    share = weights(found, config)
    patients, patient = np.unique(found.patient, return_inverse=True)
    by_patient = np.zeros((len(share), len(patients)))
    np.add.at(by_patient, (np.arange(len(share))[:, None], patient), share)
    return Retrieved(
        prediction=_mixed(found.ids, share, shards),
        similarity=found.similarity[:, 0],
        effective_donors=(1 / (share**2).sum(axis=1)).astype(np.float32),
        donor_share=by_patient.max(axis=1, initial=0).astype(np.float32),
    )


def _mixed(ids: np.ndarray, share: np.ndarray, shards: Shards) -> np.ndarray:
    """Returns each query's weighted mean of its neighbours' payloads, float32 (Q, G)."""
    blocks = [block for shard in shards.sums(ids, share) for block in shard]
    total = blocks[0]
    for block in blocks[1:]:
        total = total + block
    return total.astype(np.float32)
