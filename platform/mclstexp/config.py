"""One typed configuration for YAML files, the command line, sweeps, checkpoints and resume.

The blocks (`settings.py`) are frozen pydantic models with defaults that run. `override` is the only way to
change settings: dotted names to values, with the nearest valid name in the error. The trade-off: all jobs share one
tree of settings, so that one YAML file describes a whole study.
"""

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

import yaml
from pydantic import ValidationError, model_validator

from mclstexp.errors import ConfigError
from mclstexp.settings import (
    ClusterConfig,
    ConfigBlock,
    GenesConfig,
    ModelConfig,
    PredictConfig,
    RetrievalConfig,
    SplitConfig,
    StorageConfig,
    TilesConfig,
    TrackingConfig,
    TrainConfig,
    TuneConfig,
)

MAX_TOWER_WIDTH = 128
"""Largest `model.embedding_dim` of towers beside a program model: half of the width of keys."""
REMOVED = {
    "predict.bank_shards": "leave it out: each node keeps one copy of the bank; cluster.object_store_mb gives it room",
}
"""Settings of earlier versions, and what to do instead."""


class Config(ConfigBlock):
    """All settings. Job arguments (`--data`, `--out`, ...) say what to work on, these say how."""

    storage: StorageConfig = StorageConfig()
    cluster: ClusterConfig = ClusterConfig()
    tiles: TilesConfig = TilesConfig()
    genes: GenesConfig = GenesConfig()
    split: SplitConfig = SplitConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    predict: PredictConfig = PredictConfig()
    tune: TuneConfig = TuneConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        train, model = self.train, self.model
        unit, size = ("batch_sentences", train.batch_sentences)
        if train.batching == "random_spots":
            unit, size = ("batch_spots", train.batch_spots)
        if size % train.num_workers:
            nearest = max(1, round(size / train.num_workers)) * train.num_workers
            raise ValueError(
                f"train.{unit}={size} is not a multiple of train.num_workers={train.num_workers}; use {nearest}"
            )
        if train.gpus_per_worker < 1 and train.num_workers > 1:
            raise ValueError(
                f"train.gpus_per_worker={train.gpus_per_worker} needs train.num_workers=1, not {train.num_workers}: "
                "workers of one run cannot share a GPU"
            )
        if model.batch_norm == "sync" and not train.use_gpu:
            raise ValueError("model.batch_norm=sync needs train.use_gpu=true; use local or frozen on CPUs")
        if model.image_views != ("image",) and not model.freeze_encoder:
            raise ValueError(
                f"model.image_views={','.join(model.image_views)} needs model.freeze_encoder=true; an encoder that is "
                "trained sees the view `image` alone"
            )
        if "all" in model.image_views and len(model.image_views) > 1:
            raise ValueError(
                f"model.image_views={','.join(model.image_views)} names views beside `all`; use all alone, or name each"
            )
        if len(set(model.image_views)) < len(model.image_views):
            raise ValueError(f"model.image_views={','.join(model.image_views)} names a view twice")
        if train.micro_batch is not None and (fault := self._fault_of_parts()):
            raise ValueError(
                f"train.micro_batch={train.micro_batch} runs a trained image tower in parts of a batch: {fault}, or "
                "leave train.micro_batch empty"
            )
        if train.feature_draws and (not model.freeze_encoder or train.augmentation == "none"):
            raise ValueError(
                f"train.feature_draws={train.feature_draws} needs model.freeze_encoder=true and an augmentation other "
                "than none"
            )
        if model.test_turns and model.freeze_encoder:
            raise ValueError(
                "model.test_turns=true needs model.freeze_encoder=false: stored features are of plain tiles"
            )
        if train.batching == "random_spots" and model.position in ("sinusoidal", "distance"):
            raise ValueError(
                f"model.position={model.position} measures within a neighbourhood, which "
                "train.batching=random_spots does not have; use table, pixel_table or none"
            )
        if train.positives == "soft" and model.l2_normalise:
            raise ValueError(
                "train.positives=soft needs model.l2_normalise=false: similarities of unit vectors make a target that "
                "is nearly uniform, which collapsed embeddings match best"
            )
        weighting = self.retrieval.weighting
        if weighting in ("softmax", "fixed_number") and not model.l2_normalise:
            raise ValueError(
                f"retrieval.weighting={weighting} needs model.l2_normalise=true; use inverse_square or mean"
            )
        if model.predictor == "programs" and not model.freeze_encoder:
            raise ValueError(
                "model.predictor=programs needs model.freeze_encoder=true: programs are fitted to stored features"
            )
        if model.predictor == "programs" and train.epochs and (fault := self._fault_of_program_towers()):
            raise ValueError(
                f"model.predictor=programs with train.epochs={train.epochs} trains towers on stored features: {fault}; "
                "or train none, with train.epochs=0"
            )
        if model.image_directions is not None and (not model.freeze_encoder or model.predictor == "regression"):
            raise ValueError(
                f"model.image_directions={model.image_directions} needs model.freeze_encoder=true and towers: "
                "directions are fitted to stored features, and model.predictor=regression has no towers"
            )
        if not train.epochs and model.predictor != "programs":
            raise ValueError(
                f"train.epochs=0 needs model.predictor=programs: {model.predictor} has nothing to answer with before "
                "training"
            )
        if self.genes.total == "shared" and "per_spot_all" not in (self.genes.input, self.genes.target):
            raise ValueError(
                f"genes.total=shared has no effect with genes.input={self.genes.input} and genes.target="
                f"{self.genes.target}, which do not divide by the total of per_spot_all; leave it at all"
            )
        if model.predictor == "regression" and self.genes.input != self.genes.target:
            raise ValueError(
                f"model.predictor=regression learns genes.target={self.genes.target} as it is streamed, which is as "
                f"genes.input; use genes.input={self.genes.target}"
            )
        return self

    def _fault_of_parts(self) -> str | None:
        """Returns why a batch cannot be run in parts, and what to use; None if it can."""
        if self.model.freeze_encoder:
            return "model.freeze_encoder=true trains none; use false with model.batch_norm=frozen"
        if self.model.batch_norm != "frozen":
            return f"model.batch_norm={self.model.batch_norm} takes its statistics from the whole batch; use frozen"
        return None

    def _fault_of_program_towers(self) -> str | None:
        """Returns a setting that towers beside a program model cannot have, and what to use; None if there is none."""
        train, model = self.train, self.model
        if model.image_directions is None:
            return "set model.image_directions, such as 48"
        if model.embedding_dim > MAX_TOWER_WIDTH:
            return (
                f"model.embedding_dim={model.embedding_dim} leaves no room for features in keys; use 32, at most "
                f"{MAX_TOWER_WIDTH}"
            )
        if model.position in ("table", "pixel_table"):
            return f"model.position={model.position} is not known of a tile; use distance, sinusoidal or none"
        if self.genes.input == "per_gene":
            return "genes.input=per_gene needs whole sections, and towers read sentences; use per_spot_all"
        if train.batching != "sentences" or train.shuffle_pairs:
            return "use train.batching=sentences and leave train.shuffle_pairs out"
        return None


def leaf_fields(block: type[ConfigBlock] = Config, prefix: str = "") -> dict[str, tuple[type[ConfigBlock], str]]:
    """Returns every setting's dotted name with its block's class and field name, in order of declaration."""
    leaves: dict[str, tuple[type[ConfigBlock], str]] = {}
    for name, field in block.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, ConfigBlock):
            leaves |= leaf_fields(field.annotation, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = (block, name)
    return leaves


def override(config: Config, settings: dict[str, object], origin: str = "settings") -> Config:
    """Returns `config` with dotted `settings` changed, for example `{"train.tower_lr": 3e-4}`.

    Raises:
        ConfigError: unknown name (with the nearest valid one), wrong type or a value out of range.
    """
    tree = config.model_dump(mode="json")
    for dotted, value in settings.items():
        if dotted not in leaf_fields():
            raise ConfigError(unknown_setting(dotted, list(leaf_fields()), origin))
        block, _, field = dotted.rpartition(".")
        tree[block][field] = value
    return _validated(tree, origin)


def load_config(path: str | Path | None) -> Config:
    """Returns the settings of a YAML file over those of its `base`, over the defaults; the defaults if it is None.

    `base: FILE` beside the blocks names another such file, relative to the one that names it.

    Raises:
        ConfigError: a file is missing, is not a mapping, is its own base, or has an unknown or invalid setting.
    """
    return Config() if path is None else _load(Path(path), ())


def _load(path: Path, above: tuple[Path, ...]) -> Config:
    tree, chain = _read(path), (*above, path.resolve())
    base = tree.pop("base", None)
    if base is None:
        return config_from(tree, str(path))
    if not isinstance(base, str):
        raise ConfigError(f"base={base!r} in {path} is not a file name; give one YAML file, relative to {path.parent}")
    if (path.parent / base).resolve() in chain:
        raise ConfigError(f"base={base} in {path} leads back to itself; take `base` out of one of the files")
    under = _load(path.parent / base, chain).model_dump(mode="json")
    over = {
        name: under[name] | fields if name in under and isinstance(fields, dict) else fields
        for name, fields in tree.items()
    }
    return config_from(under | over, str(path))


def _read(path: Path) -> dict[str, object]:
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} contains {type(tree).__name__}, not a mapping of blocks; see jobs/configs/")
    return tree


def config_from(tree: dict[str, object], origin: str = "settings") -> Config:
    """Returns the Config of a nested plain dict (a YAML file, a checkpoint's or a model version's record).

    Raises:
        ConfigError: an unknown block or setting, or an invalid value.
    """
    for block, fields in tree.items():
        if block not in Config.model_fields:
            raise ConfigError(unknown_setting(block, list(Config.model_fields), origin))
        for field in fields if isinstance(fields, dict) else ():
            if f"{block}.{field}" not in leaf_fields():
                raise ConfigError(unknown_setting(f"{block}.{field}", list(leaf_fields()), origin))
    return _validated(tree, origin)


def recorded_config(tree: Mapping[str, object], origin: str) -> Config:
    """Returns the Config that this or an earlier version of the code recorded; settings that are gone are ignored.

    Raises:
        ConfigError: as `config_from`.
    """
    known = {
        block: {field: value for field, value in fields.items() if f"{block}.{field}" not in REMOVED}
        if isinstance(fields, dict)
        else fields
        for block, fields in tree.items()
    }
    return config_from(known, origin)


def unknown_setting(name: str, valid: list[str], origin: str) -> str:
    """Returns the message for an unknown setting, with the nearest valid name."""
    if name in REMOVED:
        return f"{name} in {origin} was removed; {REMOVED[name]}"
    by_last = {key.rpartition(".")[2]: key for key in reversed(valid)}
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    near = near or [by_last[key] for key in difflib.get_close_matches(name.rpartition(".")[2], by_last, n=1)]
    hint = f"; did you mean {near[0]}?" if near else f"; valid ones: {', '.join(valid)}"
    return f"unknown setting {name} in {origin}{hint}"


def validation_faults(error: ValidationError, prefix: str = "", spelled: Callable[[str], str] = str) -> str:
    """Returns each fault of a validation in words, with `prefix` before the names of fields, which are `spelled`."""
    faults = []
    for fault in error.errors():
        name = f"{prefix}{spelled('.'.join(map(str, fault['loc'])))}"
        if not fault["loc"]:
            faults.append(fault["msg"].removeprefix("Value error, "))
        elif fault["type"] == "missing":
            faults.append(f"{name} is missing")
        else:
            faults.append(f"{name}={fault['input']!r}: {fault['msg']}")
    return "; ".join(faults)


def _validated(tree: dict[str, object], origin: str) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"invalid setting in {origin}: {validation_faults(error)}") from None
