"""The only file that knows the layout: puts the project on the path and ships it to every node.

Every job imports it first. `platform/` is a source root without `__init__.py`, because the standard library owns
that name; the working copy always wins over an installed wheel.
"""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("platform/mclstexp", "ingest", "tuning")
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # nodes have their environment; uv would build another
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's new default; without it every task warns
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")  # workers wait for this poll at each checkpoint
if "RAY_ADDRESS" not in os.environ and "ray" not in sys.modules:  # Ray reads it when it is imported
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray's default for clusters of its own; unset, it prints a notice

from mclstexp.config import Config  # noqa: E402

_CORE_LINE = r"^\[[^]]* [IWE] [0-9]+ [0-9]+\] [a-z_]+\.cc:"


def hide_logs_of_ray() -> None:
    """Hides log lines of Ray that a user cannot act on: notices of its Python loggers, and lines of its C++ core.

    The core writes to file descriptor 2 past Python's logging, so a `grep` filters that. It is a process of its own:
    what a dying process writes last (a crash of the core, a traceback) still gets through.
    """
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # "Progress bars disabled"
    if shutil.which("grep") is None:
        return
    command = ["grep", "--line-buffered", "--invert-match", "--extended-regexp", _CORE_LINE]
    terminal = os.dup(2)
    # In a session of its own, so that Ctrl-C does not end it before what it filters.
    passing = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=terminal, start_new_session=True)
    assert passing.stdin is not None
    os.dup2(passing.stdin.fileno(), 2)
    passing.stdin.close()
    # Encoded as Python encodes the standard error: an undecodable file name must not hide the message that names it.
    sys.stderr = os.fdopen(terminal, "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")


def connect(config: Config, min_cpus: int = 2) -> None:
    """Joins or starts Ray (`cluster.connect`); its nodes get the project's packages and the storage settings."""
    from mclstexp import cluster

    modules = [str(ROOT / package) for package in PACKAGES]
    cluster.connect(config, {"py_modules": modules, "env_vars": config.storage.environment()}, min_cpus)
