"""Random spots of all sections: their order, their loading, and data that is too large."""

import numpy as np
import pyarrow as pa
import pytest
from small_table import manifest_of

from mclstexp.config import Config
from mclstexp.data import random_spots
from mclstexp.data.genes import normalisers
from mclstexp.data.spots import SpotReader
from mclstexp.errors import ConfigError
from mclstexp.slides.codec import encode_tile


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_random_spots_are_an_exact_permutation_in_equal_steps(world_size: int) -> None:
    order = random_spots.spot_order(30, seed=0, epoch=1)
    ranks = [random_spots.rank_slice(order, 8, rank, world_size, epoch=1) for rank in range(world_size)]
    assert {len(rows) for rows in ranks} == {4}
    for step in range(4):
        spots = np.concatenate([rows[step]["spots"] for rows in ranks])
        assert sorted(spots[spots >= 0]) == sorted(order[step * 8 : (step + 1) * 8])
    assert all(len(row["spots"]) == 8 // world_size for rows in ranks for row in rows)


def test_random_spots_are_loaded_from_any_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), np.uint8)
    encoded = pa.array([encode_tile(tile, "png", 90) for tile in tiles])
    numbers = np.arange(7, dtype=np.float32)[:, None]
    spots = random_spots.EncodedSpots(pa.chunked_array([encoded[:3], encoded[3:4], encoded[4:]]), numbers, -numbers)
    monkeypatch.setattr(random_spots.ray, "get", lambda reference: reference)  # the store, which needs a cluster
    loader = random_spots.SpotLoader(spots, 16, None)  # type: ignore[arg-type]
    batch = loader({"spots": np.array([[6, 0, 3, -1]]), "epoch": np.array([0])})
    assert np.array_equal(batch["image"][0, :3], tiles[[6, 0, 3]])
    assert batch["expression"][0, :, 0].tolist() == [6, 0, 3, 0]
    assert batch["position"][0, :3, 0].tolist() == [-6, 0, -3]
    assert batch["mask"].tolist() == [[True, True, True, False]]


def test_data_that_would_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = SpotReader("", manifest_of({"A1": 5}), np.zeros(3, np.int32), *normalisers(Config().genes), "none")
    assert random_spots.require_size(reader, ["A1"], 8) == 50
    monkeypatch.setattr(random_spots, "MAX_BYTES", 499)
    with pytest.raises(ConfigError, match=r"use train\.batching=sentences"):
        random_spots.require_size(reader, ["A1"], 8)
