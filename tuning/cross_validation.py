"""Cross-validation: every fold trained, scored and kept, as many at once as the cluster holds.

A fold is a training run of its own with everything fitted on its training sections. Folds run as Ray tasks that
drive them; a fold that is scored is never run again, one that was interrupted goes on where it stopped, and one that
fails does not stop the others.
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import ray
from ray.data import ExecutionResources

from mclstexp import cluster, storage, tracking
from mclstexp.cluster import config_for_tasks, ordered, weights_for_tasks
from mclstexp.config import Config, override
from mclstexp.data.folds import make_split
from mclstexp.data.genes import GenePanel
from mclstexp.data.schema import Manifest, load_manifest
from mclstexp.errors import RunError, SplitError, UserError
from mclstexp.evaluation.evaluate import evaluate
from mclstexp.evaluation.save import save_card
from mclstexp.evaluation.score_card import ScoreCard
from mclstexp.evaluation.scores import read_table
from mclstexp.model.version import ModelVersion
from mclstexp.progress import Metrics, ProgressBoard
from mclstexp.tracking import MetricLog
from mclstexp.training import finish
from mclstexp.training.run import Run, identity, open_run
from mclstexp.training.trainer import fit
from tuning.study import StudyRecord, open_record

RECORD, SCORES, FEATURES = "study.json", "scores", "features"
RESULT = "score_card.json"
POLL_S = 1.0
Show = Callable[[str, float], None]
"""Called with (fold, share of its training that is done)."""


@dataclass(frozen=True)
class Fold:
    """One held-out section or patient."""

    name: str
    config: Config


@dataclass(frozen=True)
class Study:
    """What all folds share: the tile table, where everything goes and which MLflow run they belong to."""

    data: str
    uri: str
    protocol: str
    mlflow_run_id: str
    probe_weights: str | None
    markers: dict[str, GenePanel]


class _Record(StudyRecord):
    protocol: str
    probe_weights: str | None
    markers: dict[str, list[str]]


def open_study(
    data: str,
    uri: str,
    protocol: str,
    config: Config,
    start_tracking: Callable[[], str],
    probe_weights: str | None = None,
    markers: Mapping[str, GenePanel] | None = None,
) -> Study:
    """Returns the study at a place, new or as it was left.

    Args:
        data: the tile table.
        uri: where the folds and the result go.
        protocol: `reference` or `patient`.
        config: the recipe, which holds nothing out itself.
        start_tracking: gives a new study's MLflow run.
        probe_weights: as `evaluate` takes them.
        markers: the same.

    Raises:
        RunError: the place holds a study of other settings, data, protocol, probe or markers.
    """
    asked = {
        "identity": identity(config),
        "manifest_digest": load_manifest(data).digest(),
        "protocol": protocol,
        "probe_weights": probe_weights,
        "markers": {name: panel.names() for name, panel in (markers or {}).items()},
    }
    record = open_record(_Record, uri, RECORD, asked, start_tracking)
    return Study(storage.absolute(data), uri, protocol, record.mlflow_run_id, probe_weights, dict(markers or {}))


def make_folds(manifest: Manifest, config: Config, protocol: str, only: Sequence[str] = ()) -> list[Fold]:
    """Returns a fold for each measured section (`reference`) or patient (`patient`), or once for each name in `only`.

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


def _fold_names(manifest: Manifest, protocol: str) -> list[str]:
    unit = "section_id" if protocol == "reference" else "patient_id"
    return sorted({str(getattr(entry, unit)) for entry in manifest.sections if entry.measured})


def run_folds(folds: Sequence[Fold], study: Study, show: Show, ended: Callable[[], None]) -> dict[str, str]:
    """Runs all folds that are not scored yet; returns the failed ones with their reason. Ray must be connected.

    `show` is told how far each is, `ended` is called after each.
    """
    folds, study = _for_tasks(folds, study)
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}  # the node that sees the driver's files
    task = ray.remote(num_cpus=0, max_retries=0, label_selector=here)(_run_guarded)
    waiting = [fold for fold in folds if not is_scored(study, fold.name)]
    failed: dict[str, str] = {}
    running: dict[ray.ObjectRef, tuple[Fold, ray.actor.ActorHandle]] = {}
    while waiting or running:
        while waiting and len(running) < cluster.runs_at_once(waiting[0].config):
            fold, board = waiting.pop(0), _make_board(here)
            running[task.remote(fold, study, board)] = (fold, board)
            show(fold.name, 0.0)
        done, _ = ray.wait(list(running), timeout=POLL_S)
        for fold, board in running.values():
            posted: list[tuple[int, Metrics]] = ray.get(board.take.remote())
            for _, metrics in posted:
                show(fold.name, metrics["done"])
        for reference in done:
            fold, _ = running.pop(reference)
            reason = _reason(reference)
            if reason:
                failed[fold.name] = reason
            ended()
    return failed


def _for_tasks(folds: Sequence[Fold], study: Study) -> tuple[list[Fold], Study]:
    """Returns both with their local files named as tasks find them."""
    named = [replace(fold, config=config_for_tasks(fold.config)) for fold in folds]
    return named, replace(study, probe_weights=weights_for_tasks(study.probe_weights))


def _make_board(node: dict[str, str]) -> ray.actor.ActorHandle:
    """Returns a board on the node of these labels: one that dies with another node would end the driver with it."""
    return ProgressBoard.options(label_selector=node).remote()  # type: ignore[attr-defined]


def is_scored(study: Study, fold: str) -> bool:
    """Tells whether the score card of the fold of that name was saved."""
    return storage.exists(storage.join(study.uri, fold, SCORES, RESULT))


def scored_folds(manifest: Manifest, study: Study) -> list[str]:
    """Returns the names of all folds of the study that are scored, whichever run asked for them."""
    return [name for name in _fold_names(manifest, study.protocol) if is_scored(study, name)]


def _run_guarded(fold: Fold, study: Study, board: ray.actor.ActorHandle) -> str:
    """Runs one fold; returns a user's error as text, for raised it would be wrapped into a traceback."""
    try:
        _run(fold, study, board)
    except UserError as error:
        return str(error)
    return ""


def _run(fold: Fold, study: Study, board: ray.actor.ActorHandle) -> None:
    def start(config: Config, name: str) -> str:
        tags = {"mlflow.parentRunId": study.mlflow_run_id, "protocol": fold.config.split.protocol, "fold": name}
        return tracking.start_run(config, name, tags)

    run = open_run(study.data, study.uri, fold.name, fold.config, start)
    metrics = tracking.metric_log(run.config.tracking, run.mlflow_run_id)
    try:
        checkpoint = None
        if not finish.is_finished(run):
            checkpoint = fit(run, _both(metrics, board, run.config.train.epochs))
        with ordered(ExecutionResources.for_limits(**cluster.share_of_run(run.config))):
            if checkpoint is not None:
                finish.finish(run, checkpoint)
            _score(run, study, metrics)
    finally:
        metrics.close()
    tracking.finish_run(run.config.tracking, run.mlflow_run_id)


def _both(metrics: MetricLog, board: ray.actor.ActorHandle, epochs: int) -> Callable[[int, Metrics], None]:
    def log(step: int, values: Metrics) -> None:
        metrics.log(step, values)
        board.post.remote(step, {"done": (values["epoch"] + 1) / epochs})

    return log


def _score(run: Run, study: Study, metrics: MetricLog) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        model = ModelVersion.load(tracking.fetch_model(run.config.tracking, finish.model_uri(run), scratch))
        card = evaluate(
            model,
            study.data,
            lambda *_: None,
            probe_weights=study.probe_weights,
            markers=study.markers,
            feature_cache=storage.join(study.uri, FEATURES),
        )
    card = replace(card, training_runs={run.name: run.mlflow_run_id})
    metrics.log(0, card.metrics())
    with tempfile.TemporaryDirectory() as folder:
        save_card(card, folder)
        storage.upload_folder(folder, storage.join(run.uri, SCORES), last=RESULT)


def _reason(reference: ray.ObjectRef) -> str:
    try:
        return str(ray.get(reference))
    except ray.exceptions.RayTaskError as error:
        return f"failed in an unforeseen way: {error.cause!r}"
    except ray.exceptions.RayError as error:
        return f"its process died: {error}"


def require_all(failed: dict[str, str], folds: Sequence[Fold], study: Study) -> None:
    """Raises what went wrong.

    Raises:
        RunError: names each failed fold with its reason.
    """
    if failed:
        listed = "\n  ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise RunError(
            f"{len(failed)} of {len(folds)} fold(s) failed, the others are kept in {study.uri}; mend it and run the "
            f"same command again:\n  {listed}"
        )


ROWS, PER_GENE = "score_card.csv", "per_gene.csv"
LEAK = "LEAK that this protocol allows: other sections of the tested patients trained"


def collect(folds: Sequence[str], study: Study) -> ScoreCard:
    """Returns one score card over the sections of scored folds; what only some folds note stands under their names."""
    records: list[dict[str, Any]] = []
    rows: list[pd.DataFrame] = []
    per_gene: list[pd.DataFrame] = []
    for fold in folds:
        place = storage.join(study.uri, fold, SCORES)
        records.append(json.loads(storage.read(storage.join(place, RESULT))))
        for name, parts in ((ROWS, rows), (PER_GENE, per_gene)):
            parts.append(read_table(storage.read(storage.join(place, name))).drop(columns="protocol"))
    genes = pd.concat(per_gene, ignore_index=True)
    leaks = any(note.startswith("LEAK") for record in records for note in record["notes"])
    noted = [[note for note in record["notes"] if not note.startswith("LEAK")] for record in records]
    shared = [note for note in noted[0] if all(note in notes for notes in noted)]
    own = [
        f"fold {fold}: {note}" for fold, notes in zip(folds, noted, strict=True) for note in notes if note not in shared
    ]
    digests = [record["model_digest"] for record in records]
    return ScoreCard(
        protocol=study.protocol,
        targets=records[0]["targets"],
        model_digest=digests[0] if len(folds) == 1 else f"{digests[0]} to {digests[-1]} ({len(folds)} folds)",
        notes=(*([LEAK] if leaks else []), "each fold has a model, a panel and floors of its own", *shared, *own),
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
