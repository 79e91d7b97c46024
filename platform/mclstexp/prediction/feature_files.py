"""Features that TRIDENT has extracted: one HDF5 file per slide, read as arrays.

Dataset `features`, floats (N, D), has the attributes `name`, `savetodir` and, in later versions, `encoder`. Dataset
`coords`, (N, 2), has each tile's upper left corner (x, y) in level-0 pixels, and the attributes `patch_size` (pixels),
`patch_size_level0`, `level0_magnification`, `target_magnification`, `overlap`, `name`, `savetodir` and, in later
versions, `level0_width` and `level0_height` (https://github.com/mahmoodlab/TRIDENT). Files are written to a folder
`features_ENCODER`. Neither states the encoder's weights, so only names and widths can be compared with a model's.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType

import h5py
import numpy as np

from mclstexp.errors import SourceError

FEATURES, COORDS = "features", "coords"
_ABSENT = "None"  # what TRIDENT writes in the place of a value that it does not know


@dataclass(frozen=True)
class FeatureNeeds:
    """The features that a model takes."""

    encoder: str
    """As `model.image_encoder`."""
    layer: str
    """The pooled layer."""
    width: int
    """Features of a tile."""
    names: tuple[str, ...]
    """Names of encoders that files of this layer may state."""
    keeps_size: bool
    """Whether the encoder takes tiles as they are, so that their pixels must be the model's."""
    folder: str = ""
    """Encoder that the folder's name states, for files that state none."""


@dataclass(frozen=True)
class FeatureFacts:
    """What a feature file states."""

    encoder: str
    """Empty if it states none."""
    width: int
    """Features of a tile."""
    corners: np.ndarray
    """Upper left corners x, y in level-0 pixels, float64 (N, 2)."""
    tile_px: float
    """Edge of a tile in the pixels that the encoder's transform got."""
    edge_px: float
    """Edge of a tile in level-0 pixels."""
    magnification: float | None
    """Of level 0, rounded to an objective's."""
    slide_px: tuple[float, float]
    """Width and height of level 0; as far as tiles reach if the file does not state them."""


class FeatureFile:
    """An open feature file; a context manager.

    Raises:
        FileNotFoundError: there is no such file.
        SourceError: it is damaged or no HDF5 file.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._resources = ExitStack()

    def __enter__(self) -> "FeatureFile":
        with self._reading():
            self._file = self._resources.enter_context(h5py.File(self._path, "r"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._resources.close()

    def facts(self) -> FeatureFacts:
        """Returns what the file states, without reading its features.

        Raises:
            SourceError: something is missing, damaged or contradictory.
        """
        with self._reading():
            features, coords = self._dataset(FEATURES), self._dataset(COORDS)
            corners = _rows(coords, slice(None)).astype(np.float64)
            shape, kind = _shape(features), features.dtype
            encoder, stated = features.attrs.get("encoder", ""), dict(coords.attrs)
        if len(shape) != 2 or kind.kind != "f":
            raise SourceError(f"{FEATURES} is {kind} {shape}, expected floats (tiles, width) of tiles, not of a slide")
        if corners.shape != (shape[0], 2) or not np.isfinite(corners).all():
            raise SourceError(f"{COORDS} is {corners.shape}, expected two finite numbers for each of {shape[0]} tiles")
        edge = _required(stated, "patch_size_level0")
        facts = FeatureFacts(
            encoder="" if _text(encoder) == _ABSENT else _text(encoder),
            width=shape[1],
            corners=corners,
            tile_px=_required(stated, "patch_size"),
            edge_px=edge,
            magnification=_number(stated, "level0_magnification"),
            slide_px=_slide_size(stated, corners, edge),
        )
        _require_on_slide(facts)
        return facts

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns the features of consecutive tiles, float32 (n, D).

        Raises:
            SourceError: they are damaged or not finite; names the first tile.
        """
        with self._reading():
            features = _rows(self._dataset(FEATURES), slice(start, stop)).astype(np.float32)
        if len(features) != stop - start:
            raise SourceError(f"{FEATURES} ends before tile {stop - 1}: the file has changed; extract it again")
        is_finite = np.isfinite(features).all(axis=1)
        if not is_finite.all():
            first = start + int(np.flatnonzero(~is_finite)[0])
            raise SourceError(f"{FEATURES} of tile {first} are not finite numbers; extract the slide again")
        return features

    def _dataset(self, name: str) -> h5py.Dataset:
        found = self._file.get(name)
        if not isinstance(found, h5py.Dataset):
            raise SourceError(
                f"it has no dataset {name!r} (it has {', '.join(self._file) or 'none'}); give a file of "
                "TRIDENT's patch features"
            )
        return found

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise FileNotFoundError(self._path) from None
        except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
            raise SourceError(f"{self._path} cannot be read as HDF5: {error}; extract the slide again") from None


def _shape(dataset: h5py.Dataset) -> tuple[int, ...]:
    """Returns the shape of a dataset without a leading batch of one."""
    shape: tuple[int, ...] = dataset.shape
    return shape[1:] if len(shape) == 3 and shape[0] == 1 else shape


def _rows(dataset: h5py.Dataset, rows: slice) -> np.ndarray:
    return np.asarray(dataset[rows] if _shape(dataset) == dataset.shape else dataset[0, rows])


def _slide_size(stated: dict[str, object], corners: np.ndarray, edge: float) -> tuple[float, float]:
    reach = (corners.max(axis=0) + edge).tolist() if len(corners) else [edge, edge]
    width, height = (_number(stated, name) for name in ("level0_width", "level0_height"))
    return width or reach[0], height or reach[1]


def _require_on_slide(facts: FeatureFacts) -> None:
    outside = (facts.corners < 0) | (facts.corners >= np.array(facts.slide_px))
    if outside.any():
        first = int(np.flatnonzero(outside.any(axis=1))[0])
        width, height = facts.slide_px
        raise SourceError(
            f"{outside.any(axis=1).sum()} of {len(outside)} tiles are outside its slide of {width:g} x {height:g} px, "
            f"the first at {facts.corners[first].tolist()}: give corners x, y in level-0 pixels"
        )


def _required(stated: dict[str, object], name: str) -> float:
    value = _number(stated, name)
    if value is None:
        raise SourceError(
            f"{COORDS} has no attribute {name} (it has {', '.join(sorted(stated)) or 'none'}); extract the slide with "
            "TRIDENT, which writes it"
        )
    return value


def _number(stated: dict[str, object], name: str) -> float | None:
    """Returns a positive attribute, or None if the file does not state it."""
    text = _text(stated.get(name, _ABSENT))
    if text == _ABSENT:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise SourceError(f"attribute {name} of {COORDS} is {text!r}, expected a number above 0")
    return value


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
