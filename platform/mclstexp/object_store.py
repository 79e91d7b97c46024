"""What `storage` needs of S3, through boto3: exact request counts, own deadlines and retries, conditional puts.

Every function takes `s3://bucket/key`. Endpoint, region and credentials come from the standard AWS environment
variables of the process that calls; nothing of them is pickled.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config as BotoConfig
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError

from mclstexp.errors import ConflictError, StorageError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_MISSING = {"404", "NoSuchKey", "NotFound"}
_LOST_RACE = {"412", "PreconditionFailed", "409", "ConditionalRequestConflict"}
_REQUEST_TRIES = 6
_MOST_DELETED = 1000
_BODY_TRIES = 4  # boto retries requests, but not a body that breaks off
_BODY_WAIT_S = 0.5  # doubles with each try


def client() -> "S3Client":
    """Returns this process's S3 client."""
    return _client_of(os.getpid())


def region() -> str:
    """Returns the region that the environment names."""
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"


def get(uri: str, start: int, length: int | None) -> bytes:
    """Returns an object's bytes from `start` on, at most `length`; a body that breaks off is asked for again."""
    bucket, key = _address(uri)
    with _errors("read", uri):
        for attempt in range(_BODY_TRIES):
            try:
                if length is None and not start:
                    return client().get_object(Bucket=bucket, Key=key)["Body"].read()
                span = f"bytes={start}-{'' if length is None else start + length - 1}"
                return client().get_object(Bucket=bucket, Key=key, Range=span)["Body"].read()
            except (HTTPClientError, IncompleteReadError):
                if attempt == _BODY_TRIES - 1:
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
    """Writes an object only if its ETag is still `previous` (None: must not exist yet), and returns the new one.

    Raises:
        ConflictError: it is not; nothing was written.
    """
    bucket, key = _address(uri)
    with _errors("publish", uri):
        try:
            if previous is None:
                answer = client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
            else:
                answer = client().put_object(Bucket=bucket, Key=key, Body=data, IfMatch=previous)
        except ClientError as error:
            if _code(error) not in _LOST_RACE | _MISSING:
                raise
            # A put that boto repeated after a lost answer meets its own first try.
            held = _version_holding(uri, data)
            if held is None:
                raise ConflictError(uri) from error
            return held
        return str(answer["ETag"])


def upload(local: str, uri: str) -> None:
    """Copies a local file to an object, in parts where it is large."""
    with _errors("upload", uri):
        client().upload_file(local, *_address(uri))


def download(uri: str, local: str) -> None:
    """Copies an object to a local file."""
    with _errors("download", uri):
        client().download_file(*_address(uri), local)


def list_keys(uri: str) -> list[str]:
    """Returns the URIs of all objects under `uri`."""
    bucket, _, prefix = uri[5:].partition("/")
    prefix = f"{prefix}/" if prefix else ""
    with _errors("list", uri):
        pages = client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [f"s3://{bucket}/{item['Key']}" for page in pages for item in page.get("Contents", ())]


def delete(uri: str) -> None:
    """Removes an object; nothing happens where there is none."""
    bucket, key = _address(uri)
    with _errors("delete", uri):
        client().delete_object(Bucket=bucket, Key=key)


def delete_all(uris: Sequence[str]) -> None:
    """Removes objects of one bucket, in requests of 1,000."""
    for start in range(0, len(uris), _MOST_DELETED):
        places = [_address(uri) for uri in uris[start : start + _MOST_DELETED]]
        with _errors("delete", uris[start]):
            answer = client().delete_objects(
                Bucket=places[0][0], Delete={"Objects": [{"Key": key} for _, key in places], "Quiet": True}
            )
        if left := answer.get("Errors"):
            raise StorageError(f"cannot delete {len(left)} of {len(places)} objects: {left[0]}")


@cache
def _client_of(process: int) -> "S3Client":
    config = BotoConfig(
        connect_timeout=10, read_timeout=60, retries={"mode": "standard", "max_attempts": _REQUEST_TRIES}
    )
    return boto3.client("s3", region_name=region(), config=config)


def _address(uri: str) -> tuple[str, str]:
    bucket, _, key = uri[5:].partition("/")
    return bucket, key


def _version_holding(uri: str, data: bytes) -> str | None:
    """Returns an object's ETag if these are its bytes."""
    bucket, key = _address(uri)
    try:
        answer = client().get_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if _code(error) in _MISSING:
            return None
        raise
    return str(answer["ETag"]) if answer["Body"].read() == data else None


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@contextmanager
def _errors(action: str, uri: str) -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        if _code(error) in _MISSING:
            raise FileNotFoundError(uri) from error
        answer = f"the store answered {_code(error)}"
        raise StorageError(f"cannot {action} {uri}: {answer}; check credentials and bucket") from error
    except (BotoCoreError, Boto3Error) as error:
        raise StorageError(f"cannot {action} {uri}: {error}; check storage.endpoint_url and credentials") from error
