"""The units in which a score card states expression, side by side.

A correlation per spot and one per gene are different questions: dividing by a gene's total leaves the spot's library
size in the target, so that tissue density alone scores high there.
"""

from types import MappingProxyType

import numpy as np

from mclstexp.data.genes import Normaliser

TARGETS = MappingProxyType(
    {
        "per_spot": Normaliser("per_spot_all", 1e4, "e"),
        "per_spot_panel": Normaliser("per_spot_panel", 1e4, "10"),
        "per_gene": Normaliser("per_gene", 1e4, "10"),
    }
)
"""By name: ours, ln(1 + 1e4 c / spot total over all genes); and mclSTExp's (2024, https://arxiv.org/abs/2407.08216)
training input, log10(1 + 1e4 c / spot total over the panel), and truth and payload, log10(1 + 1e4 c / gene total over
the section)."""


def scored_targets(own: Normaliser, seen: Normaliser) -> dict[str, Normaliser]:
    """Returns by name what a score card states, each once.

    The model's own target first, then `per_spot`, `per_gene` and what the model's spots were `seen` in: in mclSTExp's
    recipe `per_spot_panel`, the per-spot unit of its published figures. One without a name in `TARGETS` is called by
    its unit.
    """
    known = {target: name for name, target in TARGETS.items()}
    stated = (own, TARGETS["per_spot"], TARGETS["per_gene"], seen)
    return {known.get(target, target.unit()): target for target in stated}


def normalise_section(target: Normaliser, counts: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Returns the expression of one whole section in a target's unit, float32 (N, G).

    Args:
        target: one of `TARGETS`, or a model's own.
        counts: raw counts of the panel's G genes in all N spots of the section, (N, G).
        totals: each spot's count over all genes, (N,).
    """
    return target.apply(counts, totals, counts.sum(axis=0, dtype=np.float64))
