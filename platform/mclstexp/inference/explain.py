"""Whom a prediction came from: the measured spots that voted for one tile, with their weights.

It asks the bank again as the prediction did, so that predictions need not keep k names a tile.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from mclstexp.inference.bank import Bank
from mclstexp.inference.retrieval import held, neighbours, weights
from mclstexp.settings import RetrievalConfig


def explain(
    query_D: np.ndarray, bank: Bank, config: RetrievalConfig, top: int, genes: Mapping[str, int] | None = None
) -> pd.DataFrame:
    """Returns the spots that voted most for a tile, one a row, the greatest weight first, then the best match.

    Columns: section_id, patient_id, spot_id; similarity (cosine, float32) and weight (float64), which are those of the
    prediction: over all k spots that voted, weights sum to 1 and the weighted mean of payloads is the prediction.

    Args:
        query_D: the tile's embedding, float32 (D,).
        bank: that the prediction was read from.
        config: as `retrieval.resolve` returns it.
        top: rows wanted; there are never more than k.
        genes: columns to add, by name, with their place in the payload: what each spot measured, in the bank's unit.
    """
    found = neighbours(query_D[None], held(bank), config)
    weight = weights(found, config)[0]
    most = np.argsort(-weight, kind="stable")[:top]
    rows = found.ids[0, most]
    donors = {name: getattr(bank, name)[rows] for name in ("section_id", "patient_id", "spot_id")}
    voters = pd.DataFrame(donors | {"similarity": found.similarity[0, most], "weight": weight[most]})
    return voters.assign(**{name: bank.payload[rows, column] for name, column in (genes or {}).items()})
