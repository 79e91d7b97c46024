"""What computing on a CPU and on a GPU have in common: turns of threads, copies, and float32 that is float32."""

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_CPU_TURN = threading.RLock()
_PRECISION_LOCK = threading.Lock()  # the flags hold for the whole process
_FREE_STREAMS: defaultdict[torch.device, list[torch.cuda.Stream]] = defaultdict(list)


@contextmanager
def turn(device: torch.device) -> Iterator[None]:
    """Lets a thread compute on a device: one at a time on a CPU, whose actor reserved one core.

    On a GPU each thread has a stream of its own: while one waits for its result, the device works for the next.
    """
    if device.type != "cuda":
        with _CPU_TURN:
            yield
        return
    try:
        stream = _FREE_STREAMS[device].pop()
    except IndexError:
        stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))  # on which weights and keys are copied
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        _FREE_STREAMS[device].append(stream)


def sent(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Returns an array on a device; a GPU reads it from pinned memory while this thread goes on."""
    if device.type != "cuda":
        return torch.from_numpy(values if values.flags.writeable else values.copy())  # else torch warns
    dtype = torch.from_numpy(np.empty(0, values.dtype)).dtype
    pinned = torch.empty(values.shape, dtype=dtype, pin_memory=True)
    pinned.numpy()[...] = values
    return pinned.to(device, non_blocking=True)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Multiplies float32 matrices in float32, whatever torch's settings allow otherwise (TF32, bfloat16, autocast).

    The settings are those of the process: meanwhile its other threads compute so too.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    with _PRECISION_LOCK, torch.autocast(device.type, enabled=False):
        before = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision
