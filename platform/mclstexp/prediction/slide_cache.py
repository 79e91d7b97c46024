"""A node's scratch folder of remote slides, within a disk budget: each is downloaded once for all its readers.

Locks are advisory and die with their process, so that a killed reader holds none. A slide in use is never removed; if
all are in use, a download waits. So nobody may wait while holding another slide: release it first.
"""

import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from mclstexp import storage
from mclstexp.errors import ResourceError, SourceError, StorageError

_MANY_FILES = (".mrxs", ".vms", ".vmu", ".dcm")
_POLL_S = 0.2
_MAX_WAIT_S = 900.0
_ROOM = ".room"
_COPY = re.compile(r"[0-9a-f]{16}-\d+")
"""Names of copies' folders; anything else in the scratch folder is not ours."""


@contextmanager
def staged(uri: str, folder: str, budget_bytes: int) -> Iterator[str]:
    """Yields a local path of a slide: its own if it is local, else its copy under `folder`, kept while in use.

    Raises:
        FileNotFoundError: there is no such object.
        ResourceError: it is larger than `budget_bytes`.
        SourceError: a slide of its format consists of many files, and only one would be copied.
        StorageError: it cannot be downloaded, the disk is full, or others used up the budget for 15 minutes.
    """
    uri = storage.absolute(uri)
    if not storage.is_s3(uri):
        yield uri
        return
    entry, size = _entry(uri, Path(folder))
    if size > budget_bytes:
        raise ResourceError(
            f"{uri} has {size} bytes, more than the scratch budget of {budget_bytes} bytes: raise predict.scratch_gb"
        )
    copy = entry / uri.rsplit("/", 1)[1]
    while True:
        with _locked(entry, fcntl.LOCK_SH):
            if copy.exists():
                os.utime(_lock_path(entry))
                yield str(copy)
                return
        with _locked(entry, fcntl.LOCK_EX):
            if not copy.exists():
                _make_room(entry, size, budget_bytes)
                _download(uri, copy, size)


def clear(folder: str) -> None:
    """Removes all copies that nobody uses from this node's scratch folder, and the folder if it is then empty."""
    root = Path(folder)
    if root.is_dir():
        with _locked(root / _ROOM, fcntl.LOCK_EX):
            for entry in _entries(root):
                _evict(entry)
            with suppress(OSError):
                _lock_path(root / _ROOM).unlink()
        with suppress(OSError):
            root.rmdir()


def _entry(uri: str, folder: Path) -> tuple[Path, int]:
    """Returns the folder of a slide's copy, named after the object's version and length, and the length in bytes."""
    if uri.lower().endswith(_MANY_FILES):
        raise SourceError(f"{uri} is one of the many files of a slide; copy them all to a local folder")
    size, version = storage.size_and_version(uri)
    digest = hashlib.sha256(f"{uri} {version}".encode()).hexdigest()[:16]
    return folder / f"{digest}-{size}", size


def _make_room(entry: Path, size: int, budget_bytes: int) -> None:
    """Reserves `size` bytes by making the entry's folder, after removing the copies used least recently."""
    deadline = time.monotonic() + _MAX_WAIT_S
    while True:
        with _locked(entry.parent / _ROOM, fcntl.LOCK_EX):
            shutil.rmtree(entry, ignore_errors=True)  # left by a killed download
            others = _entries(entry.parent)
            excess = sum(_size(other) for other in others) + size - budget_bytes
            for other in others:
                if excess > 0 and _evict(other):
                    excess -= _size(other)
            if excess <= 0:
                entry.mkdir(parents=True)
                return
        if time.monotonic() > deadline:
            raise StorageError(
                f"waited {_MAX_WAIT_S:.0f} s for {size} bytes in {entry.parent}: the slides in use there leave too "
                f"little of the scratch budget of {budget_bytes} bytes; raise predict.scratch_gb"
            )
        time.sleep(_POLL_S)


def _download(uri: str, copy: Path, size: int) -> None:
    scratch = copy.with_name(f".{copy.name}.part")
    try:
        storage.download(uri, scratch)
        if scratch.stat().st_size != size:
            raise StorageError(
                f"{uri} changed while it was copied: expected {size} bytes, got {scratch.stat().st_size}"
            )
        scratch.rename(copy)
    except FileNotFoundError:
        raise
    except OSError as error:  # a full disk
        raise StorageError(f"cannot copy {uri} to {copy.parent}: {error.strerror or error}") from error
    finally:
        if not copy.exists():
            shutil.rmtree(copy.parent, ignore_errors=True)


def _entries(folder: Path) -> list[Path]:
    """Returns all copies, whole or under way, least recently used first."""
    used = []
    for entry in folder.iterdir():
        if entry.is_dir() and _COPY.fullmatch(entry.name):
            lock = _lock_path(entry)
            used.append((lock.stat().st_mtime_ns if lock.exists() else 0, entry))
    return [entry for _, entry in sorted(used)]


def _size(entry: Path) -> int:
    return int(entry.name.rpartition("-")[2])


def _evict(entry: Path) -> bool:
    """Removes a copy unless somebody holds it; returns whether it is gone."""
    with ExitStack() as stack:
        try:
            stack.enter_context(_locked(entry, fcntl.LOCK_EX | fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        shutil.rmtree(entry, ignore_errors=True)
        _lock_path(entry).unlink(missing_ok=True)
    return not entry.exists()


@contextmanager
def _locked(path: Path, kind: int) -> Iterator[None]:
    """Holds the lock file beside `path`; opens it again if it was removed during the wait."""
    lock = _lock_path(path)
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with open(lock, "a") as file:
            fcntl.flock(file, kind)
            if not _is_at(file.fileno(), lock):
                continue
            yield
            return


def _is_at(file: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), path.stat())
    return False


def _lock_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")
