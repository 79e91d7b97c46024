"""A training run by name: its record, its data and what was fitted on its training sections.

A run's default name comes from its identity, the settings and data that its result depends on. The same command
therefore finds its run again wherever and on however many workers it goes on; a run of other settings under the same
name is refused.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

from mclstexp import storage
from mclstexp.config import Config, override
from mclstexp.data.folds import Split, make_split
from mclstexp.data.genes import GenePanel, align
from mclstexp.data.panel import fit_panel, require_counts
from mclstexp.data.schema import IMAGE_WIDE, Manifest, load_genes, load_manifest, require_views
from mclstexp.data.spots import SpotReader, make_reader
from mclstexp.data.totals import GeneCounts, other_totals, require_one_total, shared_genes
from mclstexp.errors import RunError
from mclstexp.model.frozen import FrozenEncoder, frozen_encoder
from mclstexp.settings import GenesConfig
from mclstexp.training.history import StoredCheckpoint, newest_checkpoint

log = logging.getLogger(__name__)

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
    "micro_batch",
}
"""Settings of `train` that say where and how a run is computed, and may change when it goes on."""
_LATER_SETTINGS = {
    "genes": {"min_sections", "total"},
    "model": {"image_layers", "image_views", "feature_dtype", "image_directions", "input_dropout"},
    "train": {"feature_draws", "min_steps", "cross_fit", "micro_batch"},
    "retrieval": {"effective_donors"},
}
"""Settings that earlier versions did not have, by block; their defaults give the same result as those versions."""

_FIRST_ENCODERS = {"densenet121", "resnet18", "resnet50", "vit_b_16", "small_cnn"}
"""Encoders of earlier versions, all trained on pixels in ImageNet's scaling."""

_DEFAULTS: Mapping[str, dict[str, object]] = Config().model_dump(mode="json")

Track = Callable[[Config, str, str | None], str]
"""Returns the id of a run's MLflow run from its settings, its name and the recorded id (None for a new run)."""


class TrackedRecord(BaseModel):
    """A record that is written once; only the MLflow run that it names may change."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    identity: dict[str, dict[str, object]]
    """The settings that the result depends on, as `identity` returns them."""
    manifest_digest: str
    mlflow_run_id: str


class RunRecord(TrackedRecord):
    """What a run's steps depend on, written before the first one."""

    panel: str
    """GenePanel as JSON."""
    encoder_digest: str | None = None
    """Of the frozen encoder: a file at the same place may change. None: trained, or begun by an earlier version."""


@dataclass(frozen=True)
class Run:
    """An opened run: where it is stored, its data and what was fitted on the training sections."""

    name: str
    out: str
    config: Config
    manifest: Manifest
    split: Split
    panel: GenePanel
    reader: SpotReader
    mlflow_run_id: str
    encoder: FrozenEncoder | None = None
    """The frozen image encoder; None if the encoder is trained."""

    @property
    def uri(self) -> str:
        """Folder of the run's record, checkpoints and model."""
        return storage.join(self.out, self.name)


def open_run(data: str, out: str, name: str | None, config: Config, track: Track) -> Run:
    """Returns the run of that name: a new one, or an earlier one as it was left.

    Args:
        data: the tile table.
        out: folder of the runs.
        name: the run's name; default made from its identity.
        config: the settings.
        track: called with the settings as the run uses them: `tiles` says how the table's tiles were cut.

    Raises:
        TableError, SplitError: the data or the split is not usable.
        ConfigError: the panel cannot be made, a section lists its genes under other names, the table lacks a view, or
            spot totals are over other genes in some sections.
        ModelError: the weights of the frozen encoder cannot be read or do not fit.
        RunError: the name belongs to a run with other settings, data or encoder weights.
    """
    root = storage.absolute(data)
    manifest = load_manifest(root)
    config = override(config, recorded_tiles(manifest), "the tile table")  # so that a version knows how they were cut
    config = with_views(config, manifest)
    split = make_split(manifest, config.split)
    config = planned(config, manifest, split.train)
    require_views(manifest, config.model.image_views)
    encoder = None
    if config.model.freeze_encoder:
        encoder = frozen_encoder(config.model, manifest.tile_size_px, config.train.seed)
    name = name or default_name(out, config, manifest)
    uri = storage.join(storage.absolute(out), name, RECORD)

    is_new = not storage.exists(uri)
    if is_new:
        for said in require_totals(GeneCounts(root, manifest), split, config.genes):
            log.warning(said)
        panel = _fit_panel(root, manifest, split, config.genes)
        request = _request(config, manifest)
        digest = encoder.record.digest if encoder else None
        run_id = track(config, name, None)
        new = RunRecord(**request, mlflow_run_id=run_id, panel=panel.to_json(), encoder_digest=digest)
        storage.publish(uri, new.model_dump_json(indent=1).encode(), previous=None)
    record = RunRecord.model_validate_json(storage.read(uri))
    _require_same(record, name, config, manifest, encoder)
    if not is_new:
        record = with_tracking(record, uri, track(config, name, record.mlflow_run_id))

    panel = GenePanel.from_json(record.panel)
    reader = make_reader(root, manifest, panel, config, split.train)
    return Run(name, storage.absolute(out), config, manifest, split, panel, reader, record.mlflow_run_id, encoder)


def planned(config: Config, manifest: Manifest, train: Sequence[str]) -> Config:
    """Returns the settings with as many epochs as `train.min_steps` takes on the training sections."""
    return of_min_steps(config, steps_per_epoch(config, manifest, train))


def steps_per_epoch(config: Config, manifest: Manifest, train: Sequence[str]) -> int:
    """Returns the optimiser steps that an epoch over some sections takes."""
    settings = config.train
    if settings.batching == "sentences":
        return -(-len(manifest.sentences(train)) // settings.batch_sentences)
    return -(-manifest.num_spots(train) // settings.batch_spots)


def of_min_steps(config: Config, num_steps: int) -> Config:
    """Returns the settings with as many epochs of `num_steps` as `train.min_steps` takes, if it takes more."""
    settings = config.train
    if not settings.epochs or not settings.min_steps:
        return config
    needed = -(-settings.min_steps // num_steps)
    return override(config, {"train.epochs": max(settings.epochs, needed)}, "train.min_steps")


def identity(config: Config) -> dict[str, dict[str, object]]:
    """Returns the settings that a run's result depends on, without those of where and on how many workers it runs.

    A later setting at its default is left out, so that the runs of earlier versions go on.
    """
    tree = config.model_dump(mode="json", include={"genes", "split", "model", "train", "retrieval"})
    tree["train"] = {name: value for name, value in tree["train"].items() if name not in _FREE_TRAIN_SETTINGS}
    tree["model"]["input_scaling"] = _named_scaling(config)
    for block, later in _LATER_SETTINGS.items():
        defaults = _DEFAULTS[block]
        tree[block] = {
            name: value for name, value in tree[block].items() if name not in later or value != defaults[name]
        }
    return tree


def _named_scaling(config: Config) -> str | None:
    """Returns the input scaling as earlier versions recorded it: an encoder's own had to be named."""
    model = config.model
    own = "imagenet" if model.image_encoder in _FIRST_ENCODERS else None
    return model.input_scaling or own


def default_name(out: str, config: Config, manifest: Manifest) -> str:
    """Returns the name of a run that was given none, made from its identity and its data."""
    request = _request(config, manifest)
    former = f"run-{former_digest(config)}-{manifest.digest()[:6]}"
    return known_name(out, RECORD, request, [name_of("run", request), former])


def name_of(kind: str, request: Mapping[str, object]) -> str:
    """Returns a name made from what a result depends on: digests of the whole request and of its tile table.

    Args:
        kind: first part of the name.
        request: values of a record's fields, as JSON has them; `manifest_digest` is among them.
    """
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    return f"{kind}-{digest[:12]}-{str(request['manifest_digest'])[:6]}"


def known_name(out: str, file: str, request: Mapping[str, object], names: list[str]) -> str:
    """Returns the first of the names under which `out` has a record of the same request, else the first name.

    The later names are those that earlier versions would have given, so that what they left unfinished goes on.
    """
    for name in names:
        uri = storage.join(storage.absolute(out), name, file)
        if storage.exists(uri):
            record = json.loads(storage.read(uri))
            if all(record.get(field) == value for field, value in request.items()):
                return name
    return names[0]


def former_digest(config: Config) -> str:
    """Returns the 12 hex digits that named a run's settings in earlier versions: of nearly all settings.

    A setting that earlier versions did not have must be excluded here, for it would change every former name.
    """
    later: Mapping[str, bool | set[str]] = {
        "predict": True,
        "tune": True,
        "tiles": {"wide_um", "wide_px"},
        **_LATER_SETTINGS,
    }
    tree = config.model_dump(mode="json", exclude=later)
    tree["model"]["input_scaling"] = _named_scaling(config)
    tree["train"]["cpus_per_worker"] = config.train.cpus_per_worker or 1  # what an open setting was then
    text = json.dumps(tree, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


Record = TypeVar("Record", bound=TrackedRecord)


def with_tracking(record: Record, uri: str, mlflow_run_id: str) -> Record:
    """Returns the record with that MLflow run, and stores it if the run is another: the tracking store has changed."""
    if mlflow_run_id == record.mlflow_run_id:
        return record
    changed = record.model_copy(update={"mlflow_run_id": mlflow_run_id})
    storage.publish(uri, changed.model_dump_json(indent=1).encode(), previous=storage.version(uri))
    return changed


def with_views(config: Config, manifest: Manifest) -> Config:
    """Returns the settings with the views that a table has instead of `all`."""
    if config.model.image_views != ("all",):
        return config
    return override(config, {"model.image_views": manifest.views}, "the tile table")


def recorded_tiles(manifest: Manifest) -> dict[str, object]:
    """Returns the settings under which a table's tiles were cut, by their dotted names."""
    cut: dict[str, object] = {"size_px": manifest.tile_size_px, "wide_um": None}
    if manifest.wide_px is not None:
        wide_um = manifest.wide_px * manifest.view_mpp(IMAGE_WIDE)
        cut |= {"wide_px": manifest.wide_px, "wide_um": round(wide_um, 6)}  # a quotient was stored
    cut |= {name: getattr(manifest, name) for name in ("mpp", "encoding", "jpeg_quality", "sentence_length")}
    return {f"tiles.{name}": value for name, value in cut.items()}


def last_checkpoint(run: Run) -> StoredCheckpoint | None:
    """Returns the newest sound checkpoint of a run that no process is training; None if it has none."""
    return newest_checkpoint(run.uri)


def _request(config: Config, manifest: Manifest) -> dict[str, object]:
    return {"identity": identity(config), "manifest_digest": manifest.digest()}


def require_totals(counts: GeneCounts, split: Split, config: GenesConfig) -> list[str]:
    """Checks that spot totals mean the same in all sections of a split; returns what is to be known in sentences.

    Raises:
        ConfigError: as `require_one_total`, `shared_genes` and `other_totals`.
    """
    if "per_spot_all" not in (config.input, config.target):
        return []
    held_out = (*split.validation, *split.test)
    if config.total == "all":
        return [*require_one_total(counts, split.train), *other_totals(counts, split.train, held_out, None)]
    genes = shared_genes(counts.manifest, split.train)
    other_totals(counts, split.train, held_out, genes)
    return [f"genes.total=shared: spot totals are over {genes.sum()} of the table's {len(genes)} genes"]


def _fit_panel(root: str, manifest: Manifest, split: Split, config: GenesConfig) -> GenePanel:
    """Returns the panel of the training sections; refuses it if a held-out section does not count its genes."""
    panel, genes = fit_panel(root, manifest, split.train, config), load_genes(root, manifest)
    require_counts(root, manifest, (*split.validation, *split.test), "the panel", align(panel, genes).tolist(), genes)
    return panel


def _require_same(
    record: RunRecord, name: str, config: Config, manifest: Manifest, encoder: FrozenEncoder | None
) -> None:
    requested = {block: _DEFAULTS[block] | fields for block, fields in identity(config).items()}
    changed = [
        f"{block}.{field}: {json.dumps(old)} -> {json.dumps(requested[block].get(field))}"
        for block, fields in record.identity.items()
        for field, old in (_DEFAULTS[block] | fields).items()
        if requested[block].get(field) != old
    ]
    if record.manifest_digest != manifest.digest():
        changed.append(f"tile table: {record.manifest_digest} -> {manifest.digest()}")
    if encoder is not None and record.encoder_digest not in (None, encoder.record.digest):
        changed.append(f"weights of the image encoder: {record.encoder_digest} -> {encoder.record.digest}")
    if changed:
        raise RunError(f"the run {name} exists with other settings ({'; '.join(changed)}); give another --name")
