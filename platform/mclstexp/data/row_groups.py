"""Parquet files of fixed row groups, read by exact byte ranges.

The tile table and its feature tables have one file per section and one row group per sentence. Manifests list where
footer and row groups are, and each process caches footers, so that a sentence costs one range request. In return, files
must be written by `write_groups`, whose layout (chunks without gaps, page checksums, no embedded Arrow schema) readers
verify. Stored types are never looked up by name, so a crafted extension type cannot run code.
"""

import hashlib
import io
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mclstexp import storage
from mclstexp.data.schema import RowGroup
from mclstexp.errors import TableError

_CACHED_FOOTERS = 1024  # about 50 KB each
_PARALLEL_RANGES = 8
_TAIL = struct.Struct("<i4s")  # footer length and magic at the end of a Parquet file
_MAGIC = b"PAR1"


@dataclass(frozen=True)
class GroupedFile:
    """What a manifest records about such a file."""

    size_bytes: int
    sha256: str
    footer_offset: int
    row_groups: tuple[RowGroup, ...]


def write_groups(
    path: str | Path, schema: pa.Schema, groups: Iterable[pa.Table], compression: str, dictionary: list[str]
) -> GroupedFile:
    """Writes a local file with one row group per table, with one of them in memory at a time.

    Args:
        path: of the file.
        schema: of each table.
        groups: the tables.
        compression: Parquet's name of it.
        dictionary: columns whose values repeat.
    """
    with pq.ParquetWriter(
        path,
        schema,
        compression=compression,
        use_dictionary=dictionary,
        write_statistics=False,
        write_page_checksum=True,
        store_schema=False,
    ) as writer:
        for group in groups:
            writer.write_table(group, row_group_size=max(1, group.num_rows))
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.seek(-_TAIL.size, io.SEEK_END) + _TAIL.size
        footer_length, _ = _TAIL.unpack(file.read(_TAIL.size))
    metadata = pq.read_metadata(path)
    ranges = tuple(_byte_range(metadata.row_group(i)) for i in range(metadata.num_row_groups))
    footer_offset = size - _TAIL.size - footer_length
    _require_no_gaps(ranges, footer_offset)
    return GroupedFile(size, digest, footer_offset, ranges)


@lru_cache(maxsize=_CACHED_FOOTERS)
def read_footer(uri: str, offset: int, length: int, sha256: str | None = None) -> pq.FileMetaData:
    """Returns a file's footer from its byte range, by one request per process.

    Raises:
        TableError: it embeds Arrow type metadata, or its bytes do not have the digest `sha256`.
    """
    data = storage.read(uri, offset, length)
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise TableError("its footer does not match its digest")
    if b"ARROW:" in data:
        raise TableError("it embeds Arrow type metadata, which no such file has")
    return pq.read_metadata(pa.BufferReader(_MAGIC + data))


def column_ranges(footer: pq.FileMetaData, names: set[str], groups: Iterable[int]) -> list[tuple[int, int]]:
    """Returns (offset, length) of the columns' chunks in some row groups, with adjacent ones joined."""
    joined: list[tuple[int, int]] = []
    for group in map(footer.row_group, groups):
        for chunk in map(group.column, range(group.num_columns)):
            if chunk.path_in_schema.split(".")[0] not in names:
                continue
            start, length = _chunk_range(chunk)
            if joined and sum(joined[-1]) == start:
                start, length = joined[-1][0], joined.pop()[1] + length
            joined.append((start, length))
    return joined


def fetch(uri: str, ranges: list[tuple[int, int]]) -> dict[int, bytes]:
    """Returns the bytes of some ranges (offset, length) by their offset; several at once."""
    with ThreadPoolExecutor(_PARALLEL_RANGES) as pool:
        parts = pool.map(lambda byte_range: storage.read(uri, *byte_range), ranges)
        return {start: data for (start, _), data in zip(ranges, parts, strict=True)}


def open_parts(parts: dict[int, bytes], size: int, footer: pq.FileMetaData, schema: pa.Schema) -> pq.ParquetFile:
    """Returns a reader over fetched parts of a file of `size` bytes, keyed by their first byte.

    Raises:
        TableError: its columns are not those of `schema`.
    """
    file = pq.ParquetFile(
        pa.PythonFile(_Parts(parts, size), mode="r"),
        metadata=footer,
        pre_buffer=False,
        page_checksum_verification=True,
        arrow_extensions_enabled=False,
    )
    if not file.schema_arrow.equals(schema):
        raise TableError(f"its columns {file.schema_arrow.names} differ in name or type from {schema.names}")
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
