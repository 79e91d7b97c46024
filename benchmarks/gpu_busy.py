"""Share of the time that a GPU is busy, as its driver counts it: of each sample, the time in which a kernel ran."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

_COMMAND = ["nvidia-smi", "--query-gpu=timestamp,utilization.gpu", "--format=csv,noheader,nounits", "-lms=200"]
_TIME = "%Y/%m/%d %H:%M:%S.%f"


@contextmanager
def busy_shares() -> Iterator[list[tuple[float, float]]]:
    """Yields a list that has (time of the clock, share) once the block has ended; it stays empty without nvidia-smi."""
    samples: list[tuple[float, float]] = []
    if shutil.which(_COMMAND[0]) is None:
        yield samples
        return
    process = subprocess.Popen(_COMMAND, stdout=subprocess.PIPE, text=True)
    try:
        yield samples
    finally:
        process.terminate()
        output, _ = process.communicate()
        for line in output.splitlines()[:-1]:  # the last one may be cut off
            moment, percent = line.split(", ")
            samples.append((datetime.strptime(moment, _TIME).timestamp(), float(percent) / 100))
