"""Cross-validation: every fold trained, scored and kept, as many at once as fit on the cluster.

A fold is a training run of its own, with everything fitted on its training sections. Folds run as Ray tasks that
drive them. A scored fold is never run again, an interrupted one goes on where it stopped, and one that fails does not
stop the others.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import ray
from ray.data import ExecutionResources

from mclstexp import cluster, storage, tracking
from mclstexp.config import Config, override
from mclstexp.data.folds import make_split
from mclstexp.data.genes import GenePanel
from mclstexp.data.schema import Manifest, load_manifest
from mclstexp.data.totals import GeneCounts
from mclstexp.errors import RunError, SplitError, UserError
from mclstexp.evaluation.evaluate import evaluate
from mclstexp.evaluation.floors import make_floor_features
from mclstexp.evaluation.save import PER_GENE, ROWS, save_card
from mclstexp.evaluation.save import RECORD as RESULT
from mclstexp.evaluation.score_card import ScoreCard
from mclstexp.evaluation.scores import read_table
from mclstexp.model.version import ModelVersion
from mclstexp.progress import Log, Metrics, ProgressBoard, Show, hidden
from mclstexp.tracking import MetricLog
from mclstexp.training.complete import train_to_end
from mclstexp.training.run import RECORD as RUN_RECORD
from mclstexp.training.run import Run, TrackedRecord, former_digest, identity, open_run, planned, require_totals
from mclstexp.training.stored import store_features
from tuning.study import Track, open_record, study_name

RECORD, SCORES = "study.json", "scores"
LEAK = "LEAK that this protocol allows: other sections of the tested patients trained"
POLL_S = 1.0


@dataclass(frozen=True)
class Fold:
    """One held-out section or patient."""

    name: str
    config: Config


@dataclass(frozen=True)
class Study:
    """What all folds share: the tile table, the folder of the results and the parent MLflow run."""

    data: str
    uri: str
    protocol: str
    mlflow_run_id: str
    floor_weights: str | None
    markers: dict[str, GenePanel]


class _Record(TrackedRecord):
    protocol: str
    probe_weights: str | None  # `floor_weights`, under the name of earlier versions
    markers: dict[str, list[str]]


def default_name(
    out: str,
    manifest: Manifest,
    protocol: str,
    config: Config,
    floor_weights: str | None = None,
    markers: Mapping[str, GenePanel] | None = None,
) -> str:
    """Returns the name of a cross-validation that was given none; arguments as `open_study`, `out` is its parent."""
    request = _request(manifest, protocol, config, floor_weights, markers)
    former = f"{protocol}-{former_digest(config)}-{manifest.digest()[:6]}"
    return study_name(out, RECORD, protocol, request, former)


def open_study(
    data: str,
    uri: str,
    protocol: str,
    config: Config,
    track: Track,
    floor_weights: str | None = None,
    markers: Mapping[str, GenePanel] | None = None,
) -> Study:
    """Returns the study at `uri`: a new one, or an earlier one as it was left.

    Args:
        data: the tile table.
        uri: folder of the folds and the result.
        protocol: `reference` or `patient`.
        config: the recipe; it holds out nothing itself.
        track: returns the study's MLflow run.
        floor_weights: as `evaluate` takes them.
        markers: as `evaluate` takes them.

    Raises:
        RunError: the folder holds a study of other settings, data, protocol, floor weights or markers.
    """
    request = _request(load_manifest(data), protocol, config, floor_weights, markers)
    record = open_record(_Record, uri, RECORD, request, track)
    return Study(storage.absolute(data), uri, protocol, record.mlflow_run_id, floor_weights, dict(markers or {}))


def make_folds(manifest: Manifest, config: Config, protocol: str, only: Sequence[str] = ()) -> list[Fold]:
    """Returns one fold for each measured section (`reference`) or patient (`patient`), or for each name in `only`.

    Raises:
        SplitError: the settings hold data out themselves, a name in `only` is unknown, or a fold cannot be trained.
    """
    if config.split.test_sections or config.split.test_patients:
        raise SplitError("cross-validation holds each section or patient out in turn; leave split.test_* empty")
    unit, setting = ("section", "test_sections") if protocol == "reference" else ("patient", "test_patients")
    names = _fold_names(manifest, protocol)
    unknown = sorted(set(only) - set(names))
    if unknown:
        raise SplitError(f"--folds: no measured {unit} {', '.join(unknown)}; there are {', '.join(names)}")
    folds = []
    for name in dict.fromkeys(only or names):
        changed: dict[str, object] = {"split.protocol": protocol, f"split.{setting}": [name]}
        folds.append(Fold(name, override(config, changed, f"fold {name}")))
        make_split(manifest, folds[-1].config.split)
    return folds


def read_sections(manifest: Manifest, folds: Sequence[Fold]) -> list[str]:
    """Returns the sections that any of the folds trains on, validates on or tests on."""
    splits = [make_split(manifest, fold.config.split) for fold in folds]
    return sorted({name for split in splits for name in (*split.train, *split.validation, *split.test)})


def run_folds(folds: Sequence[Fold], study: Study, show: Show = hidden) -> dict[str, str]:
    """Runs all folds that are not scored yet; returns the failed ones with their reasons. Ray must be connected.

    Features of a frozen encoder and of the floors' encoders are made before, so that no two folds make the same.

    Raises:
        ConfigError, ModelError: features cannot be made, or spot totals of a fold's sections are over other genes.
    """
    folds, study = _for_tasks(folds, study)
    folds = [_planned(fold, load_manifest(study.data)) for fold in folds]
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}  # the node that sees the driver's files
    task = ray.remote(num_cpus=0, max_retries=0, label_selector=here)(cluster.guarded)
    waiting = [fold for fold in folds if not is_scored(study, fold.name)]
    _require_totals(waiting, study)
    sections = read_sections(load_manifest(study.data), waiting)
    store_features(study.data, sections, [fold.config for fold in waiting[:1]], show)
    if waiting:
        make_floor_features(waiting[0].config, study.data, sections, study.floor_weights, show)
    num_done = len(folds) - len(waiting)
    failed: dict[str, str] = {}
    running: dict[ray.ObjectRef, tuple[Fold, ray.actor.ActorHandle]] = {}
    while waiting or running:
        show("folds", num_done, len(folds))
        while waiting and len(running) < cluster.runs_at_once(waiting[0].config):
            fold, board = waiting.pop(0), _make_board(here)
            running[task.remote(_run_fold, fold, study, board)] = (fold, board)
            show(f"fold {fold.name}", 0, fold.config.train.epochs, "starting")
        done, _ = ray.wait(list(running), timeout=POLL_S)
        for fold, board in running.values():
            _show_epochs(fold, ray.get(board.take.remote()), show)
        for reference in done:
            fold, _ = running.pop(reference)
            reason = _reason(reference)
            if reason:
                failed[fold.name] = reason
            num_done += 1
    show("folds", num_done, len(folds))
    return failed


def _require_totals(folds: Sequence[Fold], study: Study) -> None:
    """Checks folds that have not begun, before any features are made for them."""
    manifest = load_manifest(study.data)
    counts = GeneCounts(study.data, manifest)
    new = [fold for fold in folds if not storage.exists(storage.join(study.uri, fold.name, RUN_RECORD))]
    for fold in new:
        require_totals(counts, make_split(manifest, fold.config.split), fold.config.genes)


def is_scored(study: Study, fold: str) -> bool:
    """Returns whether the score card of the fold of that name was saved."""
    return storage.exists(storage.join(study.uri, fold, SCORES, RESULT))


def scored_folds(manifest: Manifest, study: Study) -> list[str]:
    """Returns the names of all scored folds of the study, whichever call ran them."""
    return [name for name in _fold_names(manifest, study.protocol) if is_scored(study, name)]


def require_all(failed: dict[str, str], folds: Sequence[Fold], study: Study) -> None:
    """Raises an error if a fold failed.

    Raises:
        RunError: names each failed fold with its reason.
    """
    if failed:
        listed = "\n  ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise RunError(
            f"{len(failed)} of {len(folds)} fold(s) failed, the others are kept in {study.uri}; fix it and run the "
            f"same command again:\n  {listed}"
        )


def collect(folds: Sequence[str], study: Study) -> ScoreCard:
    """Returns one score card over the sections of scored folds; notes of single folds come with the fold's name."""
    records: list[dict[str, Any]] = []
    rows: list[pd.DataFrame] = []
    per_gene: list[pd.DataFrame] = []
    for fold in folds:
        uri = storage.join(study.uri, fold, SCORES)
        records.append(json.loads(storage.read(storage.join(uri, RESULT))))
        for name, parts in ((ROWS, rows), (PER_GENE, per_gene)):
            parts.append(read_table(storage.read(storage.join(uri, name))).drop(columns="protocol"))
    genes = pd.concat(per_gene, ignore_index=True)
    digests = [record["model_digest"] for record in records]
    return ScoreCard(
        protocol=study.protocol,
        targets=records[0]["targets"],
        model_digest=digests[0] if len(folds) == 1 else f"{digests[0]} to {digests[-1]} ({len(folds)} folds)",
        notes=_joined_notes({fold: record["notes"] for fold, record in zip(folds, records, strict=True)}),
        genes=sorted(genes["gene"].unique()),
        rows=pd.concat(rows, ignore_index=True),
        per_gene=genes,
        predictions={
            name: f"{fold}/{SCORES}/{path}"
            for fold, record in zip(folds, records, strict=True)
            for name, path in record["predictions"].items()
        },
        training_runs={name: run_id for record in records for name, run_id in record["training_runs"].items()},
    )


def _request(
    manifest: Manifest,
    protocol: str,
    config: Config,
    floor_weights: str | None,
    markers: Mapping[str, GenePanel] | None,
) -> dict[str, object]:
    return {
        "identity": identity(config),
        "manifest_digest": manifest.digest(),
        "protocol": protocol,
        "probe_weights": floor_weights,
        "markers": {name: panel.names() for name, panel in (markers or {}).items()},
    }


def _fold_names(manifest: Manifest, protocol: str) -> list[str]:
    unit = "section_id" if protocol == "reference" else "patient_id"
    return sorted({str(getattr(entry, unit)) for entry in manifest.sections if entry.measured})


def _for_tasks(folds: Sequence[Fold], study: Study) -> tuple[list[Fold], Study]:
    """Returns both with local files named as tasks find them."""
    named = [replace(fold, config=cluster.config_for_tasks(fold.config)) for fold in folds]
    return named, replace(study, floor_weights=cluster.weights_for_tasks(study.floor_weights))


def _planned(fold: Fold, manifest: Manifest) -> Fold:
    """Returns the fold with the epochs that its run will have."""
    return replace(fold, config=planned(fold.config, manifest, make_split(manifest, fold.config.split).train))


def _make_board(node: dict[str, str]) -> ray.actor.ActorHandle:
    """Returns a board on the node with these labels: one that died with another node would end the driver too."""
    return ProgressBoard.options(label_selector=node).remote()  # type: ignore[attr-defined]


def _show_epochs(fold: Fold, posted: list[tuple[int, Metrics]], show: Show) -> None:
    epochs = fold.config.train.epochs
    for _, metrics in posted:
        epoch = int(metrics["epoch"]) + 1
        show(f"fold {fold.name}", epoch, epochs, "training" if epoch < epochs else "last epoch, bank, scores")


def _run_fold(fold: Fold, study: Study, board: ray.actor.ActorHandle) -> None:
    def track(config: Config, name: str, recorded: str | None) -> str:
        tags = {"mlflow.parentRunId": study.mlflow_run_id, "protocol": fold.config.split.protocol, "fold": name}
        return tracking.start_run(config, name, tags, recorded)

    run = open_run(study.data, study.uri, fold.name, fold.config, track)
    limits = ExecutionResources.for_limits(**cluster.share_of_run(run.config))
    metrics = tracking.metric_log(run.config.tracking, run.mlflow_run_id)
    try:
        model = train_to_end(run, _log_to(metrics, board), limits=limits)
        with cluster.ordered(limits):
            _score(run, model, study, metrics)
    finally:
        metrics.close()
    tracking.finish_run(run.config.tracking, run.mlflow_run_id)


def _log_to(metrics: MetricLog, board: ray.actor.ActorHandle) -> Log:
    """Returns a log that sends metrics to MLflow and to the driver's board."""

    def log(step: int, values: Metrics) -> None:
        metrics.log(step, values)
        board.post.remote(step, values)

    return log


def _score(run: Run, model: ModelVersion, study: Study, metrics: MetricLog) -> None:
    card = evaluate(model, study.data, hidden, floor_weights=study.floor_weights, markers=study.markers)
    card = replace(card, training_runs={run.name: run.mlflow_run_id})
    metrics.log(0, card.metrics())
    if model.calibration is not None:
        tracking.log_trust(run.config.tracking, run.mlflow_run_id, model.calibration.genes(model.panel))
    with tempfile.TemporaryDirectory() as folder:
        save_card(card, folder)
        storage.upload_folder(folder, storage.join(run.uri, SCORES), last=RESULT)


def _reason(reference: ray.ObjectRef) -> str:
    """Returns why a fold failed; empty if it did not."""
    try:
        error: UserError | None = ray.get(reference)
    except ray.exceptions.RayTaskError as unforeseen:
        return f"failed in an unforeseen way: {unforeseen.cause!r}"
    except ray.exceptions.RayError as crash:
        return f"its process died: {crash}"
    return str(error) if error else ""


def _joined_notes(notes: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Returns the notes of all folds, each once: a leak, what all folds note, and what only some note."""
    leaks = any(note.startswith("LEAK") for of_fold in notes.values() for note in of_fold)
    kept = {fold: [note for note in of_fold if not note.startswith("LEAK")] for fold, of_fold in notes.items()}
    shared = [note for note in next(iter(kept.values())) if all(note in of_fold for of_fold in kept.values())]
    single = [f"fold {fold}: {note}" for fold, of_fold in kept.items() for note in of_fold if note not in shared]
    return (*([LEAK] if leaks else []), "each fold has a model, a panel and floors of its own", *shared, *single)
