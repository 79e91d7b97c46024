"""Files that gzip may have packed, read as if they were plain, without a copy on disk."""

import gzip
from pathlib import Path
from typing import IO, cast

_MAGIC = b"\x1f\x8b"


def is_packed(path: str | Path) -> bool:
    """Tells by a local file's first bytes, whatever its name is, whether gzip packed it."""
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def open_unpacked(path: str | Path) -> IO[bytes]:
    """Opens a local file for reading; what gzip packed is unpacked while it is read."""
    return cast(IO[bytes], gzip.open(path)) if is_packed(path) else open(path, "rb")
