"""The newest sound checkpoint of a run is found whatever Ray Train's snapshot names, and Ray goes on from it."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import ray.train
import torch

from mclstexp import storage
from mclstexp.errors import RunError
from mclstexp.training.checkpoint import OPTIMIZER, STATE, WEIGHTS, TrainState, save_checkpoint
from mclstexp.training.history import SNAPSHOT, best_checkpoint, mend_snapshot, newest_checkpoint
from mclstexp.training.validation import VALIDATION_PCC

SCORES = (0.1, 0.3, 0.2, float("nan"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Four checkpoints, of which the last has no score, and the snapshot that Ray Train writes of them."""
    folder = tmp_path / "run"
    network = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.ones(1, 3)).sum().backward()
    results = []
    for epoch, score in enumerate(SCORES):
        optimizer.step()
        name = f"checkpoint_{epoch}"
        metrics = {"epoch": epoch, "step": epoch + 1, VALIDATION_PCC: score}
        (folder / name).mkdir(parents=True)
        state = TrainState({}, epoch=epoch, step=epoch + 1, metrics=metrics)
        save_checkpoint(str(folder / name), network, optimizer, state)
        results.append({"version": 0, "checkpoint_dir_name": name, "metrics": metrics})
    snapshot = {
        "ray_version": ray.__version__,
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(len(SCORES))),
        "latest_checkpoint_result": results[-1],
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": len(SCORES),
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }
    (folder / SNAPSHOT).write_text(json.dumps(snapshot))
    return folder


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut weights": lambda folder: _cut(folder / WEIGHTS),
    "cut moments": lambda folder: _cut(folder / OPTIMIZER),
    "no state": lambda folder: (folder / STATE).unlink(),
    "no folder": shutil.rmtree,
}


def _in_ray(run: Path) -> ray.train.Result:
    """What Ray Train reads of a run when it starts; it refuses a snapshot that names missing folders."""
    return ray.train.Result.from_path(str(run))


def _names(found: list[tuple[ray.train.Checkpoint, dict[str, object]]] | None) -> list[str]:
    return [Path(checkpoint.path).name for checkpoint, _ in found or []]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints_are_passed_over_and_named(
    run: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (2, 3):
        DAMAGE[damage](run / f"checkpoint_{number}")
    newest = newest_checkpoint(str(run))
    assert newest is not None
    assert (newest.uri, newest.metrics["epoch"]) == (str(run / "checkpoint_1"), 1)
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" is damaged: ")[0][-1] for line in said] == ["3", "2"]
    mend_snapshot(str(run), by_score=False)
    result = _in_ray(run)
    assert result.checkpoint is not None
    assert Path(result.checkpoint.path).name == "checkpoint_1"
    assert _names(result.best_checkpoints) == ["checkpoint_0", "checkpoint_1"]


def test_an_older_folder_that_is_gone_does_not_stop_ray(run: Path) -> None:
    shutil.rmtree(run / "checkpoint_1")
    mend_snapshot(str(run), by_score=False)
    assert _names(_in_ray(run).best_checkpoints) == ["checkpoint_0", "checkpoint_2", "checkpoint_3"]


def test_the_snapshot_of_a_sound_run_stays_as_it_is(run: Path) -> None:
    before = (run / SNAPSHOT).read_bytes()
    mend_snapshot(str(run), by_score=True)
    assert (run / SNAPSHOT).read_bytes() == before


@pytest.mark.parametrize("text", ["", '{"ray_ver', "[]"])
def test_a_snapshot_that_was_cut_is_made_again(run: Path, text: str) -> None:
    (run / SNAPSHOT).write_text(text)
    newest = newest_checkpoint(str(run))
    assert newest is not None
    assert newest.uri == str(run / "checkpoint_3")
    mend_snapshot(str(run), by_score=True)
    result = _in_ray(run)
    assert _names(result.best_checkpoints) == [f"checkpoint_{number}" for number in (3, 0, 2, 1)], "worst first"
    assert result.metrics is not None
    assert result.metrics["step"] == 4


def test_every_changed_letter_of_the_snapshot_still_finds_a_checkpoint(run: Path) -> None:
    snapshot = run / "checkpoint_manager_snapshot.json"
    whole = snapshot.read_bytes()
    names = {path.name for path in run.glob("checkpoint_?")}
    for place in range(0, len(whole), 3):
        snapshot.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with suppress(RunError):  # a changed folder name counts as a damaged checkpoint
            found = newest_checkpoint(str(run))
            assert found is not None
            assert found.uri.rpartition("/")[2] in names
    snapshot.write_bytes(whole)


def test_the_best_checkpoint_is_the_best_sound_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for damaged, expected in ((None, 1), (1, 2), (2, 0), (0, 3)):
        if damaged is not None:
            _cut(run / f"checkpoint_{damaged}" / WEIGHTS)
        best = best_checkpoint(str(run))
        assert best is not None
        assert best.uri == str(run / f"checkpoint_{expected}")
    assert "checkpoint_1 is damaged" in capsys.readouterr().out


def test_without_a_sound_checkpoint_the_advice_is_to_start_again(run: Path) -> None:
    for number in range(4):
        _cut(run / f"checkpoint_{number}" / WEIGHTS)
    for choose in (newest_checkpoint, best_checkpoint, lambda uri: mend_snapshot(uri, by_score=False)):
        with pytest.raises(RunError, match=f"none of its 4 checkpoints is sound .*delete the folder {run} and run the"):
            choose(str(run))
    shutil.rmtree(run)
    assert newest_checkpoint(str(run)) is None
    mend_snapshot(str(run), by_score=False)


def test_checkpoints_in_object_storage_are_read_beside_the_folders_of_pyarrow(run: Path, s3: str) -> None:
    uri = f"{s3}/runs/run"
    filesystem, root = storage.filesystem(uri)
    for file in sorted(path for path in run.rglob("*") if path.is_file()):
        name = file.relative_to(run)
        filesystem.create_dir(
            f"{root}/{name.parent}".removesuffix("/.")
        )  # as Ray Train does: an empty object with the folder's name
        storage.upload(file, f"{uri}/{name}")
    assert newest_checkpoint(uri).uri == f"{uri}/checkpoint_3"
    storage.delete(f"{uri}/checkpoint_3/{WEIGHTS}")
    assert newest_checkpoint(uri).uri == f"{uri}/checkpoint_2"
    mend_snapshot(uri, by_score=False)
    assert ray.train.Result.from_path(root, filesystem).checkpoint.path == f"{root}/checkpoint_2"
