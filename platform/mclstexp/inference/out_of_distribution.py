"""Which tiles resemble nothing that the bank was measured on.

A tile is called out of distribution where its best cosine is lower than that of 99 in 100 training tiles whose own
section is left out of the bank. The price is one more embedding of training tiles, of which a fixed draw serves.

Shapes: N tiles, D embedding.
"""

from collections.abc import Mapping

import numpy as np

from mclstexp.inference.bank import Bank
from mclstexp.inference.cosine import nearest

MAX_TILES = 20_000
PERCENTILE = 1.0
_SEED = 0


def drawn_sections(num_tiles: Mapping[str, int], most: int = MAX_TILES) -> list[str]:
    """Returns the training sections whose tiles set the threshold, in the order given; none where there is but one.

    All of them, or as many whole ones as a fixed draw fits into `most` tiles; the smallest where none fits.
    """
    names, left, drawn = list(num_tiles), most, set()
    if len(names) < 2:
        return []
    if sum(num_tiles.values()) <= most:
        return names
    for index in np.random.default_rng(_SEED).permutation(len(names)):
        if num_tiles[names[index]] <= left:
            drawn.add(names[index])
            left -= num_tiles[names[index]]
    return [name for name in names if name in drawn] or [min(names, key=num_tiles.__getitem__)]


def ood_similarity(queries: Mapping[str, np.ndarray], bank: Bank) -> float | None:
    """Returns the best cosine that 1 in 100 training tiles stays below; None where nothing can be left out.

    Args:
        queries: image embeddings of training sections by their names, float32 (N, D) each.
        bank: of all training sections; each tile is asked of the keys of the others.
    """
    best = []
    for section_id, embedding in queries.items():
        others = bank.section_id != section_id
        if len(embedding) and others.any():
            best.append(nearest(embedding, bank.directions[others], k=1)[1][:, 0])
    return float(np.percentile(np.concatenate(best), PERCENTILE)) if best else None
