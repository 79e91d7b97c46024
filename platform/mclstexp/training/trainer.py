"""Training from the driver's side: check, start or resume a named run, and hand over its last checkpoint.

A run's name is its identity: the same command finds its record and goes on, another configuration under the same
name is refused. Ray Train restarts workers and keeps the checkpoints; the record keeps what they stand on.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import ray
import torch
from pydantic import BaseModel, ConfigDict
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from mclstexp import resources, storage
from mclstexp.config import Config, override
from mclstexp.data.folds import Split, make_split
from mclstexp.data.gene_naming import require_counts
from mclstexp.data.genes import GenePanel, align, fit_panel
from mclstexp.data.schema import Manifest, load_genes, load_manifest
from mclstexp.data.spots import SpotReader, make_reader, num_positions
from mclstexp.data.stream import StreamShare
from mclstexp.errors import RunError, UserError
from mclstexp.inference.retrieval import resolve
from mclstexp.model.build import build_network
from mclstexp.settings import GenesConfig
from mclstexp.training.checkpoint import plain_tensors
from mclstexp.training.feed import make_feed
from mclstexp.training.loop import TrainPlan, train_worker
from mclstexp.training.progress import Metrics, ProgressBoard, followed
from mclstexp.training.validation import VALIDATION_PCC, ValidationSet

RECORD = "run.json"
GROUP_TIMEOUT_S = 300
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**36), "MALLOC_ARENA_MAX": "1"}
"""Lets glibc keep freed memory; else each batch's activations are fetched from the system anew.

One arena, since Ray Train calls the worker in a thread, and the arenas of threads hold no block of over 64 MiB.
"""
_FREE_TRAIN_SETTINGS = {
    "num_workers",
    "use_gpu",
    "gpus_per_worker",
    "cpus_per_worker",
    "checkpoint_every",
    "keep_checkpoints",
    "max_failures",
    "compile",
}


class RunRecord(BaseModel):
    """What a run stands on, written once before its first step."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    identity: dict[str, dict[str, object]]
    """The settings that its result depends on."""
    manifest_digest: str
    mlflow_run_id: str
    panel: str
    """GenePanel as JSON."""


@dataclass(frozen=True)
class Run:
    """An opened run: its place, its data and what was fitted on the training sections."""

    name: str
    out: str
    config: Config
    manifest: Manifest
    split: Split
    panel: GenePanel
    reader: SpotReader
    mlflow_run_id: str

    @property
    def uri(self) -> str:
        """Where the run's record and checkpoints lie."""
        return storage.join(self.out, self.name)


def identity(config: Config) -> dict[str, dict[str, object]]:
    """Returns the settings that a run's result depends on: not where and on how many workers it runs."""
    tree = config.model_dump(mode="json", include={"genes", "split", "model", "train", "retrieval"})
    tree["train"] = {name: value for name, value in tree["train"].items() if name not in _FREE_TRAIN_SETTINGS}
    return tree


def default_name(config: Config, manifest: Manifest) -> str:
    """Returns a name made from the settings and the data, so that the same command means the same run."""
    return f"run-{config.digest()}-{manifest.digest()[:6]}"


def open_run(
    data: str, out: str, name: str | None, config: Config, start_tracking: Callable[[Config, str], str]
) -> Run:
    """Returns the run of that name, new or as it was left.

    `start_tracking(config, name)` gives a new run's MLflow id; its `config` tells how the table's tiles were cut.

    Raises:
        TableError, SplitError: the data or the split is not usable.
        ConfigError: no panel can be had, or a section names its genes otherwise.
        RunError: the name is taken by a run with other settings or data.
    """
    root = storage.absolute(data)
    manifest = load_manifest(root)
    config = override(config, recorded_tiles(manifest), "the tile table")  # so that a version knows how they were cut
    split = make_split(manifest, config.split)
    name = name or default_name(config, manifest)
    uri = storage.join(storage.absolute(out), name, RECORD)
    if not storage.exists(uri):
        panel = _panel(root, manifest, split, config.genes)
        record = RunRecord(
            identity=identity(config),
            manifest_digest=manifest.digest(),
            mlflow_run_id=start_tracking(config, name),
            panel=panel.to_json(),
        )
        storage.publish(uri, record.model_dump_json(indent=1).encode(), previous=None)
    record = RunRecord.model_validate_json(storage.read(uri))
    _require_same(record, name, config, manifest)
    panel = GenePanel.from_json(record.panel)
    reader = make_reader(root, manifest, panel, config)
    return Run(name, storage.absolute(out), config, manifest, split, panel, reader, record.mlflow_run_id)


def _panel(root: str, manifest: Manifest, split: Split, config: GenesConfig) -> GenePanel:
    """Returns the panel of the training sections, after a look whether the held-out ones count its genes too."""
    panel, genes = fit_panel(root, manifest, split.train, config), load_genes(root, manifest)
    require_counts(root, manifest, (*split.validation, *split.test), "the panel", align(panel, genes).tolist(), genes)
    return panel


def recorded_tiles(manifest: Manifest) -> dict[str, object]:
    """Returns the settings under which a table's tiles were cut, by their dotted names."""
    cut = {"size_px": manifest.tile_size_px}
    cut |= {name: getattr(manifest, name) for name in ("mpp", "encoding", "jpeg_quality", "sentence_length")}
    return {f"tiles.{name}": value for name, value in cut.items()}


def fit(
    run: Run,
    log: Callable[[int, Metrics], None],
    callbacks: Sequence[UserCallback] = (),
    board_name: str | None = None,
) -> str:
    """Trains the run to its end and returns the URI of the checkpoint to be its model; finished work is not repeated.

    That is the last one or, with early stopping, the one that scored best on the validation patients.

    Args:
        run: as `open_run` returns it.
        log: told each metric.
        callbacks: Ray Train's, told of each report.
        board_name: name of an actor that lives as long as the caller or the training does.

    Raises:
        UserError: what the workers raised, where a user can mend it.
        RunError: the workers failed more often than train.max_failures allows.
        ModelError: retrieval.k exceeds the training spots.
    """
    train = run.config.train
    if run.config.model.predictor == "retrieval":
        resolve(run.config.retrieval, sum(run.manifest.section(name).num_spots for name in run.split.train))
    plan = make_plan(run, board_name)
    early_stopping = bool(plan.validation and train.patience)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"plan": plan},
        scaling_config=ScalingConfig(
            num_workers=train.num_workers,
            use_gpu=train.use_gpu,
            resources_per_worker=resources.worker_resources(run.config),
            label_selector=resources.worker_nodes(run.config),  # type: ignore[call-arg]  # typed as the older one
        ),
        torch_config=TorchConfig(backend="nccl" if train.use_gpu else "gloo", timeout_s=GROUP_TIMEOUT_S),
        run_config=RunConfig(  # type: ignore[call-arg]  # typed as the older one
            name=run.name,
            storage_path=storage.filesystem(run.out)[1],
            storage_filesystem=storage.filesystem(run.out)[0],
            checkpoint_config=CheckpointConfig(
                num_to_keep=train.keep_checkpoints,
                checkpoint_score_attribute=VALIDATION_PCC if early_stopping else None,
            ),
            failure_config=FailureConfig(max_failures=train.max_failures),
            callbacks=list(callbacks),  # type: ignore[arg-type]  # the same
            worker_runtime_env={"env_vars": KEEP_MEMORY},
        ),
    )
    with followed(plan.board, train.epochs * plan.feed.num_steps(), log):
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _cause(error, train.max_failures) from error
    if result.checkpoint is None:
        raise RunError(f"the run {run.name} ended without a checkpoint; see its log")
    return _uri(run, _best(result) if early_stopping else result.checkpoint)


def _best(result: ray.train.Result) -> ray.train.Checkpoint:
    """Returns the checkpoint that scored best on the validation patients, and says which it is."""
    kept = result.best_checkpoints or []
    scored = [(found, metrics) for found, metrics in kept if math.isfinite(metrics.get(VALIDATION_PCC, math.nan))]
    best, metrics = max(scored, key=lambda one: one[1][VALIDATION_PCC])
    epoch, score = metrics["epoch"] + 1, metrics[VALIDATION_PCC]
    print(f"the model is the checkpoint after epoch {epoch}, best on the validation patients (PCC {score:.3f})")
    return best


class LastCheckpoint(NamedTuple):
    """A checkpoint and what was reported with it."""

    uri: str
    metrics: Metrics


def last_checkpoint(run: Run) -> LastCheckpoint | None:
    """Returns the newest checkpoint of a run that is not under way; None where it has none."""
    filesystem, path = storage.filesystem(run.uri)
    try:
        result = ray.train.Result.from_path(path, filesystem)
    except RuntimeError:  # it was killed before its first checkpoint
        return None
    return LastCheckpoint(_uri(run, result.checkpoint), result.metrics or {}) if result.checkpoint else None


def _uri(run: Run, checkpoint: ray.train.Checkpoint) -> str:
    return f"{'s3://' if storage.is_s3(run.out) else ''}{checkpoint.path}"


def make_plan(run: Run, board_name: str | None = None) -> TrainPlan:
    """Returns what the workers need, with each rank's share of the cluster for its stream."""
    config = run.config
    store_bytes = int(ray.cluster_resources().get("object_store_memory", 0) / (2 * config.train.num_workers))
    return TrainPlan(
        config=config.model_dump(mode="json"),
        feed=make_feed(config, run.reader, run.split.train),
        share=StreamShare(config.cluster.data_cpus, store_bytes, config.cluster.data_pool),
        num_genes=len(run.panel.gene_id),
        num_positions=num_positions(run.reader),
        tile_size_px=run.manifest.tile_size_px,
        initial_weights=ray.put(initial_weights(run)),
        board=ProgressBoard.options(name=board_name).remote(),  # type: ignore[attr-defined]
        validation=_validation(run),
    )


def _validation(run: Run) -> ValidationSet | None:
    if not (run.config.train.validate_every and run.split.validation):
        return None
    return ValidationSet(run.reader, run.split.train, run.split.validation)


def initial_weights(run: Run) -> dict[str, torch.Tensor]:
    """Returns the state dict of the network before the first step, fixed by train.seed and model.image_weights.

    Raises:
        ModelError, ConfigError: the image encoder's weights cannot be had or do not fit it.
    """
    torch.manual_seed(run.config.train.seed)
    positions = num_positions(run.reader)
    network = build_network(run.config.model, len(run.panel), positions, run.manifest.tile_size_px)
    return plain_tensors(network.state_dict())


def _require_same(record: RunRecord, name: str, config: Config, manifest: Manifest) -> None:
    asked = identity(config)
    changed = [
        f"{section}.{field}: {json.dumps(old)} -> {json.dumps(asked[section].get(field))}"
        for section, fields in record.identity.items()
        for field, old in fields.items()
        if asked[section].get(field) != old
    ]
    if record.manifest_digest != manifest.digest():
        changed.append(f"tile table: {record.manifest_digest} -> {manifest.digest()}")
    if changed:
        raise RunError(f"the run {name} exists with other settings ({'; '.join(changed)}); give another --name")


def _cause(error: ray.train.TrainingFailedError, max_failures: int) -> UserError:
    for failure in getattr(error, "worker_failures", {}).values():
        cause = getattr(failure, "cause", None) or failure
        if isinstance(cause, UserError):
            return cause
    return RunError(f"training failed after {max_failures} restarts (train.max_failures): {error}")
