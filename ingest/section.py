"""One section from its sources to its files in the tile table: the Ray task of `prepare`.

Spots are read and screened first and ordered into sentences; then tiles are read in that order, with one sentence in
memory at a time. Files get random names and become visible to readers once a manifest names them; in return, a task
that dies leaves files behind, which a later run removes.
"""

import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.sparse import csr_array

from ingest.array_fit import ArrayFit, fit_array
from ingest.image_match import require_on_image
from ingest.layout import judged_resolution
from ingest.orientation import require_best_orientation
from ingest.readers.files import read_expression
from ingest.readers.labels import read_labels
from ingest.readers.spots import Expression, Layout, Reject, Spots, require_positions
from ingest.twins import counts_digest
from mclstexp import storage
from mclstexp.data.schema import IMAGE_WIDE, REJECT_SCHEMA, TILE_SCHEMA, WIDE_TILE_SCHEMA, SectionEntry, encode_rows
from mclstexp.data.sheet import SectionRow
from mclstexp.data.table import tile_crc, write_section
from mclstexp.errors import SourceError
from mclstexp.settings import TilesConfig
from mclstexp.slides.codec import encode_tile
from mclstexp.slides.slide import Slide, open_slide
from mclstexp.slides.tiles import (
    curve_order,
    cut_evenly,
    encode_picture,
    grid,
    inside,
    small_picture,
    tile_corner,
    tile_names,
    tile_scale,
)
from mclstexp.slides.tissue import find_tissue

_MIN_SHARE = 0.5  # of whole tiles of measured spots that are on tissue


@dataclass(frozen=True)
class Recipe:
    """How all sections of a table are cut."""

    tiles: TilesConfig
    mpp: float
    """Micrometres per tile pixel; `tiles.mpp` resolved."""

    @property
    def wide_mpp(self) -> float | None:
        """Micrometres per pixel of the wide view; None without one."""
        return None if self.tiles.wide_um is None else self.tiles.wide_um / self.tiles.wide_px


def cut_section(row: SectionRow, recipe: Recipe, gene_rows: Mapping[str, int], root: str, digest: str) -> SectionEntry:
    """Writes one section's tiles, rejects and thumbnail under `root` and returns its manifest entry.

    Args:
        row: the section in the sample sheet.
        recipe: how it is cut.
        gene_rows: row in the gene table by what a source may call the gene, see `header.gene_rows`.
        root: URI of the tile table.
        digest: of its sources and settings, for the manifest's `fingerprint`.

    Raises:
        SourceError: a source is damaged or contradicts another; names the section.
    """
    name, picture = (f"{row.section_id}-{uuid.uuid4().hex}.{kind}" for kind in ("parquet", "jpg"))
    with section_errors(row), tempfile.TemporaryDirectory(prefix="mclstexp-") as scratch:
        local = Path(scratch) / name
        expression = read_expression(row, scratch) if row.measured else None
        same_counts = _counts_digest(expression) if expression else None  # before the counts are moved in place
        with storage.local_copy(row.image, scratch) as image, open_slide(image) as slide:
            layout = expression.layout if expression else Layout()
            mpp = judged_resolution(row, layout, slide).mpp
            scale = tile_scale(recipe.mpp, mpp)
            wide_scale = None if recipe.wide_mpp is None else tile_scale(recipe.wide_mpp, mpp)
            cut = _Cut(row, recipe.tiles, slide, layout, fit_array(layout), mpp, scale, wide_scale)
            spots, rejected = cut.read_spots(expression, gene_rows)
            spots, tissue_fraction, unfit = cut.screen(spots)
            rejected += unfit
            labels = _read_labels(row, spots, scratch)
            written = write_section(local, cut.sentences(spots, labels, tissue_fraction, rejected), cut.schema)
            num_labelled = pq.read_table(local, columns=["label"])["label"].drop_null().length()
            small, scale = small_picture(slide)
            thumbnail = encode_picture(small)
        storage.upload(local, storage.join(root, "tiles", name))
        storage.write(storage.join(root, "thumbnails", picture), thumbnail)
        _write_rejects(local, row, rejected)
        storage.upload(local, storage.join(root, "rejects", name))
    return SectionEntry(
        section_id=row.section_id,
        patient_id=row.patient_id,
        site=row.site,
        file=f"tiles/{name}",
        size_bytes=written.size_bytes,
        sha256=written.sha256,
        footer_offset=written.footer_offset,
        row_groups=written.row_groups,
        num_spots=sum(group.num_rows for group in written.row_groups),
        measured=row.measured,
        max_array=int(np.nanmax([-1, *spots.array_row, *spots.array_col])),
        source_mpp=mpp,
        width_px=slide.width,
        height_px=slide.height,
        fingerprint=digest,
        rejects_file=f"rejects/{name}",
        rejected=dict(sorted(Counter(reject.reason for reject in rejected).items())),
        num_labelled=num_labelled,
        thumbnail_file=f"thumbnails/{picture}",
        thumbnail_scale=scale,
        genes=_measured_genes(expression, gene_rows) if expression else None,
        counts_digest=same_counts,
        species=row.species or None,
        organ=row.organ or None,
    )


def _counts_digest(expression: Expression) -> str | None:
    assert expression.spots.counts is not None, "a reader gives counts"
    return counts_digest(expression.spots.counts)


@contextmanager
def section_errors(row: SectionRow) -> Iterator[None]:
    """Puts the section's id before the message of any error in its sources."""
    try:
        yield
    except SourceError as error:
        raise SourceError(f"section {row.section_id}: {error}") from error
    except FileNotFoundError as error:
        raise SourceError(f"section {row.section_id}: there is no file {error}") from None


@dataclass(frozen=True)
class _Cut:
    """An open slide and how it is cut."""

    row: SectionRow
    tiles: TilesConfig
    slide: Slide
    layout: Layout
    fit: ArrayFit | None
    """Of the layout's array."""
    mpp: float
    """Micrometres per level-0 pixel."""
    scale: float
    """Level-0 pixels along a tile pixel."""
    wide_scale: float | None
    """Level-0 pixels along a pixel of the wide view; None without one."""

    @property
    def schema(self) -> pa.Schema:
        """Schema of the section's sentences."""
        return TILE_SCHEMA if self.wide_scale is None else WIDE_TILE_SCHEMA

    def read_spots(self, expression: Expression | None, gene_rows: Mapping[str, int]) -> tuple[Spots, list[Reject]]:
        """Returns the section's usable spots with counts over the table's genes, and the rejects so far.

        Without expression, the spots are the whole tiles of a grid over the slide.

        Raises:
            SourceError: no spot of the expression is usable.
        """
        if expression is None:
            return _grid_spots(self.slide, self.tiles.size_px, self.scale), []
        _require_usable(expression)
        return _over_table_genes(expression, gene_rows), list(expression.rejected)

    def screen(self, spots: Spots) -> tuple[Spots, np.ndarray, list[Reject]]:
        """Returns the spots that get a tile, their share of tissue, float32 (n,), and the rejects.

        A spot is rejected because its centre is `outside_image`, its tile `crosses_edge`, its tile has less than
        `tiles.min_tissue` of tissue (`no_tissue`), or it is not where its array position puts it (`off_array`).

        Raises:
            SourceError: less than half of the measured spots are on the slide, or less than half of those on tissue, or
                clearly more would be with x and y exchanged, or the image mirrored or turned.
        """
        size_px, slide = self.tiles.size_px, self.slide
        left, top = (tile_corner(centre, size_px, self.scale) for centre in (spots.x_px, spots.y_px))
        edge = size_px * self.scale
        is_whole = inside(left, top, edge, slide.width, slide.height)
        is_centred = inside(spots.x_px, spots.y_px, 0, slide.width, slide.height)
        mask = find_tissue(slide, self.mpp)
        tissue_fraction = mask.share(left, top, edge)
        on_tissue = tissue_fraction >= self.tiles.min_tissue
        if spots.counts is not None:
            xy_px = np.stack([spots.x_px, spots.y_px], axis=1)
            if self.tiles.min_tissue > 0:
                require_best_orientation(xy_px, self.layout, self.fit, slide, mask)
            require_on_image(xy_px, self.layout, slide)
            _require_on_tissue(int((is_whole & on_tissue).sum()), int(is_whole.sum()), self.tiles.min_tissue)
        rejects = spots.rejects(~is_centred, "outside_image") + spots.rejects(is_centred & ~is_whole, "crosses_edge")
        rejects += spots.rejects(is_whole & ~on_tissue, "no_tissue")
        off = self._off_array(spots)
        rejects += spots.rejects(is_whole & on_tissue & off, "off_array")
        kept = is_whole & on_tissue & ~off
        return spots.take(kept), tissue_fraction[kept], rejects

    def _off_array(self, spots: Spots) -> np.ndarray:
        """Returns which spots are not where their array positions put them, bool (n,)."""
        if self.fit is None:
            return np.zeros(len(spots), bool)
        array_xy, xy_px = np.stack([spots.array_col, spots.array_row], 1), np.stack([spots.x_px, spots.y_px], 1)
        return self.fit.off(array_xy, xy_px)

    def sentences(
        self, spots: Spots, labels: np.ndarray, tissue_fraction: np.ndarray, rejected: list[Reject]
    ) -> Iterator[pa.Table]:
        """Yields the section's sentences (`schema`) in curve order; adds tiles without pixels to `rejected`."""
        for rows in cut_evenly(curve_order(spots.x_px, spots.y_px), self.tiles.sentence_length):
            part = spots.take(rows)
            images = self._read_tiles(part)
            has_pixels = np.array([image is not None for image in images], bool)
            rejected += part.rejects(~has_pixels, "missing_pixels")
            if has_pixels.any():
                tiles = [image for image in images if image is not None]
                kept = rows[has_pixels]
                yield self._sentence(part.take(has_pixels), labels[kept], tissue_fraction[kept], tiles)

    def _read_tiles(self, spots: Spots) -> list[np.ndarray | None]:
        size, scale = self.tiles.size_px, self.scale
        return [self.slide.read_tile(left, top, size, scale) for left, top in _corners(spots, size, scale)]

    def _wide_columns(self, spots: Spots) -> dict[str, object]:
        """Returns the columns of the wide view; none without one."""
        if self.wide_scale is None:
            return {}
        size, scale = self.tiles.wide_px, self.wide_scale
        tiles = (self.slide.read_wide(left, top, size, scale) for left, top in _corners(spots, size, scale))
        encoded = [self._encoded(tile) for tile in tiles]
        return {IMAGE_WIDE: encoded, "crc_wide": pa.array(map(tile_crc, encoded), pa.uint32())}

    def _encoded(self, tile: np.ndarray) -> bytes:
        return encode_tile(tile, self.tiles.encoding, self.tiles.jpeg_quality)

    def _sentence(
        self, spots: Spots, labels: np.ndarray, tissue_fraction: np.ndarray, tiles: list[np.ndarray]
    ) -> pa.Table:
        encoded = [self._encoded(tile) for tile in tiles]
        gene_index, count = _count_lists(spots)
        columns = {
            "section_id": [self.row.section_id] * len(spots),
            "patient_id": [self.row.patient_id] * len(spots),
            "spot_id": spots.spot_id.tolist(),
            "array_row": pa.array(spots.array_row, pa.int32(), from_pandas=True),
            "array_col": pa.array(spots.array_col, pa.int32(), from_pandas=True),
            "x_px": spots.x_px,
            "y_px": spots.y_px,
            "x_um": spots.x_px * self.mpp,
            "y_um": spots.y_px * self.mpp,
            "image": encoded,
            "tissue_fraction": tissue_fraction,
            "label": pa.array(labels, pa.string()),
            "crc": pa.array(map(tile_crc, encoded), pa.uint32()),
            "gene_index": gene_index,
            "count": count,
        }
        return pa.table(columns | self._wide_columns(spots), schema=self.schema)


def _corners(spots: Spots, size_px: int, scale: float) -> Iterator[tuple[float, float]]:
    """Yields the left and top of tiles around the spots."""
    left, top = (tile_corner(centre, size_px, scale).tolist() for centre in (spots.x_px, spots.y_px))
    return zip(left, top, strict=True)


def _grid_spots(slide: Slide, size_px: int, scale: float) -> Spots:
    """Returns all whole tiles of a slide as spots named `{column}x{row}`."""
    column, row, x, y = grid(slide.width, slide.height, size_px, scale)
    spots = Spots(tile_names(column, row), x, y, array_row=row.astype(np.float64), array_col=column.astype(np.float64))
    require_positions(spots)
    return spots


def _over_table_genes(expression: Expression, gene_rows: Mapping[str, int]) -> Spots:
    """Returns the spots with counts over the table's genes instead of the source's."""
    counts = expression.spots.counts
    assert counts is not None, "a reader gives counts"
    row_of = np.array([gene_rows[gene.gene_id] for gene in expression.genes], np.int32)
    shape = (len(expression.spots), 1 + max(gene_rows.values(), default=-1))
    moved = csr_array((counts.data, row_of[counts.indices], counts.indptr), shape=shape)
    moved.sum_duplicates()  # and sorts
    return replace(expression.spots, counts=moved)


def _measured_genes(expression: Expression, gene_rows: Mapping[str, int]) -> str:
    """Returns the table's genes that the source lists, with counts or without, for the manifest."""
    listed = np.zeros(1 + max(gene_rows.values(), default=-1), bool)
    listed[[gene_rows[gene.gene_id] for gene in expression.genes]] = True
    return encode_rows(listed)


def _require_usable(expression: Expression) -> None:
    if len(expression.spots):
        return
    reasons = Counter(reject.reason for reject in expression.rejected)
    listed = ", ".join(f"{number} {reason}" for reason, number in reasons.most_common())
    raise SourceError(
        f"none of its {reasons.total()} spots can be used ({listed}): fix its column in_tissue or selected, give "
        "counts and positions of the same section, or remove it from the sheet"
    )


def _require_on_tissue(num_on_tissue: int, num_whole: int, min_tissue: float) -> None:
    if num_on_tissue < _MIN_SHARE * num_whole:
        raise SourceError(
            f"only {num_on_tissue} of {num_whole} spots are on tissue: do the positions belong to another image? For "
            f"an unusual stain set tiles.min_tissue (now {min_tissue}) to 0"
        )


def _read_labels(row: SectionRow, spots: Spots, scratch: str) -> np.ndarray:
    """Returns each spot's label, object (n,); None for a spot without one."""
    if row.labels is None:
        return np.full(len(spots), None, object)
    with storage.local_copy(row.labels, scratch) as path:
        return read_labels(path, spots)


def _count_lists(spots: Spots) -> tuple[pa.Array, pa.Array]:
    """Returns gene_index and count, list<int32> (n,); null on an H&E-only slide."""
    kind = pa.list_(pa.int32())
    if spots.counts is None:
        return pa.nulls(len(spots), kind), pa.nulls(len(spots), kind)
    offsets = pa.array(spots.counts.indptr, pa.int32())
    values = (spots.counts.indices, spots.counts.data)
    gene_index, count = (pa.ListArray.from_arrays(offsets, pa.array(part, pa.int32()), kind) for part in values)
    return gene_index, count


def _write_rejects(path: Path, row: SectionRow, rejected: list[Reject]) -> None:
    records = [{"section_id": row.section_id, **reject._asdict()} for reject in rejected]
    table = pa.Table.from_pylist(records, REJECT_SCHEMA)
    pq.write_table(table, path, compression="zstd", store_schema=False)
