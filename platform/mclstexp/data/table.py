"""Section files of a tile table: one Parquet file per section, one row group per sentence (`row_groups`).

A sentence costs one range request, and each tile is verified by its checksum.
"""

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.sparse import csr_array

from mclstexp import storage
from mclstexp.data.row_groups import GroupedFile, column_ranges, fetch, open_parts, read_footer, write_groups
from mclstexp.data.schema import CRC_COLUMNS, TILE_SCHEMA, WIDE_TILE_SCHEMA, SectionEntry, load_manifest
from mclstexp.errors import StorageError, TableError
from mclstexp.slides.codec import decode_tile

_REPEATING = ["section_id", "patient_id", "gene_index.list.element", "count.list.element"]


def write_section(path: str | Path, sentences: Iterable[pa.Table], schema: pa.Schema = TILE_SCHEMA) -> GroupedFile:
    """Writes a local section file from its sentences, with one in memory at a time.

    Args:
        path: the file.
        sentences: all of one schema.
        schema: that schema, TILE_SCHEMA or WIDE_TILE_SCHEMA.
    """
    return write_groups(path, schema, sentences, "zstd", _REPEATING)


def read_sentence(root: str, entry: SectionEntry, group_index: int) -> pa.Table:
    """Returns one sentence by one range request, with each tile of each view verified by its checksum.

    Its schema is TILE_SCHEMA or, in tables with a wide view, WIDE_TILE_SCHEMA.

    The first sentence of a section in a process costs one more request, for the footer.

    Raises:
        TableError: the file is missing or damaged; names section and spot.
    """
    group = entry.row_groups[group_index]
    with _damage(entry, f"sentence {group_index}"):
        footer = _footer(root, entry)
        data = storage.read(_uri(root, entry), group.offset, group.length)
        file = open_parts({group.offset: data}, entry.size_bytes, footer, _schema_of(footer))
        table = file.read_row_group(group_index, use_threads=False)
        _verify_rows(entry, table, group.num_rows)
        _verify_tiles(table)
    return table.cast(_schema_of(footer))


def read_columns(root: str, entry: SectionEntry, columns: Iterable[str], group_index: int | None = None) -> pa.Table:
    """Returns some columns of a section, or of one of its sentences, without reading the bytes of the others.

    Raises:
        TableError: the file is missing or damaged.
    """
    names, sentence = list(columns), "" if group_index is None else f"sentence {group_index}, "
    with _damage(entry, f"{sentence}columns {', '.join(names)}"):
        footer = _footer(root, entry)
        groups = range(footer.num_row_groups) if group_index is None else [group_index]
        ranges = column_ranges(footer, {*names, "section_id"}, groups)
        file = open_parts(fetch(_uri(root, entry), ranges), entry.size_bytes, footer, _schema_of(footer))
        table = file.read_row_groups(list(groups), columns=[*names, "section_id"], use_threads=False)
        _verify_rows(entry, table, sum(entry.row_groups[group].num_rows for group in groups))
    return table.select(names).cast(pa.schema([WIDE_TILE_SCHEMA.field(name) for name in names]))


def read_counts(root: str, entry: SectionEntry, num_genes: int | None = None) -> csr_array:
    """Returns a section's raw counts in stored order, int32 (num_spots, num_genes).

    Args:
        root: URI of the tile table.
        entry: the section.
        num_genes: length of the gene table; None: the manifest's.

    Raises:
        TableError: the section is H&E-only, or its file is missing or damaged.
    """
    if not entry.measured:
        raise TableError(f"section {entry.section_id} of {root} has no counts: it was prepared as an H&E-only slide")
    width = load_manifest(root).num_genes if num_genes is None else num_genes
    table = read_columns(root, entry, ["gene_index", "count"])
    with _damage(entry, "counts"):
        gene, first = _flat(table["gene_index"])
        count, also_first = _flat(table["count"])
        if not np.array_equal(first, also_first) or not np.all((gene >= 0) & (gene < width)):
            raise TableError(f"its gene indices do not fit its counts or the {width} genes of the table")
    return csr_array((count, gene, first), shape=(entry.num_spots, width))


def read_thumbnail(root: str, entry: SectionEntry) -> np.ndarray:
    """Returns the thumbnail of a section's whole slide, uint8 (height, width, 3).

    Raises:
        TableError: the file is missing or damaged.
    """
    with _damage(entry, "thumbnail"):
        return decode_tile(storage.read(storage.join(root, entry.thumbnail_file)))


def tile_crc(image: bytes) -> int:
    """Returns the checksum that is stored with an encoded tile."""
    return zlib.crc32(image)


def _uri(root: str, entry: SectionEntry) -> str:
    return storage.join(storage.absolute(root), entry.file)


def _footer(root: str, entry: SectionEntry) -> pq.FileMetaData:
    footer = read_footer(_uri(root, entry), entry.footer_offset, entry.size_bytes - entry.footer_offset)
    if footer.num_row_groups != len(entry.row_groups) or footer.num_rows != entry.num_spots:
        raise TableError(f"its footer has {footer.num_rows} rows and the manifest {entry.num_spots}")
    return footer


def _schema_of(footer: pq.FileMetaData) -> pa.Schema:
    """Returns the schema that a section file with so many columns must have."""
    return WIDE_TILE_SCHEMA if footer.num_columns == len(WIDE_TILE_SCHEMA) else TILE_SCHEMA


def _verify_rows(entry: SectionEntry, table: pa.Table, num_rows: int) -> None:
    if table.num_rows != num_rows:
        raise TableError(f"it has {table.num_rows} rows and the manifest {num_rows}")
    found = set(table["section_id"].unique().to_pylist())
    if found - {entry.section_id}:
        raise TableError(f"it has rows of section {', '.join(sorted(map(str, found)))}")


def _verify_tiles(table: pa.Table) -> None:
    for view, crc in CRC_COLUMNS.items():
        if view not in table.column_names:
            continue
        for spot_id, image, expected in zip(*(table[name].to_pylist() for name in ("spot_id", view, crc)), strict=True):
            if tile_crc(image) != expected:
                raise TableError(f"the tile of spot {spot_id} ({view}) does not match its checksum")


def _flat(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Returns a column of lists as its values and the row pointers into them."""
    chunks = [chunk for chunk in column.chunks if len(chunk)]
    values = [chunk.flatten().to_numpy() for chunk in chunks]
    lengths = [chunk.value_lengths().to_numpy(zero_copy_only=False) for chunk in chunks]
    first = np.concatenate([np.zeros(1, np.int64), *lengths]).cumsum()
    return np.concatenate([np.zeros(0, np.int32), *values]), first.astype(np.int64)


@contextmanager
def _damage(entry: SectionEntry, part: str) -> Iterator[None]:
    """Puts section, part and file into the message of any error while reading them."""
    where = f"section {entry.section_id}, {part} ({entry.file})"
    try:
        yield
    except FileNotFoundError:
        raise TableError(f"{where} is missing: if the table was prepared again, load its new manifest") from None
    except StorageError as error:
        raise TableError(f"{where} cannot be read: {error}") from error
    except (TableError, pa.ArrowException, OSError) as error:
        raise TableError(f"{where} is damaged: {error}; prepare the section again") from error
