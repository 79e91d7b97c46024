"""Share of the time that a GPU is busy, as its driver counts it: in each sample, the time in which a kernel ran."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

EVERY_MS = 200


@contextmanager
def busy_shares() -> Iterator[list[float]]:
    """Yields a list that has a share for each sample once the block has ended; none without `nvidia-smi`."""
    shares: list[float] = []
    if shutil.which("nvidia-smi") is None:
        yield shares
        return
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", f"-lms={EVERY_MS}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield shares
    finally:
        process.terminate()
        output, _ = process.communicate()
        shares += [float(line) / 100 for line in output.splitlines() if line.strip().isdigit()]
