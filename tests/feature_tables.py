"""Feature tables with random numbers beside tile tables: no encoder, no Ray."""

from pathlib import Path

import numpy as np
from small_table import make_table, random_counts

from mclstexp.data.feature_writer import Blocks, write_features
from mclstexp.data.features import RGB, EncoderRecord, FeatureManifest, FeatureReader, feature_root
from mclstexp.data.schema import Manifest, SectionEntry

WIDTHS = {"class": 5, "mean": 3}


def record(**known: object) -> EncoderRecord:
    """Returns the record of an encoder with two pooled layers."""
    usual: dict[str, object] = {
        "name": "small_cnn",
        "digest": 64 * "0",
        "tile_size_px": 8,
        "layers": tuple(WIDTHS),
        "widths": tuple(WIDTHS.values()),
        "resize_px": None,
        "crop_px": None,
        "scaling": "encoder",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
    }
    return EncoderRecord.model_validate(usual | known)


def plain_table(**known: object) -> FeatureManifest:
    """Returns what a feature table of two views and one draw is, without sections."""
    usual: dict[str, object] = {
        "encoder": record(),
        "views": ("image", "image_wide"),
        "dtype": "float32",
        "arithmetic": "fp32",
        "num_draws": 1,
        "augmentation": "flips",
        "seed": 0,
        "libraries": {"torch": "2"},
    }
    return FeatureManifest.model_validate(usual | known)


def small_tiles(folder: Path) -> Manifest:
    """Writes a tile table of two sections with two sentences each."""
    return make_table(folder, {"A1": random_counts(9, 0), "B1": random_counts(7, 1)})


def random_blocks(plain: FeatureManifest, num_spots: int, seed: int) -> Blocks:
    """Returns random blocks of one sentence."""
    rng = np.random.default_rng(seed)
    widths = {f"{view}/{RGB}": 6 for view in plain.views}
    for draw in (None, *range(plain.num_draws)):
        for view in plain.views:
            widths |= plain.encoder.blocks(view, draw)
    return {name: rng.normal(size=(num_spots, width)).astype(np.float32) for name, width in widths.items()}


def section_blocks(plain: FeatureManifest, entry: SectionEntry, seed: int = 0) -> list[Blocks]:
    """Returns random blocks of each sentence of a section."""
    return [random_blocks(plain, group.num_rows, seed + i) for i, group in enumerate(entry.row_groups)]


def write(tiles: Path | str, plain: FeatureManifest, entry: SectionEntry, blocks: list[Blocks]) -> FeatureReader:
    """Writes a section's blocks; returns the reader of the table."""
    sentences = [([f"spot{i}" for i in range(len(each["image/rgb"]))], each) for each in blocks]
    manifest = write_features(str(tiles), plain, entry, sentences)
    return FeatureReader(feature_root(str(tiles), plain.name), manifest, plain.views, plain.encoder)
