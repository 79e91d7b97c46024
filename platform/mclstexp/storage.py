"""One resolver for every URI: local paths and `s3://bucket/key`.

Whole objects and byte ranges go through boto3 (exact request counts, own deadlines and retries, conditional
puts, which pyarrow's S3 file system lacks); `filesystem` hands the same place to libraries that want a
`pyarrow.fs`. Endpoint, region and credentials come from the standard AWS environment variables, so nothing
secret is ever pickled or printed; `export` turns the config block into those variables.
"""

import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import pyarrow.fs
from botocore.config import Config as BotoConfig
from botocore.exceptions import BotoCoreError, ClientError

from mclstexp.config import StorageConfig
from mclstexp.errors import ConflictError, StorageError

if TYPE_CHECKING:
    from botocore.client import BaseClient

_MISSING = {"404", "NoSuchKey", "NotFound"}
_LOST_RACE = {"412", "PreconditionFailed", "409", "ConditionalRequestConflict"}


def environment(config: StorageConfig) -> dict[str, str]:
    """Returns the config block as AWS environment variables (no secrets), for the driver and all workers."""
    values = {
        "AWS_ENDPOINT_URL": config.endpoint_url,
        "AWS_REGION": config.region,
        "AWS_DEFAULT_REGION": config.region,
        "AWS_PROFILE": config.profile,
    }
    return {name: value for name, value in values.items() if value}


def is_s3(uri: str) -> bool:
    """Tells whether `uri` lies in object storage."""
    return uri.startswith("s3://")


def absolute(uri: str) -> str:
    """Returns `uri` in its canonical form: an `s3://` URI or an absolute local path, without trailing slash.

    Raises:
        StorageError: any other scheme, or credentials inside the URI.
    """
    if is_s3(uri):
        if "@" in uri.split("/")[2] or "?" in uri:
            raise StorageError("an s3:// URI holds only bucket and key; put endpoint and profile into `storage`")
        return uri.rstrip("/")
    if "://" in uri and not uri.startswith("file://"):
        raise StorageError(f"cannot resolve {uri}: use a local path or s3://bucket/key")
    return str(Path(uri.removeprefix("file://")).expanduser().absolute())


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
    return pyarrow.fs.S3FileSystem(region=_region(), connect_timeout=10, request_timeout=60, **options), uri[5:]


def exists(uri: str) -> bool:
    """Tells whether an object or file is there."""
    uri = absolute(uri)
    if not is_s3(uri):
        return Path(uri).is_file()
    try:
        with _errors("look up", uri):
            _client().head_object(**_address(uri))
    except FileNotFoundError:
        return False
    return True


def read(uri: str, start: int = 0, length: int | None = None) -> bytes:
    """Returns an object's bytes, or `length` of them from `start`, in one request.

    Raises:
        FileNotFoundError: there is no such object.
        StorageError: it cannot be read, or is shorter than asked for.
    """
    uri = absolute(uri)
    with _errors("read", uri):
        if is_s3(uri):
            span = {} if length is None else {"Range": f"bytes={start}-{start + length - 1}"}
            data = _client().get_object(**_address(uri), **span)["Body"].read()
        else:
            with open(uri, "rb") as file:
                file.seek(start)
                data = file.read(-1 if length is None else length)
    if length is not None and len(data) != length:
        raise StorageError(f"{uri} ended early: asked for {length} bytes at {start}, got {len(data)}")
    return bytes(data)


def version(uri: str) -> str | None:
    """Returns a token that changes whenever the object does, or None where there is none."""
    uri = absolute(uri)
    try:
        with _errors("look up", uri):
            if is_s3(uri):
                return str(_client().head_object(**_address(uri))["ETag"])
            return hashlib.sha256(Path(uri).read_bytes()).hexdigest()
    except FileNotFoundError:
        return None


def write(uri: str, data: bytes) -> None:
    """Writes a whole object; readers see all of it or nothing."""
    uri = absolute(uri)
    with _errors("write", uri):
        if is_s3(uri):
            _client().put_object(**_address(uri), Body=data)
        else:
            _replace(Path(uri), data)


def publish(uri: str, data: bytes, previous: str | None) -> None:
    """Writes an object only if it is still at `previous` (a `version`; None: must not exist yet).

    Raises:
        ConflictError: somebody else published in between; nothing was written.
    """
    uri = absolute(uri)
    with _errors("publish", uri):
        if is_s3(uri):
            condition = {"IfNoneMatch": "*"} if previous is None else {"IfMatch": previous}
            _client().put_object(**_address(uri), Body=data, **condition)
            return
        with _locked(uri):
            if version(uri) != previous:
                raise ConflictError(_lost(uri))
            _replace(Path(uri), data)


def upload(local: str | Path, uri: str) -> None:
    """Copies a local file to `uri`; readers see all of it or nothing."""
    uri = absolute(uri)
    with _errors("upload", uri):
        if is_s3(uri):
            address = _address(uri)
            _client().upload_file(str(local), address["Bucket"], address["Key"])
        else:
            scratch = _scratch_beside(Path(uri))
            shutil.copyfile(local, scratch)
            scratch.replace(uri)


def download(uri: str, local: str | Path) -> None:
    """Copies an object to a local file.

    Raises:
        FileNotFoundError: there is no such object.
    """
    uri = absolute(uri)
    with _errors("download", uri):
        if is_s3(uri):
            address = _address(uri)
            _client().download_file(address["Bucket"], address["Key"], str(local))
        else:
            shutil.copyfile(uri, local)


@contextmanager
def local_copy(uri: str, scratch: str | Path) -> Iterator[str]:
    """Yields a local path of `uri`: itself where it is local, else a copy under `scratch`, removed at the end."""
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
    """Returns the URIs of all files under `uri`, sorted; empty where there is nothing."""
    uri = absolute(uri)
    if not is_s3(uri):
        return sorted(str(path) for path in Path(uri).rglob("*") if path.is_file())
    bucket, _, prefix = uri[5:].partition("/")
    with _errors("list", uri):
        pages = _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix.rstrip("/") + "/")
        return sorted(f"s3://{bucket}/{item['Key']}" for page in pages for item in page.get("Contents", ()))


def delete(uri: str) -> None:
    """Removes one object or file; nothing happens where there is none."""
    uri = absolute(uri)
    with _errors("delete", uri):
        if is_s3(uri):
            _client().delete_object(**_address(uri))
        else:
            Path(uri).unlink(missing_ok=True)


def _region() -> str:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"


@cache
def _client_of(process: int) -> "BaseClient":
    retries = {"mode": "standard", "max_attempts": 6}
    config = BotoConfig(connect_timeout=10, read_timeout=60, retries=retries)
    return boto3.client("s3", region_name=_region(), config=config)


def _client() -> "BaseClient":
    return _client_of(os.getpid())


def _address(uri: str) -> dict[str, str]:
    bucket, _, key = uri[5:].partition("/")
    return {"Bucket": bucket, "Key": key}


def _scratch_beside(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def _replace(path: Path, data: bytes) -> None:
    scratch = _scratch_beside(path)
    try:
        with open(scratch, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def _locked(uri: str) -> Iterator[None]:
    """Holds an advisory lock that dies with its process, so that a crash leaves nothing locked."""
    lock = Path(f"{uri}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _lost(uri: str) -> str:
    return f"another writer published {uri} first; nothing was changed: run the same command again"


@contextmanager
def _errors(action: str, uri: str) -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        if code in _MISSING:
            raise FileNotFoundError(uri) from error
        if code in _LOST_RACE:
            raise ConflictError(_lost(uri)) from error
        raise StorageError(f"cannot {action} {uri}: the store answered {code}; check credentials and bucket") from error
    except BotoCoreError as error:
        raise StorageError(f"cannot {action} {uri}: {error}; check storage.endpoint_url and credentials") from error
    except PermissionError as error:
        raise StorageError(f"cannot {action} {uri}: no permission") from error
