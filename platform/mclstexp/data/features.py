"""The feature table: a frozen encoder's pooled features of every tile, stored once beside the tile table.

`TILES/features/NAME/` has `manifest.json`, the commit point, and one Parquet file per section with the row groups of
the section file. Each block, a pooled layer of a view, is one column of fixed-width little-endian bytes, so that
pandas, R and NumPy read it without this project; they are stored uncompressed, because features hardly compress. NAME
contains a digest of everything that the numbers depend on, so that features of two encoders never mix. Files are named
by their own digest, so that a file, once written, never has other bytes.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from mclstexp import storage
from mclstexp.data.row_groups import column_ranges, fetch, open_parts, read_footer
from mclstexp.data.schema import MANIFEST, Manifest
from mclstexp.errors import StorageError, TableError
from mclstexp.messages import did_you_mean, some_of

FEATURES = "features"
"""Folder of the feature tables below a tile table."""
RGB = "rgb"
"""Block of each view: mean and standard deviation of red, green and blue in [0, 1], float32 (n, 6)."""


_RGB_TYPE = np.dtype("<f4")
_RGB_BYTES = 6 * _RGB_TYPE.itemsize
_ORIGIN = {"licence", "stores_weights", "hub", "commit", "uri"}
"""What a record says about the encoder's weights without changing a number."""
_REMEDY = "run jobs/embed.py again with the same settings, which makes them again"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EncoderRecord(_Record):
    """A frozen encoder: everything that its features depend on but precision and versions of libraries."""

    name: str
    """As `model.image_encoder`."""
    digest: str
    """SHA-256 of its tensors by name, 64 hex digits, whatever file they came in."""
    tile_size_px: int
    """Edge of the tiles that the network was built for."""
    layers: tuple[str, ...]
    widths: tuple[int, ...]
    """Features of each layer."""
    resize_px: int | None
    crop_px: int | None
    scaling: str
    """`encoder`, or as `model.input_scaling`."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    licence: str = ""
    stores_weights: bool = True
    """Whether the licence lets a model version contain the weights."""
    hub: str | None = None
    commit: str | None = None
    uri: str | None = None
    """Where the weights were read from: a file, `imagenet` or `hub`; None: random, or stored in the model version."""

    def blocks(self, view: str, draw: int | None = None) -> dict[str, int]:
        """Returns the columns of one view's layers, for the plain tiles or an augmented draw, with their widths."""
        suffix = "" if draw is None else f"/{draw}"
        return {f"{view}/{layer}{suffix}": width for layer, width in zip(self.layers, self.widths, strict=True)}


class FeatureGroup(_Record):
    """One row group: the features of a sentence."""

    offset: int
    length: int
    num_rows: int
    sha256: str
    """Of its bytes."""


class FeatureSection(_Record):
    """One section of a feature table."""

    section_id: str
    tiles_sha256: str
    """Digest of the section file whose tiles these are: another cut of the section has no features yet."""
    file: str
    """Path relative to the feature table's root."""
    size_bytes: int
    sha256: str
    """Of the whole file; the first digits are in its name."""
    footer_offset: int
    footer_sha256: str
    row_groups: tuple[FeatureGroup, ...]


class FeatureManifest(_Record):
    """The commit point of a feature table."""

    schema_version: Literal[1] = 1
    encoder: EncoderRecord
    views: tuple[str, ...]
    dtype: str
    """float32 or float16."""
    arithmetic: str
    """bf16 or fp32: what the encoder computed in."""
    num_draws: int
    """Augmented draws stored beside each plain tile."""
    augmentation: str
    """Of the draws; `none` without draws."""
    seed: int
    """Of the draws."""
    libraries: dict[str, str]
    """Versions of torch, torchvision and timm."""
    sections: tuple[FeatureSection, ...] = ()
    """Sorted by section_id."""

    @property
    def name(self) -> str:
        """Name of the table's folder: the encoder's, and 12 hex digits of everything that the numbers depend on."""
        tree = self.model_dump(mode="json", exclude={"sections": True, "encoder": _ORIGIN})
        digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]
        return f"{re.sub('[^A-Za-z0-9._-]', '-', self.encoder.name)}-{digest}"

    @property
    def plain(self) -> "FeatureManifest":
        """The same table without sections."""
        return self.model_copy(update={"sections": ()})

    def section(self, section_id: str) -> FeatureSection:
        """Returns one section's entry.

        Raises:
            TableError: there is no such section.
        """
        for entry in self.sections:
            if entry.section_id == section_id:
                return entry
        known = [entry.section_id for entry in self.sections]
        raise TableError(
            f"the feature table {self.name} has no section {section_id}; {did_you_mean(section_id, known)}: run "
            "jobs/embed.py with the same settings, which adds it"
        )

    def missing(self, tiles: Manifest, section_ids: Iterable[str]) -> list[str]:
        """Returns those of some sections whose features, as the tile table has cut them, are not in the table."""
        cut = {entry.section_id: entry.tiles_sha256 for entry in self.sections}
        return [name for name in section_ids if cut.get(name) != tiles.section(name).sha256]

    def number_type(self) -> np.dtype:
        """Returns the NumPy type of the stored numbers, little-endian."""
        return np.dtype(self.dtype).newbyteorder("<")

    def arrow_schema(self) -> pa.Schema:
        """Returns the Arrow schema of a feature file: what is read together stands together."""
        size = self.number_type().itemsize
        fields = [pa.field("spot_id", pa.string())]
        fields += [_bytes_field(f"{view}/{RGB}", _RGB_BYTES) for view in self.views]
        for draw in (None, *range(self.num_draws)):
            for view in self.views:
                fields += [_bytes_field(name, width * size) for name, width in self.encoder.blocks(view, draw).items()]
        return pa.schema(fields)

    def encode(self) -> bytes:
        """Returns the bytes of `manifest.json`; equal manifests give equal bytes."""
        return (json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode()


@dataclass(frozen=True)
class FeatureReader:
    """Reads one feature table as arrays; crosses process borders and imports no torch."""

    root: str
    """URI of the feature table."""
    manifest: FeatureManifest
    views: tuple[str, ...]
    """The views whose blocks are joined, in this order."""
    encoder: EncoderRecord
    """Has the layers that are joined within each view, in this order; the table may have more."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each of the joined blocks."""
        return self.encoder.widths * len(self.views)

    @property
    def num_features(self) -> int:
        """Width F of the joined features."""
        return sum(self.widths)

    def read(self, section_id: str, group: int, draw: int | None = None) -> np.ndarray:
        """Returns the features of one sentence in stored order, float32 (n, F), by one range request.

        The first sentence of a section in a process costs one more request, for the footer.

        Args:
            section_id: the section.
            group: index of the row group.
            draw: number of the augmented draw; None: the plain tiles.

        Raises:
            TableError: the file is missing or damaged; names section, sentence and how to make it again.
        """
        return self._joined(section_id, [group], draw)

    def read_section(self, section_id: str, draw: int | None = None) -> np.ndarray:
        """Returns the features of a whole section in stored order, float32 (N, F).

        Args:
            section_id: the section.
            draw: as `read`.

        Raises:
            TableError: as `read`.
        """
        return self._joined(section_id, range(len(self.manifest.section(section_id).row_groups)), draw)

    def read_colours(self, section_id: str) -> np.ndarray:
        """Returns the block `RGB` of the first view for a whole section, float32 (N, 6).

        Raises:
            TableError: as `read`.
        """
        column = f"{self.views[0]}/{RGB}"
        table = self._table(section_id, range(len(self.manifest.section(section_id).row_groups)), [column])
        return _numbers(table[column], _RGB_TYPE)

    def _joined(self, section_id: str, groups: Sequence[int], draw: int | None) -> np.ndarray:
        if draw is not None and not 0 <= draw < self.manifest.num_draws:
            raise TableError(f"{self.root} has {self.manifest.num_draws} draws of each tile, and no draw {draw}")
        columns = [name for view in self.views for name in self.encoder.blocks(view, draw)]
        table = self._table(section_id, groups, columns)
        blocks = [_numbers(table[name], self.manifest.number_type()) for name in columns]
        return np.concatenate(blocks, axis=1, dtype=np.float32)

    def _table(self, section_id: str, groups: Sequence[int], columns: list[str]) -> pa.Table:
        """Returns some columns of some row groups, verified by the digest of the footer and the pages' checksums."""
        section = self.manifest.section(section_id)
        what = f"sentence {groups[0]}" if len(groups) == 1 else f"columns {some_of(columns)}"
        with damage(section, what):
            uri = storage.join(self.root, section.file)
            length = section.size_bytes - section.footer_offset
            footer = read_footer(uri, section.footer_offset, length, section.footer_sha256)
            parts = fetch(uri, column_ranges(footer, set(columns), groups))
            file = open_parts(parts, section.size_bytes, footer, self.manifest.arrow_schema())
            table = file.read_row_groups(list(groups), columns=columns, use_threads=False)
            expected = sum(section.row_groups[group].num_rows for group in groups)
            if table.num_rows != expected:
                raise TableError(f"it has {table.num_rows} rows and the manifest {expected}")
        return table.select(columns)


def feature_root(tiles: str, name: str) -> str:
    """Returns the URI of a feature table of this name beside a tile table."""
    return storage.join(storage.absolute(tiles), FEATURES, name)


def load_features(tiles: str, name: str) -> FeatureManifest | None:
    """Returns the manifest of a feature table; None if there is no such table.

    Raises:
        TableError: it is damaged, or of another schema version.
    """
    uri = storage.join(feature_root(tiles, name), MANIFEST)
    try:
        manifest = FeatureManifest.model_validate_json(storage.read(uri))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise TableError(f"{uri} is damaged: {error.errors()[0]['msg']}; {_REMEDY}") from None
    if manifest.name != name:
        raise TableError(f"{uri} is damaged: its content belongs to {manifest.name}; {_REMEDY}")
    return manifest


@contextmanager
def damage(section: FeatureSection, part: str) -> Iterator[None]:
    """Puts section, part and file into the message of any error while reading features."""
    where = f"features of section {section.section_id}, {part} ({section.file})"
    try:
        yield
    except FileNotFoundError:
        raise TableError(f"{where} are missing; {_REMEDY}") from None
    except StorageError as error:
        raise TableError(f"{where} cannot be read: {error}; {_REMEDY}") from error
    except (TableError, pa.ArrowException, OSError) as error:
        raise TableError(f"{where} are damaged: {error}; {_REMEDY}") from error


def _bytes_field(name: str, num_bytes: int) -> pa.Field:
    return pa.field(name, pa.binary(num_bytes), nullable=False)


def _numbers(column: pa.ChunkedArray, kind: np.dtype) -> np.ndarray:
    """Returns a column of fixed-width bytes as numbers, (n, width)."""
    width = column.type.byte_width // kind.itemsize
    chunks = [chunk for chunk in column.chunks if len(chunk)]
    arrays = [
        np.frombuffer(chunk.buffers()[1], kind)[chunk.offset * width :][: len(chunk) * width].reshape(-1, width)
        for chunk in chunks
    ]
    return np.concatenate([np.zeros((0, width), kind), *arrays])
