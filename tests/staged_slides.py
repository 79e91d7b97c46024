"""Staged slides, complete with parts, and the model that they were predicted by."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mclstexp.data.genes import GenePanel
from mclstexp.model.calibration import SPREAD
from mclstexp.prediction.ledger import Entry, claim_slide, commit, stored
from mclstexp.prediction.parts import GRID_SCHEMA, PART_TILES, SlideRecord, encode_part, num_parts, write_part
from mclstexp.prediction.publish import publish_slide
from mclstexp.prediction.writers.slide import OutputInfo

TILE_PX = 32
PANEL = GenePanel(
    ("ENSG01", "FASN", "ENSG03", "ENSG04", "ENSG05", "µ1"),
    ("GNAS", "FASN", "DUP", "DUP", "", "µ1"),
    ("ENSG01", "", "ENSG03", "ENSG04", "ENSG05", ""),
)
INFO = OutputInfo(PANEL, "ln(1 + 1e4 share)", "0123456789ab", TILE_PX, 0.5, 0.3)
GENES = ["GNAS", "FASN"]
SCANNED_FROM = (64.0, 96.0)
CONFIDENCE = ("similarity", "effective_donors", "donor_share")


@dataclass(frozen=True)
class Slide:
    """A staged slide and what was staged."""

    staging: Path
    record: SlideRecord
    grid: pd.DataFrame
    answer: SimpleNamespace
    complete: np.ndarray
    sums: np.ndarray
    """Of each part, float64 (parts, S)."""

    @property
    def centre_px(self) -> np.ndarray:
        return self.grid.loc[self.complete, ["x_px", "y_px"]].to_numpy()


def stage(
    folder: Path, name: str, across: int, down: int, scale: float = 1.0, given: bool = False, missing: int = 0
) -> Slide:
    """Stages a slide that is all tiles, across x down, in an order that is not theirs."""
    rng = np.random.default_rng(across)
    edge, num_tiles = TILE_PX * scale, across * down
    row, column = np.divmod(rng.permutation(num_tiles), across)
    x, y = (np.floor(index * edge + edge / 2) + (0.7 if given else 0.0) for index in (column, row))
    record = SlideRecord(
        slide_id=name,
        patient_id=f"{name} of µ",
        site="",
        image="slide.svs",
        fingerprint=f"print of {name}",
        width_px=round(across * edge),
        height_px=round(down * edge),
        mpp=0.5 / scale,
        mpp_source="its image",
        scale=scale,
        reads_regions=True,
        scanned_from_px=SCANNED_FROM,
        num_tiles=num_tiles,
        tile_area_mm2=1.0,
        tissue_area_mm2=1.0,
        missing_tiles=0,
        left_out_positions=0,
        thumbnail_scale=max(4.0, max(across, down) * edge / 512),
        not_h_and_e="",
    )
    grid = pd.DataFrame(
        {
            "spot_id": [f"{a}x{b}" for a, b in zip(row, column, strict=True)],
            "array_row": pd.array(row, "Int32") if not given else pd.array([None] * num_tiles, "Int32"),
            "array_col": pd.array(column, "Int32") if not given else pd.array([None] * num_tiles, "Int32"),
            "x_px": x,
            "y_px": y,
            "x_um": x * record.mpp,
            "y_um": y * record.mpp,
            "tissue_fraction": rng.random(num_tiles, np.float32),
        }
    )
    answer = SimpleNamespace(values=rng.gamma(2, size=(num_tiles, len(PANEL))).astype(np.float32))
    vars(answer).update({key: rng.random(num_tiles, np.float32) for key in CONFIDENCE})
    complete = np.ones(num_tiles, bool)
    complete[rng.choice(num_tiles, missing, replace=False)] = False
    slide = Slide(folder / f"{name}-key", record, grid, answer, complete, np.zeros((num_parts(num_tiles), 0)))
    write(slide)
    return slide


def write(slide: Slide) -> None:
    slide.staging.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pandas(slide.grid, GRID_SCHEMA, preserve_index=False).replace_schema_metadata(None)
    pq.write_table(table, slide.staging / "grid.parquet", compression="zstd", store_schema=False)
    (slide.staging / "slide.json").write_text(slide.record.model_dump_json())
    size = (round(side / slide.record.thumbnail_scale) for side in (slide.record.height_px, slide.record.width_px))
    picture = np.full((*size, 3), (230, 200, 220), np.uint8)
    for name in ("thumbnail.jpg", "preview.jpg"):
        Image.fromarray(picture).save(slide.staging / name)
    for part in range(num_parts(len(slide.grid))):
        rows = slice(part * PART_TILES, (part + 1) * PART_TILES)
        names = [name for name in (*CONFIDENCE, SPREAD) if hasattr(slide.answer, name)]
        confidence = {name: getattr(slide.answer, name)[rows] for name in names}
        answer = SimpleNamespace(values=slide.answer.values[rows], sums=slide.sums[part], confidence=confidence)
        write_part(str(slide.staging), part, encode_part(answer, slide.complete[rows]))


def publish(slide: Slide, out: Path | str, key: str = "key") -> None:
    """Publishes a slide and enters it as done; its staging folder stays, for other tests."""
    name = slide.record.slide_id
    claim = Entry(slide_id=name, key=key, state="publishing")
    claimed = claim_slide(str(out), claim, over=stored(str(out), name))
    publish_slide(str(slide.staging), str(out), INFO)
    commit(str(out), claim.model_copy(update={"state": "done"}), claimed)
