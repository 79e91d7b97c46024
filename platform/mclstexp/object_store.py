"""Requests to object storage, for `storage`: `s3://bucket/key` URIs in their canonical form.

Errors of boto come back as the project's own: a missing object as a FileNotFoundError, all else as a StorageError.
"""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config as BotoConfig
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError

from mclstexp.errors import ConflictError, StorageError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_MISSING_CODES = {"404", "NoSuchKey", "NotFound"}
_LOST_RACE_CODES = {"412", "PreconditionFailed", "409", "ConditionalRequestConflict"}
_MAX_REQUEST_TRIES = 6
_MAX_CONNECTIONS = 64  # beyond it each request of another thread would open one of its own
_MAX_DELETED = 1000  # objects in one request
_MAX_PUT_BYTES = 8 * 2**20
"""Up to this size a file is uploaded in one request."""
_MAX_BODY_TRIES = 4  # boto retries requests, but not a body that breaks off
_BODY_WAIT_S = 0.5  # doubles with each try
_CLIENT_LOCK = threading.Lock()  # boto's default session makes one client at a time


def get(uri: str, start: int, length: int | None) -> tuple[bytes, str]:
    """Returns an object's bytes from `start` on, at most `length`, and its ETag.

    A body that breaks off is requested again.
    """
    bucket, key = _address(uri)
    with _errors("read", uri):
        for attempt in range(_MAX_BODY_TRIES):
            try:
                if length is None and not start:
                    answer = client().get_object(Bucket=bucket, Key=key)
                else:
                    span = f"bytes={start}-{'' if length is None else start + length - 1}"
                    answer = client().get_object(Bucket=bucket, Key=key, Range=span)
                return answer["Body"].read(), str(answer["ETag"])
            except (HTTPClientError, IncompleteReadError):
                if attempt == _MAX_BODY_TRIES - 1:
                    raise
                time.sleep(_BODY_WAIT_S * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


def head(uri: str) -> tuple[int, str]:
    """Returns an object's length and ETag."""
    bucket, key = _address(uri)
    with _errors("look up", uri):
        answer = client().head_object(Bucket=bucket, Key=key)
    return int(answer["ContentLength"]), str(answer["ETag"])


def put(uri: str, data: bytes) -> None:
    """Writes an object."""
    bucket, key = _address(uri)
    with _errors("write", uri):
        client().put_object(Bucket=bucket, Key=key, Body=data)


def exchange(uri: str, data: bytes, previous: str | None) -> str:
    """Writes an object only if its ETag is still `previous` (None: it must not exist), and returns the new ETag.

    Raises:
        ConflictError: the object has another ETag; nothing was written.
    """
    bucket, key = _address(uri)
    with _errors("publish", uri):
        try:
            if previous is None:
                answer = client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
            else:
                answer = client().put_object(Bucket=bucket, Key=key, Body=data, IfMatch=previous)
        except ClientError as error:
            if _code(error) not in _LOST_RACE_CODES | _MISSING_CODES:
                raise
            # boto repeats a put whose answer was lost; the second try then conflicts with the first.
            own = _etag_of_equal(uri, data)
            if own is None:
                raise ConflictError(uri) from error
            return own
        return str(answer["ETag"])


def upload(local: str, uri: str) -> None:
    """Copies a local file to an object, in parts if it is large."""
    if os.path.getsize(local) <= _MAX_PUT_BYTES:  # boto's transfers start threads for each file
        put(uri, Path(local).read_bytes())
        return
    with _errors("upload", uri):
        client().upload_file(local, *_address(uri))


def download(uri: str, local: str) -> None:
    """Copies an object to a local file."""
    with _errors("download", uri):
        client().download_file(*_address(uri), local)


def list_objects(uri: str, delimiter: str = "") -> list[str]:
    """Returns the URIs of all objects under `uri`, or those without a delimiter in the rest of their keys."""
    bucket, _, prefix = uri[5:].partition("/")
    prefix = f"{prefix}/" if prefix else ""
    with _errors("list", uri):
        paginator = client().get_paginator("list_objects_v2")
        pages = paginator.paginate(Bucket=bucket, Prefix=prefix, Delimiter=delimiter)
        return [f"s3://{bucket}/{item['Key']}" for page in pages for item in page.get("Contents", ())]


def delete(uri: str) -> None:
    """Removes an object, if it exists."""
    bucket, key = _address(uri)
    with _errors("delete", uri):
        client().delete_object(Bucket=bucket, Key=key)


def delete_all(uris: Sequence[str]) -> None:
    """Removes objects of one bucket, `_MAX_DELETED` per request."""
    for start in range(0, len(uris), _MAX_DELETED):
        addresses = [_address(uri) for uri in uris[start : start + _MAX_DELETED]]
        with _errors("delete", uris[start]):
            answer = client().delete_objects(
                Bucket=addresses[0][0], Delete={"Objects": [{"Key": key} for _, key in addresses], "Quiet": True}
            )
        if left := answer.get("Errors"):
            raise StorageError(f"cannot delete {len(left)} of {len(addresses)} objects: {left[0]}")


def client() -> "S3Client":
    """Returns this process's S3 client, the same for all threads."""
    with _CLIENT_LOCK:
        return _client_of(os.getpid())


@cache
def _client_of(process: int) -> "S3Client":
    config = BotoConfig(
        connect_timeout=10,
        read_timeout=60,
        retries={"mode": "standard", "max_attempts": _MAX_REQUEST_TRIES},
        max_pool_connections=_MAX_CONNECTIONS,
    )
    return boto3.client("s3", region_name=region(), config=config)


def region() -> str:
    """Returns the region that the environment names."""
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"


def _address(uri: str) -> tuple[str, str]:
    """Returns bucket and key."""
    bucket, _, key = uri[5:].partition("/")
    return bucket, key


def _etag_of_equal(uri: str, data: bytes) -> str | None:
    """Returns an object's ETag if its bytes equal `data`, else None."""
    bucket, key = _address(uri)
    try:
        answer = client().get_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if _code(error) in _MISSING_CODES:
            return None
        raise
    return str(answer["ETag"]) if answer["Body"].read() == data else None


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@contextmanager
def _errors(action: str, uri: str) -> Iterator[None]:
    """Raises boto's errors as a StorageError, a missing object as a FileNotFoundError."""
    try:
        yield
    except ClientError as error:
        if _code(error) in _MISSING_CODES:
            raise FileNotFoundError(uri) from error
        answer = f"the store answered {_code(error)}"
        raise StorageError(f"cannot {action} {uri}: {answer}; check credentials and bucket") from error
    except (BotoCoreError, Boto3Error) as error:
        raise StorageError(f"cannot {action} {uri}: {error}; check storage.endpoint_url and credentials") from error
