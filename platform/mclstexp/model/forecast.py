"""Forecast of what computing a table's features will take: a few tiles are timed on this machine."""

import os
import time
from collections.abc import Sequence

import torch

from mclstexp.data.features import FeatureManifest
from mclstexp.data.schema import Manifest
from mclstexp.data.spots import decode_tiles
from mclstexp.data.table import read_sentence
from mclstexp.messages import duration
from mclstexp.model.extractor import Extractor
from mclstexp.model.frozen import FrozenEncoder
from mclstexp.model.tile_stream import TILES_AT_ONCE

_RGB_BYTES = 24


def forecast(
    tiles: str, manifest: Manifest, section_ids: Sequence[str], encoder: FrozenEncoder, plain: FeatureManifest
) -> str:
    """Returns in words how long the features of some sections take to compute here, and how large they are.

    Args:
        tiles: URI of the tile table.
        manifest: of the tile table.
        section_ids: sections whose features are missing.
        encoder: the encoder.
        plain: what the feature table is.
    """
    num_spots = manifest.num_spots(section_ids)
    if not num_spots:
        return "nothing to compute"
    per_view = sum(encoder.record.widths) * plain.number_type().itemsize * (1 + plain.num_draws) + _RGB_BYTES
    gigabytes = num_spots * len(plain.views) * per_view / 1e9
    seconds, on = _seconds_per_spot(tiles, manifest, section_ids, encoder, plain)
    return (
        f"{num_spots} spots of {len(section_ids)} section(s), {gigabytes:.3g} GB; {1000 * seconds:.3g} ms per spot on "
        f"{on}: about {duration(num_spots * seconds)} there, divided among the cores or GPUs that encode"
    )


def _seconds_per_spot(
    tiles: str, manifest: Manifest, section_ids: Sequence[str], encoder: FrozenEncoder, plain: FeatureManifest
) -> tuple[float, str]:
    """Returns the seconds to decode and encode a spot, and on what."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    extract = Extractor(encoder.state(), plain, device)
    name = next(name for name in section_ids if manifest.section(name).num_spots)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of the processes that encode
    try:
        for _ in range(2):  # the first pass warms up
            start = time.perf_counter()
            table = read_sentence(tiles, manifest.section(name), 0).slice(0, TILES_AT_ONCE[device.type])
            views = {view: decode_tiles(table[view].to_pylist(), manifest.view_size_px(view)) for view in plain.views}
            extract(views, name)
            seconds = (time.perf_counter() - start) / table.num_rows
    finally:
        torch.set_num_threads(threads)
    cores = os.cpu_count() or 1
    return seconds, "a GPU here" if device.type == "cuda" else f"one of the {cores} CPU core(s) here"
