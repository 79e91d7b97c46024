"""The tile table's contract: Arrow schema, manifest and gene table.

A table is a folder (local or `s3://`): `manifest.json` is the commit point, and readers see only files that it names.
There is one Parquet file per section and one row group per sentence. The manifest lists each row group's byte range, so
that a sentence costs one range request; in return, it grows with the number of sentences.
"""

import base64
import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from typing import Annotated, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from mclstexp import storage
from mclstexp.errors import ConfigError, TableError
from mclstexp.messages import did_you_mean

SCHEMA_VERSION, WIDE_SCHEMA_VERSION = 4, 5
"""Tables with a wide view have a version of their own, because earlier code refuses their columns."""
_READ_VERSIONS = (3, SCHEMA_VERSION, WIDE_SCHEMA_VERSION)
"""Tables of schema 3 do not say which genes a section measures."""
MANIFEST = "manifest.json"
IMAGE, IMAGE_WIDE = "image", "image_wide"
"""Views of a spot: its tile, and a coarser look at more of its surroundings."""

TILE_SCHEMA = pa.schema(
    [
        ("section_id", pa.string()),
        ("patient_id", pa.string()),
        ("spot_id", pa.string()),  # unique within its section
        ("array_row", pa.int32()),  # null if the source has no array
        ("array_col", pa.int32()),
        ("x_px", pa.float64()),  # tile centre, slide level 0
        ("y_px", pa.float64()),
        ("x_um", pa.float64()),
        ("y_um", pa.float64()),
        ("image", pa.binary()),  # encoded tile
        ("tissue_fraction", pa.float32()),
        ("label", pa.string()),  # a pathologist's; null without one
        ("crc", pa.uint32()),  # zlib.crc32 of image
        ("gene_index", pa.list_(pa.int32())),  # null on H&E-only slides; rows of the gene table, ascending
        ("count", pa.list_(pa.int32())),
    ]
)
WIDE_TILE_SCHEMA = TILE_SCHEMA.append(pa.field(IMAGE_WIDE, pa.binary())).append(pa.field("crc_wide", pa.uint32()))
"""Of tables with a wide view: a second encoded tile around the same centre, and its zlib.crc32."""
CRC_COLUMNS = {IMAGE: "crc", IMAGE_WIDE: "crc_wide"}
"""Column of each view's checksum."""
REJECT_SCHEMA = pa.schema(
    [
        ("section_id", pa.string()),
        ("spot_id", pa.string()),
        ("x_px", pa.float64()),
        ("y_px", pa.float64()),
        ("reason", pa.string()),
    ]
)
GENE_SCHEMA = pa.schema([("gene_id", pa.string()), ("symbol", pa.string()), ("ensembl_id", pa.string())])
NO_LABEL = frozenset({"", "na", "<na>", "nan"})
"""What tables (also R's and pandas') write for a spot without label, in lower case."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def encode_rows(is_in: np.ndarray) -> str:
    """Returns a set of rows of the gene table, bool (genes,), as text: packed bits, zlib, base64."""
    return base64.b64encode(zlib.compress(np.packbits(is_in).tobytes())).decode()


def decode_rows(text: str, num_genes: int) -> np.ndarray:
    """Returns what `encode_rows` encoded, bool (num_genes,); rows beyond its end are not in the set.

    Raises:
        ValueError: the text is damaged.
    """
    try:
        packed = zlib.decompress(base64.b64decode(text, validate=True))
    except zlib.error as error:
        raise ValueError(str(error)) from error
    return np.unpackbits(np.frombuffer(packed, np.uint8), count=num_genes).astype(bool)


def _decodable(text: str | None) -> str | None:
    if text is not None:
        decode_rows(text, 0)
    return text


class RowGroup(_Record):
    """Byte range and number of rows of a sentence in its section file."""

    offset: int
    length: int
    num_rows: int


class SectionEntry(_Record):
    """One section of a tile table."""

    section_id: str
    patient_id: str
    site: str
    file: str
    """Path relative to the table's root; never reused for other bytes."""
    size_bytes: int
    sha256: str
    footer_offset: int
    """First byte of the Parquet footer, which extends to the end of the file."""
    row_groups: tuple[RowGroup, ...]
    num_spots: int
    measured: bool
    """Whether the section has counts."""
    max_array: int
    """Largest array row or column; -1 without an array."""
    source_mpp: float
    width_px: int
    height_px: int
    fingerprint: str
    """Digest of the source files and of all settings that the section's bytes depend on."""
    rejects_file: str
    rejected: dict[str, int]
    """Rejected spots by reason."""
    num_labelled: int
    """Spots with a pathologist's label."""
    thumbnail_file: str
    """A small JPEG of the whole slide."""
    thumbnail_scale: float
    """Level-0 pixels along a thumbnail pixel."""
    genes: Annotated[str | None, AfterValidator(_decodable)] = None
    """Rows of the gene table that the section measures, by `encode_rows`: genes that its files list, counted or not.

    None: unknown (schema 3), every gene counts as measured."""
    counts_digest: str | None = None
    """Digest of the counts, whatever the order and names of spots and genes; None without, and in older tables."""
    species: str | None = None
    """In lower case, for example `homo sapiens`; None: not stated."""
    organ: str | None = None


class Manifest(_Record):
    """The table's commit point."""

    schema_version: int = SCHEMA_VERSION
    tile_size_px: int
    mpp: float
    """Micrometres per tile pixel."""
    encoding: str
    """Encoding of the stored tiles: jpeg or png."""
    jpeg_quality: int
    """Quality of a jpeg tile; from 95 on with full colour resolution."""
    sentence_length: int
    genes_file: str
    genes_sha256: str
    num_genes: int
    sections: tuple[SectionEntry, ...]
    """Sorted by section_id."""
    wide_px: int | None = None
    """Edge of the wide view in pixels; None: the table has no wide view."""
    wide_mpp: float | None = None
    """Micrometres per pixel of the wide view."""

    @model_validator(mode="after")
    def _has_a_whole_wide_view(self) -> Self:
        wide = self.schema_version == WIDE_SCHEMA_VERSION
        if (self.wide_px is not None, self.wide_mpp is not None) != (wide, wide):
            raise ValueError(
                f"wide_px={self.wide_px} and wide_mpp={self.wide_mpp} do not fit schema version {self.schema_version}"
            )
        return self

    @property
    def views(self) -> tuple[str, ...]:
        """Views that the table has of each spot."""
        return (IMAGE,) if self.wide_px is None else (IMAGE, IMAGE_WIDE)

    def view_size_px(self, view: str) -> int:
        """Returns the edge of a view's tiles in pixels.

        Raises:
            ConfigError: the table has no such view.
        """
        require_views(self, [view])
        return self.wide_px if view == IMAGE_WIDE and self.wide_px is not None else self.tile_size_px

    def view_mpp(self, view: str) -> float:
        """Returns the micrometres per pixel of a view's tiles.

        Raises:
            ConfigError: the table has no such view.
        """
        require_views(self, [view])
        return self.wide_mpp if view == IMAGE_WIDE and self.wide_mpp is not None else self.mpp

    @property
    def tile_size_um(self) -> float:
        """Edge of a tile in micrometres."""
        return self.tile_size_px * self.mpp

    def section(self, section_id: str) -> SectionEntry:
        """Returns one section's entry.

        Raises:
            TableError: there is no such section; gives the nearest.
        """
        for entry in self.sections:
            if entry.section_id == section_id:
                return entry
        known = [entry.section_id for entry in self.sections]
        raise TableError(f"the tile table has no section {section_id}; {did_you_mean(section_id, known)}")

    def num_spots(self, section_ids: Iterable[str]) -> int:
        """Returns the number of spots (tiles) of some sections."""
        return sum(self.section(name).num_spots for name in section_ids)

    def sentences(self, section_ids: Iterable[str]) -> list[tuple[str, int]]:
        """Returns the sentences of some sections in stored order, as (section id, row group)."""
        return [(name, group) for name in section_ids for group in range(len(self.section(name).row_groups))]

    def patients(self, section_ids: Iterable[str]) -> set[str]:
        """Returns the patients of some sections."""
        return {self.section(name).patient_id for name in section_ids}

    def measures(self, section_id: str) -> np.ndarray:
        """Returns which genes of the table a section measures, bool (num_genes,): a gene it lacks is not zero there."""
        genes = self.section(section_id).genes
        return np.ones(self.num_genes, bool) if genes is None else decode_rows(genes, self.num_genes)

    def encode(self) -> bytes:
        """Returns the bytes of `manifest.json`; equal manifests give equal bytes, and those of schema 3 their own."""
        tree = self.model_dump(mode="json", exclude_none=True)
        return (json.dumps(tree, indent=1, sort_keys=True) + "\n").encode()

    def digest(self) -> str:
        """Returns the digest of the table's content, 12 hex digits."""
        return hashlib.sha256(self.encode()).hexdigest()[:12]


def require_views(manifest: Manifest, views: Sequence[str]) -> None:
    """Checks that a table has all views that a model reads.

    Raises:
        ConfigError: it lacks one; says how to prepare the table with it.
    """
    missing = [view for view in views if view not in manifest.views]
    if missing:
        raise ConfigError(
            f"model.image_views={','.join(views)} needs the view {', '.join(missing)}, the tile table has "
            f"{', '.join(manifest.views)}; prepare it again with --tiles.wide_um 618 (jobs/prepare.py), or set "
            f"model.image_views={','.join(manifest.views)}"
        )


def load_manifest(root: str) -> Manifest:
    """Returns the manifest of the tile table at `root`.

    Raises:
        TableError: there is none, or it is damaged or of another schema version.
    """
    uri = storage.join(storage.absolute(root), MANIFEST)
    try:
        tree = json.loads(storage.read(uri))
    except FileNotFoundError:
        raise TableError(f"no tile table at {root} ({MANIFEST} is missing); make one with jobs/prepare.py") from None
    except json.JSONDecodeError as error:
        raise TableError(f"{uri} is damaged: {error}") from None
    found = tree.get("schema_version") if isinstance(tree, dict) else None
    if found not in _READ_VERSIONS:
        readable = ", ".join(map(str, _READ_VERSIONS))
        raise TableError(
            f"{uri} has schema version {found}, this code reads {readable}; prepare it again (jobs/prepare.py)"
        )
    try:
        return Manifest.model_validate(tree)
    except ValidationError as error:
        raise TableError(f"{uri} is damaged: {error}") from None


def load_genes(root: str, manifest: Manifest) -> pa.Table:
    """Returns the table's genes (GENE_SCHEMA; the row number is `gene_index`).

    Raises:
        TableError: the file is not the one that the manifest names.
    """
    data = storage.read(storage.join(storage.absolute(root), manifest.genes_file))
    if hashlib.sha256(data).hexdigest() != manifest.genes_sha256:
        raise TableError(f"{manifest.genes_file} of {root} is not the file that the manifest names")
    return pq.read_table(pa.BufferReader(data), schema=GENE_SCHEMA)
