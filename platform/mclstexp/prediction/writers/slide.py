"""What a writer of predictions receives, and what all published files of a slide state.

A writer makes one file from the slide's table, so that all files agree and each part is fetched once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
from pydantic import ValidationError

from mclstexp.data.genes import GenePanel, normalisers
from mclstexp.errors import StorageError
from mclstexp.model.calibration import SPREAD, Calibration
from mclstexp.model.decode import SlideDecoder
from mclstexp.prediction.parts import CONFIDENCE, SlideRecord
from mclstexp.slides.tiles import tile_corner

if TYPE_CHECKING:
    from mclstexp.model.version import ModelVersion

RECORD_KEY = "slide_record"
"""Key of the slide's record in the metadata of its table."""


@dataclass(frozen=True)
class OutputInfo:
    """What finishing a slide needs of the model version, and its files state about it."""

    panel: GenePanel
    unit: str
    """Unit of the predictions, in words."""
    model_digest: str
    tile_size_px: int
    mpp: float
    """Micrometres per tile pixel."""
    ood_similarity: float | None
    """Best similarity below which a tile is out of distribution; None if the model has no threshold."""
    decoder: SlideDecoder | None = field(default=None, compare=False)
    """Of a program model, whose parts hold scores; None: they hold expression. A published table does not state it."""
    calibration: Calibration | None = field(default=None, compare=False)
    """Of a program model; its genes' half widths are in a published table, the rest is not."""
    intervals: bool = False
    """Whether h5ad files have the layers `lower` and `upper`."""

    @property
    def num_values(self) -> int:
        """Numbers that a part holds for each tile."""
        return len(self.panel) if self.decoder is None else self.decoder.num_values

    @property
    def num_sums(self) -> int:
        """Numbers that a part holds for all its tiles together."""
        return 0 if self.decoder is None else self.decoder.num_sums

    @property
    def confidence(self) -> tuple[str, ...]:
        """What parts hold for each tile beside its values."""
        return CONFIDENCE if self.decoder is None else (*CONFIDENCE, SPREAD)

    @classmethod
    def of_model(cls, model: "ModelVersion", intervals: bool = False) -> "OutputInfo":
        """Returns what finishing tasks get of a model version, whose files have `intervals`, or not."""
        unit = normalisers(model.config.genes)[1].unit()
        decoder = model.programs.decoder() if model.programs else None
        return cls(
            panel=model.panel,
            unit=unit,
            model_digest=model.digest,
            tile_size_px=model.tile_size_px,
            mpp=model.mpp,
            ood_similarity=model.ood_similarity,
            decoder=decoder,
            calibration=model.calibration,
            intervals=intervals,
        )


@dataclass(frozen=True)
class PredictedSlide:
    """A slide as writers get it: all its parts are written."""

    staging: str
    """URI of the staging folder; empty for a slide that is drawn from its published table."""
    table: Path
    """Local Parquet table: one row per tile, columns of `table.spot_schema` and one per gene id."""
    info: OutputInfo
    thumbnail: np.ndarray
    """The slide, uint8 (height, width, 3)."""
    inspected: SlideRecord | None = None
    """The slide as its staging folder describes it; None for a slide that is drawn from its published table."""

    @cached_property
    def record(self) -> SlideRecord:
        """The slide as its table describes it: with the number of missing tiles, without the image's URI.

        Raises:
            StorageError: the file is not a table that `write_table` wrote.
        """
        return record_of(pq.read_metadata(self.table).metadata)


@dataclass(frozen=True)
class Writer:
    """One published file."""

    path: str
    """Relative to the root of the predictions, such as `{slide_id}.h5ad`."""
    write: Callable[[Path, PredictedSlide], None]
    """Writes it to a local path."""
    without_tissue: bool = False
    """Whether slides without tissue have this file too; its writer gets neither table nor thumbnail then."""


def record_of(metadata: dict[bytes, bytes] | None) -> SlideRecord:
    """Returns a slide's record from the metadata of its table.

    Raises:
        StorageError: the metadata has no valid record.
    """
    try:
        return SlideRecord.model_validate_json((metadata or {})[RECORD_KEY.encode()])
    except (KeyError, ValidationError) as error:
        raise StorageError(f"the table has no record of its slide ({error})") from None


def provenance(slide: PredictedSlide) -> dict[str, str]:
    """Returns what a slide's prediction was made from and how, the same in all its files."""
    return provenance_of(slide.record, slide.info)


def provenance_of(record: SlideRecord, info: OutputInfo) -> dict[str, str]:
    """Returns `provenance` of a slide that has no table yet."""
    facts = {
        "model_digest": info.model_digest,
        "unit": info.unit,
        "mpp": info.mpp,
        "tile_size_px": info.tile_size_px,
        "ood_similarity": "" if info.ood_similarity is None else info.ood_similarity,
        "slide_fingerprint": record.fingerprint,
        "slide_mpp": record.mpp,
        "slide_mpp_source": record.mpp_source,
        "slide_not_h_and_e": record.not_h_and_e,
        "missing_tiles": record.missing_tiles,
    }
    return {name: str(value) for name, value in facts.items()}


def tile_left(centre_px: np.ndarray, slide: PredictedSlide) -> np.ndarray:
    """Returns the left (or top) edges of a slide's tiles around centres (n,), in level-0 pixels, float64 (n,)."""
    return tile_corner(centre_px, slide.info.tile_size_px, slide.record.scale)


def tile_edge(slide: PredictedSlide) -> float:
    """Returns the edge of a tile in level-0 pixels."""
    return slide.info.tile_size_px * slide.record.scale
