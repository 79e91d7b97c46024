"""Reading and writing section files of a tile table.

A sentence is read with one range request: the manifest knows its bytes, the footer is fetched once a process.
What is read is verified twice, by page checksums and by each tile's own CRC, because flipped bits inside a JPEG
decode without complaint.
"""

import hashlib
import io
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse

from mclstexp import storage
from mclstexp.data.schema import TILE_SCHEMA, RowGroup, SectionEntry
from mclstexp.errors import TableError

_TAIL = 8  # length of the footer (4 bytes) and the closing magic (4 bytes)
_FOOTERS_PER_PROCESS = 256


class SectionWriter:
    """Writes one section file, sentence by sentence, to a local path."""

    def __init__(self, path: str | Path) -> None:
        dictionary = [name for name in TILE_SCHEMA.names if name not in ("image", "crc", "gene_index", "count")]
        self._writer = pq.ParquetWriter(
            path, TILE_SCHEMA, compression="zstd", use_dictionary=dictionary, write_page_checksum=True
        )

    def write(self, sentence: pa.Table) -> None:
        """Appends one sentence (TILE_SCHEMA) as one row group."""
        self._writer.write_table(sentence, row_group_size=sentence.num_rows)

    def close(self) -> None:
        """Writes the footer."""
        self._writer.close()


def describe_file(path: str | Path) -> dict[str, object]:
    """Returns what the manifest says of a section file: size_bytes, sha256, footer_offset, row_groups, num_spots."""
    data = Path(path).read_bytes()
    metadata = pq.read_metadata(path)
    groups = [_place(metadata.row_group(number)) for number in range(metadata.num_row_groups)]
    return {
        "size_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "footer_offset": len(data) - _TAIL - int.from_bytes(data[-_TAIL:-4], "little"),
        "row_groups": tuple(groups),
        "num_spots": metadata.num_rows,
    }


def _place(group: pq.RowGroupMetaData) -> RowGroup:
    chunks = [group.column(number) for number in range(group.num_columns)]
    starts = [chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks]
    ends = [start + chunk.total_compressed_size for start, chunk in zip(starts, chunks, strict=True)]
    return RowGroup(offset=min(starts), length=max(ends) - min(starts), num_rows=group.num_rows)


def read_sentence(root: str, entry: SectionEntry, group: int) -> pa.Table:
    """Returns one sentence (TILE_SCHEMA), verified, with one range request (and one for a new file's footer).

    Raises:
        TableError: the bytes are missing or not those that were written; names section and sentence.
    """
    place = entry.row_groups[group]
    where = f"sentence {entry.section_id}/{group} of {root}"
    try:
        footer = _footer(root, entry)
        data = storage.read(storage.join(root, entry.file), place.offset, place.length)
        source = pa.PythonFile(_Window(data, place.offset, entry.size_bytes), mode="r")
        file = pq.ParquetFile(source, metadata=footer, page_checksum_verification=True)
        table = file.read_row_group(group)
    except (FileNotFoundError, OSError, pa.ArrowException) as error:
        raise TableError(f"{where} is damaged or missing: {error}; prepare it again") from error
    if table.schema.names != TILE_SCHEMA.names or table.num_rows != place.num_rows:
        raise TableError(f"{where} has {table.num_rows} rows of {table.schema.names}, not what the manifest names")
    _verify_tiles(table, where)
    return table


def read_columns(root: str, entry: SectionEntry, columns: list[str]) -> pa.Table:
    """Returns some columns of a whole section in stored order, read without its images."""
    filesystem, path = storage.filesystem(storage.join(root, entry.file))
    try:
        with filesystem.open_input_file(path) as source:
            file = pq.ParquetFile(source, pre_buffer=True, page_checksum_verification=True)
            return file.read(columns=columns)
    except (FileNotFoundError, OSError, pa.ArrowException) as error:
        raise TableError(f"section {entry.section_id} of {root} cannot be read: {error}; prepare it again") from error


def read_counts(root: str, entry: SectionEntry, num_genes: int) -> scipy.sparse.csr_matrix:
    """Returns a section's raw counts, int32 CSR (num_spots, num_genes), in stored order.

    Raises:
        TableError: the section was not measured, or its file is damaged.
    """
    if not entry.measured:
        raise TableError(f"section {entry.section_id} has no measured counts")
    table = read_columns(root, entry, ["gene_index", "count"])
    genes, counts = (table[name].combine_chunks() for name in ("gene_index", "count"))
    offsets = genes.offsets.to_numpy().astype(np.int64)
    values = (counts.flatten().to_numpy(), genes.flatten().to_numpy(), offsets - offsets[0])
    return scipy.sparse.csr_matrix(values, shape=(entry.num_spots, num_genes))


@lru_cache(maxsize=_FOOTERS_PER_PROCESS)
def _footer_of(uri: str, offset: int, length: int, sha256: str) -> pq.FileMetaData:
    """`sha256` keeps the footer of a file that was replaced under the same name from being used."""
    return pq.read_metadata(io.BytesIO(storage.read(uri, offset, length)))


def _footer(root: str, entry: SectionEntry) -> pq.FileMetaData:
    length = entry.size_bytes - entry.footer_offset
    return _footer_of(storage.join(root, entry.file), entry.footer_offset, length, entry.sha256)


def _verify_tiles(table: pa.Table, where: str) -> None:
    for spot, tile, crc in zip(table["spot_id"], table["image"], table["crc"], strict=True):
        if zlib.crc32(tile.as_buffer()) != crc.as_py():
            raise TableError(f"the tile of spot {spot} in {where} does not match its checksum; prepare it again")


class _Window(io.RawIOBase):
    """A read-only file of which only one stretch of bytes is at hand."""

    def __init__(self, data: bytes, offset: int, size: int) -> None:
        self._data, self._offset, self._size, self._at = data, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        start = self._at - self._offset
        stop = len(self._data) if size < 0 else start + size
        if start < 0 or stop > len(self._data):
            raise OSError(f"bytes {self._at} to {self._at + size} lie outside the row group that was fetched")
        self._at = self._offset + stop
        return self._data[start:stop]
