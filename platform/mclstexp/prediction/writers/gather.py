"""From a slide's parts to the expression of its complete tiles, group by group, when all its parts are written.

Parts hold expression, or the scores of a program model, which become expression when they are known as a whole. So the
scores of all tiles may be in memory, 140 bytes per tile, and expression of one group only. Each part is fetched once.

Shapes: n tiles of a group, m of them complete, W values of a tile, S sums of a part, G genes.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from mclstexp.model.decode import SlideDecoder, TileScores
from mclstexp.prediction.parts import PART_TILES, SlideRecord, num_parts, read_part
from mclstexp.prediction.writers.slide import OutputInfo

GROUP_PARTS = 16
GROUP_TILES = GROUP_PARTS * PART_TILES
"""Most tiles of a group."""
_NO_VALUES = np.zeros((0, 0), np.float32)


@dataclass(frozen=True)
class Group:
    """The answers for the complete tiles of consecutive parts."""

    complete: np.ndarray
    """bool (n,): whether the slide has pixels there, of all the group's tiles in the order of the grid."""
    values: np.ndarray
    """float32 (m, W): expression in the model's unit, W = G, or what `SlideDecoder` takes."""
    sums: np.ndarray
    """float64 (S,), over the group."""
    confidence: dict[str, np.ndarray]
    """`OutputInfo.confidence`, float32 (m,) each."""


def gather(staging: str, record: SlideRecord, grid: pa.Table, info: OutputInfo) -> Iterator[Group]:
    """Yields the groups of a slide in the order of the grid, with expression as their values.

    Args:
        staging: URI of the slide's staging folder, with all parts.
        record: of the slide.
        grid: its tiles, GRID_SCHEMA.
        info: the model that made the parts.

    Raises:
        PartError: a part is missing or was damaged.
    """
    firsts = range(0, num_parts(record.num_tiles), GROUP_PARTS)
    groups = (_read(staging, first, record.num_tiles, info) for first in firsts)
    return groups if info.decoder is None else _decoded(list(groups), grid, info.decoder)


def _read(staging: str, first: int, num_tiles: int, info: OutputInfo) -> Group:
    """Returns the group that begins with part `first`."""
    numbers = range(first, min(first + GROUP_PARTS, num_parts(num_tiles)))
    sizes = (num_tiles, info.num_values, info.num_sums, info.confidence)
    with ThreadPoolExecutor(len(numbers)) as pool:  # it waits for the store
        parts = list(pool.map(lambda part: read_part(staging, part, *sizes), numbers))
    complete = np.concatenate([part.complete for part in parts])
    return Group(
        complete,
        np.concatenate([part.values for part in parts])[complete],
        np.sum([part.sums for part in parts], axis=0),
        {name: np.concatenate([part.confidence[name] for part in parts])[complete] for name in info.confidence},
    )


def _decoded(groups: list[Group], grid: pa.Table, decoder: SlideDecoder) -> Iterator[Group]:
    complete = np.concatenate([group.complete for group in groups])
    xy_um = np.stack([grid[name].to_numpy() for name in ("x_um", "y_um")], axis=1)[complete]
    tiles = TileScores(
        np.concatenate([group.values for group in groups]), np.sum([group.sums for group in groups], axis=0)
    )
    groups = [replace(group, values=_NO_VALUES) for group in groups]  # their memory is needed
    scores, level = decoder.scores(tiles, xy_um), decoder.slide_level(tiles)
    del tiles
    start = 0
    for group in groups:
        rows = slice(start, start + int(group.complete.sum()))
        yield replace(group, values=decoder.expression(scores[rows], level))
        start = rows.stop
