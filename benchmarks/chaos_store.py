"""The store of `chaos.py` for slides, model and outputs: a folder, or a bucket on an S3 server that may be killed."""

import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import boto3

from mclstexp import storage

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from s3_server import S3Server, free_port

BUCKET = "chaos"


@dataclass(frozen=True)
class Store:
    """A folder or a bucket."""

    root: str
    """URI above slides, model and outputs."""
    restart: Callable[[], None] | None
    """Kills its server and starts it again; None for a folder."""

    def copy(self, folder: Path, names: tuple[str, ...]) -> None:
        """Copies folders into it, unless it is their own folder."""
        if self.root != str(folder):
            for name in names:
                storage.upload_folder(folder / name, storage.join(self.root, name), last="")


@contextmanager
def on_disk(folder: Path) -> Iterator[Store]:
    """A folder as it is."""
    yield Store(str(folder), None)


@contextmanager
def on_s3(folder: Path) -> Iterator[Store]:
    """A bucket on a server of this block's own, which this process and its children find by the environment."""
    endpoint = f"http://127.0.0.1:{free_port()}"
    os.environ.update({"AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"})
    os.environ.update({"AWS_ACCESS_KEY_ID": "chaos", "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16)})
    (folder / "s3").mkdir()
    server = S3Server(endpoint, folder / "s3")

    def restart() -> None:
        server.kill()
        server.start()

    try:
        server.start()
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield Store(f"s3://{BUCKET}", restart)
    finally:
        server.kill()
