"""The out-of-distribution threshold from its definition, one tile at a time."""

import numpy as np

from mclstexp.model.bank import Bank


def expected_threshold(queries: dict[str, np.ndarray], bank: Bank) -> float:
    """Returns the first percentile of the best cosine to a key of another section, one tile at a time."""
    unit = bank.keys / np.linalg.norm(bank.keys.astype(np.float64), axis=1, keepdims=True)
    best = []
    for name, section in queries.items():
        for query in section.astype(np.float64):
            cosines = [unit[row] @ query for row in range(len(unit)) if bank.section_id[row] != name]
            best.append(max(cosines) / np.linalg.norm(query))
    best = sorted(best)
    rank = 0.01 * (len(best) - 1)
    low = int(rank)
    return best[low] + (rank - low) * (best[low + 1] - best[low])
