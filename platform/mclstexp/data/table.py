"""Section files of a tile table: one Parquet file per section, one row group per sentence, read by exact byte ranges.

A sentence costs one range request, because the manifest lists each row group's byte range and each process caches the
footer. In return, files must be written by `write_section`, whose layout (chunks without gaps, page checksums, no
embedded Arrow schema) readers verify. Stored types are never looked up by name, so a crafted extension type cannot run
code.
"""

import hashlib
import io
import struct
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.sparse import csr_array

from mclstexp import storage
from mclstexp.data.schema import TILE_SCHEMA, RowGroup, SectionEntry, load_manifest
from mclstexp.errors import StorageError, TableError
from mclstexp.slides.codec import decode_tile

_REPEATING = ["section_id", "patient_id", "gene_index.list.element", "count.list.element"]
_CACHED_FOOTERS = 1024  # about 50 KB each
_PARALLEL_RANGES = 8
_TAIL = struct.Struct("<i4s")  # footer length and magic at the end of a Parquet file
_MAGIC = b"PAR1"


@dataclass(frozen=True)
class SectionFile:
    """What the manifest records about a section file."""

    size_bytes: int
    sha256: str
    footer_offset: int
    row_groups: tuple[RowGroup, ...]


def write_section(path: str | Path, sentences: Iterable[pa.Table]) -> SectionFile:
    """Writes a local section file from its sentences (TILE_SCHEMA each), with one in memory at a time."""
    with pq.ParquetWriter(
        path,
        TILE_SCHEMA,
        compression="zstd",
        use_dictionary=_REPEATING,
        write_statistics=False,
        write_page_checksum=True,
        store_schema=False,
    ) as writer:
        for sentence in sentences:
            writer.write_table(sentence, row_group_size=max(1, sentence.num_rows))
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.seek(-_TAIL.size, io.SEEK_END) + _TAIL.size
        footer_length, _ = _TAIL.unpack(file.read(_TAIL.size))
    metadata = pq.read_metadata(path)
    groups = tuple(_byte_range(metadata.row_group(i)) for i in range(metadata.num_row_groups))
    footer_offset = size - _TAIL.size - footer_length
    _require_no_gaps(groups, footer_offset)
    return SectionFile(size, digest, footer_offset, groups)


def read_sentence(root: str, entry: SectionEntry, group_index: int) -> pa.Table:
    """Returns one sentence (TILE_SCHEMA) by one range request, with each tile verified by its checksum.

    The first sentence of a section in a process costs one more request, for the footer.

    Raises:
        TableError: the file is missing or damaged; names section and spot.
    """
    group = entry.row_groups[group_index]
    with _damage(entry, f"sentence {group_index}"):
        footer = _footer(root, entry)
        data = storage.read(_uri(root, entry), group.offset, group.length)
        table = _open(entry, footer, {group.offset: data}).read_row_group(group_index, use_threads=False)
        _verify_rows(entry, table, group.num_rows)
        _verify_tiles(entry, table)
    return table.cast(TILE_SCHEMA)


def read_columns(root: str, entry: SectionEntry, columns: Iterable[str]) -> pa.Table:
    """Returns some columns of a whole section in stored order, without reading the bytes of the others.

    Raises:
        TableError: the file is missing or damaged.
    """
    names = list(columns)
    with _damage(entry, f"columns {', '.join(names)}"):
        footer = _footer(root, entry)
        parts = _fetch(_uri(root, entry), _column_ranges(footer, {*names, "section_id"}))
        table = _open(entry, footer, parts).read(columns=[*names, "section_id"], use_threads=False)
        _verify_rows(entry, table, entry.num_spots)
    return table.select(names).cast(pa.schema([TILE_SCHEMA.field(name) for name in names]))


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


def _byte_range(group: pq.RowGroupMetaData) -> RowGroup:
    chunks = [_chunk_range(group.column(i)) for i in range(group.num_columns)]
    start = min(offset for offset, _ in chunks)
    return RowGroup(offset=start, length=sum(length for _, length in chunks), num_rows=group.num_rows)


def _chunk_range(chunk: pq.ColumnChunkMetaData) -> tuple[int, int]:
    start = chunk.data_page_offset if chunk.dictionary_page_offset is None else chunk.dictionary_page_offset
    return start, chunk.total_compressed_size


def _require_no_gaps(groups: tuple[RowGroup, ...], footer_offset: int) -> None:
    end = len(_MAGIC)
    for group in groups:
        assert group.offset == end, "row groups must follow each other without gaps"
        end += group.length
    assert end == footer_offset, "the footer must follow the last row group"


def _uri(root: str, entry: SectionEntry) -> str:
    return storage.join(storage.absolute(root), entry.file)


def _footer(root: str, entry: SectionEntry) -> pq.FileMetaData:
    footer = _read_footer(_uri(root, entry), entry.footer_offset, entry.size_bytes - entry.footer_offset)
    if footer.num_row_groups != len(entry.row_groups) or footer.num_rows != entry.num_spots:
        raise TableError(f"its footer has {footer.num_rows} rows and the manifest {entry.num_spots}")
    return footer


@lru_cache(maxsize=_CACHED_FOOTERS)
def _read_footer(uri: str, offset: int, length: int) -> pq.FileMetaData:
    data = storage.read(uri, offset, length)
    if b"ARROW:" in data:
        raise TableError("it embeds Arrow type metadata, which no section file has")
    return pq.read_metadata(pa.BufferReader(_MAGIC + data))


def _open(entry: SectionEntry, footer: pq.FileMetaData, parts: dict[int, bytes]) -> pq.ParquetFile:
    """Returns a reader over fetched parts of the file, keyed by their first byte."""
    file = pq.ParquetFile(
        pa.PythonFile(_Parts(parts, entry.size_bytes), mode="r"),
        metadata=footer,
        pre_buffer=False,
        page_checksum_verification=True,
        arrow_extensions_enabled=False,
    )
    if not file.schema_arrow.equals(TILE_SCHEMA):
        raise TableError(f"its columns {file.schema_arrow.names} differ in name or type from {TILE_SCHEMA.names}")
    return file


class _Parts(io.RawIOBase):
    """A file of which only some parts were fetched; reading other bytes is an error."""

    def __init__(self, parts: dict[int, bytes], size: int) -> None:
        self._parts, self._size, self._at = parts, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        for start, data in self._parts.items():
            first = self._at - start
            if 0 <= first < len(data) and size >= 0:
                found = data[first : first + size]
                self._at += len(found)
                return found
        raise OSError(f"its footer points to bytes {self._at}..{self._at + size}, outside the row group")


def _column_ranges(footer: pq.FileMetaData, names: set[str]) -> list[tuple[int, int]]:
    """Returns (offset, length) of the columns' chunks in all row groups, with adjacent ones joined."""
    joined: list[tuple[int, int]] = []
    for group in (footer.row_group(i) for i in range(footer.num_row_groups)):
        for chunk in (group.column(i) for i in range(group.num_columns)):
            if chunk.path_in_schema.split(".")[0] not in names:
                continue
            start, length = _chunk_range(chunk)
            if joined and sum(joined[-1]) == start:
                start, length = joined[-1][0], joined.pop()[1] + length
            joined.append((start, length))
    return joined


def _fetch(uri: str, ranges: list[tuple[int, int]]) -> dict[int, bytes]:
    with ThreadPoolExecutor(_PARALLEL_RANGES) as pool:
        parts = pool.map(lambda byte_range: storage.read(uri, *byte_range), ranges)
        return {start: data for (start, _), data in zip(ranges, parts, strict=True)}


def _verify_rows(entry: SectionEntry, table: pa.Table, num_rows: int) -> None:
    if table.num_rows != num_rows:
        raise TableError(f"it has {table.num_rows} rows and the manifest {num_rows}")
    found = set(table["section_id"].unique().to_pylist())
    if found - {entry.section_id}:
        raise TableError(f"it has rows of section {', '.join(sorted(map(str, found)))}")


def _verify_tiles(entry: SectionEntry, table: pa.Table) -> None:
    for spot_id, image, crc in zip(*(table[name].to_pylist() for name in ("spot_id", "image", "crc")), strict=True):
        if tile_crc(image) != crc:
            raise TableError(f"the tile of spot {spot_id} does not match its checksum")


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
