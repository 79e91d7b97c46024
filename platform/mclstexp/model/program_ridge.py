"""Ridge regression from features to program scores, with a penalty for each program (Hoerl and Kennard 1970).

A program that the image does not show is shrunk by its own penalty. Penalties are relative: alpha stands for
alpha * N / 100 times the mean squared length of a spot's features. No intercept: features are standardised, and scores
are centred within their sections. Augmented draws of the tiles are fitted to as more spots with the same scores; both
sides of the ridge grow by the same factor, so that relative penalties are as strong as before. With at most as many
spots as features the kernel matrix is decomposed, otherwise the sums of products, so that memory goes with the features
and not with the spots.

Shapes: N spots, F features, R programs, P penalties.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from mclstexp.model.left_out import LeftOut
from mclstexp.model.programs import centred_within

ALPHAS = 10.0 ** np.arange(-3, 2.6, 0.5)
"""Penalties that are tried."""
_MIN_UNIT = 1e-12
Blocks = Callable[[], Iterable[np.ndarray]]
"""Yields the features of one training section after the other, (n, F), each time it is called."""


@dataclass(frozen=True)
class ProgramRidge:
    """A fitted ridge."""

    weights: np.ndarray
    """float64 (F, R)."""
    alphas: np.ndarray
    """The penalty of each program, float64 (R,)."""
    left_out: np.ndarray
    """Scores of each training spot as predicted without its fold, float64 (N, R)."""


def fit_program_ridge(
    blocks: Blocks, scores: np.ndarray, section_id: np.ndarray, folds: LeftOut, augmented: Sequence[Blocks] = ()
) -> ProgramRidge:
    """Returns the ridge whose penalties have the least squared error within sections, out of fold.

    Args:
        blocks: standardised features of the training sections, in the order of the spots.
        scores: their program scores, (N, R).
        section_id: strings, (N,).
        folds: the spots that are left out together.
        augmented: features of augmented draws of the same tiles, as `blocks`; only fitted to, never predicted.
    """
    copies = (blocks, *augmented)
    paths = [_path(copies, scores, folds.sides(index)[0]) for index in range(folds.num_folds)]
    offsets = np.stack([scores[folds.sides(index)[0]].mean(axis=0) for index in range(folds.num_folds)])
    predicted = np.concatenate(
        [
            _left_out(features, fold, paths) + offsets[fold][None]
            for features, fold in _with_values(blocks(), folds.fold)
        ],
        axis=1,
    )
    truth = centred_within(scores, section_id)
    errors = np.stack([((centred_within(each, section_id) - truth) ** 2).mean(axis=0) for each in predicted])
    best = errors.argmin(axis=0)
    programs = np.arange(scores.shape[1])
    whole = _path(copies, scores, np.ones(len(scores), bool))
    return ProgramRidge(whole[best, :, programs].T.copy(), ALPHAS[best], predicted[best, :, programs].T.copy())


def _path(copies: Sequence[Blocks], scores: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Returns the weights for each of ALPHAS, (P, F, R), fitted to the chosen spots, bool (N,), centred."""
    centred = scores - scores[chosen].mean(axis=0)
    products: _Products | None = None
    spots = np.arange(len(scores))
    for features, rows in chain.from_iterable(_with_values(blocks(), spots) for blocks in copies):
        kept = chosen[rows]
        if kept.any():
            added = features[kept], centred[rows[kept]]
            products = _Products.of(*added) if products is None else products.plus(*added)
    assert products is not None, "every fold leaves spots to fit to"
    return products.path(ALPHAS)


@dataclass(frozen=True)
class _Products:
    """What a ridge needs of its spots: themselves while they are few, else their sums of products."""

    features: np.ndarray | None
    scores: np.ndarray | None
    gram: np.ndarray | None = None
    """float64 (F, F)."""
    moments: np.ndarray | None = None
    """float64 (F, R)."""

    @classmethod
    def of(cls, features: np.ndarray, scores: np.ndarray) -> "_Products":
        values = features.astype(np.float64)
        if len(values) <= values.shape[1]:
            return cls(values, scores)
        return cls(None, None, values.T @ values, values.T @ scores)

    def plus(self, features: np.ndarray, scores: np.ndarray) -> "_Products":
        if self.features is not None and self.scores is not None:
            return self.of(np.concatenate([self.features, features]), np.concatenate([self.scores, scores]))
        values = features.astype(np.float64)
        assert self.gram is not None
        assert self.moments is not None
        return _Products(None, None, self.gram + values.T @ values, self.moments + values.T @ scores)

    def path(self, alphas: np.ndarray) -> np.ndarray:
        """Returns the weights for each penalty, (P, F, R), by one eigendecomposition."""
        if self.features is not None and self.scores is not None:
            kernel = self.features @ self.features.T
            values, vectors = np.linalg.eigh(kernel)
            turned = vectors.T @ self.scores
            lift = self.features.T @ vectors
        else:
            assert self.gram is not None
            values, vectors = np.linalg.eigh(self.gram)
            assert self.moments is not None
            turned, lift = vectors.T @ self.moments, vectors
        unit = max(values.sum() / 100, _MIN_UNIT)
        spread = np.maximum(values, 0)[None] + alphas[:, None] * unit
        return np.stack([lift @ (turned / each[:, None]) for each in spread])


def _with_values(blocks: Iterable[np.ndarray], values: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the features of each section and its part of the spots' values, (N,)."""
    start = 0
    for features in blocks:
        yield features, values[start : start + len(features)]
        start += len(features)


def _left_out(features: np.ndarray, fold: np.ndarray, paths: Sequence[np.ndarray]) -> np.ndarray:
    """Returns a section's scores without its folds, for each penalty, (P, n, R)."""
    predicted = np.empty((len(paths[0]), len(features), paths[0].shape[2]))
    for index in np.unique(fold):
        rows = fold == index
        predicted[:, rows] = features[rows].astype(np.float64) @ paths[index]
    return predicted
