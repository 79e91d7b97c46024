"""Fits intervals to training spots that were predicted without their fold: conformal, for patients never seen.

Split conformal prediction takes a quantile of absolute errors on spots that took no part in fitting (Vovk et al. 2005,
https://doi.org/10.1007/b106715), here of errors divided by the tile's scale (locally weighted: Lei et al. 2018,
https://arxiv.org/abs/1604.04173). It holds for values that are exchangeable with those spots, and spots of one patient
are not exchangeable with those of the next. So the unit is the patient (as in Dunn, Wasserman and Ramdas 2022,
https://arxiv.org/abs/1809.07441): a gene's half width is the mean over patients of their own quantiles, times one
factor with which patients, left out of that mean in turn, are covered as often as stated. The price is that coverage
holds on average over genes and patients: a single patient may have less, as `left_out_coverage` shows.

Where there are fewer than three patients, sections (or blocks of a lone section) take their place.

Shapes: N training spots, G genes, J groups: patients, sections or blocks.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import nnls

from mclstexp.model.calibration import COVERAGE, Calibration, TileScale, doubts
from mclstexp.model.fit_blend import FittedPrograms
from mclstexp.model.programs import centred_within
from mclstexp.model.thinning import thinned_most
from mclstexp.model.training_spots import TrainingSpots
from mclstexp.model.trust import gene_trust

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Strengths of the scale that are tried; 0 is a constant width."""
MAX_SPREAD_PERCENTILE = 99.0
_LIMITS = (1.0, 99.0)
_SCALE_VALUES, _SCALE_GENES = 1_000_000, 50
"""Values that choose the scale, about, and the fewest genes."""
_MIN_WIDTH, _MAX_FACTOR, _BISECTIONS = 1e-9, 1e3, 40


def fit_calibration(spots: TrainingSpots, fitted: FittedPrograms) -> Calibration:
    """Returns the calibration of a program model by its left-out training spots."""
    group = groups(spots)
    found = fitted.retrieved
    errors = np.abs(spots.expression - fitted.left_out)
    scale = fit_scale(errors, found.spread, found.similarity, group)
    of_tile = scale.of(found.spread, found.similarity)[:, None].astype(np.float32)
    widths, coverage = half_widths(errors / of_tile, group)
    thin = np.concatenate([thinned_most(each, spots.target) for each in spots.sections])
    return Calibration(
        half_width=widths,
        half_width_any_depth=half_widths(np.abs(thin - fitted.left_out) / of_tile, group)[0],
        scale=scale,
        max_spread=float(np.percentile(found.spread, MAX_SPREAD_PERCENTILE)),
        calibrated_on=spots.folds.kind,
        left_out_coverage=coverage,
        trust=gene_trust(spots, fitted.left_out_scores, fitted.model.programs),
    )


def groups(spots: TrainingSpots) -> np.ndarray:
    """Returns the name of the patient, section or block that each training spot is left out with, strings (N,)."""
    kind = spots.folds.kind
    if kind == "blocks":
        return spots.folds.fold.astype(str).astype(object)
    return spots.patient_id if kind == "patients" else spots.section_id


def half_widths(errors: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    """Returns half the width of each gene's interval, float64 (G,), and the share of each group that it contains.

    The share is that of an interval fitted to the other groups.

    Args:
        errors: absolute errors over the tiles' scales, (N, G); NaN where a gene is not measured.
        group: strings (N,), at least two different ones.
    """
    names = np.unique(group)
    rows = [group == name for name in names]
    own = np.stack([_quantiles(errors[each]) for each in rows])
    ratios = []
    for index, each in enumerate(rows):
        others = _mean(np.delete(own, index, axis=0))
        ratios.append(errors[each] / np.maximum(others, _MIN_WIDTH).astype(errors.dtype))
    low, high = 0.0, _MAX_FACTOR
    for _ in range(_BISECTIONS):
        factor = (low + high) / 2
        is_covered = np.mean(_shares(ratios, factor)) >= COVERAGE
        low, high = (low, factor) if is_covered else (factor, high)
    shares = _shares(ratios, high)
    return high * _mean(own), {str(name): float(share) for name, share in zip(names, shares, strict=True)}


def fit_scale(errors: np.ndarray, spread: np.ndarray, similarity: np.ndarray, group: np.ndarray) -> TileScale:
    """Returns the scale of tiles whose strength has the best intervals in left-out groups.

    Its slopes are those of the least squares fit of log(a tile's mean error) to `doubts` within groups, none below 0: a
    tile does not gain certainty by being unlike. The strength has the smallest mean interval score in groups left out
    of slopes and widths (Gneiting and Raftery 2007, https://doi.org/10.1198/016214506000001437), so that it is 0, a
    constant width, where the scale tells nothing of patients never seen.

    Args:
        errors: absolute errors, (N, G); genes that are NaN somewhere, not measured, are left out.
        spread, similarity: of each spot's donors outside its fold, (N,).
        group: strings (N,), at least two different ones.
    """
    everywhere = np.flatnonzero(~np.isnan(errors).any(axis=0))
    num_genes = max(_SCALE_GENES, _SCALE_VALUES // len(errors))
    some = errors[:, everywhere[:: -(-len(everywhere) // num_genes)]]
    some = some / np.maximum(some.mean(axis=0), _MIN_WIDTH)
    signs = doubts(spread, similarity)
    scores = np.zeros(len(STRENGTHS))
    for name in np.unique(group):
        inside = group == name
        scale = _scale(some[~inside], signs[~inside], group[~inside])
        for index, strength in enumerate(STRENGTHS):
            size = replace(scale, strength=strength).of_doubts(signs)[:, None]
            width = _quantiles(some[~inside] / size[~inside]) * size[inside]
            scores[index] += _interval_score(some[inside], width)
    return replace(_scale(some, signs, group), strength=STRENGTHS[int(scores.argmin())])


def _scale(errors: np.ndarray, signs: np.ndarray, group: np.ndarray) -> TileScale:
    """Returns the scale of full strength from errors in units of each gene's mean, (N, G), and `doubts`, (N, 2)."""
    size = np.log(np.maximum(errors.mean(axis=1), _MIN_WIDTH))
    low, high = np.percentile(signs, _LIMITS, axis=0)
    signs = signs.clip(low, high)
    slopes, _ = nnls(centred_within(signs, group), centred_within(size, group))
    return TileScale(1.0, *(values.tolist() for values in (slopes, np.median(signs, axis=0), low, high)))


def _interval_score(errors: np.ndarray, width: np.ndarray) -> float:
    """Returns the mean interval score of symmetric intervals of half widths (n, G) with absolute errors (n, G)."""
    return float(np.mean(2 * width + 2 / (1 - COVERAGE) * np.maximum(errors - width, 0)))


def _quantiles(errors: np.ndarray) -> np.ndarray:
    """Returns each gene's quantile, float64 (G,); NaN for a gene that no spot measures."""
    found = np.full(errors.shape[1], np.nan)
    measured = ~np.isnan(errors)
    whole, partly = measured.all(axis=0), measured.any(axis=0)
    found[whole] = np.quantile(errors[:, whole], COVERAGE, axis=0, method="higher")
    for gene in np.flatnonzero(partly & ~whole):
        found[gene] = np.quantile(errors[measured[:, gene], gene], COVERAGE, method="higher")
    return found


def _mean(of_groups: np.ndarray) -> np.ndarray:
    """Returns the mean over the groups that measure each gene, (G,), from (J, G); NaN for a gene of none."""
    measured = ~np.isnan(of_groups)
    count = measured.sum(axis=0)
    return np.where(count > 0, np.nansum(of_groups, axis=0) / np.maximum(count, 1), np.nan)


def _shares(ratios: Sequence[np.ndarray], factor: float) -> list[float]:
    """Returns the share of each group's ratios that are at most the factor."""
    return [float((each <= factor).sum() / max(1, np.isfinite(each).sum())) for each in ratios]
