"""Whether one model beats another on sections that neither was trained on: a paired bootstrap of blocks of tissue.

Spots side by side are alike, so that single spots would make an interval too narrow; blocks of tissue are drawn
within each section instead (Kuensch 1989, https://doi.org/10.1214/aos/1176347265), for both models alike. Trainings
of the challenger are too few to be drawn: their variance is added, and the interval is Student's with the degrees of
freedom of Welch and Satterthwaite (1946, https://doi.org/10.2307/3002019). It holds for these patients; others are not
drawn.

Shapes: N spots of a section, G genes, B blocks, R replicates of the challenger, T draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats

from mclstexp.errors import ConfigError
from mclstexp.evaluation.metrics import highest_genes, mean_by_patient

DRAWS = 2000
FEWEST_BLOCKS = 8
_LEVEL = 0.95


@dataclass(frozen=True)
class Pair:
    """One section with what both models say of it, over the same genes and in the same unit."""

    patient_id: str
    place_um: np.ndarray
    """(N, 2)."""
    truth: np.ndarray
    """(N, G)."""
    champion: np.ndarray
    """(N, G)."""
    challengers: np.ndarray
    """(R, N, G), a training each."""


@dataclass(frozen=True)
class Difference:
    """Challenger minus champion: PCC over each section's 50 highest genes, mean over sections, then patients."""

    mean: float
    low: float
    high: float
    """The 95 % interval."""

    @property
    def is_better(self) -> bool:
        """Whether the whole interval lies above zero."""
        return self.low > 0

    def __str__(self) -> str:
        return f"{self.mean:+.4f} (95 % from {self.low:+.4f} to {self.high:+.4f})"


def compare(pairs: Sequence[Pair], block_um: float, seed: int) -> Difference:
    """Returns the difference with its interval, from DRAWS draws of blocks, `block_um` um wide, and the replicates.

    Raises:
        ConfigError: a section has fewer than FEWEST_BLOCKS blocks.
    """
    rng = np.random.default_rng(seed)
    patients = [pair.patient_id for pair in pairs]
    of_replicates = mean_by_patient(
        patients, np.array([_differences(pair, np.ones((1, len(pair.truth))))[0] for pair in pairs])
    )
    draws = [_differences(pair, _block_weights(pair.place_um, block_um, rng)).mean(axis=1) for pair in pairs]
    tissue = mean_by_patient(patients, np.array(draws)).var(ddof=1)
    seeds = of_replicates.var(ddof=1) / len(of_replicates) if len(of_replicates) > 1 else 0.0
    freedom = (len(of_replicates) - 1) * ((tissue + seeds) / seeds) ** 2 if seeds else np.inf
    reach = scipy.stats.t.ppf((1 + _LEVEL) / 2, freedom) * np.sqrt(tissue + seeds)
    mean = of_replicates.mean()
    return Difference(float(mean), float(mean - reach), float(mean + reach))


def _block_weights(place_um: np.ndarray, block_um: float, rng: np.random.Generator) -> np.ndarray:
    """Returns how often each spot is drawn, float (T, N): all spots of a block alike; refuses too few blocks."""
    cells = np.floor((place_um - place_um.min(axis=0)) / block_um).astype(int)
    _, block = np.unique(cells, axis=0, return_inverse=True)
    num_blocks = block.max() + 1
    if num_blocks < FEWEST_BLOCKS:
        raise ConfigError(
            f"tune.block_um={block_um:g} cuts a section into {num_blocks} blocks, too few to be drawn; set it so that "
            f"there are {FEWEST_BLOCKS}, and no smaller than the distance over which tissue is alike"
        )
    counts = rng.multinomial(num_blocks, np.full(num_blocks, 1 / num_blocks), size=DRAWS)
    return counts[:, block.ravel()].astype(float)


def _differences(pair: Pair, weights: np.ndarray) -> np.ndarray:
    """Returns each replicate's gain over the champion under weights of spots, (T, R) for (T, N)."""
    genes = highest_genes(pair.truth)
    truth, champion = pair.truth[:, genes], pair.champion[:, genes]
    base = _weighted_pcc(truth, champion, weights)
    gains = [_weighted_pcc(truth, said[:, genes], weights) - base for said in pair.challengers]
    return np.stack(gains, axis=1)


def _weighted_pcc(truth: np.ndarray, said: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the mean over genes of the weighted correlation, (T,); one that is not defined counts as 0."""
    truth, said = (values.astype(np.float64) - values.mean(axis=0, dtype=np.float64) for values in (truth, said))
    total = weights.sum(axis=1, keepdims=True)
    mean_t, mean_s = weights @ truth / total, weights @ said / total
    product = weights @ (truth * said) / total - mean_t * mean_s
    square_t, square_s = (weights @ (values**2) / total - mean**2 for values, mean in ((truth, mean_t), (said, mean_s)))
    norm = np.sqrt(np.clip(square_t, 0, None) * np.clip(square_s, 0, None))
    return np.divide(product, norm, out=np.zeros_like(product), where=norm > 1e-12).mean(axis=1)
