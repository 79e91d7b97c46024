"""The published batches: random spots of all sections that attend to each other.

All encoded rows are read once into the object store (the 11,548 tiles of HER2+ are about 150 MB as JPEG and several
times that as PNG) and fully permuted in each epoch. The memory grows with the data set, so data above `MAX_BYTES` is
refused; `batching: sentences` has no such limit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import ray

from mclstexp.cluster import MAX_RETRIES
from mclstexp.data.spots import Batch, SpotReader, decode_sentences, joined, pad
from mclstexp.errors import ConfigError

MAX_BYTES = 4 * 2**30


@dataclass(frozen=True)
class EncodedSpots:
    """All rows of the training sections in stored order: encoded tiles or features, expression and position."""

    tiles: pa.ChunkedArray | None
    expression: np.ndarray
    position: np.ndarray
    features: np.ndarray | None = None
    """Stored features, float32 (N, K, F), of the K augmented draws or of the plain tile (K = 1); None: tiles."""


def require_size(reader: SpotReader, section_ids: Sequence[str], batch_spots: int, num_draws: int = 0) -> int:
    """Returns the number of spots of the sections.

    Raises:
        ConfigError: their rows exceed `MAX_BYTES`, or do not fill a batch.
    """
    manifest = reader.manifest
    num_spots = manifest.num_spots(section_ids)
    num_bytes = sum(group.length for name in section_ids for group in manifest.section(name).row_groups)
    if reader.features is not None:
        num_bytes = 4 * num_spots * (max(1, num_draws) * reader.features.num_features + len(reader.columns))
    if num_bytes > MAX_BYTES:
        raise ConfigError(
            f"train.batching=random_spots keeps all training rows in memory: {num_bytes / 2**30:.1f} GiB, at most "
            f"{MAX_BYTES / 2**30:.0f} GiB are allowed; use train.batching=sentences"
        )
    if num_spots < batch_spots:
        raise ConfigError(f"train.batch_spots={batch_spots} exceeds the {num_spots} training spots; use at most those")
    return num_spots


def encode_spots(reader: SpotReader, section_ids: Sequence[str], num_draws: int = 0) -> ray.ObjectRef:
    """Reads all rows of the sections with Ray tasks and returns a reference to their EncodedSpots.

    Args:
        reader: of tiles or of stored features.
        section_ids: the training sections.
        num_draws: augmented draws whose features are read; 0: those of the plain tiles.
    """
    read = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(_read)
    shared = ray.put(reader)
    parts = ray.get([read.remote(shared, *sentence, num_draws) for sentence in reader.manifest.sentences(section_ids)])
    of_features = reader.features is not None
    return ray.put(
        EncodedSpots(
            tiles=None if of_features else pa.chunked_array([tiles for _, tiles in parts]),
            expression=np.concatenate([spots["expression"] for spots, _ in parts]),
            position=np.concatenate([spots["position"] for spots, _ in parts]),
            features=np.concatenate([features for _, features in parts]) if of_features else None,
        )
    )


def _read(reader: SpotReader, section_id: str, group: int, num_draws: int) -> tuple[Batch, pa.Array | np.ndarray]:
    """Returns a sentence's spots, and its encoded tiles or its features, float32 (n, K, F)."""
    if reader.features is None:
        return reader.read_encoded(section_id, group)
    draws = [reader.features.read(section_id, group, draw) for draw in (range(num_draws) if num_draws else [None])]
    return reader.read_spots(section_id, group), np.stack(draws, axis=1)


def spot_order(num_spots: int, seed: int, epoch: int) -> np.ndarray:
    """Returns one epoch's permutation of the spots, int64 (num_spots,)."""
    return np.random.default_rng([seed, epoch]).permutation(num_spots)


def rank_slice(order: np.ndarray, batch_spots: int, rank: int, world_size: int, epoch: int) -> list[dict[str, object]]:
    """Returns one rank's rows of the stream: its equal share of every batch, -1 where the last batch is short.

    A short last batch is split evenly, so that every rank has spots in it if there are enough.
    """
    num_steps = -(-len(order) // batch_spots)
    share = batch_spots // world_size
    rows: list[dict[str, object]] = []
    for step in range(num_steps):
        mine = np.array_split(order[step * batch_spots : (step + 1) * batch_spots], world_size)[rank]
        spots = np.concatenate([mine, np.full(share - len(mine), -1)]).astype(np.int64)
        rows.append({"spots": spots, "epoch": epoch})
    return rows


@dataclass(frozen=True)
class SpotLoader:
    """The map function of the stream: takes rows of spot numbers, returns their padded arrays."""

    encoded: ray.ObjectRef
    tile_size_px: int
    partner: np.ndarray | None
    """For the shuffled-pairs control: the spot whose expression each image gets, int64 (num_spots,); else None."""
    reads_features: bool = False
    """Whether `encoded` has stored features instead of tiles."""

    def keeping(self) -> "SpotLoader":
        """Returns the loader for all epochs of one process: this one, because all spots are in memory."""
        return self

    def __call__(self, rows: dict[str, np.ndarray]) -> Batch:
        """Returns spot (-1: none), image or features, expression, position and mask with leading shape (n, share)."""
        spots: EncodedSpots = ray.get(self.encoded)
        wanted = np.stack(list(rows["spots"]))
        real = [numbers[numbers >= 0] for numbers in wanted]
        arrays = [self._arrays(spots, *each) for each in zip(real, rows["epoch"].tolist(), strict=True)]
        batch = joined([pad(each, wanted.shape[1]) for each in arrays]) | {"spot": wanted}
        if spots.tiles is None:
            return batch
        # `tiles.take` would copy all tiles, and fail beyond 2 GiB
        encoded = [[spots.tiles[number].as_py() for number in numbers.tolist()] for numbers in real]
        return batch | {"image": decode_sentences(encoded, wanted.shape[1], self.tile_size_px)}

    def _arrays(self, spots: EncodedSpots, wanted: np.ndarray, epoch: int) -> Batch:
        """Returns the arrays of some spots, without their tiles; stored draws are taken in turn over the epochs."""
        source = wanted if self.partner is None else self.partner[wanted]
        arrays = {"expression": spots.expression[source], "position": spots.position[source]}
        if spots.features is None:
            return arrays
        return arrays | {"features": spots.features[wanted, (wanted + epoch) % spots.features.shape[1]]}
