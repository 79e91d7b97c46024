"""The checkpoints of a run in storage: the newest sound one, whatever Ray Train's snapshot names.

Ray Train's snapshot lists a run's checkpoints. Ray reads none of them, refuses a run whose snapshot names one that is
gone, and writes the snapshot in place. So every checkpoint is read before it is used, at the price of hashing it once
more, and a damaged one is passed over for the one before.
"""

import json
import math
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import ray

from mclstexp import storage
from mclstexp.errors import RunError
from mclstexp.progress import Metrics
from mclstexp.training.checkpoint import read_checkpoint
from mclstexp.training.validation import VALIDATION_PCC

SNAPSHOT = "checkpoint_manager_snapshot.json"
_FOLDERS = "checkpoint_"
_LISTS = (
    "pending_training_results",
    "pending_validation_specs",
    "validated_checkpoint_dir_names",
    "timed_out_validation_checkpoint_dir_names",
    "failed_validation_checkpoint_dir_names",
)
"""What a snapshot says of Ray Train's own validation, which runs do not use."""


class StoredCheckpoint(NamedTuple):
    """A checkpoint and the metrics that were reported with it."""

    uri: str
    metrics: Metrics
    report: int
    """Its place among all reports of the run."""


def newest_checkpoint(run_uri: str) -> StoredCheckpoint | None:
    """Returns a run's newest sound checkpoint; None if it has no checkpoint. Prints which ones are damaged.

    Raises:
        RunError: there are checkpoints, and all are damaged.
    """
    stored = _stored(run_uri)
    return _first_sound(run_uri, stored) if stored else None


def best_checkpoint(run_uri: str) -> StoredCheckpoint | None:
    """Returns the sound checkpoint that scored best on the validation patients, the earliest of several such.

    The newest sound one if none of those with a score is sound; None if the run has no checkpoint.

    Raises:
        RunError: there are checkpoints, and all are damaged.
    """
    stored = _stored(run_uri)
    scored = [one for one in stored if math.isfinite(one.metrics.get(VALIDATION_PCC, math.nan))]
    ranked = sorted(scored, key=lambda one: (-one.metrics[VALIDATION_PCC], one.report))
    return _first_sound(run_uri, [*ranked, *(one for one in stored if one not in scored)]) if stored else None


def mend_snapshot(run_uri: str, by_score: bool) -> None:
    """Makes Ray Train go on from the newest sound checkpoint: removes the damaged ones from its snapshot.

    A snapshot that cannot be read is made again from the checkpoints. Nothing else of the run is changed.

    Args:
        run_uri: the run, which no process is training.
        by_score: whether Ray keeps the checkpoints that scored best, and lists them in this order.

    Raises:
        RunError: there are checkpoints, and all are damaged.
    """
    stored = _stored(run_uri)
    if not stored:
        return
    newest = _first_sound(run_uri, stored)
    kept = [one for one in stored if one.report <= newest.report and storage.list_folder(one.uri)]
    snapshot = _snapshot(run_uri)
    if snapshot is not None and len(kept) == len(snapshot["checkpoint_results"]):
        return
    kept.sort(key=lambda one: (_score(one) if by_score else 0.0, one.report))
    results = [_result(one) for one in kept]
    mended = {"ray_version": ray.__version__, "current_report_index": newest.report + 1, **(snapshot or {})}
    mended |= {key: [] for key in _LISTS} | {
        "checkpoint_results": results,
        "checkpoint_report_indices": [one.report for one in kept],
        "latest_checkpoint_result": _result(newest),
    }
    storage.write(storage.join(run_uri, SNAPSHOT), json.dumps(mended).encode())


@contextmanager
def local_checkpoint(uri: str) -> Iterator[str]:
    """Yields a local folder with a checkpoint's files: its own if it is local, else a copy, removed at the end."""
    if not storage.is_s3(uri):
        yield uri
        return
    with tempfile.TemporaryDirectory() as scratch:
        for name in storage.list_folder(uri):
            storage.download(storage.join(uri, name), Path(scratch, name))
        yield scratch


def _first_sound(run_uri: str, stored: Iterable[StoredCheckpoint]) -> StoredCheckpoint:
    """Returns the first checkpoint that is sound, and prints why those before it are passed over."""
    faults = []
    for one in stored:
        fault = _fault(one)
        if fault is None:
            return one
        print(f"{fault}; passed over for the one before", flush=True)
        faults.append(fault)
    raise RunError(
        f"the run cannot go on, because none of its {len(faults)} checkpoints is sound ({faults[0]}); delete the "
        f"folder {run_uri} and run the same command again, which trains from the start"
    )


def _fault(one: StoredCheckpoint) -> str | None:
    """Returns what is wrong with a checkpoint; None if it is sound."""
    try:
        with local_checkpoint(one.uri) as folder:
            read_checkpoint(folder)
    except RunError as error:
        return str(error)
    return None


def _stored(run_uri: str) -> list[StoredCheckpoint]:
    """Returns the checkpoints that Ray Train's snapshot names, newest first; without a readable one, all folders."""
    snapshot = _snapshot(run_uri)
    if snapshot is None:
        return _found(run_uri)
    return sorted(_listed(run_uri, snapshot), key=lambda one: -one.report)


def _listed(run_uri: str, snapshot: dict[str, Any]) -> list[StoredCheckpoint]:
    """Returns the checkpoints of a snapshot, in its order."""
    pairs = zip(snapshot["checkpoint_results"], snapshot["checkpoint_report_indices"], strict=True)
    return [
        StoredCheckpoint(
            storage.join(run_uri, str(result["checkpoint_dir_name"])), Metrics(result["metrics"]), int(report)
        )
        for result, report in pairs
    ]


def _snapshot(run_uri: str) -> dict[str, Any] | None:
    """Returns Ray Train's snapshot of a run; None if it is missing, or damaged, as by a kill while it was written."""
    try:
        snapshot = json.loads(storage.read(storage.join(run_uri, SNAPSHOT)))
        _listed(run_uri, snapshot)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return cast(dict[str, Any], snapshot)


def _found(run_uri: str) -> list[StoredCheckpoint]:
    """Returns the checkpoints whose folders are in storage, newest first, with the metrics that their states have."""
    inside = (file.removeprefix(f"{run_uri}/") for file in storage.list_files(run_uri))
    names = sorted({path.split("/")[0] for path in inside if path.startswith(_FOLDERS) and "/" in path})
    found = []
    for report, name in enumerate(names):
        uri = storage.join(run_uri, name)
        with local_checkpoint(uri) as folder:
            metrics = _metrics(folder)
        found.append(StoredCheckpoint(uri, metrics, report))
    return found[::-1]


def _metrics(folder: str) -> Metrics:
    try:
        state = read_checkpoint(folder).state
    except RunError:
        return Metrics()
    return Metrics({"epoch": state.epoch, "step": state.step, **state.metrics})


def _score(one: StoredCheckpoint) -> float:
    score = one.metrics.get(VALIDATION_PCC, math.nan)
    return score if math.isfinite(score) else -math.inf


def _result(one: StoredCheckpoint) -> dict[str, object]:
    return {"version": 0, "checkpoint_dir_name": one.uri.rpartition("/")[2], "metrics": one.metrics}
