"""Exact retrieval: each query takes the weighted mean of its k nearest keys' payloads.

Queries and keys are scored in blocks of fixed size and ties go to the lower key, so that an answer depends neither
on which other queries are asked nor on how they are batched; the price is a little padding.

Shapes: Q queries, N keys, D embedding, G genes, k neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F

from mclstexp.errors import ModelError
from mclstexp.evaluation.metrics import highest_genes, pearson_per_gene
from mclstexp.inference.bank import Bank
from mclstexp.settings import RetrievalConfig

QUERY_BLOCK, KEY_BLOCK = 256, 65_536
DEFAULT_K, DEFAULT_TEMPERATURE = 200, 0.1
TRIED_K = (10, 20, 50, 100, 200, 400)
TRIED_TEMPERATURES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_SMALLEST_DISTANCE = 1e-12


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


def retrieve(queries: np.ndarray, bank: Bank, config: RetrievalConfig) -> Retrieved:
    """Returns the bank's answer to image embeddings, float32 (Q, D); `config` as `resolve` returns it."""
    ids, scores = nearest(queries, bank.keys, config.k or DEFAULT_K)
    return _weighted(bank, ids, scores, weights(queries, bank.keys, ids, scores, config))


def nearest(queries: np.ndarray, keys: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the k keys of highest cosine, int64 (Q, k), and their cosines, float32 (Q, k); best first."""
    unit_keys = F.normalize(torch.from_numpy(keys), dim=1)
    found = [_nearest_in_block(block, unit_keys, k) for block in torch.from_numpy(queries).split(QUERY_BLOCK)]
    ids, scores = (torch.cat(part).numpy() for part in zip(*found, strict=True))
    return ids, scores


def weights(
    queries: np.ndarray, keys: np.ndarray, ids: np.ndarray, scores: np.ndarray, config: RetrievalConfig
) -> np.ndarray:
    """Returns each neighbour's weight, float64 (Q, k), rows summing to 1.

    `softmax`: of cosine / temperature. `inverse_square`: 1 / d^2 of the un-normalised vectors, L1 or L2, as
    mclSTExp does (2024, https://arxiv.org/abs/2407.08216). `mean`: all alike, as BLEEP does (2023,
    https://arxiv.org/abs/2306.01859).
    """
    if config.weighting == "softmax":
        logits = scores.astype(np.float64) / (config.temperature or DEFAULT_TEMPERATURE)
        raw = np.exp(logits - logits.max(axis=1, keepdims=True))
    elif config.weighting == "mean":
        raw = np.ones(scores.shape)
    else:
        order = 1 if config.distance == "l1" else 2
        gaps = [keys[row].astype(np.float64) - query for query, row in zip(queries, ids, strict=True)]
        distance = np.stack([np.linalg.norm(gap, order, axis=1) for gap in gaps])
        raw = 1 / np.maximum(distance, _SMALLEST_DISTANCE) ** 2
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
    fixed = resolve(config, len(bank))
    all_k = [config.k] if config.k else [k for k in TRIED_K if k <= len(bank)] or [len(bank)]
    open_temperature = config.weighting == "softmax" and config.temperature is None
    temperatures = TRIED_TEMPERATURES if open_temperature else (fixed.temperature,)
    tried = [
        fixed.model_copy(update={"k": k, "temperature": temperature}) for k, temperature in product(all_k, temperatures)
    ]
    of_patients: dict[str, list[list[float]]] = {}
    for section in sections:
        of_patients.setdefault(section.patient_id, []).append(_scores(section, bank, tried, max(all_k)))
    means = np.mean([np.mean(of_sections, axis=0) for of_sections in of_patients.values()], axis=0)
    return tried[int(means.argmax())]


def _scores(section: ValidationSection, bank: Bank, tried: Sequence[RetrievalConfig], most: int) -> list[float]:
    """Returns the mean PCC over a section's own highest genes under each of the tried settings."""
    ids, cosines = nearest(section.queries, bank.keys, most)
    genes = highest_genes(section.truth)
    payload, found = bank.payload[:, genes], []
    for config in tried:
        share = weights(section.queries, bank.keys, ids[:, : config.k], cosines[:, : config.k], config)
        said = _mixed(share, payload, ids[:, : config.k])
        found.append(float(np.nan_to_num(pearson_per_gene(section.truth[:, genes], said)).mean()))
    return found


def _nearest_in_block(block: torch.Tensor, unit_keys: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (ids, cosines), (q, k) each, of at most QUERY_BLOCK queries."""
    padded = F.pad(F.normalize(block, dim=1), (0, 0, 0, QUERY_BLOCK - len(block)))
    all_ids, all_scores = [], []
    for start in range(0, len(unit_keys), KEY_BLOCK):
        keys = unit_keys[start : start + KEY_BLOCK]
        ids, scores = _top(padded @ keys.T, min(k, len(keys)))
        all_ids.append(ids + start)
        all_scores.append(scores)
    ids, scores = torch.cat(all_ids, 1), torch.cat(all_scores, 1)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return ids.gather(1, order)[: len(block)], scores.gather(1, order)[: len(block)]


def _top(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (ids, scores) of the k highest of each row, best first and ties by the lower id."""
    ids = scores.topk(k, dim=1).indices
    worst = scores.gather(1, ids[:, -1:])
    ambiguous = (scores >= worst).sum(dim=1) > k
    if ambiguous.any():
        ids[ambiguous] = scores[ambiguous].argsort(dim=1, descending=True, stable=True)[:, :k]
    ids = ids.sort(dim=1).values
    order = scores.gather(1, ids).argsort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, order)
    return ids, scores.gather(1, ids)


def _weighted(bank: Bank, ids: np.ndarray, scores: np.ndarray, share: np.ndarray) -> Retrieved:
    patients, patient = np.unique(bank.patient_id, return_inverse=True)
    by_patient = np.zeros((len(ids), len(patients)))
    np.add.at(by_patient, (np.arange(len(ids))[:, None], patient[ids]), share)
    return Retrieved(
        prediction=_mixed(share, bank.payload, ids),
        similarity=scores[:, 0],
        effective_donors=(1 / (share**2).sum(axis=1)).astype(np.float32),
        donor_share=by_patient.max(axis=1).astype(np.float32),
    )


def _mixed(share: np.ndarray, payload: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Returns each query's weighted mean of its neighbours' payloads, float32 (Q, G), one query in memory at a time."""
    mixed = np.empty((len(ids), payload.shape[1]), np.float32)
    for query, (row, neighbours) in enumerate(zip(share, ids, strict=True)):
        mixed[query] = row @ payload[neighbours]
    return mixed
