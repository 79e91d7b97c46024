"""The scratch folder of remote slides: one download per node, a budget that holds, no partial copy, no stale lock."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from mclstexp import object_store, storage
from mclstexp.errors import ResourceError, SourceError, StorageError
from mclstexp.prediction import slide_cache
from mclstexp.prediction.slide_cache import clear, staged

MIB = 2**20
SPAWN = multiprocessing.get_context("spawn")


def put(s3, name, size=MIB):
    data = os.urandom(size)
    storage.write(f"{s3}/{name}", data)
    return f"{s3}/{name}", data


def whole(folder):
    """Names of the whole copies in a scratch folder."""
    return sorted(path.name for path in Path(folder).glob("*/*") if not path.name.startswith("."))


def taken(folder):
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def test_a_local_slide_is_used_where_it_is(tmp_path):
    with staged(str(tmp_path / "a.svs"), str(tmp_path / "scratch"), 0) as path:
        assert path == str(tmp_path / "a.svs")
    assert not (tmp_path / "scratch").exists()


def test_a_copy_stays_until_it_is_cleared(s3, tmp_path, monkeypatch):
    uri, data = put(s3, "deep/a b.svs")
    downloads = []
    original = storage.download
    monkeypatch.setattr(storage, "download", lambda *where: (downloads.append(where), original(*where)))
    for _ in range(2):
        with staged(uri, str(tmp_path / "scratch"), 2 * MIB) as path:
            assert Path(path).name == "a b.svs"
            assert Path(path).read_bytes() == data
            clear(str(tmp_path / "scratch"))  # in use: stays
            assert Path(path).exists()
    assert len(downloads) == 1
    foreign = tmp_path / "scratch" / "thesis"
    foreign.mkdir()
    clear(str(tmp_path / "scratch"))
    assert foreign.is_dir()
    foreign.rmdir()
    clear(str(tmp_path / "scratch"))
    assert not (tmp_path / "scratch").exists()
    clear(str(tmp_path / "scratch"))


def test_another_version_of_an_object_is_another_copy(s3, tmp_path):
    uri, _ = put(s3, "a.svs")
    with staged(uri, str(tmp_path), 4 * MIB):
        pass
    _, data = put(s3, "a.svs")
    with staged(uri, str(tmp_path), 4 * MIB) as path:
        assert Path(path).read_bytes() == data


def test_the_least_recently_used_slide_makes_room(s3, tmp_path):
    uris = [put(s3, f"{name}.svs")[0] for name in "abcd"]
    budget = 3 * MIB
    for uri in (*uris[:3], uris[0]):
        with staged(uri, str(tmp_path), budget):
            time.sleep(0.02)
    with staged(uris[3], str(tmp_path), budget):
        assert whole(tmp_path) == ["a.svs", "c.svs", "d.svs"]
        assert taken(tmp_path) <= budget


def test_a_slide_beyond_the_budget_is_refused_with_both_numbers(s3, tmp_path):
    uri, _ = put(s3, "a.svs")
    with (
        pytest.raises(ResourceError, match=rf"a\.svs has {MIB} bytes.*budget of {MIB - 1} bytes"),
        staged(uri, str(tmp_path), MIB - 1),
    ):
        pass
    assert taken(tmp_path) == 0


def test_a_format_of_many_files_is_refused(tmp_path):
    with pytest.raises(SourceError, match="many files"), staged("s3://bucket/a.mrxs", str(tmp_path), MIB):
        pass


def test_a_slide_in_use_is_waited_for_and_never_removed(s3, tmp_path, monkeypatch):
    first, _ = put(s3, "a.svs")
    second, data = put(s3, "b.svs")
    got = []

    def use_second():
        with staged(second, str(tmp_path), MIB) as path:
            got.append(Path(path).read_bytes() == data)

    waiting = threading.Thread(target=use_second)
    with staged(first, str(tmp_path), MIB) as path:
        waiting.start()
        time.sleep(1.0)
        assert Path(path).exists()
        assert not got
    waiting.join(60)
    assert got == [True]
    assert whole(tmp_path) == ["b.svs"]
    monkeypatch.setattr(slide_cache, "_MAX_WAIT_S", 0.5)
    with (
        staged(second, str(tmp_path), MIB),
        pytest.raises(StorageError, match=rf"{MIB} bytes.*scratch budget of {MIB} bytes"),
        staged(first, str(tmp_path), MIB),
    ):
        pass


def test_a_download_cut_short_never_shows(s3, tmp_path, monkeypatch):
    uri, data = put(s3, "a.svs")

    def cut_short(uri, local):
        Path(local).write_bytes(data[: MIB // 2])

    def breaks_off(uri, local):
        cut_short(uri, local)
        raise StorageError("reset")

    def fills_the_disk(uri, local):
        cut_short(uri, local)
        raise OSError(28, "No space left on device")

    for fault, message in (
        (cut_short, f"expected {MIB} bytes, got {MIB // 2}"),
        (breaks_off, "reset"),
        (fills_the_disk, "No space"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(storage, "download", fault)
            with pytest.raises(StorageError, match=message), staged(uri, str(tmp_path), MIB):
                pass
        assert taken(tmp_path) == 0
    with staged(uri, str(tmp_path), MIB) as path:
        assert Path(path).read_bytes() == data


def use(uri, folder, budget, log, hold_s):
    original = object_store.download

    def counted(uri, local):
        with open(log, "a") as file:
            file.write("d")
        original(uri, local)

    object_store.download = counted
    with staged(uri, folder, budget) as path, open(log, "a") as file:
        file.write("u" if Path(path).stat().st_size == 8 * MIB else "!")
        file.flush()
        time.sleep(hold_s)


def run(log, *calls):
    started = [SPAWN.Process(target=use, args=(*call[:3], log, call[3])) for call in calls]
    for process in started:
        process.start()
    return started


@pytest.mark.slow
def test_processes_share_one_download_and_a_killed_one_holds_nothing(s3, tmp_path):
    uri, _ = put(s3, "a.svs", 8 * MIB)
    folder, log = str(tmp_path / "scratch"), str(tmp_path / "log")
    for process in run(log, *[(uri, folder, 8 * MIB, 0.5)] * 3):
        process.join()
        assert process.exitcode == 0
    assert sorted(Path(log).read_text()) == ["d", "u", "u", "u"]

    other, _ = put(s3, "b.svs", 8 * MIB)
    (holder,) = run(log, (uri, folder, 8 * MIB, 600))
    while Path(log).read_text().count("u") < 4:
        time.sleep(0.05)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with staged(other, folder, 8 * MIB) as path:
        assert Path(path).stat().st_size == 8 * MIB
        assert whole(folder) == ["b.svs"]


def test_the_rest_of_a_killed_download_is_replaced(s3, tmp_path):
    uri, data = put(s3, "a.svs")
    entry, _ = slide_cache._entry(uri, tmp_path)
    entry.mkdir()
    (entry / ".a.svs.part").write_bytes(b"x" * MIB)
    other, _ = put(s3, "b.svs")
    with staged(other, str(tmp_path), MIB):
        assert whole(tmp_path) == ["b.svs"]
        assert taken(tmp_path) == MIB
    entry.mkdir()
    (entry / ".a.svs.part").write_bytes(b"x" * MIB)
    with staged(uri, str(tmp_path), MIB) as path:
        assert Path(path).read_bytes() == data
        assert taken(tmp_path) == MIB
