"""The order of the training stream: every sentence once per epoch, whatever the world size or the restart."""

import itertools
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import ray.data
from small_table import manifest_of

from mclstexp.config import Config, override
from mclstexp.data import spots, stream
from mclstexp.data.genes import GenePanel
from mclstexp.data.schema import load_genes, load_manifest
from mclstexp.training import worker
from mclstexp.training.checkpoint import TrainState
from mclstexp.training.feed import SentenceFeed

SENTENCES = stream.sentence_index(manifest_of({"A1": 5, "A2": 5, "B1": 5, "C1": 8}), ["A1", "A2", "B1", "C1"])


def _ids(rows: list[dict[str, object]]) -> list[object]:
    return [row["sentence_id"] for row in rows if row["sentence_id"]]


def test_an_epoch_is_a_permutation_fixed_by_seed_and_epoch() -> None:
    first, again = (stream.epoch_order(SENTENCES, seed=1, epoch=0) for _ in range(2))
    assert first == again
    assert sorted(first, key=repr) == sorted(SENTENCES, key=repr)
    orders = [
        tuple(s.sentence_id for s in stream.epoch_order(SENTENCES, seed, epoch)) for seed in (1, 2) for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4


def test_a_batch_holds_sentences_of_different_sections() -> None:
    even = [sentence for sentence in SENTENCES if sentence.section_id != "C1"]
    order = stream.epoch_order(even, seed=3, epoch=5)
    for start in range(0, len(order), 3):
        assert len({sentence.section_id for sentence in order[start : start + 3]}) == 3


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_each_global_step_whatever_the_world_size(world_size: int) -> None:
    order = stream.epoch_order(SENTENCES, seed=0, epoch=0)
    ranks = [stream.rank_slice(order, 4, rank, world_size, epoch=0) for rank in range(world_size)]
    assert len({len(rows) for rows in ranks}) == 1
    share = 4 // world_size
    steps = len(ranks[0]) // share
    by_step = [
        _ids([row for rows in ranks for row in rows[step * share : (step + 1) * share]]) for step in range(steps)
    ]
    assert list(itertools.chain(*by_step)) == [sentence.sentence_id for sentence in order]
    assert [len(ids) for ids in by_step] == [4, 4, 4, 4, 4, 3]


def test_shuffled_pairs_are_others_expression_and_new_each_epoch() -> None:
    orders = [stream.epoch_order(SENTENCES, seed=0, epoch=epoch) for epoch in (0, 1)]
    shuffled = [stream.mispaired(order) for order in orders]
    for order, pairs in zip(orders, shuffled, strict=True):
        assert [pair.sentence_id for pair in pairs] == [sentence.sentence_id for sentence in order]
        assert all(pair.expression_of != (pair.section_id, pair.group) for pair in pairs)
        assert len({pair.expression_of for pair in pairs}) == len(order)
    partners = [{pair.sentence_id: pair.expression_of for pair in pairs} for pairs in shuffled]
    assert sum(partners[0][name] == partners[1][name] for name in partners[0]) < len(SENTENCES) / 4


def test_kept_spots_are_ordered_within_bounds_and_new_each_epoch() -> None:
    kept = [spots.kept_spots(100, 0.3, seed=0, epoch=epoch, sentence_id="A1/0") for epoch in range(20)]
    assert all(70 <= len(rows) <= 100 and (np.diff(rows) > 0).all() for rows in kept)
    assert len({tuple(rows) for rows in kept}) > 10
    assert list(spots.kept_spots(1, 0.9, 0, 0, "x")) == [0]
    assert list(spots.kept_spots(7, 0.0, 0, 0, "x")) == list(range(7))


def test_padding_is_masked_zeros() -> None:
    padded = spots.pad({"a": np.ones((2, 3)), "b": np.arange(2)}, 4)
    assert padded["a"].shape == (1, 4, 3)
    assert padded["mask"].tolist() == [[True, True, False, False]]
    assert padded["a"][0, 2:].sum() == 0


def test_a_dataset_has_whole_epochs() -> None:
    epochs = [[{"epoch": epoch}] * 3 for epoch in range(5)]
    for min_rows, sizes in ((1, [3, 3, 3, 3, 3]), (4, [6, 6, 3]), (6, [6, 6, 3]), (100, [15])):
        joined = list(stream._joined(epochs, min_rows))
        assert [len(rows) for rows in joined] == sizes
        assert list(itertools.chain(*joined)) == list(itertools.chain(*epochs))
    assert list(stream._joined([[], []], 1)) == []


@pytest.mark.ray
@pytest.mark.parametrize(
    ("row_bytes", "dataset_tasks", "num_tasks"),
    [
        (stream._TASK_BYTES, 64, [6]),
        (stream._TASK_BYTES // 4, 64, [3]),
        (1, 64, [1]),
        (stream._TASK_BYTES, 1, [3, 3]),
    ],
    ids=["a batch in a task", "two batches in a task", "all in a task", "an epoch in a dataset"],
)
def test_batches_come_in_the_order_of_the_epochs(
    tiles: str, monkeypatch: pytest.MonkeyPatch, row_bytes: int, dataset_tasks: int, num_tasks: list[int]
) -> None:
    loader, epochs = _real_epochs(tiles)
    made: list[ray.data.Dataset] = []
    plainly = ray.data.from_blocks
    monkeypatch.setattr(
        ray.data, "from_blocks", lambda *given, **named: made.append(plainly(*given, **named)) or made[-1]
    )
    monkeypatch.setattr(stream, "_DATASET_TASKS", dataset_tasks)
    share = stream.StreamShare(2, 100 * 2**20, None)
    batches = list(stream.stream(epochs, loader, stream.BatchShape(2, row_bytes), share))
    assert [dataset.num_blocks() for dataset in made] == num_tasks
    assert [list(batch["sentence_id"]) for batch in batches] == [
        [row["sentence_id"] for row in epoch[start : start + 2]]
        for epoch in epochs
        for start in range(0, len(epoch), 2)
    ]
    rows = itertools.chain(*epochs)
    for batch in batches:
        for index, row in zip(range(2), rows, strict=False):
            alone = loader({name: np.array([value]) for name, value in row.items()})
            for name in ("image", "expression", "position", "mask"):
                assert np.array_equal(batch[name][index], alone[name][0])
    assert next(rows, None) is None


def _real_epochs(root: str) -> tuple[spots.SentenceLoader, list[stream.Rows]]:
    """Two epochs of six sentences each, the last one a filler, and what loads them."""
    manifest = load_manifest(root)
    panel = GenePanel.from_table(load_genes(root, manifest))
    sections = [entry.section_id for entry in manifest.sections if entry.measured]
    reader = spots.make_reader(root, manifest, panel, Config(), sections)
    few = stream.sentence_index(manifest, sections)[:5]
    orders = [stream.epoch_order(few, seed=0, epoch=epoch) for epoch in range(2)]
    epochs = [stream.rank_slice(order, 2, 0, 1, epoch) for epoch, order in enumerate(orders)]
    return spots.SentenceLoader(reader, drop_spots=0.3, seed=0), epochs


@pytest.mark.parametrize("consumed", [(), ("A1/0", "C1/3", "B1/2", "A2/4", "C1/0")], ids=["from its start", "resumed"])
def test_all_ranks_together_take_the_same_steps_in_every_epoch(consumed: tuple[str, ...]) -> None:
    steps = {}
    for world_size in (1, 2, 4):
        ranks = [_steps_left(consumed, rank, world_size) for rank in range(world_size)]
        steps[world_size] = [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]
    assert steps[1] == steps[2] == steps[4]
    left = len(SENTENCES) - len(consumed)
    first, second = steps[1][: -(-left // 4)], steps[1][-(-left // 4) :]
    everything = {sentence.sentence_id for sentence in SENTENCES}
    assert sorted(itertools.chain(*first)) == sorted(everything - set(consumed))
    assert sorted(itertools.chain(*second)) == sorted(everything)


def _steps_left(consumed: tuple[str, ...], rank: int, world_size: int) -> list[list[object]]:
    """What a rank takes in each step of two epochs, of the first one after `consumed`."""
    config = override(Config(), {"train.epochs": 5})
    state = TrainState({}, epoch=3, consumed=list(consumed))
    rank_state = SimpleNamespace(config=config, state=state, rank=rank, world_size=world_size)
    made = SentenceFeed(SENTENCES, None, batch_sentences=4, seed=0, shuffle_pairs=False)  # type: ignore[arg-type]
    rows = list(itertools.chain(*worker.epochs_left(rank_state, made)))  # type: ignore[arg-type]
    share = 4 // world_size
    return [_ids(rows[start : start + share]) for start in range(0, len(rows), share)]


@pytest.mark.ray
def test_a_slow_step_holds_the_stream_back(tiles: str, tmp_path: Path) -> None:
    loader, epochs = _real_epochs(tiles)

    def counted(rows: dict[str, np.ndarray]) -> spots.Batch:
        (tmp_path / uuid.uuid4().hex).touch()
        return loader(rows)

    batch_bytes = 2 * loader.reader.manifest.sentence_length * 3 * 32**2
    share = stream.StreamShare(2, 10 * batch_bytes, None)
    batches = stream.stream(epochs * 10, counted, stream.BatchShape(2, stream._TASK_BYTES), share)
    next(batches)
    time.sleep(1.0)
    assert len(list(tmp_path.iterdir())) < len(epochs) * 10 * 3 / 2
    assert len(list(batches)) == len(epochs) * 10 * 3 - 1
    assert len(list(tmp_path.iterdir())) == len(epochs) * 10 * 3


@pytest.mark.ray
@pytest.mark.slow
def test_a_rank_that_dies_leaves_the_streams_of_others_alone(tiles: str) -> None:
    loader, epochs = _real_epochs(tiles)
    many = epochs * 15
    ranks = [Rank.remote() for _ in range(2)]  # type: ignore[attr-defined]
    assert ray.get([rank.take.remote(loader, many, 1) for rank in ranks]) == [1, 1]
    lost, kept = [rank.take.remote(loader, many, len(many) * 3) for rank in ranks]
    ray.kill(ranks[0])
    assert ray.get(kept, timeout=120) == len(many) * 3
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(lost)
    ray.kill(ranks[1])


@ray.remote(num_cpus=0)
class Rank:
    """A process that takes batches of its own stream."""

    def take(self, loader: spots.SentenceLoader, epochs: list[stream.Rows], num_batches: int) -> int:
        """Returns how many batches came, at most `num_batches`."""
        share = stream.StreamShare(1, 100 * 2**20, None)
        batches = stream.stream(epochs, loader, stream.BatchShape(2, stream._TASK_BYTES), share)
        return sum(1 for _ in itertools.islice(batches, num_batches))
