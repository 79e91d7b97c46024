"""A slide's prediction as one Parquet file, joined from its grid and its parts.

It is made first, one group of parts in memory at a time, and the other files are made from it, so that all say the
same and each part is fetched once. The price is that the table exists on scratch before anything is published. Only
the grid is held whole, about 70 bytes a tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from mclstexp import storage
from mclstexp.data.genes import GenePanel
from mclstexp.errors import StorageError, TableError
from mclstexp.prediction.parts import (
    CONFIDENCE,
    GRID,
    GRID_SCHEMA,
    PART_TILES,
    RECORD,
    THUMBNAIL,
    Part,
    SlideRecord,
    num_parts,
    read_part,
)
from mclstexp.slides.codec import decode_tile
from mclstexp.slides.tiles import tile_corner


@dataclass(frozen=True)
class OutputInfo:
    """A model version as its predictions describe it."""

    panel: GenePanel
    unit: str
    """Unit of the predictions, in words."""
    model_digest: str
    tile_size_px: int
    mpp: float
    """Micrometres per tile pixel."""
    ood_similarity: float | None
    """Best similarity below which a tile is out of distribution; None where the model has no threshold."""


GROUP_PARTS = 16
GROUP_TILES = GROUP_PARTS * PART_TILES
"""Most rows of a row group."""
OUT_OF_DISTRIBUTION = "out_of_distribution"
_RECORD = "slide_record"
_NAMES = ["section_id", "patient_id"]
SPOT_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in _NAMES),
        *GRID_SCHEMA,
        *((name, pa.float32()) for name in CONFIDENCE),
        (OUT_OF_DISTRIBUTION, pa.bool_()),  # null where the model has no threshold
    ]
)
"""The columns in front of the genes."""


def read_record(staging_uri: str) -> SlideRecord:
    """Returns the record of a staged slide.

    Raises:
        StorageError: it is damaged.
    """
    uri = storage.join(staging_uri, RECORD)
    try:
        return SlideRecord.model_validate_json(storage.read(uri))
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, fault['loc']))} {fault['msg']}".strip() for fault in error.errors())
        raise _damaged(uri, "; ".join(faults)) from None


def read_grid(staging_uri: str, num_tiles: int) -> pa.Table:
    """Returns the tiles of a staged slide, GRID_SCHEMA, in the order in which they are predicted.

    Raises:
        StorageError: it is damaged, or has another number of tiles.
    """
    uri = storage.join(staging_uri, GRID)
    try:
        grid = pq.ParquetFile(pa.BufferReader(storage.read(uri))).read()
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(uri, str(error)) from None
    if not grid.schema.equals(GRID_SCHEMA) or grid.num_rows != num_tiles:
        raise _damaged(uri, f"it has {grid.num_rows} tiles of {grid.schema.names}, its {RECORD} says {num_tiles}")
    return grid


def read_thumbnail(staging_uri: str) -> np.ndarray:
    """Returns the small picture of a staged slide, uint8 (height, width, 3).

    Raises:
        StorageError: it is damaged.
    """
    uri = storage.join(staging_uri, THUMBNAIL)
    try:
        return decode_tile(storage.read(uri))
    except TableError as error:
        raise _damaged(uri, str(error)) from None


def write_table(path: Path, staging_uri: str, record: SlideRecord, facts: OutputInfo) -> SlideRecord:
    """Writes one row a tile: its place, confidence, and one float32 column a gene (named by gene id).

    Tiles without pixels are left out. A row group has at most 4,096 rows. The file's metadata is `provenance` with
    the panel's genes and symbols, and the slide's record for `published_record`.

    Returns:
        The record with the number of tiles that were left out.

    Raises:
        PartError: a part is missing or was damaged.
        StorageError: the grid is damaged.
    """
    grid = read_grid(staging_uri, record.num_tiles)
    schema, num_rows, spots = _schema(facts), 0, SPOT_SCHEMA.names
    # Expression neither repeats nor is searched by range; dictionaries and statistics of it only cost.
    options = {"use_dictionary": _NAMES, "write_statistics": spots, "compression": "zstd", "store_schema": False}
    with pq.ParquetWriter(path, schema, **options) as writer:
        for start in range(0, record.num_tiles, GROUP_TILES):
            parts = _parts(staging_uri, start, record, facts)
            num_rows += sum(int(part.complete.sum()) for part in parts)
            writer.write_table(_joined(grid.slice(start, GROUP_TILES), parts, record, facts), GROUP_TILES)
            del parts  # before the next ones come
        record = record.model_copy(update={"missing_tiles": record.num_tiles - num_rows})
        names = {"genes": ",".join(facts.panel.gene_id), "symbols": ",".join(facts.panel.symbol)}
        kept = record.model_copy(update={"image": ""})  # a moved slide gives the same bytes
        names[_RECORD] = kept.model_dump_json()
        writer.add_key_value_metadata(provenance(record, facts) | names)
    return record


def published_record(path: Path) -> SlideRecord:
    """Returns the record of the slide that a table is of, without the image's place.

    Raises:
        StorageError: it is no table that `write_table` wrote.
    """
    try:
        return SlideRecord.model_validate_json(pq.read_metadata(path).metadata[_RECORD.encode()])
    except (pa.ArrowInvalid, KeyError, TypeError, ValidationError) as error:
        raise StorageError(f"it is no table of a slide by this version of the project: {error}") from None


def row_groups(path: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Yields the row groups of a table that `write_table` wrote, with all its columns or those named."""
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns)


def provenance(record: SlideRecord, facts: OutputInfo) -> dict[str, str]:
    """Returns what a slide's prediction was made from and how, the same in all its files."""
    ood = "" if facts.ood_similarity is None else facts.ood_similarity
    said = {
        "model_digest": facts.model_digest,
        "unit": facts.unit,
        "mpp": facts.mpp,
        "tile_size_px": facts.tile_size_px,
        "ood_similarity": ood,
        "slide_fingerprint": record.fingerprint,
        "slide_mpp": record.mpp,
        "slide_mpp_source": record.mpp_source,
        "slide_not_h_and_e": record.not_h_and_e,
        "missing_tiles": record.missing_tiles,
    }
    return {name: str(value) for name, value in said.items()}


def tile_left(centre_px: np.ndarray, record: SlideRecord, facts: OutputInfo) -> np.ndarray:
    """Returns the left (or top) edges of a slide's tiles around centres (n,), in level-0 pixels, float64 (n,)."""
    return tile_corner(centre_px, facts.tile_size_px, record.scale)


def tile_edge(record: SlideRecord, facts: OutputInfo) -> float:
    """Returns the edge of a tile in level-0 pixels."""
    return facts.tile_size_px * record.scale


def _schema(facts: OutputInfo) -> pa.Schema:
    return pa.schema([*SPOT_SCHEMA, *((gene, pa.float32()) for gene in facts.panel.gene_id)])


def _parts(staging_uri: str, start: int, record: SlideRecord, facts: OutputInfo) -> list[Part]:
    """Returns the parts of the group that begins with tile `start`."""
    first = start // PART_TILES
    numbers = range(first, min(first + GROUP_PARTS, num_parts(record.num_tiles)))
    return [read_part(staging_uri, part, record.num_tiles, len(facts.panel)) for part in numbers]


def _joined(grid: pa.Table, parts: list[Part], record: SlideRecord, facts: OutputInfo) -> pa.Table:
    """Returns the rows of the complete tiles of a group."""
    complete = np.concatenate([part.complete for part in parts])
    values = {name: np.concatenate([getattr(part, name) for part in parts])[complete] for name in CONFIDENCE}
    prediction = np.concatenate([part.prediction for part in parts])[complete]
    num_rows = len(prediction)
    names = [pa.repeat(name, num_rows) for name in (record.slide_id, record.patient_id)]
    return pa.table(
        [
            *names,
            *grid.filter(pa.array(complete)).columns,
            *map(pa.array, values.values()),
            _out_of_distribution(values["similarity"], facts.ood_similarity),
            *map(pa.array, prediction.T),
        ],
        schema=_schema(facts),
    )


def _out_of_distribution(similarity: np.ndarray, threshold: float | None) -> pa.Array:
    return pa.nulls(len(similarity), pa.bool_()) if threshold is None else pa.array(similarity < threshold)


def _damaged(uri: str, fault: str) -> StorageError:
    folder = uri.rpartition("/")[0]
    return StorageError(f"{uri} is damaged: {fault}; remove {folder} and run the same command again")
