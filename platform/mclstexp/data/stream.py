"""The training stream shuffles the index of sentences, not the data.

An epoch is a permutation of sentence descriptors that depends only on (seed, epoch); Ray Data tasks then read, verify,
decode and normalise one sentence per row. Each rank streams its own slice in exact order, so that the order does not
depend on the world size and a resumed run continues with the rest of the index. In return, the ranks' executions do not
know of each other, and each must get its share of the cluster (`docs/decisions.md`).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import pyarrow as pa
import ray.data
from ray.data import ExecutionResources

from mclstexp.cluster import MAX_RETRIES, ordered
from mclstexp.data.schema import Manifest
from mclstexp.data.spots import Batch


@dataclass(frozen=True)
class Sentence:
    """One sentence of the table, by section and row group."""

    section_id: str
    group: int
    expression_of: tuple[str, int]
    """The sentence whose expression is used: this one, or another one for the shuffled-pairs control."""

    @property
    def sentence_id(self) -> str:
        """The sentence's name, the same in all runs; empty for the filler of a last step."""
        return f"{self.section_id}/{self.group}" if self.section_id else ""


Rows = list[dict[str, object]]
"""What a rank loads, in this order."""
Load = Callable[[dict[str, np.ndarray]], Batch]
"""What loads rows, given by column, n values each."""
_READ_THREADS, _BATCHES_AHEAD = 4, 4
_TASK_BYTES = 16 * 2**20
"""Decoded tiles of a task: starting one takes as long as decoding a few MiB."""
_CALL_BYTES = 128 * 2**20
"""Decoded tiles that a task has in memory at once; Ray hands larger blocks on in parts too."""
_DATASET_TASKS = 64
"""Tasks that make the start of a Dataset short beside their work."""
_EMPTY = Sentence("", -1, ("", -1))


@dataclass(frozen=True)
class StreamShare:
    """The part of the cluster that one rank's stream may use."""

    cpus: int
    object_store_bytes: int
    pool: str | None
    """Value of the node label `pool` of the nodes that decode; None: any node."""


@dataclass(frozen=True)
class BatchShape:
    """What a rank takes in a step."""

    num_rows: int
    row_bytes: int
    """Size of a row's decoded tiles."""


def sentence_index(manifest: Manifest, section_ids: Iterable[str]) -> list[Sentence]:
    """Returns the sentences of the given sections in stored order."""
    return [Sentence(*sentence, expression_of=sentence) for sentence in manifest.sentences(section_ids)]


def epoch_order(sentences: list[Sentence], seed: int, epoch: int) -> list[Sentence]:
    """Returns one epoch's permutation: random within each section, with sections spread evenly over the epoch.

    Sentence i of n of a section comes at about (i + u) / n of the epoch, with u uniform and the same for the section.
    Neighbours in the order, hence the sentences of a global batch, are therefore from different sections.
    """
    rng = np.random.default_rng([seed, epoch])
    keyed: list[tuple[float, int]] = []
    by_section: dict[str, list[int]] = {}
    for index, sentence in enumerate(sentences):
        by_section.setdefault(sentence.section_id, []).append(index)
    for indices in by_section.values():
        shuffled = rng.permutation(indices)
        offset = rng.random()
        keyed += [((i + offset) / len(indices), int(index)) for i, index in enumerate(shuffled)]
    return [sentences[index] for _, index in sorted(keyed)]


def mispaired(order: list[Sentence]) -> list[Sentence]:
    """Returns an epoch's order with each sentence's images paired with another sentence's expression.

    The partner is half an epoch away. It differs in each epoch, because fixed wrong pairs of a small table share chance
    patterns that can be learnt. It is rarely in the same batch, where a sentence's own expression would be a negative
    and never the positive.
    """
    partners = np.roll(np.arange(len(order)), -(len(order) // 2))
    return [replace(one, expression_of=order[two].expression_of) for one, two in zip(order, partners, strict=True)]


def rank_slice(order: list[Sentence], batch_sentences: int, rank: int, world_size: int, epoch: int) -> Rows:
    """Returns one rank's rows of the stream, the same number for every rank.

    Global step s takes `batch_sentences` sentences from s * batch_sentences on, and each rank an equal run of them. The
    last step is filled with empty rows (group -1), which count neither in the loss nor as negatives.
    """
    num_steps = -(-len(order) // batch_sentences)
    filled = order + [_EMPTY] * (num_steps * batch_sentences - len(order))
    share = batch_sentences // world_size
    starts = [step * batch_sentences + rank * share for step in range(num_steps)]
    return [_row(sentence, epoch) for start in starts for sentence in filled[start : start + share]]


def _row(sentence: Sentence, epoch: int) -> dict[str, object]:
    section_id, group = sentence.expression_of
    return {
        "sentence_id": sentence.sentence_id,
        "section_id": sentence.section_id,
        "group": sentence.group,
        "expression_section": section_id,
        "expression_group": group,
        "epoch": epoch,
    }


def stream(epochs: Iterable[Rows], load: Load, batch: BatchShape, share: StreamShare) -> Iterator[Batch]:
    """Yields batches of loaded rows in the order of `epochs`, decoded ahead by Ray Data's CPU tasks.

    Only this function decides how a rank is fed (see `docs/decisions.md`): by its own Ray Datasets over its slices.
    Starting a task or a Dataset takes time too: a task loads as many steps as `_TASK_BYTES` hold, at least one, and a
    Dataset has as many whole epochs as make `_DATASET_TASKS`. No batch has rows of two epochs, because the rows of each
    fill their batches.
    """
    task_rows = batch.num_rows * max(1, _TASK_BYTES // (batch.num_rows * batch.row_bytes))
    for rows in _joined(epochs, _DATASET_TASKS * task_rows):
        with ordered(ExecutionResources.for_limits(cpu=share.cpus, object_store_memory=share.object_store_bytes)):
            dataset = ray.data.from_blocks(  # `from_arrow` would start a task for each
                [pa.Table.from_pylist(part) for part in _parts(rows, task_rows)]
            ).map_batches(
                load,
                batch_size=min(task_rows, max(1, _CALL_BYTES // batch.row_bytes)),  # more would join blocks
                num_cpus=1,
                max_retries=MAX_RETRIES,
                label_selector={"pool": share.pool} if share.pool else None,
            )
        yield from cast(
            Iterable[Batch], dataset.iter_batches(batch_size=batch.num_rows, batch_format="numpy", prefetch_batches=2)
        )


def read_ahead(epochs: Iterable[Rows], load: Load, batch_size: int) -> Iterator[Batch]:
    """Yields the batches of `stream`, loaded ahead by threads of this process.

    It suits stored features, which take no decoding: starting a Ray Dataset would take longer than an epoch.
    """
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        waiting: deque[Future[Batch]] = deque()
        for rows in epochs:
            for part in _parts(rows, batch_size):
                waiting.append(pool.submit(load, {name: np.array([row[name] for row in part]) for name in part[0]}))
                if len(waiting) > _BATCHES_AHEAD:
                    yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _parts(rows: Rows, size: int) -> Iterator[Rows]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _joined(epochs: Iterable[Rows], min_rows: int) -> Iterator[Rows]:
    """Yields the rows of one or more epochs at a time, at least `min_rows` except at the end."""
    rows: Rows = []
    for epoch in epochs:
        rows += epoch
        if len(rows) >= min_rows:
            yield rows
            rows = []
    if rows:
        yield rows
