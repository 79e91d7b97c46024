"""The job that computes features: killed and run again it ends as a calm run does; it says what it would do and did."""

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import _launch
import embed
import pytest
import ray

from mclstexp import storage
from mclstexp.data.features import FEATURES, FeatureManifest
from mclstexp.data.schema import MANIFEST, load_manifest
from mclstexp.errors import UserError

JOB = Path(__file__).parents[1] / "jobs" / "embed.py"
ENCODER = ("--config", os.devnull, "--model.image_encoder", "small_cnn", "--train.precision", "fp32")
DRAWS = ("--views", "12", "--train.augmentation", "default")
"""Enough draws for a run to be killed midway."""


def _start(tiles: str, *options: str) -> subprocess.Popen[str]:
    """Starts the job as a process, on the tests' Ray."""
    return subprocess.Popen(
        [sys.executable, str(JOB), "--data", tiles, *ENCODER, *options],
        env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _run(tiles: str, *options: str) -> list[str]:
    """Runs the job in this process, on the tests' Ray; returns the lines that it prints."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(_launch, "connect", lambda config: None)
        _main(patch, tiles, *options)
    return printed.getvalue().strip().splitlines()


def _main(monkeypatch: pytest.MonkeyPatch, tiles: str, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["embed.py", "--verbose", "--data", tiles, *ENCODER, *options])
    embed.main()


def _files(tiles: str) -> dict[str, bytes]:
    """Returns the files of the only feature table by their name below its folder."""
    root = storage.join(tiles, FEATURES)
    uris = [uri for uri in storage.list_files(root) if uri.endswith((".parquet", ".json"))]
    return {uri.removeprefix(f"{root}/"): storage.read(uri) for uri in uris}


def _published(tiles: str) -> int:
    """Returns the number of published sections."""
    manifests = [data for name, data in _files(tiles).items() if name.endswith(MANIFEST)]
    return len(FeatureManifest.model_validate_json(manifests[0]).sections) if manifests else 0


@pytest.fixture(scope="module")
def calm(tiles: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """A copy of the tile table whose features were computed without a break, and what the job printed."""
    root = str(tmp_path_factory.mktemp("calm") / "tiles")
    shutil.copytree(tiles, root, ignore=shutil.ignore_patterns(FEATURES))
    return root, _run(root, *DRAWS)


@pytest.mark.ray
@pytest.mark.slow
def test_killed_midway_and_run_again_it_ends_with_the_same_bytes(
    calm: tuple[str, list[str]], tiles: str, s3: str
) -> None:
    root = f"{s3}/tiles"
    for uri in storage.list_files(tiles):
        if not uri.endswith(".lock") and FEATURES not in uri:
            storage.upload(uri, storage.join(root, uri.removeprefix(f"{tiles}/")))
    num_sections = len(load_manifest(root).sections)
    job, deadline = _start(root, *DRAWS), time.monotonic() + 120
    while not _published(root):
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    kept = _published(root)
    assert 0 < kept < num_sections, "killed too late to prove anything"
    lines = _run(root, *DRAWS)
    assert lines[-2] == f"computed {num_sections - kept} section(s), kept {kept}"
    assert _files(root) == _files(calm[0])


@pytest.mark.ray
@pytest.mark.slow
def test_it_says_what_it_did_and_a_flipped_bit_is_named_and_made_again(calm: tuple[str, list[str]]) -> None:
    tiles, printed = calm
    num_sections = len(load_manifest(tiles).sections)
    before = _files(tiles)
    name = next(iter(before)).partition("/")[0]
    assert printed[-2:] == [
        f"computed {num_sections} section(s), kept 0",
        f"features {storage.join(tiles, FEATURES, name)}",
    ]
    file = next(name for name in before if name.startswith(f"{name.partition('/')[0]}/P1S1"))
    flipped = bytearray(before[file])
    flipped[len(flipped) // 2] ^= 1
    Path(tiles, FEATURES, file).write_bytes(flipped)
    lines = _run(tiles, *DRAWS)
    assert lines[-2] == f"computed 1 section(s), kept {num_sections - 1}"
    assert lines[-3].startswith("damaged, and made again: section P1S1: sentence ")
    assert lines[-3].endswith(f" of {file.partition('/')[2]}")
    assert _files(tiles) == before


def test_a_dry_run_forecasts_and_writes_nothing(
    tiles: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = storage.list_files(tiles)
    options = ("--sections", "P1S1,P1S1", "--dry-run", "--views", "2", "--model.feature_dtype", "float16")
    _main(monkeypatch, tiles, *options)
    spots = load_manifest(tiles).section("P1S1").num_spots
    printed = capsys.readouterr()
    assert "warning: small_cnn has random weights and learns nothing" in printed.err
    last = printed.out.strip().splitlines()[-1]
    gigabytes = spots * (128 * 2 * 3 + 24) / 1e9
    assert last.startswith("would write features/small_cnn-")
    assert f": {spots} spots of 1 section(s), {gigabytes:.3g} GB; " in last
    assert "ms per spot on " in last
    assert storage.list_files(tiles) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sections", "P9"), "the tile table has no section P9"),
        (("--model.image_layers", "fourth"), "fourth"),
        (("--views", "2", "--train.augmentation", "none"), "needs model.freeze_encoder=true and an augmentation other"),
        (("--model.image_weights", "missing.pth"), "missing.pth"),
    ],
)
def test_mistakes_are_refused_before_anything_starts(
    tiles: str, options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_launch, "connect", lambda config: pytest.fail("Ray was started"))
    with pytest.raises(UserError, match=re.escape(message)):
        _main(monkeypatch, tiles, *options)
