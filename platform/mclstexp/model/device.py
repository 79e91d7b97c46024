"""What computing on a CPU and on a GPU have in common: copies to the device, and float32 that is float32."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_PRECISION_LOCK = threading.Lock()  # the flags hold for the whole process


def sent(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Returns an array on a device; a GPU reads it from pinned memory while this process goes on."""
    values = values if values.flags.writeable else values.copy()  # torch warns of what it cannot write
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Multiplies float32 matrices in float32, whatever settings allow elsewhere (TF32, bfloat16, autocast)."""
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
