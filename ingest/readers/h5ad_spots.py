"""The spots of a section in an AnnData file: which of the file's, where they are, and the scale of their positions.

Columns with names win over columns in an order: `obsm["spatial"]` is x, y only where nothing names its columns.
"""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem

from ingest.readers.cells import flags, numbers, whole
from ingest.readers.h5ad_file import part
from ingest.readers.libraries import ARRAY_COLUMNS, choose_spots, library_of
from ingest.readers.spots import Layout, Picture, Scale, Spots, require_positions
from mclstexp.errors import SourceError

_PIXEL_COLUMNS = (
    *(("pxl_col_in_fullres", "pxl_row_in_fullres"), ("pxl_col", "pxl_row"), ("pixel_x", "pixel_y"), ("x_px", "y_px")),
    *(("pixel_col", "pixel_row"), ("pxl_x", "pxl_y"), ("px_x", "px_y")),
    *(("imagecol", "imagerow"), ("image_col", "image_row"), ("image_x", "image_y")),
)
"""Names of (x, y) that say pixels, in any case."""
_XY_COLUMNS = (*_PIXEL_COLUMNS, ("x", "y"), ("col", "row"), ("0", "1"))
"""Names of (x, y) in `obsm["spatial"]`."""
_ROUNDING_PX = 1.0
_PICTURE_FACTOR = re.compile("tissue_(.+)_scalef")


class Placed(NamedTuple):
    """A section's spots before their counts are read."""

    spots: Spots
    selected: np.ndarray
    """1.0 or 0.0, float64 (n,); NaN where it is unclear."""
    layout: Layout
    chosen: np.ndarray
    """The section's spots among those of the file, bool."""
    remarks: tuple[str, ...]
    """As in `Preview`."""


def placed_spots(file: h5py.File, library_id: str | None) -> Placed:
    """Returns the spots of the file's section, or of the one with a name.

    Raises:
        SourceError: the file has several sections and no such one, or no usable positions.
    """
    all_obs: pd.DataFrame = part(file, "obs")
    libraries = _libraries(file)
    chosen, num_nameless = choose_spots(all_obs, list(libraries), library_id)
    obs = all_obs[chosen]
    spot_id = obs.index.astype(str)
    obs = obs.set_axis("spot " + spot_id)
    xy_px, remark = _pixels(file, obs, chosen)
    x_px, y_px = xy_px.T
    array_row, array_col = _array(obs).T
    spots = Spots(spot_id.to_numpy(object), x_px, y_px, array_row, array_col)
    require_positions(spots)
    selected = flags(obs["in_tissue"]) if "in_tissue" in obs else np.ones(len(obs))
    library = library_of(obs, list(libraries), library_id)
    nameless = (
        f"{num_nameless} of the file's {len(all_obs)} spots name no section and are in none" if num_nameless else ""
    )
    layout = spots.layout(_scale(libraries[library]) if library else None)
    return Placed(spots, selected, layout, chosen, tuple(filter(None, (remark, nameless))))


def _array(obs: pd.DataFrame) -> np.ndarray:
    """Returns array row and column, float64 (n, 2); NaN if the file has none."""
    if not all(name in obs and obs[name].notna().any() for name in ARRAY_COLUMNS):
        return np.full((len(obs), 2), np.nan)
    return np.rint(whole(numbers(obs[name]) for name in ARRAY_COLUMNS))


def _pixels(file: h5py.File, obs: pd.DataFrame, chosen: np.ndarray) -> tuple[np.ndarray, str]:
    """Returns x, y in pixels, float64 (n, 2), NaN for a spot without position; and what the user should know of them.

    Args:
        file: the AnnData file.
        obs: table of the section's n spots.
        chosen: these spots among the file's.
    """
    in_obs = _pair(obs.columns, _PIXEL_COLUMNS)
    if "obsm/spatial" not in file:
        if in_obs is None:
            raise SourceError(f"it has no obsm/spatial{_other_places(file)}; {_ALLOWED}")
        return whole(numbers(obs[name]) for name in in_obs), ""
    spatial = part(file, "obsm/spatial")
    if len(np.shape(spatial)) != 2 or len(spatial) != len(chosen) or np.shape(spatial)[1] < 2:
        raise SourceError(f"obsm['spatial'] is {np.shape(spatial)}, expected ({len(chosen)}, 2): x, y in pixels")
    if isinstance(spatial, pd.DataFrame):
        pair = _pair(spatial.columns, _XY_COLUMNS)
        if pair is None:
            raise SourceError(f"obsm['spatial'] has the columns {', '.join(map(str, spatial.columns))}; {_ALLOWED}")
        return whole(_numbers_in_spatial(spatial[name].to_numpy(object)[chosen], name, obs) for name in pair), ""
    xy_px = whole(_numbers_in_spatial(spatial[chosen, axis], axis, obs) for axis in (0, 1))
    if in_obs is not None:
        named = np.stack([pd.to_numeric(obs[name].astype(object), errors="coerce") for name in in_obs], axis=1)
        if _agree(named, xy_px[:, ::-1]) and not _agree(named, xy_px):
            return xy_px[:, ::-1], f"obsm['spatial'] is y, x by {' and '.join(in_obs)} of obs, and was read so"
    return xy_px, ""


_ALLOWED = (
    "give x, y in full-resolution pixels in obsm['spatial'], without column names or with one of the pairs "
    f"{', '.join(f'{x} and {y}' for x, y in _XY_COLUMNS[:-1])}"
)


def _numbers_in_spatial(values: np.ndarray, column: object, obs: pd.DataFrame) -> np.ndarray:
    return numbers(pd.Series(values, index=obs.index, name=f"{column} of obsm['spatial']"))


def _pair(columns: pd.Index, pairs: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
    """Returns the columns of the first pair that there is."""
    named = {str(name).strip().lower(): name for name in columns}
    return next(((named[x], named[y]) for x, y in pairs if x in named and y in named), None)


def _agree(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.nanmax(np.abs(np.asarray(one, np.float64) - other), initial=0) <= _ROUNDING_PX)


def _other_places(file: h5py.File) -> str:
    others = [name for name in file.get("obsm", ()) if "spatial" in name.lower()]
    return f", but {', '.join(others)}, whose unit and order are not known" if others else ""


def _libraries(file: h5py.File) -> dict[str, h5py.Group]:
    """Returns what `uns["spatial"]` has by section."""
    spatial = file.get("uns/spatial")
    if not isinstance(spatial, h5py.Group):
        return {}
    if "scalefactors" in spatial:
        return {"spatial": spatial}
    return {name: node for name, node in spatial.items() if isinstance(node, h5py.Group) and "scalefactors" in node}


def _scale(library: h5py.Group) -> Scale:
    factors = {name: _factor(node) for name, node in library["scalefactors"].items()}
    scales = {"fullres": 1.0} if "images/fullres" in library else {}
    scales |= {
        match[1]: scale for name, scale in factors.items() if scale and (match := _PICTURE_FACTOR.fullmatch(name))
    }
    pictures = tuple(_picture(library, name, scale) for name, scale in scales.items())
    return Scale(factors.get("microns_per_pixel"), factors.get("spot_diameter_fullres"), pictures)


def _picture(library: h5py.Group, name: str, scale: float) -> Picture:
    title = f"uns['spatial'][{library.name.rpartition('/')[2]!r}]['images'][{name!r}]"
    node = library.get(f"images/{name}")
    if not isinstance(node, h5py.Dataset) or node.ndim not in (2, 3):
        return Picture(title, 0, 0, scale)
    return Picture(title, node.shape[1], node.shape[0], scale)


def _factor(node: h5py.Group | h5py.Dataset) -> float | None:
    """Returns a scale factor; None for anything but a number above 0, since writers fill in what they do not know."""
    try:
        value = float(np.asarray(read_elem(node)).item())
    except (TypeError, ValueError):
        return None
    return value if 0 < value < math.inf else None
