"""Parts of a slide's prediction: what was embedded and retrieved for 256 tiles, kept until the slide is published.

A part is one safetensors object, written whole. Nothing but its name is looked at when a run goes on; its content is
checked when it is read for publishing, and a damaged one is removed then, so that a listing stays one request and
the same command makes good what was lost.
"""

import re
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import load, save

from mclstexp import storage
from mclstexp.errors import PartError

CONFIDENCE = ("similarity", "effective_donors", "donor_share")
_PART_FILE = re.compile(r"(\d{5,})\.safetensors")


class Answer(Protocol):
    """What a model says of n tiles, as `retrieval.Retrieved`: `prediction` float32 (n, G), the others float32 (n,)."""

    @property
    def prediction(self) -> np.ndarray: ...  # noqa: D102

    @property
    def similarity(self) -> np.ndarray: ...  # noqa: D102

    @property
    def effective_donors(self) -> np.ndarray: ...  # noqa: D102

    @property
    def donor_share(self) -> np.ndarray: ...  # noqa: D102


@dataclass(frozen=True)
class Part:
    """The answer for n tiles that follow each other in the grid."""

    prediction: np.ndarray
    """float32 (n, G), in the model's unit; NaN where a tile is not complete."""
    similarity: np.ndarray
    """float32 (n,), as are the next two."""
    effective_donors: np.ndarray
    donor_share: np.ndarray
    complete: np.ndarray
    """bool (n,): whether the slide had pixels there."""


def write_part(staging_uri: str, part: int, found: Answer, complete: np.ndarray) -> None:
    """Writes one part, whole or not at all.

    Args:
        staging_uri: the slide's staging folder.
        part: its number.
        found: the answer for its n tiles; what it says of tiles that are not complete is replaced by NaN.
        complete: bool (n,), whether the slide had pixels there.
    """
    there = np.asarray(complete, bool)
    arrays = {"prediction": np.where(there[:, None], found.prediction, np.float32(np.nan))}
    arrays |= {name: np.where(there, getattr(found, name), np.float32(np.nan)) for name in CONFIDENCE}
    arrays = {name: values.astype(np.float32) for name, values in arrays.items()}
    storage.write(storage.join(staging_uri, part_name(part)), save(arrays | {"complete": there.astype(np.uint8)}))


def read_part(staging_uri: str, part: int, num_tiles: int, num_genes: int) -> Part:
    """Returns one part.

    Args:
        staging_uri: the slide's staging folder.
        part: its number.
        num_tiles: tiles of the whole slide.
        num_genes: genes of the panel.

    Raises:
        PartError: it is missing, truncated or of another shape; it has been removed, so that `parts_done` no longer
            names it.
    """
    uri = storage.join(staging_uri, part_name(part))
    length = min(PART_TILES, num_tiles - part * PART_TILES)
    try:
        arrays = load(storage.read(uri))
    except FileNotFoundError:
        raise PartError(f"{uri} is missing; run the same command again, which makes it anew") from None
    except SafetensorError as error:
        raise _removed(uri, str(error)) from None
    wanted = {"prediction": ((length, num_genes), "float32"), "complete": ((length,), "uint8")}
    wanted |= dict.fromkeys(CONFIDENCE, ((length,), "float32"))
    got = {name: (values.shape, str(values.dtype)) for name, values in arrays.items()}
    if got != wanted:
        raise _removed(uri, f"it has {_listed(got)}, wanted are {_listed(wanted)}")
    return Part(**arrays | {"complete": arrays["complete"].astype(bool)})


def parts_done(staging_uri: str) -> set[int]:
    """Returns the numbers of the parts that were written, in one listing."""
    names = [uri.rpartition("/")[2] for uri in storage.list_files(storage.join(staging_uri, PARTS))]
    return {int(match[1]) for match in map(_PART_FILE.fullmatch, names) if match}


def _removed(uri: str, fault: str) -> PartError:
    storage.delete(uri)
    return PartError(f"{uri} was damaged and is removed: {fault}; run the same command again, which makes it anew")


def _listed(arrays: dict[str, tuple[tuple[int, ...], str]]) -> str:
    return ", ".join(f"{name} {dtype} {shape}" for name, (shape, dtype) in sorted(arrays.items()))


PART_TILES = 256
"""Tiles of a part, the unit of embedding, writing and resuming."""
TILES, NOTHING_LEFT, QUARANTINED, FAILED = "tiles", "nothing_left", "quarantined", "failed"
"""States of a row on its way: a part's tiles; all parts are there; the slide's own fault; a fault that may pass."""
GRID, RECORD, THUMBNAIL, PREVIEW, PARTS = "grid.parquet", "slide.json", "thumbnail.jpg", "preview.jpg", "parts"
GRID_SCHEMA = pa.schema(
    [
        ("spot_id", pa.string()),  # unique within its slide
        ("array_row", pa.int32()),  # null where the positions were given
        ("array_col", pa.int32()),
        ("x_px", pa.float64()),  # tile centre, slide level 0
        ("y_px", pa.float64()),
        ("x_um", pa.float64()),
        ("y_um", pa.float64()),
        ("tissue_fraction", pa.float32()),
    ]
)
"""One row a tile, in the order in which they are predicted (along a Hilbert curve)."""


class SlideRecord(BaseModel):
    """One slide as its inspection found it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    slide_id: str
    patient_id: str
    site: str
    image: str
    """URI as it was given."""
    fingerprint: str
    width_px: int
    height_px: int
    mpp: float
    """Micrometres per level-0 pixel."""
    mpp_source: str
    scale: float
    """Level-0 pixels along a tile pixel."""
    reads_regions: bool = True
    """Whether a region of the image is read by itself, or the whole image decoded for any."""
    scanned_from_px: tuple[float, float]
    """x and y of the scanned region's corner, level 0."""
    num_tiles: int
    tile_area_mm2: float
    """Area of all tiles; where they overlap it counts twice."""
    tissue_area_mm2: float
    missing_tiles: int
    """Tiles without pixels; 0 at inspection."""
    left_out_positions: int
    """Given positions whose tile would lie off the image or cross its edge."""
    thumbnail_scale: float
    """Level-0 pixels along a pixel of the thumbnail."""
    not_h_and_e: str
    """Why it is flagged as no H&E; empty where it is not."""


def part_name(part: int) -> str:
    """Returns where a part lies within the staging folder."""
    return f"{PARTS}/{part:05d}.safetensors"


def num_parts(num_tiles: int) -> int:
    """Returns how many parts a slide has."""
    return -(-num_tiles // PART_TILES)


STAGING = "staging"
_AT_ONCE = 16


def staging_folder(out: str, slide_id: str, key: str) -> str:
    """Returns the URI of the folder that keeps a slide's unfinished prediction under a key."""
    return storage.join(out, STAGING, f"{slide_id}-{key}")


def remove_staging(uri: str) -> None:
    """Removes one folder."""
    storage.delete(storage.join(uri, RECORD))
    storage.delete_folder(uri)


def clear_staging(out: str, slide_ids: Collection[str]) -> None:
    """Removes all folders of some slides, under whatever key: of settled ones none is of use."""
    root = storage.join(out, STAGING)
    found = {uri[len(root) + 1 :].partition("/")[0] for uri in storage.list_files(root)}
    folders = [storage.join(root, name) for name in sorted(found) if name.rpartition("-")[0] in slide_ids]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(remove_staging, folders))
