"""The batches of an epoch: sentences of neighbouring spots, or random spots as published.

Both feeds answer the same questions (how many steps, which rows belong to a rank, how many it takes in a step, how
they are loaded, which ids a batch has), so that the training loop needs no branch.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import ray

from mclstexp.config import Config
from mclstexp.data import random_spots, stream
from mclstexp.data.spots import Batch, SentenceLoader, SpotReader
from mclstexp.data.stream import BatchShape, Rows, Sentence, StreamShare
from mclstexp.training.tower_loader import TowerLoader

Ids = Collection[str | int]


@dataclass(frozen=True)
class SentenceFeed:
    """Global batches of whole sentences."""

    sentences: list[Sentence]
    loader: SentenceLoader | TowerLoader
    batch_sentences: int
    seed: int
    shuffle_pairs: bool

    def num_steps(self, num_consumed: int = 0) -> int:
        """Returns the number of steps of an epoch, or of its rest after `num_consumed`."""
        return -(-(len(self.sentences) - num_consumed) // self.batch_sentences)

    def rows(self, epoch: int, consumed: Ids, rank: int, world_size: int) -> Rows:
        """Returns the rank's stream rows of an epoch, without the consumed sentences."""
        order = stream.epoch_order(self.sentences, self.seed, epoch)
        order = stream.mispaired(order) if self.shuffle_pairs else order
        done = set(consumed)
        left = [sentence for sentence in order if sentence.sentence_id not in done]
        return stream.rank_slice(left, self.batch_sentences, rank, world_size, epoch)

    def batch_shape(self, world_size: int) -> BatchShape:
        """Returns what a rank takes in a step."""
        manifest = self.loader.reader.manifest
        return BatchShape(self.batch_sentences // world_size, manifest.sentence_length * 3 * manifest.tile_size_px**2)

    def tiles_per_step(self, world_size: int) -> int:
        """Returns how many tiles a rank takes in a step, at most."""
        return self.batch_shape(world_size).num_rows * self.loader.reader.manifest.sentence_length

    def min_tiles(self, rows: Rows) -> list[int]:
        """Returns the number of tiles of each stream row, 2 where it is more."""
        groups = {entry.section_id: entry.row_groups for entry in self.loader.reader.manifest.sections}

        def num_tiles(row: dict[str, object], section: str, group: str) -> int:
            return 0 if row[group] == -1 else groups[str(row[section])][int(str(row[group]))].num_rows

        sentences = (("section_id", "group"), ("expression_section", "expression_group"))
        return [min(2, *(num_tiles(row, *names) for names in sentences)) for row in rows]

    def ids(self, batch: Batch) -> list[str | int]:
        """Returns the ids of the sentences in a batch."""
        return [str(name) for name in batch["sentence_id"] if name]


@dataclass(frozen=True)
class SpotFeed:
    """Global batches of random spots, each one sentence."""

    num_spots: int
    loader: random_spots.SpotLoader
    batch_spots: int
    seed: int

    def num_steps(self, num_consumed: int = 0) -> int:
        """Returns the number of steps of an epoch, or of its rest after `num_consumed`."""
        return -(-(self.num_spots - num_consumed) // self.batch_spots)

    def rows(self, epoch: int, consumed: Ids, rank: int, world_size: int) -> Rows:
        """Returns the rank's stream rows of an epoch, without the consumed spots."""
        order = random_spots.spot_order(self.num_spots, self.seed, epoch)
        left = order[~np.isin(order, np.array(list(consumed), np.int64))]
        return random_spots.rank_slice(left, self.batch_spots, rank, world_size, epoch)

    def batch_shape(self, world_size: int) -> BatchShape:
        """Returns what a rank takes in a step."""
        return BatchShape(1, self.batch_spots // world_size * 3 * self.loader.tile_size_px**2)

    def tiles_per_step(self, world_size: int) -> int:
        """Returns how many tiles a rank takes in a step, at most."""
        return self.batch_spots // world_size

    def min_tiles(self, rows: Rows) -> list[int]:
        """Returns the number of tiles of each stream row, 2 where it is more."""
        return [min(2, int((np.asarray(row["spots"]) >= 0).sum())) for row in rows]

    def ids(self, batch: Batch) -> list[str | int]:
        """Returns the numbers of the spots in a batch."""
        return [int(spot) for spot in batch["spot"].ravel() if spot >= 0]


Feed = SentenceFeed | SpotFeed


def make_feed(config: Config, reader: SpotReader, section_ids: Collection[str]) -> Feed:
    """Returns the feed over the training sections; with `random_spots` it reads them into the object store.

    Raises:
        ConfigError: the sections are too large for `random_spots`.
    """
    train, sections = config.train, sorted(section_ids)
    if train.batching == "sentences":
        sentences = stream.sentence_index(reader.manifest, sections)
        loader = SentenceLoader(reader, train.drop_spots, train.seed, train.feature_draws)
        return SentenceFeed(sentences, loader, train.batch_sentences, train.seed, train.shuffle_pairs)
    num_spots = random_spots.require_size(reader, sections, train.batch_spots, train.feature_draws)
    partner = np.random.default_rng(train.seed).permutation(num_spots) if train.shuffle_pairs else None
    encoded: ray.ObjectRef = random_spots.encode_spots(reader, sections, train.feature_draws)
    reads_features = reader.features is not None
    spot_loader = random_spots.SpotLoader(encoded, reader.manifest.tile_size_px, partner, reads_features)
    return SpotFeed(num_spots, spot_loader, train.batch_spots, train.seed)


def tower_feed(config: Config, loader: TowerLoader) -> SentenceFeed:
    """Returns the feed over the sentences that have training spots, for the towers of programs."""
    sentences = stream.sentence_index(loader.reader.manifest, loader.scores)
    seen = [each for each in sentences if loader.has_spots(each.section_id, each.group)]
    return SentenceFeed(seen, loader, config.train.batch_sentences, config.train.seed, shuffle_pairs=False)


def short_steps(feed: Feed, epoch: int, consumed: Ids, world_size: int) -> set[int]:
    """Returns the steps of the rest of an epoch, counted from 0, in which a rank has fewer than two tiles.

    Every rank finds the same from the rows of all ranks, without asking the others.
    """
    size, short = feed.batch_shape(world_size).num_rows, set[int]()
    for rank in range(world_size):
        tiles = feed.min_tiles(feed.rows(epoch, consumed, rank, world_size))
        short |= {start // size for start in range(0, len(tiles), size) if sum(tiles[start : start + size]) < 2}
    return short


def open_batches(feed: Feed, epochs: Iterable[Rows], world_size: int, share: StreamShare) -> Iterator[Batch]:
    """Yields the batches of a rank's epochs, one after the other.

    Tiles are decoded by tasks of Ray Data; stored features are read in the worker itself, which keeps them in memory.
    """
    batch = feed.batch_shape(world_size)
    if feed.loader.reads_features:
        return stream.read_ahead(epochs, feed.loader.keeping(), batch.num_rows)
    return stream.stream(epochs, feed.loader, batch, share)
