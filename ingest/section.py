"""One section from its sources to its files in the tile table: the task that Ray runs.

Spots are screened first, then cut into sentences, then tiles are read in that order, one sentence in memory at a
time. Files get random names and exist for readers only once a manifest names them.
"""

import collections
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.sparse import csr_array
from scipy.spatial import cKDTree

from ingest.readers import read_expression
from ingest.readers.labels import read_labels
from ingest.readers.spots import Expression, Reject, Spots, require_places
from mclstexp import storage
from mclstexp.data.schema import REJECT_SCHEMA, TILE_SCHEMA, SectionEntry
from mclstexp.data.sheet import SectionRow
from mclstexp.data.table import tile_crc, write_section
from mclstexp.errors import SourceError
from mclstexp.settings import TilesConfig
from mclstexp.slides.codec import encode_tile
from mclstexp.slides.resolution import resolve_mpp
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


@dataclass(frozen=True)
class Recipe:
    """How every section of a table is cut."""

    tiles: TilesConfig
    mpp: float
    """Micrometres per tile pixel; `tiles.mpp` resolved."""


def source_mpp(row: SectionRow, image_mpp: float | None, array_mpp: float | None) -> tuple[float, str]:
    """Returns the micrometres per level-0 pixel and its source: the sheet, the image or the array of spots.

    Raises:
        SourceError: as `resolve_mpp`.
    """
    return resolve_mpp({"sheet": row.mpp, "image": image_mpp, "array of spots": array_mpp})


def cut_section(
    row: SectionRow, recipe: Recipe, gene_rows: dict[str, int], root: str, fingerprint: str
) -> SectionEntry:
    """Writes one section's tiles, rejects and thumbnail under `root` and returns its manifest entry.

    Args:
        gene_rows: row of the table's gene table by what a source may call the gene, see `gene_table.gene_rows`.

    Raises:
        SourceError: a source is damaged or contradicts another; names the section.
    """
    name, picture = (f"{row.section_id}-{uuid.uuid4().hex}.{kind}" for kind in ("parquet", "jpg"))
    with section_errors(row), tempfile.TemporaryDirectory(prefix="mclstexp-") as scratch:
        local = Path(scratch) / name
        expression = read_expression(row, scratch) if row.measured else None
        with storage.local_copy(row.image, scratch) as image, open_slide(image) as slide:
            mpp, _ = source_mpp(row, slide.mpp, expression.array_mpp if expression else None)
            cut = _Cut(row, recipe.tiles, slide, mpp, tile_scale(recipe.mpp, mpp))
            spots, rejected = cut.spots(expression, gene_rows)
            spots, share, unfit = screen(spots, slide, cut.tiles.size_px, cut.scale, mpp, cut.tiles.min_tissue)
            rejected += unfit
            labels = _labels(row, spots, scratch)
            written = write_section(local, cut.sentences(spots, labels, share, rejected))
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
        fingerprint=fingerprint,
        rejects_file=f"rejects/{name}",
        rejected=dict(sorted(collections.Counter(reject.reason for reject in rejected).items())),
        num_labelled=num_labelled,
        thumbnail_file=f"thumbnails/{picture}",
        thumbnail_scale=scale,
    )


@contextmanager
def section_errors(row: SectionRow) -> Iterator[None]:
    """Names the section in whatever is wrong with its sources."""
    try:
        yield
    except SourceError as error:
        raise SourceError(f"section {row.section_id}: {error}") from error
    except FileNotFoundError as error:
        raise SourceError(f"section {row.section_id}: there is no file {error}") from None


@dataclass(frozen=True)
class _Cut:
    """One open slide and how it is cut."""

    row: SectionRow
    tiles: TilesConfig
    slide: Slide
    mpp: float
    scale: float
    """Level-0 pixels along a tile pixel."""

    def spots(self, expression: Expression | None, gene_rows: dict[str, int]) -> tuple[Spots, list[Reject]]:
        """Returns the section's usable spots, counts over the table's genes, and its rejects so far."""
        if expression is None:
            return grid_spots(self.slide, self.tiles.size_px, self.scale), []
        diameter_um = self.row.spot_diameter_um
        if diameter_um is None and expression.spot_diameter_px is not None:
            diameter_um = expression.spot_diameter_px * self.mpp
        require_pitch(expression.spots, diameter_um, self.mpp)
        return _over_table_genes(expression, gene_rows), list(expression.rejected)

    def sentences(
        self, spots: Spots, labels: np.ndarray, share: np.ndarray, rejected: list[Reject]
    ) -> Iterator[pa.Table]:
        """Yields the section's sentences (TILE_SCHEMA) in curve order; adds tiles without pixels to `rejected`."""
        for rows in cut_evenly(curve_order(spots.x_px, spots.y_px), self.tiles.sentence_length):
            part = spots.take(rows)
            images = self._read_tiles(part)
            there = np.array([image is not None for image in images], bool)
            rejected += part.rejects(~there, "missing_pixels")
            if there.any():
                shown = [image for image in images if image is not None]
                yield self._table(part.take(there), labels[rows][there], share[rows][there], shown)

    def _read_tiles(self, spots: Spots) -> list[np.ndarray | None]:
        size, scale = self.tiles.size_px, self.scale
        corners = zip(*(tile_corner(centre, size, scale).tolist() for centre in (spots.x_px, spots.y_px)), strict=True)
        return [self.slide.read_tile(left, top, size, scale) for left, top in corners]

    def _table(self, spots: Spots, labels: np.ndarray, share: np.ndarray, images: list[np.ndarray]) -> pa.Table:
        encoded = [encode_tile(image, self.tiles.encoding, self.tiles.jpeg_quality) for image in images]
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
            "tissue_fraction": share,
            "label": pa.array(labels, pa.string()),
            "crc": pa.array(map(tile_crc, encoded), pa.uint32()),
            "gene_index": gene_index,
            "count": count,
        }
        return pa.table(columns, schema=TILE_SCHEMA)


def _over_table_genes(expression: Expression, gene_rows: dict[str, int]) -> Spots:
    """Returns the spots with counts over the table's genes instead of the source's."""
    counts = expression.spots.counts
    assert counts is not None, "a reader gives counts"
    row_of = np.array([gene_rows[gene.gene_id] for gene in expression.genes], np.int32)
    shape = (len(expression.spots), 1 + max(gene_rows.values(), default=-1))
    moved = csr_array((counts.data, row_of[counts.indices], counts.indptr), shape=shape)
    moved.sum_duplicates()  # and sorts
    return replace(expression.spots, counts=moved)


def _labels(row: SectionRow, spots: Spots, scratch: str) -> np.ndarray:
    """Returns each spot's label, object (n,); None where there is none."""
    if row.labels is None:
        return np.full(len(spots), None, object)
    with storage.local_copy(row.labels, scratch) as path:
        return read_labels(path, spots)


def _count_lists(spots: Spots) -> tuple[pa.Array, pa.Array]:
    """Returns gene_index and count, list<int32> (n,); null where nothing was measured."""
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


_LEAST_SHARE = 0.5  # of measured spots on the slide, and on tissue
_PITCH_OVER_DIAMETER = (0.9, 5.0)  # spots do not overlap; arrays leave at most a few diameters between them
_LEAST_FOR_PITCH = 16  # spots


def grid_spots(slide: Slide, size_px: int, scale: float) -> Spots:
    """Returns all whole tiles of a slide as spots named `{column}x{row}`."""
    column, row, x, y = grid(slide.width, slide.height, size_px, scale)
    spots = Spots(tile_names(column, row), x, y, array_row=row.astype(np.float64), array_col=column.astype(np.float64))
    require_places(spots)
    return spots


def require_pitch(spots: Spots, diameter_um: float | None, mpp: float) -> None:
    """Checks the distance of neighbouring spots against their diameter: a wrong resolution shows there.

    Raises:
        SourceError: the distance is below 0.9 or above 5 diameters; gives both in micrometres.
    """
    if diameter_um is None or len(spots) < _LEAST_FOR_PITCH:
        return
    place = np.stack([spots.x_px, spots.y_px], axis=1)
    pitch_um = float(np.median(cKDTree(place).query(place, k=2)[0][:, 1])) * mpp
    low, high = _PITCH_OVER_DIAMETER
    if not low * diameter_um <= pitch_um <= high * diameter_um:
        raise SourceError(
            f"its spots lie {pitch_um:.3g} um apart at {mpp:.4g} um/px but are {diameter_um:.4g} um wide (allowed "
            f"{low} to {high} diameters): mend mpp or spot_diameter_um, or give positions in full-resolution pixels"
        )


def screen(
    spots: Spots, slide: Slide, size_px: int, scale: float, mpp: float, min_tissue: float
) -> tuple[Spots, np.ndarray, list[Reject]]:
    """Returns the spots that get a tile, their share of tissue, float32 (n,), and the rejects.

    Reasons are `outside_image` (the centre is), `crosses_edge` (its tile does) and `no_tissue` (less than
    `min_tissue`).

    Raises:
        SourceError: less than half of the measured spots lie on the slide, or less than half of those on tissue.
    """
    edge = size_px * scale
    left, top = tile_corner(spots.x_px, size_px, scale), tile_corner(spots.y_px, size_px, scale)
    whole = inside(left, top, edge, slide.width, slide.height)
    centred = inside(spots.x_px, spots.y_px, 0, slide.width, slide.height)
    if spots.counts is not None:
        _require_on_slide(spots, centred, slide)
    share = find_tissue(slide, mpp).share(left, top, edge)
    on_tissue = share >= min_tissue
    if spots.counts is not None:
        _require_on_tissue(int((whole & on_tissue).sum()), int(whole.sum()), min_tissue)
    rejects = spots.rejects(~centred, "outside_image") + spots.rejects(centred & ~whole, "crosses_edge")
    rejects += spots.rejects(whole & ~on_tissue, "no_tissue")
    return spots.take(whole & on_tissue), share[whole & on_tissue], rejects


def _require_on_slide(spots: Spots, on_slide: np.ndarray, slide: Slide) -> None:
    if on_slide.sum() >= _LEAST_SHARE * len(spots):
        return
    exchanged = inside(spots.y_px, spots.x_px, 0, slide.width, slide.height).sum()
    raise SourceError(
        f"only {on_slide.sum()} of {len(spots)} spots lie on its image of {slide.width} x {slide.height} px "
        f"({exchanged} with x and y exchanged): give positions in pixels of this very image"
    )


def _require_on_tissue(num_on_tissue: int, num_whole: int, min_tissue: float) -> None:
    if num_on_tissue < _LEAST_SHARE * num_whole:
        raise SourceError(
            f"only {num_on_tissue} of {num_whole} spots lie on tissue: are x and y exchanged or positions of another "
            f"image? With an unusual stain set tiles.min_tissue (now {min_tissue}) to 0"
        )
