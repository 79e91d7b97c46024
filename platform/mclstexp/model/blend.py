"""The program model: what a slide's tiles are answered with, in one pass, by a program ridge and retrieval.

Each tile is answered on its own: its program scores by the ridge and by retrieval, the scores that it gives its
neighbours, and its part in the slide's level. Nothing of the width of features leaves that step. When all tiles of a
slide are known, neighbours are added, scores are centred over the slide, and genes are decoded:

    prediction = level + ((own + neighbours) - mean over the slide) decoder

The ridge sees a tile's own feature blocks and the Gaussian means of some blocks over its neighbours; being linear, its
answer is a sum over neighbours of what each gives.

Shapes: n tiles, N spots of the bank, F features of a tile, R programs, D width of keys.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import nn

from mclstexp.errors import ModelError
from mclstexp.model.bank import Bank
from mclstexp.model.decode import SlideDecoder, TileScores
from mclstexp.model.level import Level
from mclstexp.model.programs import Programs
from mclstexp.model.retrieval import Retrieved, retrieve
from mclstexp.model.standardise import Standardiser
from mclstexp.model.tower_keys import TowerKeys
from mclstexp.settings import RetrievalConfig

FILE = "programs.safetensors"
_STANDARDISERS = ("own", "near")
_ARRAYS = ("near_columns", "level_columns", "own_weights", "near_weights", "key_weights", "donor_scores")
_NUMBERS = ("neighbour_um", "retrieved_scale", "share")
_TOWER_SHARE = "tower_share"
_NUMBERS_KEY = "numbers"


def with_squares(scores: np.ndarray) -> np.ndarray:
    """Returns program scores (N, R) and, as a last column, their squared length, float32 (N, R + 1)."""
    values = np.asarray(scores, np.float64)
    return np.column_stack([values, (values**2).sum(axis=1)]).astype(np.float32)


def spread(retrieved: np.ndarray) -> np.ndarray:
    """Returns how far the scores of a tile's donors lie apart: their weighted standard deviation, float32 (n,).

    It is in units of expression, over all programs: the root of the mean squared distance of donors from their mean.

    Args:
        retrieved: weighted means of what `with_squares` returns, (n, R + 1).
    """
    mean, squares = retrieved[:, :-1].astype(np.float64), retrieved[:, -1].astype(np.float64)
    return np.sqrt(np.maximum(squares - (mean**2).sum(axis=1), 0)).astype(np.float32)


@dataclass(frozen=True)
class ProgramModel:
    """The fitted closed forms of a model version; its bank holds the keys that retrieval searches."""

    own: Standardiser
    """Of a tile's features."""
    near: Standardiser
    """Of the means over neighbours of the features in `near_columns`."""
    near_columns: np.ndarray
    """Features that count in the means over neighbours, int64 (F',)."""
    level_columns: np.ndarray
    """Features that the level sees, int64."""
    neighbour_um: float
    """Width of the Gaussian over neighbours, in micrometres."""
    own_weights: np.ndarray
    """The ridge's, with the blend's share and slope, float64 (F, R)."""
    near_weights: np.ndarray
    """float64 (F', R)."""
    key_weights: np.ndarray
    """Turns standardised features into queries, float32 (F, D)."""
    retrieved_scale: float
    """Factor of retrieved scores, with the blend's share and slope."""
    donor_scores: np.ndarray
    """Program scores of the bank's spots, float32 (N, R)."""
    share: float
    """Of retrieval in the blend."""
    programs: Programs
    level: Level
    towers: TowerKeys | None = None
    """Trained towers that spots are also found by."""

    def bank(self, measured: Bank) -> Bank:
        """Returns the bank whose payload are program scores and their squared length, in the place of expression."""
        return replace(measured, payload=with_squares(self.donor_scores), measured=None)

    @property
    def tower_share(self) -> float:
        """The towers' share of the similarity by which spots are found."""
        return self.towers.share if self.towers else 0.0

    def queries(self, features: np.ndarray) -> np.ndarray:
        """Returns what tiles are searched by, float32 (n, D)."""
        of_features = self.own.apply(features).astype(np.float32) @ self.key_weights
        return of_features if self.towers is None else self.towers.queries(features, of_features)

    def tile_scores(self, features: np.ndarray, retrieved: np.ndarray, complete: np.ndarray) -> TileScores:
        """Returns what tiles leave behind.

        Args:
            features: of the tiles, float32 (n, F).
            retrieved: what they retrieve from `bank`, (n, R + 1).
            complete: bool (n,); other tiles have no part in the level.
        """
        standard = self.own.apply(features)
        near = self.near.apply(features[:, self.near_columns], clip=False)
        components = standard[:, self.level_columns] @ self.level.components
        own = standard @ self.own_weights + self.retrieved_scale * retrieved[:, :-1]
        values = np.concatenate([own, near @ self.near_weights], axis=1, dtype=np.float32)
        return TileScores(values, components[complete].sum(axis=0))

    def answer(self, features: np.ndarray, xy_um: np.ndarray, bank: Bank, config: RetrievalConfig) -> Retrieved:
        """Returns the answer to all tiles of a slide, which are complete.

        Args:
            features: of the tiles, float32 (n, F).
            xy_um: their centres in micrometres, (n, 2).
            bank: as the method `bank` returns it.
            config: as `retrieval.resolve` returns it.
        """
        found = retrieve(self.queries(features), bank, config)
        tiles = self.tile_scores(features, found.prediction, np.ones(len(features), bool))
        return replace(found, prediction=self.decoder().predict(tiles, xy_um), spread=spread(found.prediction))

    def decoder(self) -> SlideDecoder:
        """Returns what turns the scores of a whole slide into expression."""
        return SlideDecoder(self.neighbour_um, self.programs.decoder, self.level)

    def not_finite(self) -> str | None:
        """Returns the name of the first array or number that is not finite; None if there is none."""
        numbers, arrays = self._numbers(), self._arrays()
        for name, value in (numbers | arrays).items():
            if not np.isfinite(value).all():
                return f"{name} of the programs"
        return None

    def save(self, folder: str | Path) -> None:
        """Writes the model into a local folder, without the tensors of its towers."""
        arrays = {name: np.ascontiguousarray(value) for name, value in self._arrays().items()}
        save_file(arrays, Path(folder, FILE), {_NUMBERS_KEY: json.dumps(self._numbers())})

    @classmethod
    def load(cls, folder: str | Path, head: nn.Module | None = None) -> "ProgramModel":
        """Returns the model that `save` wrote.

        Args:
            folder: where it is.
            head: the image side of its towers; None if it has none.

        Raises:
            ModelError: an array or a number is missing.
        """
        with safe_open(Path(folder, FILE), "numpy") as file:
            numbers = json.loads((file.metadata() or {}).get(_NUMBERS_KEY, "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
        try:
            standardisers = {
                name: Standardiser(**{part: arrays[f"{name}/{part}"] for part in ("mean", "deviation", "weight")})
                for name in _STANDARDISERS
            }
            level = Level(
                **{part: arrays[f"level/{part}"] for part in ("components", "coefficients", "intercept", "mean")},
                share=numbers["level_share"],
                error=numbers.get("level_mse"),
                mean_error=numbers.get("level_mse_of_train_mean"),
            )
            programs = Programs(arrays["programs/loadings"], arrays["programs/decoder"])
            plain = {name: arrays[name] for name in _ARRAYS} | {name: numbers[name] for name in _NUMBERS}
        except KeyError as error:
            raise ModelError(f"{FILE} in {folder} has no {error.args[0]}; fetch the model version again") from None
        towers = None if head is None else TowerKeys(numbers[_TOWER_SHARE], head)
        return cls(
            own=standardisers["own"], near=standardisers["near"], **plain, programs=programs, level=level, towers=towers
        )

    def _arrays(self) -> dict[str, np.ndarray]:
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        for name in (*_STANDARDISERS, "level", "programs"):
            values = vars(getattr(self, name)).items()
            arrays |= {f"{name}/{part}": value for part, value in values if isinstance(value, np.ndarray)}
        return arrays

    def _numbers(self) -> dict[str, float]:
        plain = {name: getattr(self, name) for name in _NUMBERS}
        known = {name: error for name, error in self.level.errors().items() if error is not None}
        return plain | known | {"level_share": self.level.share, _TOWER_SHARE: self.tower_share}
