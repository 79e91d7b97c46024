"""A rank's share of a batch as tensors, on the device that trains.

All that a step must know in numbers (how many tiles are real, and where) is read here from the arrays in memory. Read
from a GPU it would make each step wait for the one before.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from mclstexp.data.spots import Batch

Share = dict[str, torch.Tensor]
"""tiles: the real tiles, uint8 (n, size, size, 3), or their stored features, float32 (n, F); one blank if none.
slots: the slot of each real tile, int64 (m,); m = n, or 0 beside the blank one.
mask, expression, position and, for towers of programs, scores: as the loaders pad them, (S, L, ...)."""


def share_of(batch: Batch) -> Share:
    """Returns a batch as tensors on the CPU, with its real tiles only."""
    images = batch["features" if "features" in batch else "image"]
    slots = np.flatnonzero(batch["mask"])
    tiles = images.reshape(-1, *images.shape[2:])[slots]
    if not len(tiles):
        tiles = np.zeros((1, *images.shape[2:]), images.dtype)
    arrays = {name: batch[name] for name in ("mask", "expression", "position", "scores") if name in batch}
    writable = {name: np.require(values, requirements="W") for name, values in arrays.items()}
    return {name: torch.from_numpy(values) for name, values in (writable | {"tiles": tiles, "slots": slots}).items()}


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[tuple[Batch, Share]]:
    """Yields each batch with its share on the device; a GPU gets the next one while it computes."""
    if device.type == "cuda":
        yield from _copied_ahead(batches, device)
    else:
        yield from ((batch, share_of(batch)) for batch in batches)


def _copied_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[tuple[Batch, Share]]:
    """Yields batches that a thread copies from pinned memory on a stream of their own, one batch ahead."""
    stream = torch.cuda.Stream(device)

    def copy_next() -> tuple[Batch, Share, torch.cuda.Event] | None:
        batch = next(batches, None)
        if batch is None:
            return None
        with torch.cuda.stream(stream):
            pinned = {name: values.pin_memory() for name, values in share_of(batch).items()}
            share = {name: values.to(device, non_blocking=True) for name, values in pinned.items()}
            return batch, share, stream.record_event()

    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(copy_next)
        while (copied := ahead.result()) is not None:
            ahead = thread.submit(copy_next)
            batch, share, event = copied
            current = torch.cuda.current_stream(device)
            current.wait_event(event)
            for values in share.values():
                values.record_stream(current)  # so that their memory is not given away while this stream reads them
            yield batch, share
