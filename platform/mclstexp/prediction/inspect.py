"""Inspects one slide before it is predicted: resolution, stain, tissue, and the tiles in the order of prediction.

A slide whose features others have computed is described by their file instead (`feature_slides`).

The findings are written to the slide's staging folder, the record last, and a later run reads them back. A slide
without tissue is a result with no tiles. The small picture and the tissue mask are read separately, which is twice the
work on a slide of a single level, so that both equal those of a tile table.
"""

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from mclstexp import storage
from mclstexp.errors import SourceError
from mclstexp.prediction.feature_slides import inspect_features
from mclstexp.prediction.parts import (
    GRID,
    GRID_SCHEMA,
    RECORD,
    Inspection,
    SlideRecord,
    remove_staging,
    staging_folder,
    write_inspection,
    write_record,
)
from mclstexp.prediction.plan import CohortPlan, SlideSource, fingerprint, key
from mclstexp.prediction.slide_cache import staged
from mclstexp.slides.resolution import ASSUMED, resolve_mpp
from mclstexp.slides.slide import Slide, open_slide
from mclstexp.slides.stain import not_h_and_e
from mclstexp.slides.tiles import (
    MAX_UPSAMPLING,
    curve_order,
    grid,
    inside,
    preview,
    small_picture,
    tile_corner,
    tile_names,
    tile_scale,
)
from mclstexp.slides.tissue import TissueMask, find_tissue_on_thumbnail

_MIN_ON_SLIDE = 0.5  # share of given positions
_UM2_PER_MM2 = 1e6


def inspect(source: SlideSource, plan: CohortPlan) -> Inspection:
    """Returns the findings about a slide, from its staging folder if it was inspected before.

    Raises:
        SourceError: it is damaged, states no resolution and none is assumed, would be enlarged too much, shows no H&E
            stain, or holds less than half of the given positions; a run may allow some of these. Or its feature file
            is not of what the model takes.
        FileNotFoundError, ResourceError, StorageError: its file is not available now.
    """
    found = fingerprint(source.image)
    inspection = _read_back(source, found, plan)
    if inspection is None:
        with staged(source.image, plan.scratch, plan.scratch_budget_bytes) as path:
            inspection = _inspect(source, found, plan, path)
    if plan.features is None:
        _require_stain(inspection.record.not_h_and_e, plan)
    return inspection


def _read_back(source: SlideSource, found: str, plan: CohortPlan) -> Inspection | None:
    for assumed in (False, True) if plan.assume_mpp is not None else (False,):
        staging = staging_folder(plan.out, source.slide_id, key(source, found, plan, assumed=assumed))
        try:
            record = SlideRecord.model_validate_json(storage.read(storage.join(staging, RECORD)))
            storage.read(storage.join(staging, GRID), length=1)
        except FileNotFoundError:
            continue
        except ValidationError:  # written by another version of this project: inspect again
            remove_staging(staging)
            continue
        if record.image == source.image:
            return Inspection(record, staging)
        moved = Inspection(record.model_copy(update={"image": source.image}), staging)
        write_record(moved)  # the output must not name the old URI
        return moved
    return None


def _inspect(source: SlideSource, found: str, plan: CohortPlan, path: str) -> Inspection:
    if plan.features is not None:
        return inspect_features(source, found, plan, path)
    with open_slide(path) as slide:
        return _inspect_slide(source, found, plan, slide)


def _inspect_slide(source: SlideSource, found: str, plan: CohortPlan, slide: Slide) -> Inspection:
    mpp, origin = resolve_mpp({"sheet": source.mpp, "image": slide.mpp}, plan.assume_mpp)
    scale = tile_scale(plan.mpp, mpp)
    finest = plan.mpp if plan.wide is None else min(plan.mpp, plan.wide[1])
    if mpp / finest > MAX_UPSAMPLING and not plan.tiles.allow_upsampling:
        raise SourceError(
            f"it has {mpp:.4g} um/px and would be enlarged {mpp / finest:.3g} times to the model's {finest:.4g} um/px "
            f"({MAX_UPSAMPLING} is allowed): give a finer scan, or set predict.allow_upsampling=true"
        )
    mask, seen = find_tissue_on_thumbnail(slide, mpp)
    stain = not_h_and_e(seen, mask.is_tissue)
    _require_stain(stain, plan)
    given = plan.positions.get(source.slide_id)
    table = _tiles(given, plan, slide, mask, scale, mpp)
    small, small_scale = small_picture(slide)
    record = SlideRecord(
        slide_id=source.slide_id,
        patient_id=source.patient_id,
        site=source.site,
        image=source.image,
        fingerprint=found,
        width_px=slide.width,
        height_px=slide.height,
        mpp=mpp,
        mpp_source=origin,
        scale=scale,
        reads_regions=slide.reads_regions,
        scanned_from_px=slide.scanned_from,
        num_tiles=len(table),
        tile_area_mm2=len(table) * (plan.tiles.size_px * scale * mpp) ** 2 / _UM2_PER_MM2,
        tissue_area_mm2=float(mask.is_tissue.sum()) * (mask.scale * mpp) ** 2 / _UM2_PER_MM2,
        missing_tiles=0,
        left_out_positions=0 if given is None else len(given) - len(table),
        thumbnail_scale=small_scale,
        not_h_and_e=stain,
    )
    staging = staging_folder(plan.out, source.slide_id, key(source, found, plan, assumed=origin == ASSUMED))
    left, top = corners(table, plan.tiles.size_px, scale)
    shown = preview(small, small_scale, mask.is_tissue, left, top, plan.tiles.size_px * scale)
    inspection = Inspection(record, staging)
    write_inspection(inspection, table, small, shown)
    return inspection


def corners(table: pa.Table, size_px: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the left and top edges, float64 (n,) in level-0 pixels, of tiles around the centres x_px and y_px."""
    left, top = (tile_corner(table[name].to_numpy(), size_px, scale) for name in ("x_px", "y_px"))
    return left, top


def _require_stain(reason: str, plan: CohortPlan) -> None:
    if reason and not plan.allow_other_stains:
        raise SourceError(f"not H&E: {reason}; set predict.other_stains=true to predict it anyway")


def _tiles(
    given: pa.Table | None, plan: CohortPlan, slide: Slide, mask: TissueMask, scale: float, mpp: float
) -> pa.Table:
    """Returns the tiles of a slide (GRID_SCHEMA) in curve order: those given, or those of a grid that show tissue."""
    size_px = plan.tiles.size_px
    if given is None:
        column, row, x, y = grid(slide.width, slide.height, size_px, scale, plan.overlap)
        names = {"spot_id": tile_names(column, row).tolist(), "array_row": row, "array_col": column}
    else:
        x, y = (given[name].to_numpy() for name in ("x_px", "y_px"))
        none = pa.nulls(len(given), pa.int32())
        names = {"spot_id": given["spot_id"], "array_row": none, "array_col": none}
    left, top = tile_corner(x, size_px, scale), tile_corner(y, size_px, scale)
    share = mask.share(left, top, size_px * scale)
    if given is None:
        kept = share >= plan.tiles.min_tissue
    else:
        kept = inside(left, top, size_px * scale, slide.width, slide.height)
        _require_on_slide(kept, x, y, slide)
    positions = {"x_px": x, "y_px": y, "x_um": x * mpp, "y_um": y * mpp, "tissue_fraction": share}
    rows = np.flatnonzero(kept)
    return pa.table(names | positions, schema=GRID_SCHEMA).take(rows[curve_order(x[rows], y[rows])])


def _require_on_slide(kept: np.ndarray, x: np.ndarray, y: np.ndarray, slide: Slide) -> None:
    """Refuses positions of another image; a few outside this one are left out and counted."""
    if kept.sum() >= _MIN_ON_SLIDE * len(kept):
        return
    centred, exchanged = (int(inside(a, b, 0, slide.width, slide.height).sum()) for a, b in ((x, y), (y, x)))
    raise SourceError(
        f"of {len(kept)} given positions {len(kept) - centred} are outside its image of {slide.width} x {slide.height} "
        f"px and the tiles of {centred - int(kept.sum())} cross its edge ({exchanged} are inside with x and y "
        "exchanged): give positions in level-0 pixels of this image"
    )
