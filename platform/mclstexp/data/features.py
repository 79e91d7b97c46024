"""The feature table: a frozen encoder's pooled features of every tile, stored once beside the tile table.

`TILES/features/NAME/` has `manifest.json`, the commit point, and one Parquet file per section with the row groups of
the section file. Each block, a pooled layer of a view, is one column of fixed-width little-endian bytes, so that
pandas, R and NumPy read it without this project. NAME contains a digest of everything that the numbers depend on, so
that features of two encoders never mix.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict

FEATURES = "features"
"""Folder of the feature tables below a tile table."""
RGB = "rgb"
"""Block of each view: mean and standard deviation of red, green and blue in [0, 1], float32 (n, 6)."""


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
    """Where the weights were read from; None: random, or ImageNet's."""


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
    footer_offset: int
    row_groups: tuple[FeatureGroup, ...]


class FeatureManifest(_Record):
    """The commit point of a feature table."""

    schema_version: int = 1
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


@dataclass(frozen=True)
class FeatureReader:
    """Reads one feature table as arrays; crosses process borders and imports no torch."""

    root: str
    """URI of the feature table."""
    manifest: FeatureManifest
    views: tuple[str, ...]
    """The views whose blocks are joined, in this order; within a view the encoder's layers in theirs."""

    @property
    def num_features(self) -> int:
        """Width F of the joined features."""
        return len(self.views) * sum(self.manifest.encoder.widths)

    def read(self, section_id: str, group: int, draw: int | None = None) -> np.ndarray:
        """Returns the features of one sentence in stored order, float32 (n, F), by one range request.

        Args:
            section_id: the section.
            group: index of the row group.
            draw: number of the augmented draw; None: the plain tiles.

        Raises:
            TableError: the file is missing or damaged; names section, sentence and how to make it again.
        """
        raise NotImplementedError

    def read_section(self, section_id: str) -> np.ndarray:
        """Returns the features of a whole section's plain tiles in stored order, float32 (N, F).

        Raises:
            TableError: as `read`.
        """
        raise NotImplementedError

    def read_colours(self, section_id: str) -> np.ndarray:
        """Returns the block `RGB` of the first view for a whole section, float32 (N, 6).

        Raises:
            TableError: as `read`.
        """
        raise NotImplementedError


def find_features(tiles: str, section_ids: Sequence[str], name: str) -> FeatureReader | None:
    """Returns the reader of a feature table if it has all these sections, cut as the tile table has them now."""
    raise NotImplementedError
