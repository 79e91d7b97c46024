"""How far each gene can be trusted: its correlation in left-out spots, and whether chance could have given it.

Neighbouring spots are alike, so that any two smooth maps correlate. Chance is therefore measured on maps that are as
smooth: each gene's own prediction, moved within its sections (the torus shift of Lotwick and Silverman 1982,
https://doi.org/10.1111/j.2517-6161.1982.tb01221.x). Genes are trusted at a false discovery rate of 5 % (Benjamini and
Hochberg 1995, https://doi.org/10.1111/j.2517-6161.1995.tb02031.x).

Predictions are linear in few program scores, so that a move costs a product of spots, genes and programs.

Shapes: N training spots, n spots of a section, G genes, R programs, S sections, B moves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats
from scipy.spatial import KDTree

from mclstexp.model.calibration import GeneTrust
from mclstexp.model.left_out import MIN_PATIENTS
from mclstexp.model.neighbours import pitch_um
from mclstexp.model.programs import Programs
from mclstexp.model.training_spots import TrainingSpots

NUM_MOVES = 200
MIN_MOVE = 0.25
"""Of a section's extent, along one of its axes at least."""
MAX_FALSE = 0.05
_LEVEL, _SEED, _AT_ONCE = 0.95, 0, 25
_TINY = 1e-12


def gene_trust(spots: TrainingSpots, scores: np.ndarray, programs: Programs) -> GeneTrust:
    """Returns the trust of each gene.

    The interval of a correlation is Student's over patients where there are three. Else it is Fisher's (1921) with as
    many independent spots as the scatter of moved predictions stands for, and tells how sure it is on these sections.

    Args:
        spots: the training sections.
        scores: left-out, less their section's mean, (N, R).
        programs: decode them.
    """
    starts = np.cumsum([len(each) for each in spots.sections])[:-1]
    truth, of_section = np.split(spots.expression, starts), np.split(scores, starts)
    maps = [
        _Map(_centred(values), each.astype(np.float32), section.xy_um)
        for values, each, section in zip(truth, of_section, spots.sections, strict=True)
    ]
    patients = [section.patient_id for section in spots.sections]
    decoder = programs.decoder
    found = np.concatenate([each.correlations(decoder, np.arange(len(each.scores))[None]) for each in maps])
    correlation, of_patients = _mean_over_patients(found, patients)
    moved = _moved(maps, decoder, patients)
    centre, scatter = moved.mean(axis=0), np.maximum(moved.std(axis=0), _TINY)
    low, high = _interval(correlation, of_patients, scatter)
    q_value = q_values((correlation - centre) / scatter, (moved - centre) / scatter)
    return GeneTrust(correlation, low, high, q_value, q_value <= MAX_FALSE)


def q_values(observed: np.ndarray, by_chance: np.ndarray) -> np.ndarray:
    """Returns q-values, float64 (G,), of statistics (G,) by those of chance, (B, G), which all genes share."""
    sorted_chance = np.sort(by_chance[np.isfinite(by_chance)])
    larger = len(sorted_chance) - np.searchsorted(sorted_chance, observed)
    p_value = (1 + larger) / (1 + len(sorted_chance))
    defined = np.isfinite(observed)
    q_value = np.full(len(observed), np.nan)
    if defined.any():
        q_value[defined] = scipy.stats.false_discovery_control(p_value[defined])
    return q_value


@dataclass(frozen=True)
class _Map:
    """What is measured and predicted in one section."""

    truth: np.ndarray
    """Expression less its mean, float32 (n, G); NaN for a gene that is not measured."""
    scores: np.ndarray
    """float32 (n, R)."""
    xy_um: np.ndarray
    """(n, 2)."""

    def correlations(self, decoder: np.ndarray, sources: np.ndarray) -> np.ndarray:
        """Returns each gene's correlations, float64 (B, G), with predictions taken from the spots `sources`, (B, n)."""
        scores = self.scores[sources]
        scores = scores - scores.mean(axis=1, keepdims=True)
        products = np.einsum("gbr,rg->bg", np.tensordot(self.truth, scores, (0, 1)), decoder)
        spread = np.einsum("brs,rg,sg->bg", np.einsum("bnr,bns->brs", scores, scores), decoder, decoder, optimize=True)
        squares = spread * (self.truth**2).sum(axis=0, dtype=np.float64)
        return np.where(squares > _TINY, products / np.sqrt(np.maximum(squares, _TINY)), np.nan)


def moved_sources(xy_um: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Returns for each spot those that lie nearest to it when its section is moved on a torus, int64 (B, n).

    Args:
        xy_um: the section's spots in micrometres, (n, 2).
        count: number of moves B, each at least `MIN_MOVE` along one of the axes.
        rng: draws them.
    """
    low, pitch = xy_um.min(axis=0), pitch_um([xy_um]) if len(xy_um) > 1 else 1.0
    extent = np.ptp(xy_um, axis=0) + pitch
    shares = rng.uniform(size=(count, 1, 2))
    far = rng.integers(2, size=count)  # the axis
    shares[np.arange(count), 0, far] = rng.uniform(MIN_MOVE, 1 - MIN_MOVE, count)
    return KDTree(xy_um).query((xy_um - low + shares * extent) % extent + low)[1]


def _moved(maps: Sequence[_Map], decoder: np.ndarray, patients: Sequence[str]) -> np.ndarray:
    """Returns the mean correlations of moved predictions, float64 (B, G)."""
    rng = np.random.default_rng(_SEED)
    parts = []
    for _ in range(NUM_MOVES // _AT_ONCE):
        of_sections = np.stack([each.correlations(decoder, moved_sources(each.xy_um, _AT_ONCE, rng)) for each in maps])
        parts.append(_mean_over_patients(of_sections, patients)[0])
    return np.concatenate(parts)


def _mean_over_patients(of_sections: np.ndarray, patients: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the means over patients of their sections' means, (..., G), and those of patients, from (S, ..., G)."""
    names = np.array(patients, object)
    of_patients = np.stack([_nanmean(of_sections[names == name]) for name in np.unique(names)])
    return _nanmean(of_patients), of_patients


def _interval(correlation: np.ndarray, of_patients: np.ndarray, scatter: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns low and high ends, (G,) each."""
    if len(of_patients) < MIN_PATIENTS:
        reach = scipy.stats.norm.ppf((1 + _LEVEL) / 2) * scatter
        middle = np.arctanh(correlation.clip(-1 + _TINY, 1 - _TINY))
        return np.tanh(middle - reach), np.tanh(middle + reach)
    count = (~np.isnan(of_patients)).sum(axis=0)
    squares = np.nansum((of_patients - correlation) ** 2, axis=0)
    error = np.sqrt(squares / np.where(count > 1, (count - 1) * count, np.nan))
    reach = scipy.stats.t.ppf((1 + _LEVEL) / 2, np.maximum(count - 1, 1)) * error
    return np.maximum(correlation - reach, -1), np.minimum(correlation + reach, 1)


def _centred(values: np.ndarray) -> np.ndarray:
    return (values - values.mean(axis=0, dtype=np.float64)).astype(np.float32)


def _nanmean(values: np.ndarray) -> np.ndarray:
    """Returns the mean over the first axis of what is not NaN; NaN where all are."""
    count = (~np.isnan(values)).sum(axis=0)
    return np.where(count > 0, np.nansum(values, axis=0) / np.maximum(count, 1), np.nan)
