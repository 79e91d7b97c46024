"""Local disk and a real S3 server pass the same tests."""

import os
import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest
from botocore.config import Config as BotoConfig

from mclstexp import object_store, storage
from mclstexp.errors import ConflictError, StorageError


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    return str(tmp_path / "root") if request.param == "local" else request.getfixturevalue("s3") + "/some/root"


def test_whole_objects_and_ranges(root):
    uri = storage.join(root, "a", "b.bin")
    assert not storage.exists(uri)
    assert storage.version(uri) is None
    storage.write(uri, b"0123456789")
    assert storage.read(uri) == b"0123456789"
    assert storage.read(uri, 3, 4) == b"3456"
    assert storage.read(uri, 3, 0) == b""
    assert storage.size(uri) == 10
    assert storage.exists(uri)


def test_short_and_missing_objects_raise_different_errors(root):
    uri = storage.join(root, "short")
    with pytest.raises(FileNotFoundError, match="short"):
        storage.read(uri)
    with pytest.raises(FileNotFoundError):
        storage.size(uri)
    storage.write(uri, b"abc")
    with pytest.raises(StorageError, match=r"expected 5 bytes at 1, got 2"):
        storage.read(uri, 1, 5)


def test_version_follows_content(root):
    uri = storage.join(root, "v")
    storage.write(uri, b"one")
    first = storage.version(uri)
    storage.write(uri, b"two")
    assert storage.version(uri) != first
    storage.write(uri, b"one")
    assert storage.version(uri) == first


def test_list_and_delete(root):
    names = ["x/1", "x/y/2", "xy/3"]
    for name in names:
        storage.write(storage.join(root, name), b"")
    assert storage.list_files(root) == [storage.join(storage.absolute(root), name) for name in names]
    assert storage.list_files(storage.join(root, "x")) == storage.list_files(root)[:2]
    storage.delete(storage.join(root, "x/1"))
    storage.delete(storage.join(root, "x/1"))
    assert len(storage.list_files(root)) == 2
    assert storage.list_files(storage.join(root, "nothing")) == []


def test_deleting_a_folder_removes_its_files_and_nothing_else(root):
    for name in ("x/1", "x/y/2", "xy/3"):
        storage.write(storage.join(root, name), b"")
    storage.delete_folder(storage.join(root, "x"))
    storage.delete_folder(storage.join(root, "x"))
    assert storage.list_files(root) == [storage.join(storage.absolute(root), "xy/3")]
    if not storage.is_s3(root):
        assert [path.name for path in Path(root).iterdir()] == ["xy"]


def test_upload_and_download(root, tmp_path):
    local, back = tmp_path / "up", tmp_path / "down"
    data = bytes(range(256)) * 40_000  # above the size from which S3 uploads in parts
    local.write_bytes(data)
    uri = storage.join(root, "big")
    storage.upload(local, uri)
    storage.download(uri, back)
    assert back.read_bytes() == data
    with pytest.raises(FileNotFoundError):
        storage.download(storage.join(root, "none"), back)


def test_local_copy_leaves_nothing_behind(root, tmp_path):
    uri, scratch = storage.join(root, "slide.svs"), tmp_path / "scratch"
    scratch.mkdir()
    storage.write(uri, b"pixels")
    with storage.local_copy(uri, scratch) as path:
        assert path.endswith("/slide.svs")
        assert storage.read(path) == b"pixels"
    assert list(scratch.iterdir()) == []
    assert storage.exists(uri)


def test_pyarrow_reads_the_same_object(root):
    uri = storage.join(root, "data")
    storage.write(uri, b"shared")
    filesystem, path = storage.filesystem(uri)
    with filesystem.open_input_file(path) as file:
        assert file.read() == b"shared"


def test_publish_creates_and_exchanges(root):
    uri = storage.join(root, "manifest.json")
    storage.publish(uri, b"one", None)
    with pytest.raises(ConflictError, match="another writer"):
        storage.publish(uri, b"two", None)
    version = storage.version(uri)
    storage.publish(uri, b"two", version)
    with pytest.raises(ConflictError):
        storage.publish(uri, b"three", version)
    assert storage.read(uri) == b"two"


def test_publish_over_a_removed_object_conflicts(root):
    uri = storage.join(root, "manifest.json")
    storage.publish(uri, b"one", None)
    version = storage.version(uri)
    storage.delete(uri)
    with pytest.raises(ConflictError):
        storage.publish(uri, b"two", version)
    assert not storage.exists(uri)


@pytest.mark.parametrize("exists_before", [False, True])
def test_of_racing_publishers_exactly_one_wins(root, exists_before):
    uri = storage.join(root, "manifest.json")
    if exists_before:
        storage.write(uri, b"old")
    version = storage.version(uri)
    start, outcomes = threading.Barrier(3), {}

    def race(name: bytes) -> None:
        start.wait()
        try:
            storage.publish(uri, name, version)
            outcomes[name] = True
        except ConflictError:
            outcomes[name] = False

    racers = [threading.Thread(target=race, args=(name,)) for name in (b"a", b"b", b"c")]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    winners = [name for name, won in outcomes.items() if won]
    assert len(outcomes) == 3
    assert winners == [storage.read(uri)]


def test_a_store_with_conditional_puts_passes_and_keeps_no_probe(root):
    storage.require_conditional_puts(root)
    assert storage.list_files(root) == []


def test_a_store_that_ignores_conditions_is_refused(s3, monkeypatch):
    monkeypatch.setattr(object_store, "exchange", lambda uri, data, previous: object_store.put(uri, data))
    with pytest.raises(StorageError, match="ignores If-None-Match"):
        storage.require_conditional_puts(s3)
    assert storage.list_files(s3) == []


def test_a_repeated_put_recognises_its_own_first_try(s3):
    """A put whose answer is lost is sent again by the client, and then conflicts with itself."""
    object_store.exchange(f"{s3}/manifest.json", b"mine", None)
    object_store.exchange(f"{s3}/manifest.json", b"mine", None)
    with pytest.raises(ConflictError):
        object_store.exchange(f"{s3}/manifest.json", b"theirs", None)


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("s3://key:secret@bucket/x", "only bucket and key"),
        ("s3://bucket/x?region=eu", "only bucket and key"),
        ("s3:///x", "only bucket and key"),
        ("gs://bucket/x", "cannot resolve"),
    ],
)
def test_a_uri_with_credentials_options_or_another_scheme_is_refused(uri, reason):
    with pytest.raises(StorageError, match=reason) as caught:
        storage.absolute(uri)
    assert "secret" not in str(caught.value)


def test_local_uris_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("a/b/") == f"{tmp_path}/a/b"
    assert storage.absolute(f"file://{tmp_path}/a") == f"{tmp_path}/a"
    assert storage.absolute("s3://bucket/a/") == "s3://bucket/a"


def test_refused_credentials_give_a_plain_error(s3, monkeypatch):
    client = boto3.client("s3", aws_access_key_id="test-key", aws_secret_access_key="wrong-secret")
    monkeypatch.setattr(object_store, "client", lambda: client)
    with pytest.raises(StorageError, match=r"cannot write s3://.*/x: the store answered \w+; check") as caught:
        storage.write(f"{s3}/x", b"")
    assert "wrong-secret" not in str(caught.value)


def test_an_unwritable_local_path_gives_a_plain_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write .*file/below"):
        storage.write(str(tmp_path / "file" / "below"), b"")


def test_no_secret_is_pickled(s3):
    filesystem, _ = storage.filesystem(s3)
    assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in pickle.dumps(filesystem)


class _Faulty(BaseHTTPRequestHandler):
    """Breaks off the first two bodies of every object, then sends them whole."""

    body = bytes(range(200))
    requests = 0

    def do_GET(self):
        type(self).requests += 1
        whole = self.requests > 2
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.send_header("ETag", '"an etag"')
        self.end_headers()
        self.wfile.write(self.body if whole else self.body[:50])
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.mark.usefixtures("_environment")
def test_a_body_that_breaks_off_is_requested_again(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Faulty)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = BotoConfig(retries={"mode": "standard", "max_attempts": 1}, s3={"addressing_style": "path"})
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{server.server_port}", config=config)
    monkeypatch.setattr(object_store, "client", lambda: client)
    monkeypatch.setattr(object_store, "_BODY_WAIT_S", 0.01)
    try:
        assert storage.read("s3://bucket/key") == _Faulty.body
        assert _Faulty.requests == 3, "the fault did not hit"
    finally:
        server.shutdown()
        server.server_close()
