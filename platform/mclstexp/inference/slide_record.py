"""What is known of a slide before it is predicted, and where its unfinished prediction is kept.

A slide's staging folder holds its tiles (`GRID`), this record, two pictures and one file a part. Parts have a fixed
length, so that what was predicted before an interruption counts whoever goes on; the price is many small files.
"""

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

PART_TILES = 256
"""Tiles of a part, the unit of embedding, writing and resuming."""
TILES, NOTHING_LEFT, QUARANTINED, FAILED = "tiles", "nothing_left", "quarantined", "failed"
"""States of a row on its way: a part's tiles; all parts are there; the slide's own fault; a fault that may pass."""
GRID, RECORD, THUMBNAIL, PREVIEW, PARTS = "grid.parquet", "slide.json", "thumbnail.jpg", "preview.jpg", "parts"
GRID_SCHEMA = pa.schema(
    [
        ("spot_id", pa.string()),  # unique within its slide
        ("array_row", pa.int32()),  # null where the positions were given
        ("array_col", pa.int32()),
        ("x_px", pa.float64()),  # tile centre, slide level 0
        ("y_px", pa.float64()),
        ("x_um", pa.float64()),
        ("y_um", pa.float64()),
        ("tissue_fraction", pa.float32()),
    ]
)
"""One row a tile, in the order in which they are predicted (along a Hilbert curve)."""


class SlideRecord(BaseModel):
    """One slide as its inspection found it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    slide_id: str
    patient_id: str
    site: str
    image: str
    """URI as it was given."""
    fingerprint: str
    width_px: int
    height_px: int
    mpp: float
    """Micrometres per level-0 pixel."""
    mpp_source: str
    scale: float
    """Level-0 pixels along a tile pixel."""
    reads_regions: bool = True
    """Whether a region of the image is read by itself, or the whole image decoded for any."""
    scanned_from_px: tuple[float, float]
    """x and y of the scanned region's corner, level 0."""
    num_tiles: int
    tile_area_mm2: float
    """Area of all tiles; where they overlap it counts twice."""
    tissue_area_mm2: float
    missing_tiles: int
    """Tiles without pixels; 0 at inspection."""
    left_out_positions: int
    """Given positions whose tile would lie off the image or cross its edge."""
    thumbnail_scale: float
    """Level-0 pixels along a pixel of the thumbnail."""
    not_h_and_e: str
    """Why it is flagged as no H&E; empty where it is not."""


def part_name(part: int) -> str:
    """Returns where a part lies within the staging folder."""
    return f"{PARTS}/{part:05d}.safetensors"


def num_parts(num_tiles: int) -> int:
    """Returns how many parts a slide has."""
    return -(-num_tiles // PART_TILES)
