"""One resolver for every URI: local paths and `s3://bucket/key`.

Both give the same guarantees: readers see whole objects or nothing, a byte range costs one request, and `publish`
lets only one of two writers win. `filesystem` is for libraries that want a `pyarrow.fs`, which has no conditional puts.
Endpoint, region and credentials come from the standard AWS environment variables, so no secret is ever pickled or
printed; `StorageConfig.environment` turns the config block into those variables.

The file has three parts: the interface, local files, S3.
"""

import fcntl
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import unquote

import boto3
import pyarrow.fs
from boto3.exceptions import Boto3Error
from botocore.config import Config as BotoConfig
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError

from mclstexp.errors import ConflictError, StorageError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_NOT_IN_BUCKETS = frozenset("@?#%: ")
"""Characters that no bucket has; credentials in a URI have some of them."""
_S3_OPTIONS = re.compile(r"[?&](access_key|secret_key|session_token|endpoint_override|region|scheme)=")
"""Options that other libraries read from an `s3://` URI."""
_MISSING_CODES = {"404", "NoSuchKey", "NotFound"}
_LOST_RACE_CODES = {"412", "PreconditionFailed", "409", "ConditionalRequestConflict"}
_MAX_REQUEST_TRIES = 6
_MAX_CONNECTIONS = 64  # beyond it each request of another thread would open one of its own
_MAX_DELETED = 1000  # objects in one request
_MAX_PUT_BYTES = 8 * 2**20
"""Up to this size a file is uploaded in one request."""
_MAX_BODY_TRIES = 4  # boto retries requests, but not a body that breaks off
_BODY_WAIT_S = 0.5  # doubles with each try


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
    region = _s3_region()
    return pyarrow.fs.S3FileSystem(region=region, connect_timeout=10, request_timeout=60, **options), uri[5:]


def exists(uri: str) -> bool:
    """Returns whether the object or file exists."""
    uri = absolute(uri)
    if not is_s3(uri):
        return Path(uri).is_file()
    try:
        _s3_head(uri)
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
        return _s3_head(uri)[0]
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
    data = _s3_get(uri, start, length)[0] if is_s3(uri) else _read_file(uri, start, length)
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
        return _s3_head(uri)
    with _local_errors("look up", uri), open(uri, "rb") as file:
        return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()


def read_with_version(uri: str) -> tuple[bytes, str]:
    """Returns an object's bytes and their `version`, in one request (more only if one breaks off).

    Raises:
        FileNotFoundError: there is no such object.
    """
    uri = absolute(uri)
    if is_s3(uri):
        return _s3_get(uri, 0, None)
    data = _read_file(uri, 0, None)
    return data, hashlib.sha256(data).hexdigest()


def write(uri: str, data: bytes) -> None:
    """Writes a whole object; readers see all of it or nothing."""
    uri = absolute(uri)
    if is_s3(uri):
        _s3_put(uri, data)
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
            return _s3_exchange(uri, data, previous)
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
        _s3_upload(str(local), uri)
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
        _s3_download(uri, str(local))
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
        return sorted(_s3_list(uri))
    # os.walk, unlike rglob, copes with folders that are removed meanwhile
    found = (Path(folder, name) for folder, _, names in os.walk(uri) for name in names)
    return sorted(str(path) for path in found if path.is_file())


def list_folder(uri: str) -> list[str]:
    """Returns the names of the files directly in a folder, sorted; empty if there are none."""
    uri = absolute(uri)
    if is_s3(uri):
        names = (found.rpartition("/")[2] for found in _s3_list(uri, "/"))
        return sorted(name for name in names if name)  # PyArrow, and so Ray Train, stores an empty object as a folder
    if not Path(uri).is_dir():
        return []
    with _local_errors("list", uri), os.scandir(uri) as entries:
        return sorted(entry.name for entry in entries if entry.is_file())


def delete(uri: str) -> None:
    """Removes one object or file, if it exists."""
    uri = absolute(uri)
    if is_s3(uri):
        _s3_delete(uri)
        return
    with _local_errors("delete", uri):
        Path(uri).unlink(missing_ok=True)


def delete_folder(uri: str) -> None:
    """Removes all files under `uri`, and on disk the folders that are then empty."""
    uri = absolute(uri)
    if is_s3(uri):
        _s3_delete_all(list_files(uri))
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


def _s3_get(uri: str, start: int, length: int | None) -> tuple[bytes, str]:
    """Returns an object's bytes from `start` on, at most `length`, and its ETag.

    A body that breaks off is requested again.
    """
    bucket, key = _s3_address(uri)
    with _s3_errors("read", uri):
        for attempt in range(_MAX_BODY_TRIES):
            try:
                if length is None and not start:
                    answer = _s3_client().get_object(Bucket=bucket, Key=key)
                else:
                    span = f"bytes={start}-{'' if length is None else start + length - 1}"
                    answer = _s3_client().get_object(Bucket=bucket, Key=key, Range=span)
                return answer["Body"].read(), str(answer["ETag"])
            except (HTTPClientError, IncompleteReadError):
                if attempt == _MAX_BODY_TRIES - 1:
                    raise
                time.sleep(_BODY_WAIT_S * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


def _s3_head(uri: str) -> tuple[int, str]:
    """Returns an object's length and ETag."""
    bucket, key = _s3_address(uri)
    with _s3_errors("look up", uri):
        answer = _s3_client().head_object(Bucket=bucket, Key=key)
    return int(answer["ContentLength"]), str(answer["ETag"])


def _s3_put(uri: str, data: bytes) -> None:
    """Writes an object."""
    bucket, key = _s3_address(uri)
    with _s3_errors("write", uri):
        _s3_client().put_object(Bucket=bucket, Key=key, Body=data)


def _s3_exchange(uri: str, data: bytes, previous: str | None) -> str:
    """Writes an object only if its ETag is still `previous` (None: it must not exist), and returns the new ETag.

    Raises:
        ConflictError: the object has another ETag; nothing was written.
    """
    bucket, key = _s3_address(uri)
    with _s3_errors("publish", uri):
        try:
            if previous is None:
                answer = _s3_client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
            else:
                answer = _s3_client().put_object(Bucket=bucket, Key=key, Body=data, IfMatch=previous)
        except ClientError as error:
            if _s3_code(error) not in _LOST_RACE_CODES | _MISSING_CODES:
                raise
            # boto repeats a put whose answer was lost; the second try then conflicts with the first.
            own = _s3_etag_of_equal(uri, data)
            if own is None:
                raise ConflictError(uri) from error
            return own
        return str(answer["ETag"])


def _s3_upload(local: str, uri: str) -> None:
    """Copies a local file to an object, in parts if it is large."""
    if os.path.getsize(local) <= _MAX_PUT_BYTES:  # boto's transfers start threads for each file
        _s3_put(uri, Path(local).read_bytes())
        return
    with _s3_errors("upload", uri):
        _s3_client().upload_file(local, *_s3_address(uri))


def _s3_download(uri: str, local: str) -> None:
    """Copies an object to a local file."""
    with _s3_errors("download", uri):
        _s3_client().download_file(*_s3_address(uri), local)


def _s3_list(uri: str, delimiter: str = "") -> list[str]:
    """Returns the URIs of all objects under `uri`, or those without a delimiter in the rest of their keys."""
    bucket, _, prefix = uri[5:].partition("/")
    prefix = f"{prefix}/" if prefix else ""
    with _s3_errors("list", uri):
        paginator = _s3_client().get_paginator("list_objects_v2")
        pages = paginator.paginate(Bucket=bucket, Prefix=prefix, Delimiter=delimiter)
        return [f"s3://{bucket}/{item['Key']}" for page in pages for item in page.get("Contents", ())]


def _s3_delete(uri: str) -> None:
    """Removes an object, if it exists."""
    bucket, key = _s3_address(uri)
    with _s3_errors("delete", uri):
        _s3_client().delete_object(Bucket=bucket, Key=key)


def _s3_delete_all(uris: Sequence[str]) -> None:
    """Removes objects of one bucket, `_MAX_DELETED` per request."""
    for start in range(0, len(uris), _MAX_DELETED):
        addresses = [_s3_address(uri) for uri in uris[start : start + _MAX_DELETED]]
        with _s3_errors("delete", uris[start]):
            answer = _s3_client().delete_objects(
                Bucket=addresses[0][0], Delete={"Objects": [{"Key": key} for _, key in addresses], "Quiet": True}
            )
        if left := answer.get("Errors"):
            raise StorageError(f"cannot delete {len(left)} of {len(addresses)} objects: {left[0]}")


def _s3_client() -> "S3Client":
    """Returns this process's S3 client."""
    return _client_of(os.getpid())


@cache
def _client_of(process: int) -> "S3Client":
    config = BotoConfig(
        connect_timeout=10,
        read_timeout=60,
        retries={"mode": "standard", "max_attempts": _MAX_REQUEST_TRIES},
        max_pool_connections=_MAX_CONNECTIONS,
    )
    return boto3.client("s3", region_name=_s3_region(), config=config)


def _s3_region() -> str:
    """Returns the region that the environment names."""
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"


def _s3_address(uri: str) -> tuple[str, str]:
    """Returns bucket and key."""
    bucket, _, key = uri[5:].partition("/")
    return bucket, key


def _s3_etag_of_equal(uri: str, data: bytes) -> str | None:
    """Returns an object's ETag if its bytes equal `data`, else None."""
    bucket, key = _s3_address(uri)
    try:
        answer = _s3_client().get_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if _s3_code(error) in _MISSING_CODES:
            return None
        raise
    return str(answer["ETag"]) if answer["Body"].read() == data else None


def _s3_code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@contextmanager
def _s3_errors(action: str, uri: str) -> Iterator[None]:
    """Raises boto's errors as a StorageError, a missing object as a FileNotFoundError."""
    try:
        yield
    except ClientError as error:
        if _s3_code(error) in _MISSING_CODES:
            raise FileNotFoundError(uri) from error
        answer = f"the store answered {_s3_code(error)}"
        raise StorageError(f"cannot {action} {uri}: {answer}; check credentials and bucket") from error
    except (BotoCoreError, Boto3Error) as error:
        raise StorageError(f"cannot {action} {uri}: {error}; check storage.endpoint_url and credentials") from error
