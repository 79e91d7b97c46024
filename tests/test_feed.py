"""The steps in which some rank has fewer than two tiles, found from the rows of all ranks."""

from pathlib import Path

import numpy as np
import pytest
from small_table import make_table

from mclstexp.config import Config, override
from mclstexp.data import random_spots
from mclstexp.data.schema import MANIFEST
from mclstexp.training.feed import Feed, SpotFeed, make_feed, short_steps
from mclstexp.training.run import open_run

SPOTS = {"A1": 1, "B1": 5, "C1": 1, "D1": 6, "E1": 4, "F1": 3}
"""Of each of the two sentences of a section."""


def _feed(folder: Path, batch_sentences: int, shuffle_pairs: bool = False) -> Feed:
    counts = {name: np.random.default_rng(0).integers(1, 9, (2 * n, 8)).astype(np.int32) for name, n in SPOTS.items()}
    (folder / "table").mkdir()
    manifest = make_table(folder / "table", counts)
    (folder / "table" / MANIFEST).write_bytes(manifest.model_copy(update={"tile_size_px": 16}).encode())
    settings = {
        "genes.num_genes": 4,
        "split.test_patients": ["F"],
        "train.batch_sentences": batch_sentences,
        "train.shuffle_pairs": shuffle_pairs,
    }
    run = open_run(str(folder / "table"), str(folder), "run", override(Config(), settings), lambda *_: "untracked")
    return make_feed(run.config, run.reader, run.split.train)


@pytest.mark.parametrize("shuffle_pairs", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_short_steps_are_those_in_which_a_rank_loads_fewer_than_two_tiles(
    world_size: int, shuffle_pairs: bool, tmp_path: Path
) -> None:
    feed, found = _feed(tmp_path, 2, shuffle_pairs), []
    for epoch in range(6):
        expected = set()
        for rank in range(world_size):
            rows = feed.rows(epoch, (), rank, world_size)
            tiles = [_tiles(row) for row in rows]
            size = feed.batch_shape(world_size).num_rows
            expected |= {at // size for at in range(0, len(rows), size) if sum(tiles[at : at + size]) < 2}
        assert short_steps(feed, epoch, (), world_size) == expected
        found.append(expected)
    assert any(found) == (world_size == 2), "a sentence of one spot may be a rank's only one, and is never a step's"


def _tiles(row: dict[str, object]) -> int:
    """Spots that are certain to be kept, of which an image and its partner's expression have as many."""
    names = (str(row["section_id"]), str(row["expression_section"]))
    return min(SPOTS[name] for name in names) if names[0] else 0


def test_a_short_step_of_random_spots_is_a_short_last_one() -> None:
    loader = random_spots.SpotLoader(None, 32, None)  # type: ignore[arg-type]  # nothing is loaded
    feed = SpotFeed(num_spots=9, loader=loader, batch_spots=4, seed=0)
    assert short_steps(feed, 0, (), 1) == {2}
    assert short_steps(feed, 0, range(3), 1) == set()
    assert short_steps(feed, 0, (), 2) == {2}
