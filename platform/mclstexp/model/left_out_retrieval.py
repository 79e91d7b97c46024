"""What training spots retrieve from the spots outside their fold: what is fitted to it holds for patients never seen.

Shapes: N training spots, R programs, D width of keys.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mclstexp.model.bank import Bank
from mclstexp.model.blend import spread, with_squares
from mclstexp.model.left_out import LeftOut
from mclstexp.model.retrieval import resolve, retrieve
from mclstexp.settings import RetrievalConfig

FoldKeys = Callable[[int], tuple[np.ndarray, np.ndarray]]
"""Returns the queries and the keys of all spots, float32 (N, D) each, as they are without a fold."""


@dataclass(frozen=True)
class LeftOutRetrieval:
    """What each spot retrieves from the spots outside its fold."""

    scores: np.ndarray
    """float64 (N, R)."""
    spread: np.ndarray
    """How far their scores lie apart (`blend.spread`), float32 (N,)."""
    similarity: np.ndarray
    """Cosine of the best match, float32 (N,)."""


def left_out_retrieval(keys: FoldKeys, scores: np.ndarray, folds: LeftOut, config: RetrievalConfig) -> LeftOutRetrieval:
    """Returns what spots with these scores, (N, R), retrieve from the spots outside their folds.

    It is what `retrieve` gives a tile, by the same weights, so that what is fitted to it holds for slides.
    """
    payload = with_squares(scores)
    retrieved, best = np.zeros(payload.shape), np.zeros(len(scores), np.float32)
    for index in range(folds.num_folds):
        outside, inside = folds.sides(index)
        queries, bank_keys = keys(index)
        bank = searched(bank_keys[outside], payload[outside])
        found = retrieve(queries[inside], bank, fitting(config, bank))
        retrieved[inside], best[inside] = found.prediction, found.similarity
    return LeftOutRetrieval(retrieved[:, :-1], spread(retrieved), best)


def searched(keys: np.ndarray, payload: np.ndarray) -> Bank:
    """Returns a bank without names, for who the donors are changes no answer."""
    no_names = np.full(len(keys), "", object)
    return Bank.of(keys, payload, no_names, no_names, no_names)


def fitting(config: RetrievalConfig, bank: Bank) -> RetrievalConfig:
    """Returns the settings for a bank that may have fewer spots than `k` asks for."""
    return resolve(config.model_copy(update={"k": min(config.k, len(bank)) if config.k else None}), len(bank))
