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
    error: float | None = None
    """Mean squared error of a left-out patient's levels, over genes; None if fewer than three patients trained it, and
    in versions that do not record it."""
    mean_error: float | None = None
    """The same of the training mean in the place of the level."""

    def errors(self) -> dict[str, float | None]:
        """Returns the errors under the names by which files state them."""
        return {"level_mse": self.error, "level_mse_of_train_mean": self.mean_error}

    def of(self, mean_components: np.ndarray) -> np.ndarray:
        """Returns a slide's mean expression, float64 (G,), from the mean of its tiles' components, (C,)."""
        return self.mean + self.share * (mean_components @ self.coefficients + self.intercept - self.mean)


LeftOutLevels = dict[tuple[int, str], np.ndarray]
"""Mean expression (G,) of a section, by a fold and its name, as predicted without the fold's spots."""


@dataclass(frozen=True)
class _LeftOutSection:
    """A section's level as the probe of the other folds tells it, and as it was measured."""

    fold: int
    name: str
    patient_id: str
    mean: np.ndarray
    """Mean over the spots outside the fold, (G,)."""
    predicted: np.ndarray
    """The probe's difference from it, (G,)."""
    measured: np.ndarray
    """The measured difference, (G,); NaN for a gene that the section does not measure."""

    def error(self, share: float) -> float:
        """Returns the mean squared error of a level with this share, over the genes that the section measures."""
        return float(np.nanmean((share * self.predicted - self.measured) ** 2))


def fit_level(
    features: np.ndarray,
    expression: np.ndarray,
    patient_id: np.ndarray,
    section_id: np.ndarray,
    folds: "LeftOut",
    augmented: Sequence[np.ndarray] = (),
) -> tuple[Level, LeftOutLevels]:
    """Returns the level, and those of the sections out of fold.

    Where whole patients are left out, the level's share is the least squares slope of measured on predicted differences
    from the training mean, over all genes and left-out sections, limited to 0 and 1; and 0, the training mean, where
    shares chosen without a patient do not tell it better than the mean. Sections of one patient do not say how patients
    differ: with fewer patients the share is 1, only the probe's penalty shrinks the level, and its error is unknown.

    Args:
        features: standardised, (N, F).
        expression: (N, G); NaN for a gene that a spot's section does not measure. Genes that only some spots measure
            have the training mean as their level.
        patient_id, section_id: strings, (N,).
        folds: the spots that are left out together.
        augmented: features of augmented draws of the same tiles, (N, F) each; only fitted to, never predicted.
    """
    sections: list[_LeftOutSection] = []
    for index in range(folds.num_folds):
        outside, inside = folds.sides(index)
        probe = _probe(features[outside], expression[outside], [each[outside] for each in augmented])
        for name in np.unique(section_id[inside]):
            rows = inside & (section_id == name)
            predicted = probe.of(features[rows].mean(axis=0) @ probe.components) - probe.mean
            measured = expression[rows].mean(axis=0) - probe.mean
            sections.append(_LeftOutSection(index, name, patient_id[rows][0], probe.mean, predicted, measured))
    share, error, mean_error = 1.0, None, None
    if folds.kind == "patients":
        share, (error, mean_error) = _share(sections), _errors(sections)
        if error >= mean_error:
            share, error = 0.0, mean_error
    left_out = {(each.fold, each.name): each.mean + share * each.predicted for each in sections}
    level = replace(_probe(features, expression, augmented), share=share, error=error, mean_error=mean_error)
    return level, left_out


def _share(sections: Sequence[_LeftOutSection]) -> float:
    """Returns the least squares slope of measured on predicted differences, limited to 0 and 1."""
    predicted, measured = (
        np.concatenate([getattr(each, side) for each in sections]) for side in ("predicted", "measured")
    )
    known = ~np.isnan(measured)
    squares = float(predicted[known] @ predicted[known])
    return float(np.clip(predicted[known] @ measured[known] / squares, 0, 1)) if squares else 0.0


def _errors(sections: Sequence[_LeftOutSection]) -> tuple[float, float]:
    """Returns the errors of levels with the share of the other folds, and of the training mean, over patients."""
    folds = {each.fold for each in sections}
    shares = {fold: _share([each for each in sections if each.fold != fold]) for fold in folds}
    of_patients: dict[str, list[tuple[float, float]]] = {}
    for each in sections:
        of_patients.setdefault(each.patient_id, []).append((each.error(shares[each.fold]), each.error(0.0)))
    error, mean_error = np.mean([np.mean(own, axis=0) for own in of_patients.values()], axis=0)
    return float(error), float(mean_error)


def _probe(features: np.ndarray, expression: np.ndarray, augmented: Sequence[np.ndarray]) -> Level:
    """Returns the probe fitted to plain tiles and augmented draws, with the penalty that suits the plain ones.

    A draw of a spot that is left out would tell of it, so that draws have no say in the penalty.
    """
    from mclstexp.model.probe import Probe  # here, because tasks that finish slides start without scikit-learn

    genes, fitted = Probe(features, expression).parts[0]
    if augmented and np.isfinite(fitted.alpha):
        # With as many times the spots, a penalty counts as much if it is as many times larger
        copies = 1 + len(augmented)
        everything = np.concatenate([features, *augmented]), np.tile(expression, (copies, 1))
        genes, fitted = Probe(*everything, alphas=[copies * fitted.alpha]).parts[0]
    num_measured = (~np.isnan(expression)).sum(axis=0)
    mean = np.nansum(expression, axis=0, dtype=np.float64) / np.maximum(1, num_measured)
    coefficients, intercept = np.zeros((fitted.components.shape[1], len(mean))), mean.copy()
    components = fitted.components / fitted.deviation[:, None]
    coefficients[:, genes] = fitted.coefficients
    intercept[genes] = fitted.intercept - fitted.mean @ components @ fitted.coefficients
    return Level(components, coefficients, intercept, mean, 1.0)
