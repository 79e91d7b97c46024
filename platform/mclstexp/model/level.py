"""The level of a slide: the mean expression that a model expects over all its tiles, gene by gene.

Programs answer within a slide. Its level is what a probe predicts for the mean of its tiles, shrunk to the training
mean by how well the probe told left-out patients apart: a share of 0 is the training mean. A probe is linear, so that a
slide needs only the mean of its tiles' components.

Shapes: N training spots, F features, C components, G genes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mclstexp.model.left_out import LeftOut


@dataclass(frozen=True)
class Level:
    """A fitted level."""

    components: np.ndarray
    """Turns a tile's standardised features into components, float64 (F, C)."""
    coefficients: np.ndarray
    """Turns the mean of a slide's components into expression, float64 (C, G)."""
    intercept: np.ndarray
    """Expression at components of 0, float64 (G,)."""
    mean: np.ndarray
    """Mean over the training spots, float64 (G,)."""
    share: float
    """Of the probe's difference from the mean, 0 to 1."""

    def of(self, mean_components: np.ndarray) -> np.ndarray:
        """Returns a slide's mean expression, float64 (G,), from the mean of its tiles' components, (C,)."""
        return self.mean + self.share * (mean_components @ self.coefficients + self.intercept - self.mean)


LeftOutLevels = dict[tuple[int, str], np.ndarray]
"""Mean expression (G,) of a section, by a fold and its name, as predicted without the fold's spots."""


def fit_level(
    features: np.ndarray,
    expression: np.ndarray,
    section_id: np.ndarray,
    folds: "LeftOut",
    augmented: Sequence[np.ndarray] = (),
) -> tuple[Level, LeftOutLevels]:
    """Returns the level, and those of the sections out of fold.

    Where whole patients are left out, the level's share is the least squares slope of measured on predicted differences
    from the training mean, over all genes and left-out sections, limited to 0 and 1. Sections of one patient do not say
    how patients differ: with fewer patients the share is 1, and only the probe's own penalty shrinks the level.

    Args:
        features: standardised, (N, F).
        expression: (N, G); NaN for a gene that a spot's section does not measure. Genes that only some spots measure
            have the training mean as their level.
        section_id: strings, (N,).
        folds: the spots that are left out together.
        augmented: features of augmented draws of the same tiles, (N, F) each; only fitted to, never predicted.
    """
    products = squares = 0.0
    probes: list[Level] = []
    differences: LeftOutLevels = {}
    for index in range(folds.num_folds):
        outside, inside = folds.sides(index)
        probe = _probe(features[outside], expression[outside], [each[outside] for each in augmented])
        probes.append(probe)
        for name in np.unique(section_id[inside]):
            rows = inside & (section_id == name)
            predicted = probe.of(features[rows].mean(axis=0) @ probe.components) - probe.mean
            products += predicted @ np.nan_to_num(expression[rows].mean(axis=0) - probe.mean)
            squares += predicted @ predicted
            differences[index, name] = predicted
    share = 1.0
    if folds.kind == "patients":
        share = float(np.clip(products / squares, 0, 1)) if squares else 0.0
    left_out = {key: probes[key[0]].mean + share * each for key, each in differences.items()}
    return replace(_probe(features, expression, augmented), share=share), left_out


def _probe(features: np.ndarray, expression: np.ndarray, augmented: Sequence[np.ndarray]) -> Level:
    """Returns the probe fitted to plain tiles and augmented draws, with the penalty that suits the plain ones.

    A draw of a spot that is left out would tell of it, so that draws have no say in the penalty.
    """
    from mclstexp.model.probe import Probe  # here, because tasks that finish slides start without scikit-learn

    genes, fitted = Probe(features, expression).parts[0]
    if augmented and np.isfinite(fitted.alpha):
        copies = 1 + len(
            augmented
        )  # with as many times the spots, a penalty counts as much if it is as many times larger
        everything = np.concatenate([features, *augmented]), np.tile(expression, (copies, 1))
        genes, fitted = Probe(*everything, alphas=[copies * fitted.alpha]).parts[0]
    num_measured = (~np.isnan(expression)).sum(axis=0)
    mean = np.nansum(expression, axis=0, dtype=np.float64) / np.maximum(1, num_measured)
    coefficients, intercept = np.zeros((fitted.components.shape[1], len(mean))), mean.copy()
    components = fitted.components / fitted.deviation[:, None]
    coefficients[:, genes] = fitted.coefficients
    intercept[genes] = fitted.intercept - fitted.mean @ components @ fitted.coefficients
    return Level(components, coefficients, intercept, mean, 1.0)
