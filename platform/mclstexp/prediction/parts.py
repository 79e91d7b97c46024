"""The staging folder of a slide: what its inspection found, and the parts of its prediction, until it is published.

A part is what a model's answer leaves behind for 256 tiles, expression or the scores of a program model: one
safetensors object, written whole. When a run resumes, only the names of parts
are looked at; their content is checked when the slide is published, and a damaged part is removed then. So a listing
stays one request, and the same command makes good what was lost.
"""

import re
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from mclstexp import storage
from mclstexp.errors import PartError, StorageError, TableError
from mclstexp.slides.codec import decode_tile
from mclstexp.slides.tiles import encode_picture

PART_TILES = 256
"""Tiles of a part, the unit of embedding, writing and resuming."""
CONFIDENCE = ("similarity", "effective_donors", "donor_share")
STAGING = "staging"
GRID, RECORD, THUMBNAIL, PREVIEW = "grid.parquet", "slide.json", "thumbnail.jpg", "preview.jpg"
PARTS = "tiles"
"""Folder of the parts; earlier versions had others under another name, which are made again."""
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
"""One row per tile, in the order of prediction (along a Hilbert curve)."""
_PART_FILE = re.compile(r"(\d{5,})\.safetensors")
_THREADS = 16


class SlideRecord(BaseModel):
    """One slide as its inspection found it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    slide_id: str
    patient_id: str
    site: str
    image: str
    """URI as the user gave it."""
    fingerprint: str
    width_px: int
    height_px: int
    mpp: float
    """Micrometres per level-0 pixel."""
    mpp_source: str
    scale: float
    """Level-0 pixels along a tile pixel."""
    reads_regions: bool = True
    """Whether a region of the image can be read alone; otherwise any region needs the whole image decoded."""
    scanned_from_px: tuple[float, float]
    """x and y of the scanned region's corner, level 0."""
    num_tiles: int
    tile_area_mm2: float
    """Area of all tiles; where they overlap it counts twice."""
    tissue_area_mm2: float
    missing_tiles: int
    """Tiles without pixels; 0 at inspection."""
    left_out_positions: int
    """Given positions whose tile would extend beyond the image."""
    thumbnail_scale: float
    """Level-0 pixels along a pixel of the thumbnail."""
    not_h_and_e: str
    """Why the slide is flagged as not H&E; empty if it is not flagged."""


@dataclass(frozen=True)
class Inspection:
    """A slide that can be predicted."""

    record: SlideRecord
    staging: str
    """URI of its staging folder."""


class Answer(Protocol):
    """A model's answer for n tiles, as `answer.TileAnswers`: shapes and types as in `Part`."""

    @property
    def values(self) -> np.ndarray: ...  # noqa: D102

    @property
    def sums(self) -> np.ndarray: ...  # noqa: D102

    @property
    def confidence(self) -> dict[str, np.ndarray]: ...  # noqa: D102


@dataclass(frozen=True)
class Part:
    """The answer for n consecutive tiles of the grid."""

    values: np.ndarray
    """float32 (n, W): expression in the model's unit, or scores of a program model; NaN if a tile is not complete."""
    sums: np.ndarray
    """float64 (S,), over the complete tiles; (0,) for a model without programs."""
    confidence: dict[str, np.ndarray]
    """`CONFIDENCE` and, of a program model, `SPREAD`, float32 (n,) each; NaN if a tile is not complete."""
    complete: np.ndarray
    """bool (n,): whether the slide has pixels there."""


def staging_folder(out: str, slide_id: str, key: str) -> str:
    """Returns the URI of the folder that keeps a slide's unfinished prediction under a key."""
    return storage.join(out, STAGING, f"{slide_id}-{key}")


def write_inspection(found: Inspection, grid: pa.Table, thumbnail: np.ndarray, preview: np.ndarray) -> None:
    """Writes what was found about a slide into its staging folder, the record last.

    Args:
        found: the slide.
        grid: its tiles, GRID_SCHEMA, in the order of prediction.
        thumbnail, preview: the slide without and with its tiles drawn in, uint8 (height, width, 3).
    """
    sink = pa.BufferOutputStream()
    pq.write_table(grid, sink, compression="zstd", store_schema=False)
    files = {GRID: sink.getvalue().to_pybytes(), THUMBNAIL: encode_picture(thumbnail), PREVIEW: encode_picture(preview)}
    with ThreadPoolExecutor(len(files)) as pool:  # it waits for the store
        list(pool.map(lambda name: storage.write(storage.join(found.staging, name), files[name]), files))
    write_record(found)


def write_record(found: Inspection) -> None:
    """Writes the record of a slide into its staging folder."""
    storage.write(storage.join(found.staging, RECORD), found.record.model_dump_json(indent=1).encode())


def key_of_staging(uri: str) -> str:
    """Returns the key in the name of a staging folder."""
    return uri.rpartition("-")[2]


def num_parts(num_tiles: int) -> int:
    """Returns how many parts a slide has."""
    return -(-num_tiles // PART_TILES)


def part_name(part: int) -> str:
    """Returns the path of a part within the staging folder."""
    return f"{PARTS}/{part:05d}.safetensors"


def encode_part(found: Answer, complete: np.ndarray) -> bytes:
    """Returns the file of one part.

    Args:
        found: the answer for its n tiles; NaN replaces the answer for tiles that are not complete.
        complete: bool (n,), whether the slide has pixels there.
    """
    has_pixels = np.asarray(complete, bool)
    arrays = {"values": np.where(has_pixels[:, None], found.values, np.float32(np.nan))}
    arrays |= {name: np.where(has_pixels, each, np.float32(np.nan)) for name, each in found.confidence.items()}
    arrays = {name: values.astype(np.float32) for name, values in arrays.items()}
    return save(arrays | {"sums": found.sums.astype(np.float64), "complete": has_pixels.astype(np.uint8)})


def write_part(staging: str, part: int, file: bytes) -> None:
    """Writes the file of one part into a staging folder, whole or not at all."""
    storage.write(storage.join(staging, part_name(part)), file)


def read_part(
    staging: str, part: int, num_tiles: int, num_values: int, num_sums: int, confidence: Sequence[str] = CONFIDENCE
) -> Part:
    """Returns one part.

    Args:
        staging: URI of the slide's staging folder.
        part: its number.
        num_tiles: tiles of the whole slide.
        num_values, num_sums: W and S of the model.
        confidence: names of what it knows of each tile.

    Raises:
        PartError: it is missing, truncated or of another shape. A damaged part is removed, so that `parts_done` no
            longer counts it.
    """
    uri = storage.join(staging, part_name(part))
    length = min(PART_TILES, num_tiles - part * PART_TILES)
    try:
        arrays = load(storage.read(uri))
    except FileNotFoundError:
        raise PartError(f"{uri} is missing; run the same command again, which makes it again") from None
    except SafetensorError as error:
        raise _removed(uri, str(error)) from None
    wanted = {"values": ((length, num_values), "float32"), "sums": ((num_sums,), "float64")}
    wanted |= {"complete": ((length,), "uint8")}
    wanted |= dict.fromkeys(confidence, ((length,), "float32"))
    got = {name: (values.shape, str(values.dtype)) for name, values in arrays.items()}
    if got != wanted:
        raise _removed(uri, f"it has {_shapes(got)}, expected {_shapes(wanted)}")
    known = {name: arrays[name] for name in confidence}
    return Part(arrays["values"], arrays["sums"], known, arrays["complete"].astype(bool))


def parts_done(staging: str) -> set[int]:
    """Returns the numbers of the parts that are written, from one listing."""
    names = [uri.rpartition("/")[2] for uri in storage.list_files(storage.join(staging, PARTS))]
    return {int(match[1]) for match in map(_PART_FILE.fullmatch, names) if match}


def read_record(staging: str) -> SlideRecord:
    """Returns the record of a staged slide.

    Raises:
        StorageError: it is damaged.
    """
    uri = storage.join(staging, RECORD)
    try:
        return SlideRecord.model_validate_json(storage.read(uri))
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, fault['loc']))} {fault['msg']}".strip() for fault in error.errors())
        raise _damaged(uri, "; ".join(faults)) from None


def read_grid(staging: str, num_tiles: int) -> pa.Table:
    """Returns the tiles of a staged slide, GRID_SCHEMA, in the order of prediction.

    Raises:
        StorageError: it is damaged, or has another number of tiles.
    """
    uri = storage.join(staging, GRID)
    try:
        grid = pq.ParquetFile(pa.BufferReader(storage.read(uri))).read()
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(uri, str(error)) from None
    if not grid.schema.equals(GRID_SCHEMA) or grid.num_rows != num_tiles:
        fault = f"it has {grid.num_rows} tiles of {grid.schema.names}, its {RECORD} states {num_tiles}"
        raise _damaged(uri, fault)
    return grid


def read_thumbnail(staging: str) -> np.ndarray:
    """Returns the small picture of a staged slide, uint8 (height, width, 3).

    Raises:
        StorageError: it is damaged.
    """
    uri = storage.join(staging, THUMBNAIL)
    try:
        return decode_tile(storage.read(uri))
    except TableError as error:
        raise _damaged(uri, str(error)) from None


def remove_staging(uri: str) -> None:
    """Removes one staging folder, its record first."""
    storage.delete(storage.join(uri, RECORD))
    storage.delete_folder(uri)


def clear_staging(out: str, slide_ids: Collection[str]) -> None:
    """Removes all staging folders of some slides, under any key: settled slides need none."""
    root = storage.join(out, STAGING)
    found = {uri[len(root) + 1 :].partition("/")[0] for uri in storage.list_files(root)}
    folders = [storage.join(root, name) for name in sorted(found) if name.rpartition("-")[0] in slide_ids]
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(remove_staging, folders))


def _removed(uri: str, fault: str) -> PartError:
    storage.delete(uri)
    return PartError(f"{uri} was damaged and is removed: {fault}; run the same command again, which makes it again")


def _shapes(arrays: dict[str, tuple[tuple[int, ...], str]]) -> str:
    return ", ".join(f"{name} {dtype} {shape}" for name, (shape, dtype) in sorted(arrays.items()))


def _damaged(uri: str, fault: str) -> StorageError:
    folder = uri.rpartition("/")[0]
    return StorageError(f"{uri} is damaged: {fault}; remove {folder} and run the same command again")
