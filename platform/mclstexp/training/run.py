"""A training run by name: its record, its data and what was fitted on its training sections."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import ray.train
from pydantic import BaseModel, ConfigDict

from mclstexp import storage
from mclstexp.config import Config, override
from mclstexp.data.folds import Split, make_split
from mclstexp.data.genes import GenePanel, align
from mclstexp.data.panel import fit_panel, require_counts
from mclstexp.data.schema import Manifest, load_genes, load_manifest
from mclstexp.data.spots import SpotReader, make_reader
from mclstexp.errors import RunError
from mclstexp.progress import Metrics
from mclstexp.settings import GenesConfig

RECORD = "run.json"
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
