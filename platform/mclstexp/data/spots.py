"""From stored rows to the arrays that models take: decoded tiles or stored features, panel expression, positions.

The training stream, the bank and the floors all read through `SpotReader`. It keeps no images and imports no torch, so
that decode tasks start fast; the parts of a table that it needs travel with it.
"""

import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from mclstexp import storage
from mclstexp.config import Config
from mclstexp.data.features import FeatureReader
from mclstexp.data.genes import (
    GenePanel,
    Normaliser,
    align,
    gene_totals,
    normalisers,
    panel_counts,
    unmeasured_genes,
)
from mclstexp.data.schema import Manifest, SectionEntry, load_genes
from mclstexp.data.table import read_columns, read_sentence
from mclstexp.data.totals import genes_of_total
from mclstexp.errors import UserError
from mclstexp.slides.codec import decode_tile

Batch = dict[str, np.ndarray]

MAX_TABLE_POSITIONS = 65_536
MAX_KEPT_BYTES = 2 * 2**30
"""Memory for the sentences that one training worker keeps."""
_TABLE_COLUMNS = {"table": ("array_col", "array_row"), "pixel_table": ("x_px", "y_px")}


@dataclass(frozen=True)
class SpotReader:
    """Reads sentences of one tile table as arrays over one gene panel."""

    root: str
    manifest: Manifest
    columns: np.ndarray
    """Row of each panel gene in the gene table, int32 (G,); -1 if the table has no such gene."""
    input: Normaliser
    target: Normaliser
    position: str
    """Kind of position, as `model.position`."""
    gene_totals: dict[str, np.ndarray] = field(default_factory=dict)
    """The panel genes' totals by section, float64 (G,); empty unless a normaliser divides by them."""
    unmeasured: dict[str, np.ndarray] = field(default_factory=dict)
    """Panel genes that a section does not measure, int64 (n,), for each section that lacks some."""
    stand_in: np.ndarray | None = None
    """What `expression` has for such a gene, float32 (G,); None: NaN."""
    features: FeatureReader | None = None
    """Stored features of the tiles of all sections that are read; None: the tiles themselves are read."""
    total: np.ndarray | None = None
    """Genes of the table that make a spot's total, bool (genes,); None: all."""

    @property
    def image_input(self) -> str:
        """Name of the array that the image tower takes: `image` or `features`."""
        return "image" if self.features is None else "features"

    def read(self, section_id: str, group: int, keep: np.ndarray | None = None, draw: int | None = None) -> Batch:
        """Returns one sentence's spots, or only its rows `keep`.

        The arrays are those of `read_spots`, and image, the encoded tiles, bytes (n,), or, with stored features and
        without reading any tile, features float32 (n, F).

        Args:
            section_id: the section.
            group: index of the sentence in the section.
            keep: rows to return; None: all.
            draw: the augmented draw whose features are read; None: those of the plain tiles.

        Raises:
            TableError: a file is missing or damaged.
        """
        if self.features is not None:
            features = self.features.read(section_id, group, draw)
            return rows_of(self.read_spots(section_id, group) | {"features": features}, keep)
        spots, tiles = self.read_encoded(section_id, group)
        return rows_of(spots | {"image": tiles.to_numpy(zero_copy_only=False)}, keep)

    def read_encoded(self, section_id: str, group: int) -> tuple[Batch, pa.Array]:
        """Returns the arrays of `read_spots`, and the encoded tiles."""
        table = read_sentence(self.root, self.manifest.section(section_id), group)
        return self._spots(section_id, table), table["image"].combine_chunks()

    def read_spots(self, section_id: str, group: int) -> Batch:
        """Returns one sentence's spots without their tiles.

        The arrays are position float32 (n, 2) and, for measured sections, expression float32 (n, G), in the input
        normalisation. A gene that the section does not measure is NaN, or its `stand_in`.
        """
        columns = [*position_columns(self.position), "gene_index", "count"]
        table = read_columns(self.root, self.manifest.section(section_id), columns, group)
        return self._spots(section_id, table)

    def read_none(self) -> Batch:
        """Returns what `read` does of a sentence without spots: image or features, expression and position."""
        if self.features is None:
            images = {"image": np.zeros(0, object)}
        else:
            images = {"features": np.zeros((0, self.features.num_features), np.float32)}
        return images | {
            "expression": np.zeros((0, len(self.columns)), np.float32),
            "position": np.zeros((0, 2), np.float32),
        }

    def read_section(self, section_id: str) -> Batch:
        """Returns a measured section's spots in stored order, without their images.

        The arrays are those of `read_spots`; payload float32 (n, G), expression in the target normalisation, NaN where
        the section does not measure a gene; and section_id, patient_id and spot_id, n strings each. Micrometre
        positions are relative to their sentence.
        """
        entry = self.manifest.section(section_id)
        table = read_columns(self.root, entry, ["spot_id", *position_columns(self.position), "gene_index", "count"])
        starts = np.cumsum([0, *(group.num_rows for group in entry.row_groups)])
        sentences = [table.slice(start, stop - start) for start, stop in pairwise(starts)]
        counts, totals = panel_counts(table["gene_index"], table["count"], self.columns, self.total)
        names = {"section_id": entry.section_id, "patient_id": entry.patient_id}
        return {
            "expression": self._expression(section_id, counts, totals),
            "payload": self._payload(section_id, counts, totals),
            "position": np.concatenate([positions(sentence, self.position) for sentence in sentences]),
            "spot_id": np.array(table["spot_id"].to_pylist(), object),
            **{column: np.full(entry.num_spots, name, object) for column, name in names.items()},
        }

    def _spots(self, section_id: str, table: pa.Table) -> Batch:
        spots = {"position": positions(table, self.position)}
        if not self.manifest.section(section_id).measured:
            return spots
        counts = panel_counts(table["gene_index"], table["count"], self.columns, self.total)
        return spots | {"expression": self._expression(section_id, *counts)}

    def _expression(self, section_id: str, counts: np.ndarray, totals: np.ndarray) -> np.ndarray:
        expression = self.input.apply(counts, totals, self.gene_totals.get(section_id))
        if section_id in self.unmeasured:
            genes = self.unmeasured[section_id]
            expression[:, genes] = np.nan if self.stand_in is None else self.stand_in[genes]
        return expression

    def _payload(self, section_id: str, counts: np.ndarray, totals: np.ndarray) -> np.ndarray:
        payload = self.target.apply(counts, totals, self.gene_totals.get(section_id))
        if section_id in self.unmeasured:
            payload[:, self.unmeasured[section_id]] = np.nan
        return payload


class Kept:
    """Arrays that are kept in memory from epoch to epoch, up to a limit. Several threads may read.

    What exceeds the limit is read again in every epoch. Nothing kept is given up for it: an epoch reads each sentence
    once, so that the oldest one would always be the next to be needed.
    """

    def __init__(self, max_bytes: int = MAX_KEPT_BYTES) -> None:
        self._free_bytes = max_bytes
        self._arrays: dict[tuple[object, ...], Batch] = {}
        self._lock = threading.Lock()

    def once(self, key: tuple[object, ...], read: Callable[[], Batch]) -> Batch:
        """Returns what `read` gives, kept from the first call on if there is room."""
        if key in self._arrays:
            return self._arrays[key]
        arrays = read()
        num_bytes = sum(values.nbytes for values in arrays.values())
        with self._lock:
            if key not in self._arrays and num_bytes <= self._free_bytes:
                self._arrays[key] = arrays
                self._free_bytes -= num_bytes
        return arrays


class KeptReader:
    """Reads stored features as a SpotReader does, and keeps sentences in memory."""

    def __init__(self, reader: SpotReader, max_bytes: int = MAX_KEPT_BYTES) -> None:
        assert reader.features is not None
        self.manifest, self.image_input, self.read_none = reader.manifest, reader.image_input, reader.read_none
        self._reader, self._features, self._kept = reader, reader.features, Kept(max_bytes)

    def read(self, section_id: str, group: int, keep: np.ndarray | None = None, draw: int | None = None) -> Batch:
        """Returns features, expression and position, as `SpotReader.read`."""
        features = self._kept.once(
            (section_id, group, draw), lambda: {"features": self._features.read(section_id, group, draw)}
        )
        return rows_of(self.read_spots(section_id, group) | features, keep)

    def read_spots(self, section_id: str, group: int) -> Batch:
        """Returns expression and position, as `SpotReader.read_spots`."""

        def read() -> Batch:
            spots = self._reader.read_spots(section_id, group)
            return {name: spots[name] for name in ("expression", "position")}

        return self._kept.once((section_id, group), read)


def decode_tiles(tiles: Sequence[bytes] | np.ndarray, size_px: int) -> np.ndarray:
    """Returns n encoded tiles as uint8 (n, size_px, size_px, 3).

    Raises:
        TableError: a tile cannot be decoded, or has another size.
    """
    return decode_sentences([tiles], len(tiles), size_px)[0]


def decode_sentences(sentences: Sequence[Sequence[bytes] | np.ndarray], length: int, size_px: int) -> np.ndarray:
    """Returns the encoded tiles of n sentences as uint8 (n, length, size_px, size_px, 3), padded with zeros.

    Each tile is decoded to its place, because copying it would take a tenth of the time, and more in new memory.

    Raises:
        TableError: a tile cannot be decoded, or has another size.
    """
    images = np.empty((len(sentences), length, size_px, size_px, 3), np.uint8)
    for places, tiles in zip(images, sentences, strict=True):
        places[len(tiles) :] = 0
        for place, tile in zip(places[: len(tiles)], tiles, strict=True):
            decode_tile(tile, place)
    return images


def make_reader(
    root: str,
    manifest: Manifest,
    panel: GenePanel,
    config: Config,
    training: Sequence[str],
    total_genes: GenePanel | None = None,
) -> SpotReader:
    """Returns the reader of a tile table for a panel, with the normalisers and positions of a configuration.

    With `genes.total=shared` totals are over `total_genes`, or over those that all `training` sections measure.

    For a gene that a spot's section does not measure, the spot tower's input has the mean over the `training` sections,
    which says nothing about the spot. Direct regression learns this input, so there the gene stays NaN.

    Raises:
        ConfigError, ModelError: as `genes_of_total`.
    """
    all_genes = load_genes(root, manifest)
    columns = align(panel, all_genes)
    both = normalisers(config.genes)
    totals = {}
    if any(normaliser.scheme == "per_gene" for normaliser in both):
        measured = (entry for entry in manifest.sections if entry.measured)
        totals = {entry.section_id: gene_totals(root, manifest, entry, columns) for entry in measured}
    genes = {
        entry.section_id: unmeasured_genes(manifest, entry.section_id, columns)
        for entry in manifest.sections
        if entry.measured
    }
    unmeasured = {name: each for name, each in genes.items() if len(each)}
    reader = SpotReader(
        storage.absolute(root),
        manifest,
        columns,
        *both,
        config.model.position,
        totals,
        unmeasured,
        total=genes_of_total(config.genes, manifest, all_genes, training, total_genes),
    )
    if config.model.predictor == "regression" or not unmeasured.keys() & set(training):
        return reader
    return replace(reader, stand_in=_mean_expression(reader, training))


def total_genes(reader: SpotReader) -> GenePanel | None:
    """Returns the genes that make a spot's total, for a model version to record; None: all that its section counts."""
    if reader.total is None:
        return None
    return GenePanel.from_table(load_genes(reader.root, reader.manifest)).take(np.flatnonzero(reader.total))


def _mean_expression(reader: SpotReader, section_ids: Sequence[str]) -> np.ndarray:
    """Returns each gene's mean over the spots of the sections that measure it, float32 (G,); 0 if none does."""
    total, num_spots = np.zeros((2, len(reader.columns)))
    for name in section_ids:
        expression = reader.read_section(name)["expression"].astype(np.float64)
        total += np.nan_to_num(expression).sum(axis=0)
        num_spots += (~np.isnan(expression)).sum(axis=0)
    return (total / np.maximum(1, num_spots)).astype(np.float32)


def position_columns(position: str) -> tuple[str, str]:
    """Returns the columns of the tile table, (x, y), from which a kind of position is made."""
    return _TABLE_COLUMNS.get(position, ("x_um", "y_um"))


def positions(table: pa.Table, position: str) -> np.ndarray:
    """Returns (x, y), float32 (n, 2): whole array or pixel (column, row), or micrometres from the rows' mean."""
    xy = np.stack([table[name].to_numpy() for name in position_columns(position)], axis=1)
    return (np.floor(xy) if position in _TABLE_COLUMNS else xy - xy.mean(axis=0)).astype(np.float32)


def num_positions(reader: SpotReader) -> int:
    """Returns the number of rows of learnt position tables, the largest measured coordinate + 1; 0 without tables.

    Raises:
        UserError: a section has no such coordinates, or they exceed 65,535.
    """
    if reader.position not in _TABLE_COLUMNS:
        return 0
    largest = {
        entry.section_id: _largest_coordinate(reader, entry) for entry in reader.manifest.sections if entry.measured
    }
    for name, coordinate in largest.items():
        if not 0 <= coordinate < MAX_TABLE_POSITIONS:
            raise UserError(
                f"model.position={reader.position} needs coordinates from 0 to {MAX_TABLE_POSITIONS - 1}; the largest "
                f"of section {name} is {coordinate} (-1: none); use sinusoidal or none"
            )
    return 1 + max(largest.values())


def _largest_coordinate(reader: SpotReader, entry: SectionEntry) -> int:
    if reader.position == "table":
        return entry.max_array
    table = read_columns(reader.root, entry, position_columns(reader.position))
    return int(positions(table, reader.position).max())


@dataclass(frozen=True)
class SentenceLoader:
    """The map function of the training stream: descriptor rows in, padded sentences out."""

    reader: SpotReader | KeptReader
    drop_spots: float
    seed: int
    num_draws: int = 0
    """Stored draws of augmented tiles that the epochs take in turn; 0: the plain tiles."""

    def __call__(self, rows: dict[str, np.ndarray]) -> Batch:
        """Returns sentence_id, image or features, expression, position and mask of n sentences.

        The leading shape is (n, sentence_length).
        """
        manifest, sentences = self.reader.manifest, [self._sentence(**row) for row in each_row(rows)]
        tiles = [] if self.reads_features else [spots.pop("image") for spots in sentences]
        batch = joined([pad(spots, manifest.sentence_length) for spots in sentences])
        if tiles:
            batch["image"] = decode_sentences(tiles, manifest.sentence_length, manifest.tile_size_px)
        return batch | {"sentence_id": rows["sentence_id"]}

    @property
    def reads_features(self) -> bool:
        """Whether it reads stored features instead of decoding tiles."""
        return self.reader.image_input == "features"

    def keeping(self) -> "SentenceLoader":
        """Returns a loader of stored features that keeps what it reads, for all epochs of one process."""
        assert isinstance(self.reader, SpotReader)
        return replace(self, reader=KeptReader(self.reader))

    def _sentence(
        self,
        sentence_id: str,
        section_id: str,
        group: int,
        expression_section: str,
        expression_group: int,
        epoch: int,
    ) -> Batch:
        if group < 0:
            return self.reader.read_none()
        spots, partner = self._kept(section_id, group, sentence_id, epoch), (expression_section, expression_group)
        return spots if partner == (section_id, group) else self._mispaired(spots, partner)

    def _kept(self, section_id: str, group: int, sentence_id: str, epoch: int) -> Batch:
        num_spots = self.reader.manifest.section(section_id).row_groups[group].num_rows
        keep = kept_spots(num_spots, self.drop_spots, self.seed, epoch, sentence_id)
        draw = (zlib.crc32(sentence_id.encode()) + self.seed + epoch) % self.num_draws if self.num_draws else None
        spots = self.reader.read(section_id, group, keep, draw)
        return {name: spots[name] for name in (self.reader.image_input, "expression", "position")}

    def _mispaired(self, spots: Batch, partner: tuple[str, int]) -> Batch:
        other, images = self.reader.read_spots(*partner), spots[self.reader.image_input]
        num_spots = min(len(images), len(other["expression"]))
        wrong = {name: other[name][:num_spots] for name in ("expression", "position")}
        return {self.reader.image_input: images[:num_spots]} | wrong


@dataclass(frozen=True)
class TileLoader:
    """The map function of embedding: descriptor rows in, the tiles of padded sentences out, in each view.

    It is defined here and not in `model`, so that tasks that decode import no torch.
    """

    root: str
    manifest: Manifest
    views: tuple[str, ...]
    """Views to decode; `schema.require_views` checks on the driver that the table has them."""

    def __call__(self, rows: dict[str, np.ndarray]) -> Batch:
        """Returns n padded sentences: each view's tiles, uint8 (n, L, size, size, 3), mask (n, L), and their names."""
        length, names = self.manifest.sentence_length, zip(rows["section_id"], rows["group"], strict=True)
        tables = [read_sentence(self.root, self.manifest.section(str(name)), int(group)) for name, group in names]
        tiles = {
            view: decode_sentences(
                [table[view].to_pylist() for table in tables], length, self.manifest.view_size_px(view)
            )
            for view in self.views
        }
        mask = np.arange(length) < np.array([[table.num_rows] for table in tables])
        return tiles | {"mask": mask} | {name: rows[name] for name in ("section_id", "group")}


def rows_of(spots: Batch, keep: np.ndarray | None) -> Batch:
    """Returns some rows of per-spot arrays; all with None."""
    return spots if keep is None else {name: values[keep] for name, values in spots.items()}


def each_row(rows: Batch) -> Iterator[dict[str, Any]]:
    """Yields rows one by one, as Python values by column."""
    columns = [values.tolist() for values in rows.values()]
    return (dict(zip(rows, values, strict=True)) for values in zip(*columns, strict=True))


def joined(parts: Sequence[Batch]) -> Batch:
    """Returns arrays of the same names one behind the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def kept_spots(num_spots: int, drop_spots: float, seed: int, epoch: int, sentence_id: str) -> np.ndarray:
    """Returns the ascending rows of a sentence that an epoch keeps: a random share up to `drop_spots` is left out."""
    rng = np.random.default_rng([seed, epoch, zlib.crc32(sentence_id.encode())])
    num_kept = max(min(2, num_spots), num_spots - int(num_spots * rng.uniform(0, drop_spots)))
    return np.sort(rng.choice(num_spots, num_kept, replace=False))


def pad(spots: Batch, length: int) -> Batch:
    """Returns per-spot arrays (n, ...) padded with zeros to (1, length, ...) and `mask` (1, length) of real spots."""
    padded = {}
    for name, values in spots.items():
        full = np.zeros((1, length, *values.shape[1:]), values.dtype)
        full[0, : len(values)] = values
        padded[name] = full
    num_spots = len(next(iter(spots.values())))
    return padded | {"mask": np.arange(length)[None] < num_spots}
