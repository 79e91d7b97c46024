"""Training targets that hold at other sequencing depths: expression averaged over counts thinned at random.

ln(1 + 1e4 c / n) of a gene with few counts follows the total n, so that a model of deep sections mispredicts shallow
ones. Thinning counts binomially gives what the same spot would have shown at a fraction of the depth (down-sampling as
in Robinson and Storey 2014, subSeq, https://doi.org/10.1093/bioinformatics/btu552).

Shapes: N spots of one section, G genes.
"""

import zlib

import numpy as np

from mclstexp.data.genes import Normaliser

SHARES = (1.0, 0.3, 0.1, 0.03)
"""Shares of the counts that are kept."""
MIN_COUNTS = 1000
"""A share is left out where it would leave the section's median spot fewer counts."""


def shares_of(totals: np.ndarray) -> list[float]:
    """Returns the shares that a section's spots are thinned to, from their totals over all genes (N,); 1 comes first."""
    median = np.median(totals) if len(totals) else 0.0
    return [share for share in SHARES if share == 1 or share * median >= MIN_COUNTS]


def thinned(
    counts: np.ndarray, totals: np.ndarray, section_id: str, target: Normaliser, seed: int = 0
) -> list[np.ndarray]:
    """Returns a section's expression at each of its `shares_of`, float32 (N, G) each; the first is of all counts.

    Args:
        counts: raw counts of the panel's genes, (N, G).
        totals: each spot's count over all genes, (N,).
        section_id: the draws depend on it, not on the order of sections.
        target: the normaliser.
        seed: of the draws.
    """
    rng = np.random.default_rng([seed, zlib.crc32(section_id.encode())])
    whole = np.rint(counts).astype(np.int64)
    others = np.maximum(np.rint(totals).astype(np.int64) - whole.sum(axis=1), 0)
    found = [target.apply(counts, totals, counts.sum(axis=0, dtype=np.float64))]
    for share in shares_of(totals)[1:]:
        kept = rng.binomial(whole, share)
        kept_totals = kept.sum(axis=1) + rng.binomial(others, share)
        found.append(target.apply(kept, kept_totals, kept.sum(axis=0, dtype=np.float64)))
    return found


def thinned_target(
    counts: np.ndarray, totals: np.ndarray, section_id: str, target: Normaliser, seed: int = 0
) -> np.ndarray:
    """Returns half the section's own expression and half its mean over all depths, float32 (N, G).

    Half, because at the training sections' own depth the plain expression is the better target.
    """
    depths = thinned(counts, totals, section_id, target, seed)
    return ((depths[0] + np.mean(depths, axis=0)) / 2).astype(np.float32)
