"""What a reader returns: spots with raw counts and pixel positions, their genes, and the rejected spots with reasons.

Counts are checked here for all readers. A value that is not a count stops the section instead of its spot, because
whatever made it (a logarithm, a scaling, a broken export) has changed its neighbours as well.
"""

import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Self

import h5py
import numpy as np
from scipy.sparse import csr_array

from mclstexp.errors import SourceError
from mclstexp.messages import some_of
from mclstexp.slides.plain import is_packed

MAX_ARRAY = 65_535
"""Largest array row or column."""
PICTURES = ("hires", "lowres")
"""Parts of a folder that it may lack: small pictures of the image, see `Picture`.

They only serve a check; a section's digest leaves them out, so that it is not cut again when they are added.
"""
_MAX_COUNT = 2**31 - 1
_BIN_OF_HD = re.compile(r"s_(\d+)um_\d+_\d+")  # size, row and column
_MAX_LOG = 20.0  # log1p of five hundred million: data with a smaller maximum may be logarithms


class Gene(NamedTuple):
    """A gene as `ingest.readers.features` names it; symbol or ensembl_id may be empty.

    The ensembl_id is the gene's stable id, also one of FlyBase or another source, or the source's own id where that
    alone tells genes apart; else the gene_id is the symbol.
    """

    gene_id: str
    symbol: str
    ensembl_id: str


class Reject(NamedTuple):
    """A spot that gets no tile; its position is NaN if the source gives none.

    Readers give the first reason that holds of: `not_selected` (off the tissue, or left out by the source),
    `no_position` (in pixels), `no_array_position` (on an array where others have one: learnt tables of positions need
    all), `unclear_selection` (a cell that says neither yes nor no) and `no_counts`.
    `ingest.section` adds `outside_image`, `crosses_edge`, `no_tissue`, `off_array` and `missing_pixels`.
    """

    spot_id: str
    x_px: float
    y_px: float
    reason: str


@dataclass(frozen=True)
class Spots:
    """Positions on a slide, n of them in the same order in every field."""

    spot_id: np.ndarray
    """object (n,) of str."""
    x_px: np.ndarray
    """Centre in level-0 pixels, float64 (n,)."""
    y_px: np.ndarray
    array_row: np.ndarray
    """float64 (n,), whole numbers; NaN without an array."""
    array_col: np.ndarray
    counts: csr_array | None = None
    """Raw counts, int32 (n, genes); None on an H&E-only slide."""

    def __len__(self) -> int:
        return len(self.spot_id)

    def take(self, rows: np.ndarray) -> Self:
        """Returns the spots in the given rows (indices or mask)."""
        names = ("spot_id", "x_px", "y_px", "array_row", "array_col")
        taken = {name: getattr(self, name)[rows] for name in names}
        return replace(self, **taken, counts=None if self.counts is None else self.counts[rows])

    def rejects(self, rows: np.ndarray, reason: str) -> list[Reject]:
        """Returns the spots in the given rows as rejects."""
        spots = zip(self.spot_id[rows].tolist(), self.x_px[rows].tolist(), self.y_px[rows].tolist(), strict=True)
        return [Reject(str(spot_id), x, y, reason) for spot_id, x, y in spots]

    def layout(self, scale: "Scale | None" = None) -> "Layout":
        """Returns where the spots are, with what else the files state; without spots that have no place.

        On an array, that includes spots without an array position.
        """
        scale = scale or Scale()
        array_xy = np.stack([self.array_col, self.array_row], axis=1)
        xy_px = np.stack([self.x_px, self.y_px], axis=1)
        known, on_array = (np.isfinite(xy).all(axis=1) for xy in (xy_px, array_xy))
        on_array &= ~_off_arrays(self)
        known &= on_array | ~on_array.any()
        of_spots = (array_xy[known], xy_px[known], _bin_um(self.spot_id))
        return Layout(*of_spots, scale.mpp, scale.spot_diameter_px, scale.pictures)


@dataclass(frozen=True, eq=False)
class Layout:
    """Where a section's spots are as its files state it, selected or not, m of them; `ingest.layout` checks it.

    Readers give what their files have and judge nothing: all that can be checked is checked for every format alike.
    """

    array_xy: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))
    """Array column and row of each spot with a pixel position, float64 (m, 2); NaN without an array."""
    xy_px: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))
    """The same spots' centres in pixels of the image, float64 (m, 2)."""
    bin_um: float | None = None
    """Edge of the bins if the spots are those of Visium HD, which have it in their names."""
    mpp: float | None = None
    """Micrometres per full-resolution pixel as the files state it (Visium HD)."""
    spot_diameter_px: float | None = None
    """Diameter of a spot in full-resolution pixels."""
    pictures: tuple["Picture", ...] = ()
    """Downscaled pictures of the same image beside the positions."""


class Picture(NamedTuple):
    """A downscaled picture of a section's image; its size over its scale is that of the full image."""

    name: str
    """What the source calls it, such as `tissue_hires_image.png`."""
    width: int
    """0 if the source has only the picture's scale."""
    height: int
    scale: float
    """Pixels of the picture along a full-resolution pixel, such as `tissue_hires_scalef`."""


class Scale(NamedTuple):
    """What a section's files state about the scale of its positions; fields as in `Layout`."""

    mpp: float | None = None
    spot_diameter_px: float | None = None
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Expression:
    """A measured section: its usable spots and the rejected ones."""

    spots: Spots
    genes: tuple[Gene, ...]
    """Columns of `spots.counts`."""
    rejected: tuple[Reject, ...]
    layout: Layout = field(default_factory=Layout)


@dataclass(frozen=True)
class Preview:
    """What a section's files state before its counts are read; empty for an H&E-only slide."""

    genes: tuple[Gene, ...] = ()
    other_features: Mapping[str, int] = field(default_factory=dict)
    """Number of features that are left out because they are not genes, by kind."""
    layout: Layout = field(default_factory=Layout)
    """As in `Expression`."""
    remarks: tuple[str, ...] = ()
    """What the user should know of how the files were read."""


def _bin_um(spot_id: np.ndarray) -> float | None:
    bins = _BIN_OF_HD.match(str(spot_id[0])) if len(spot_id) else None
    return float(bins[1]) if bins else None


@contextmanager
def file_errors(path: str, kind: str) -> Iterator[None]:
    """Turns whatever a damaged file makes libraries raise into an error that names the file.

    Args:
        path: the file.
        kind: what it should be, for the message.

    Raises:
        SourceError: instead of those errors.
    """
    try:
        yield
    except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise SourceError(f"{Path(path).name} cannot be read, it is damaged or not a {kind}: {error}") from error
    except SourceError as error:
        raise SourceError(f"{Path(path).name}: {error}") from None


@contextmanager
def opened_hdf5(path: str, kind: str) -> Iterator[h5py.File]:
    """Yields a local HDF5 file; errors name it and its `kind`, as in `file_errors`.

    Raises:
        SourceError: it is damaged, or compressed as a whole.
    """
    with file_errors(path, kind):
        if is_packed(path):
            raise SourceError("it is compressed with gzip, and HDF5 is read in parts: unpack it (gunzip)")
        with h5py.File(path, "r") as file:
            yield file


def checked_counts(values: csr_array, spot_ids: list[str], genes: tuple[Gene, ...]) -> csr_array:
    """Returns values (spots, genes) as int32 counts, canonical and without stored zeros.

    Raises:
        SourceError: a value is NaN, infinite, negative, fractional or above 2^31 - 1; names spot and gene.
    """
    counts = csr_array(values)
    counts.sum_duplicates()
    data = counts.data
    with np.errstate(invalid="ignore"):
        wrong = ~((data >= 0) & (data <= _MAX_COUNT) & (data == np.rint(data)))
    if wrong.any():
        first = int(wrong.argmax())
        spot = spot_ids[int(np.searchsorted(counts.indptr, first, side="right")) - 1]
        gene = genes[counts.indices[first]].gene_id
        hint = "; the values look normalised or log-transformed" if np.nanmax(data, initial=0) < _MAX_LOG else ""
        hint = "; leave out genes that were not measured" if np.isnan(data[first]) else f"{hint}: give raw counts"
        raise SourceError(f"gene {gene} of spot {spot} has the value {data[first]}, which is not a raw count{hint}")
    counts = counts.astype(np.int32)
    counts.eliminate_zeros()
    return counts


def require_unique(names: list[str], what: str) -> None:
    """Refuses repeated names.

    Raises:
        SourceError: names the repeated ones.
    """
    repeated = sorted(name for name, times in Counter(names).items() if times > 1)
    if repeated:
        raise SourceError(f"{what} appears more than once: {some_of(repeated)}; merge or drop them")


def require_positions(spots: Spots) -> None:
    """Refuses positions that no array has; a few, such as -1 where one is unknown, cost their spots only.

    Raises:
        SourceError: more than half of the array positions are negative or above `MAX_ARRAY`; names a spot.
    """
    wrong = _off_arrays(spots)
    if wrong.sum() > len(spots) / 2:
        i = int(wrong.argmax())
        raise SourceError(
            f"{wrong.sum()} of {len(spots)} spots have array positions outside 0 to {MAX_ARRAY}, such as row "
            f"{spots.array_row[i]:g}, column {spots.array_col[i]:g} of spot {spots.spot_id[i]}: give those of the array"
        )


def _off_arrays(spots: Spots) -> np.ndarray:
    """Returns which spots have an array position that no array has, bool (n,)."""
    row, column = spots.array_row, spots.array_col
    return (np.minimum(row, column) < 0) | (np.maximum(row, column) > MAX_ARRAY)


def split_usable(spots: Spots, selected: np.ndarray) -> tuple[Spots, list[Reject]]:
    """Returns the spots that can be used, and the others as rejects with the reason.

    Args:
        spots: without counts, none of them can be used.
        selected: bool (n,), or float64 (n,) of 1, 0 and NaN where it is unclear.
    """
    lacks_array = np.isnan(spots.array_row + spots.array_col) | _off_arrays(spots)
    tests = {
        "not_selected": selected == 0,
        "no_position": np.isnan(spots.x_px + spots.y_px),
        "no_array_position": lacks_array & ~lacks_array.all(),
        "unclear_selection": np.isnan(selected),
        "no_counts": np.full(len(spots), True) if spots.counts is None else spots.counts.sum(axis=1) == 0,
    }
    usable, rejected = np.full(len(spots), True), []
    for reason, holds in tests.items():
        rejected += spots.rejects(usable & holds, reason)
        usable &= ~holds
    return spots.take(usable), rejected


def join_counts(
    spot_ids: list[str], counts: csr_array, placed: Spots, selected: np.ndarray
) -> tuple[Spots, list[Reject]]:
    """Returns the usable spots of a table of counts and a table of positions, and all others of either as rejects.

    Args:
        spot_ids: of the counts, in the order of the result.
        counts: int32 (spots, genes).
        placed: all spots of the table of positions.
        selected: as for `split_usable`, of these.

    Raises:
        SourceError: the tables have no spot in common, or an array position is impossible.
    """
    row_of = {name: row for row, name in enumerate(placed.spot_id)}
    row = np.array([row_of.get(name, -1) for name in spot_ids], np.int64)
    known = row >= 0
    if not known.any():
        raise SourceError(
            f"the positions ({', '.join(placed.spot_id[:1])}, ...) have none of the spots of the counts "
            f"({spot_ids[0]}, ...): give counts and positions of the same section"
        )
    counted = replace(placed.take(row[known]), counts=counts[known])
    require_positions(counted)
    usable, rejected = split_usable(counted, selected[row[known]])
    uncounted = ~np.isin(np.arange(len(placed)), row)
    rejected += split_usable(placed.take(uncounted), selected[uncounted])[1]
    rejected += [Reject(name, np.nan, np.nan, "no_position") for name in np.array(spot_ids, object)[~known].tolist()]
    return usable, rejected
