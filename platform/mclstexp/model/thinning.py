"""Training targets that hold at other sequencing depths: expression averaged over counts thinned at random.

ln(1 + 1e4 c / n) of a gene with few counts follows the total n, so that a model of deep sections mispredicts shallow
ones. Thinning counts binomially gives what the same spot would have shown at a fraction of the depth (down-sampling as
in Robinson and Storey 2014, subSeq, https://doi.org/10.1093/bioinformatics/btu552).

Shapes: N spots of one section, G genes.
"""

import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mclstexp.data.genes import Normaliser
from mclstexp.data.measured import MeasuredSection

SHARES = (1.0, 0.3, 0.1, 0.03)
"""Shares of the counts that are kept."""
MIN_COUNTS = 1000
"""A share is left out where it would leave the section's median spot fewer counts."""


def shares_of(totals: np.ndarray) -> list[float]:
    """Returns the shares that a section's spots are thinned to, 1 first, from their totals (N,)."""
    median = np.median(totals) if len(totals) else 0.0
    return [share for share in SHARES if share == 1 or share * median >= MIN_COUNTS]


def thinned(
    section: MeasuredSection, target: Normaliser, seed: int = 0, shares: Sequence[float] | None = None
) -> list[np.ndarray]:
    """Returns a section's expression at several depths, float32 (N, G) each; the first is of all counts.

    The draws depend on the section's name and not on the order of sections. A gene that the section does not measure is
    NaN.

    Args:
        section: the section.
        target: the unit.
        seed: of the draws.
        shares: of the counts, 1 first; default its own `shares_of`.
    """
    shares = shares or shares_of(section.totals)
    rng = np.random.default_rng([seed, zlib.crc32(section.section_id.encode())])
    whole = np.rint(section.counts).astype(np.int64)
    in_panel = whole.sum(axis=1, where=section.in_total)
    others = np.maximum(np.rint(section.totals).astype(np.int64) - in_panel, 0)
    found = [section.expression(target)]
    for share in shares[1:]:
        kept = rng.binomial(whole, share)
        kept_totals = kept.sum(axis=1, where=section.in_total) + rng.binomial(others, share)
        found.append(replace(section, counts=kept, totals=kept_totals).expression(target))
    return found


def thinned_most(section: MeasuredSection, target: Normaliser, seed: int = 0) -> np.ndarray:
    """Returns a section's expression at the lowest of its `shares_of`, float32 (N, G)."""
    return thinned(section, target, seed)[-1]


def thinned_target(section: MeasuredSection, target: Normaliser, seed: int = 0) -> np.ndarray:
    """Returns half the section's own expression and half its mean over all depths, float32 (N, G).

    Half, because at the training sections' own depth the plain expression is the better target.
    """
    depths = thinned(section, target, seed)
    return ((depths[0] + np.mean(depths, axis=0)) / 2).astype(np.float32)
