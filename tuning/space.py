"""The search space: which settings a sweep varies, and over which values.

A YAML file maps dotted names to a list of values or to a range:

    model.temperature: {low: 0.01, high: 0.5, log: true}
    model.spot_layers: [1, 2, 4, 8]
"""

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from ray import tune

from mclstexp.config import Config, leaf_fields, override, unknown_setting
from mclstexp.errors import ConfigError
from mclstexp.model.losses import require_loss
from mclstexp.model.weights import require_encoder

VARIED_BLOCKS = ("model", "train", "retrieval")
FIXED = (
    *("train.epochs", "train.min_steps", "train.patience", "train.validate_every", "train.cross_fit"),
    *("train.num_workers", "train.use_gpu", "train.gpus_per_worker", "train.cpus_per_worker"),
    *("train.checkpoint_every", "train.keep_checkpoints", "train.max_failures", "train.micro_batch", "train.compile"),
)
"""Settings that all trials share: early stopping sets a trial's length, the others say where and how it runs."""

OF_FEATURES = (
    *("model.freeze_encoder", "model.image_encoder", "model.image_weights", "model.image_layers", "model.image_views"),
    *("model.feature_dtype", "model.input_scaling"),
    *("train.feature_draws", "train.augmentation", "train.precision", "train.seed"),
)
"""Settings that the stored features of a frozen encoder depend on."""


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    values: tuple[Any, ...]

    def domain(self, is_grid: bool) -> Any:
        """Returns the values in Ray Tune's form."""
        return tune.grid_search(list(self.values)) if is_grid else tune.choice(list(self.values))

    def bounds(self) -> tuple[Any, ...]:
        """Returns the values that the setting must allow."""
        return self.values

    def __str__(self) -> str:
        return f"one of {', '.join(map(str, self.values))}"


@dataclass(frozen=True)
class Range:
    """A number from `low` to `high`, whole if the setting is, drawn uniformly or (`log`) uniformly in its logarithm."""

    low: float
    high: float
    log: bool

    def domain(self, is_grid: bool) -> Any:
        """Returns the range in Ray Tune's form.

        Raises:
            ConfigError: a grid cannot have ranges.
        """
        if is_grid:
            raise ConfigError(f"a grid needs lists of values, not {self}; list them, or use --search random or optuna")
        if isinstance(self.low, int) and isinstance(self.high, int):
            return (tune.lograndint if self.log else tune.randint)(self.low, self.high + 1)
        return (tune.loguniform if self.log else tune.uniform)(self.low, self.high)

    def bounds(self) -> tuple[Any, ...]:
        """Returns the values that the setting must allow."""
        return (self.low, self.high)

    def __str__(self) -> str:
        return f"from {self.low:g} to {self.high:g}{', evenly in its logarithm' if self.log else ''}"


Space = dict[str, Choice | Range]


def load_space(path: str | Path, config: Config) -> Space:
    """Returns the space of a YAML file.

    Raises:
        ConfigError: the file cannot be read, or names a setting that does not exist, cannot vary or does not allow a
            given value; lists every fault.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the search space {path}: {error}") from error
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(f"{path} is not a mapping of settings to values; see jobs/configs/sweep.yaml")
    space, faults = {}, []
    for name, values in tree.items():
        try:
            space[str(name)] = _entry(str(name), values, config)
        except ConfigError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError(f"the search space {path} has {len(faults)} fault(s):\n  " + "\n  ".join(faults))
    return space


def param_space(space: Space, search: str) -> dict[str, Any]:
    """Returns the space in Ray Tune's form.

    Raises:
        ConfigError: a grid over a range.
    """
    return {name: entry.domain(search == "grid") for name, entry in space.items()}


def feature_configs(space: Space, config: Config) -> list[Config]:
    """Returns the settings with every combination of the listed values that features of a frozen encoder depend on.

    Combinations that contradict each other are left out: their trials fail with the reason.
    """
    varied = {name: entry.values for name, entry in space.items() if name in OF_FEATURES and isinstance(entry, Choice)}
    configs = []
    for values in product(*varied.values()):
        with suppress(ConfigError):
            configs.append(override(config, dict(zip(varied, values, strict=True)), "the search space"))
    return configs


def num_trials(space: Space, search: str, requested: int) -> int:
    """Returns the number of trials of a sweep: the requested one, or the points of a grid.

    Raises:
        ConfigError: a grid over a range.
    """
    points = param_space(space, search)
    return prod(len(point["grid_search"]) for point in points.values()) if search == "grid" else requested


def digest(space: Space) -> str:
    """Returns 6 hex digits that name a space."""
    text = "\n".join(f"{name}: {entry}" for name, entry in space.items())
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def _entry(name: str, values: object, config: Config) -> Choice | Range:
    if name not in leaf_fields():
        raise ConfigError(unknown_setting(name, list(leaf_fields()), "the search space"))
    if name.partition(".")[0] not in VARIED_BLOCKS or name in FIXED:
        raise ConfigError(
            f"{name} cannot vary: trials are compared on the same genes, patients and tiles, with the same epochs; "
            f"settings of {', '.join(VARIED_BLOCKS)} can, except {', '.join(FIXED)}"
        )
    entry = _parsed(name, values)
    for value in entry.bounds():
        _require_allowed(name, value, config)
    return entry


def _parsed(name: str, values: object) -> Choice | Range:
    if isinstance(values, list) and values:
        return Choice(tuple(map(_number, values)))
    if isinstance(values, dict) and {"low", "high"} <= set(values) <= {"low", "high", "log"}:
        low, high = (_end(name, _number(values[end])) for end in ("low", "high"))
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (low, high))
        if numbers and low < high and not (values.get("log") and low <= 0):
            return Range(low, high, bool(values.get("log", False)))
    raise ConfigError(
        f"{name}: {values!r} is neither a list of values nor {{low: A, high: B, log: true|false}} with A < B "
        "(and A > 0 with log)"
    )


def _end(name: str, value: Any) -> Any:
    """Returns an end of a range as its setting's kind of number: for a whole-number setting 1e3 becomes 1000."""
    block, field = leaf_fields()[name]
    kinds = {block.model_fields[field].annotation, *get_args(block.model_fields[field].annotation)}
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if int in kinds:
        return int(value) if float(value).is_integer() else value
    return float(value)


def _number(value: object) -> Any:
    """Returns a text that reads as a number as that number: YAML parses 1e-5 as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _require_allowed(name: str, value: object, config: Config) -> None:
    block, _, field = name.partition(".")
    settings = getattr(config, block)
    try:
        changed_block = type(settings).model_validate(settings.model_dump() | {field: value})
    except ValidationError as error:
        raise ConfigError(f"{name}={value!r}: {error.errors()[0]['msg']}") from None
    changed = config.model_copy(update={block: changed_block})
    require_encoder(changed.model.image_encoder, layers=changed.model.image_layers)
    require_loss(changed)
