"""One resolver for every URI: local paths and `s3://bucket/key`.

Both give the same guarantees: readers see whole objects or nothing, a byte range costs one request, and `publish`
lets only one of two writers win. `filesystem` is for libraries that want a `pyarrow.fs`, which has no conditional puts.
Endpoint, region and credentials come from the standard AWS environment variables, so no secret is ever pickled or
printed; `StorageConfig.environment` turns the config block into those variables.

The file has two parts, the interface and local files; requests to object storage are in `object_store`.
"""

import fcntl
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

import pyarrow.fs

from mclstexp import object_store
from mclstexp.errors import ConflictError, StorageError

_NOT_IN_BUCKETS = frozenset("@?#%: ")
"""Characters that no bucket has; credentials in a URI have some of them."""
_S3_OPTIONS = re.compile(r"[?&](access_key|secret_key|session_token|endpoint_override|region|scheme)=")
"""Options that other libraries read from an `s3://` URI."""


def is_s3(uri: str) -> bool:
    """Returns whether `uri` is in object storage."""
    return uri.startswith("s3://")


def absolute(uri: str) -> str:
    """Returns `uri` in its canonical form: an `s3://` URI or an absolute local path, without trailing slash.

    An `s3://` URI is taken as it is, so that keys may have any characters; a `file://` URI is decoded.

    Raises:
        StorageError: any other scheme, no bucket, options or credentials inside the URI, or a file on another host.
    """
    if is_s3(uri):
        bucket = uri.split("/")[2]
        if not bucket or not _NOT_IN_BUCKETS.isdisjoint(bucket) or _S3_OPTIONS.search(uri):
            raise StorageError("an s3:// URI has only bucket and key; put endpoint and profile into `storage`")
        return uri.rstrip("/")
    if uri.startswith("file:"):
        return str(Path(_file_path(uri)))
    if "://" in uri:
        raise StorageError(f"cannot resolve {uri}: use a local path or s3://bucket/key")
    return str(Path(uri).expanduser().absolute())


def _file_path(uri: str) -> str:
    """Returns the path of a `file://` URI, in which `%20` is a space."""
    path = re.sub("^file:(//(localhost)?)?(?=/)", "", uri)
    if not path.startswith("/") or path.startswith("//"):
        raise StorageError(
            f"cannot resolve {uri}: a file URI has an absolute path on this machine: file:///folder/name"
        )
    return unquote(path)


def join(uri: str, *parts: str) -> str:
    """Returns `uri` extended by relative `parts`."""
    return "/".join([uri.rstrip("/"), *parts])


def filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """Returns the file system of `uri` and the path inside it, for libraries that take a `pyarrow.fs`."""
    uri = absolute(uri)
    if not is_s3(uri):
        return pyarrow.fs.LocalFileSystem(), uri
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    options = {"endpoint_override": endpoint} if endpoint else {}
    region = object_store.region()
    return pyarrow.fs.S3FileSystem(region=region, connect_timeout=10, request_timeout=60, **options), uri[5:]


def exists(uri: str) -> bool:
    """Returns whether the object or file exists."""
    uri = absolute(uri)
    if not is_s3(uri):
        return Path(uri).is_file()
    try:
        object_store.head(uri)
    except FileNotFoundError:
        return False
    return True


def size(uri: str) -> int:
    """Returns an object's length in bytes.

    Raises:
        FileNotFoundError: there is no such object.
    """
    uri = absolute(uri)
    if is_s3(uri):
        return object_store.head(uri)[0]
    with _local_errors("look up", uri):
        return os.stat(uri).st_size


def read(uri: str, start: int = 0, length: int | None = None) -> bytes:
    """Returns an object's bytes, or `length` of them from `start`, in one request (more only if one breaks off).

    Raises:
        FileNotFoundError: there is no such object.
        StorageError: it cannot be read, or ends before `start + length`.
    """
    uri = absolute(uri)
    if length == 0:
        return b""
    data = object_store.get(uri, start, length)[0] if is_s3(uri) else _read_file(uri, start, length)
    if length is not None and len(data) != length:
        raise StorageError(f"{uri} ended early: expected {length} bytes at {start}, got {len(data)}")
    return data


def version(uri: str) -> str | None:
    """Returns a token that changes whenever the object does; None if there is no object.

    The token is the ETag in object storage and the content's SHA-256 on disk.
    """
    try:
        return size_and_version(uri)[1]
    except FileNotFoundError:
        return None


def size_and_version(uri: str) -> tuple[int, str]:
    """Returns an object's length in bytes and its `version`, in one request.

    Raises:
        FileNotFoundError: there is no such object.
    """
    uri = absolute(uri)
    if is_s3(uri):
        return object_store.head(uri)
    with _local_errors("look up", uri), open(uri, "rb") as file:
        return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()


def read_with_version(uri: str) -> tuple[bytes, str]:
    """Returns an object's bytes and their `version`, in one request (more only if one breaks off).

    Raises:
        FileNotFoundError: there is no such object.
    """
    uri = absolute(uri)
    if is_s3(uri):
        return object_store.get(uri, 0, None)
    data = _read_file(uri, 0, None)
    return data, hashlib.sha256(data).hexdigest()


def write(uri: str, data: bytes) -> None:
    """Writes a whole object; readers see all of it or nothing."""
    uri = absolute(uri)
    if is_s3(uri):
        object_store.put(uri, data)
        return
    with _local_errors("write", uri), _replacing(Path(uri)) as file:
        file.write(data)


def publish(uri: str, data: bytes, previous: str | None) -> str:
    """Writes an object only if its `version` is still `previous` (None: it must not exist); returns the new version.

    Raises:
        ConflictError: another writer published in between; nothing was written.
    """
    uri = absolute(uri)
    try:
        if is_s3(uri):
            return object_store.exchange(uri, data, previous)
        return _exchange_file(uri, data, previous)
    except ConflictError:
        raise ConflictError(
            f"another writer published {uri} first; nothing was changed: run the same command again"
        ) from None


def require_conditional_puts(root: str) -> None:
    """Tries the conditional puts of `publish` on a scratch object under `root`: some S3-compatible stores ignore them.

    Raises:
        StorageError: the store overwrites an object despite the condition.
    """
    if not is_s3(root):
        return
    probe = join(absolute(root), f".probe-{uuid.uuid4().hex}")
    try:
        publish(probe, b"first", None)
        for data, previous in ((b"second", None), (b"third", '"00000000000000000000000000000000"')):
            try:
                publish(probe, data, previous)
            except ConflictError:
                continue
            raise StorageError(
                f"the store of {root} ignores If-None-Match or If-Match: two writers would overwrite each other; use "
                "another store"
            )
    finally:
        delete(probe)


def upload(local: str | Path, uri: str) -> None:
    """Copies a local file to `uri`; readers see all of it or nothing."""
    uri = absolute(uri)
    if is_s3(uri):
        object_store.upload(str(local), uri)
        return
    with _local_errors("upload", uri), open(local, "rb") as source, _replacing(Path(uri)) as target:
        shutil.copyfileobj(source, target)


def upload_folder(folder: str | Path, uri: str, last: str) -> None:
    """Copies a local folder's files to below `uri`; the file `last` comes last and marks it as complete."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    for path in sorted(paths, key=lambda path: path.name == last):
        upload(path, join(uri, *path.relative_to(folder).parts))


def download(uri: str, local: str | Path) -> None:
    """Copies an object to a local file.

    Raises:
        FileNotFoundError: there is no such object.
    """
    uri = absolute(uri)
    if is_s3(uri):
        object_store.download(uri, str(local))
        return
    with _local_errors("download", uri):
        shutil.copyfile(uri, local)


@contextmanager
def local_copy(uri: str, scratch: str | Path) -> Iterator[str]:
    """Yields a local path of `uri`: its own if it is local, else a copy under `scratch`, removed at the end."""
    uri = absolute(uri)
    if not is_s3(uri):
        if not Path(uri).exists():
            raise FileNotFoundError(uri)
        yield uri
        return
    target = Path(scratch) / uuid.uuid4().hex / uri.rsplit("/", 1)[1]
    target.parent.mkdir(parents=True)
    try:
        download(uri, target)
        yield str(target)
    finally:
        shutil.rmtree(target.parent, ignore_errors=True)


def list_files(uri: str) -> list[str]:
    """Returns the URIs of all files under `uri`, sorted; empty if there are none."""
    uri = absolute(uri)
    if is_s3(uri):
        return sorted(object_store.list_objects(uri))
    # os.walk, unlike rglob, copes with folders that are removed meanwhile
    found = (Path(folder, name) for folder, _, names in os.walk(uri) for name in names)
    return sorted(str(path) for path in found if path.is_file())


def list_folder(uri: str) -> list[str]:
    """Returns the names of the files directly in a folder, sorted; empty if there are none."""
    uri = absolute(uri)
    if is_s3(uri):
        names = (found.rpartition("/")[2] for found in object_store.list_objects(uri, "/"))
        return sorted(name for name in names if name)  # PyArrow, and so Ray Train, stores an empty object as a folder
    if not Path(uri).is_dir():
        return []
    with _local_errors("list", uri), os.scandir(uri) as entries:
        return sorted(entry.name for entry in entries if entry.is_file())


def delete(uri: str) -> None:
    """Removes one object or file, if it exists."""
    uri = absolute(uri)
    if is_s3(uri):
        object_store.delete(uri)
        return
    with _local_errors("delete", uri):
        Path(uri).unlink(missing_ok=True)


def delete_folder(uri: str) -> None:
    """Removes all files under `uri`, and on disk the folders that are then empty."""
    uri = absolute(uri)
    if is_s3(uri):
        object_store.delete_all(list_files(uri))
        return
    for file in list_files(uri):
        delete(file)
    for folder, _, _ in os.walk(uri, topdown=False):
        with suppress(OSError):  # another process wrote into it meanwhile
            os.rmdir(folder)


def _read_file(path: str, start: int, length: int | None) -> bytes:
    with _local_errors("read", path), open(path, "rb") as file:
        file.seek(start)
        return file.read(-1 if length is None else length)


def _exchange_file(path: str, data: bytes, previous: str | None) -> str:
    with _local_errors("publish", path), _locked(path):
        if version(path) != previous:
            raise ConflictError(path)
        with _replacing(Path(path)) as file:
            file.write(data)
    return hashlib.sha256(data).hexdigest()


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Yields a scratch file that replaces `path`, synced to disk, when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(scratch, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """Takes an advisory lock, which ends with the process, so that a crash leaves nothing locked."""
    lock = Path(f"{path}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _local_errors(action: str, path: str) -> Iterator[None]:
    """Raises an `OSError` of the block as a StorageError, a missing file as it is."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(f"cannot {action} {path}: {error.strerror or error}") from error
