"""Local files that settings name, as Ray's tasks find them: they begin in other folders than the driver."""

import os

import ray

from mclstexp import storage
from mclstexp.config import Config, override
from mclstexp.settings import FITTED_PANELS

_SQLITE = "sqlite:///"


def config_for_tasks(config: Config) -> Config:
    """Returns the configuration with its local files named absolutely. Ray must be connected.

    It stays as it is where the job brings a working folder along (`ray job submit`): tasks begin in a copy of it.
    """
    return config if _have_working_folder() else with_absolute_paths(config)


def weights_for_tasks(weights: str | None) -> str | None:
    """Returns the name of image weights (as `model.image_weights`) in the same way."""
    return weights if weights is None or _have_working_folder() else _absolute_weights(weights)


def with_absolute_paths(config: Config) -> Config:
    """Returns the configuration with its local files named absolutely, by the folder of this process."""
    database, weights, panel = config.tracking.uri, config.model.image_weights, config.genes.panel
    changed: dict[str, object] = {"model.image_weights": _absolute_weights(weights)}
    if database.startswith(_SQLITE):
        changed["tracking.uri"] = _SQLITE + os.path.abspath(database.removeprefix(_SQLITE))
    if panel not in FITTED_PANELS:
        changed["genes.panel"] = storage.absolute(panel)
    return override(config, changed, "the paths that tasks see")


def _absolute_weights(weights: str) -> str:
    return weights if weights in ("random", "imagenet") else storage.absolute(weights)


def _have_working_folder() -> bool:
    return bool(ray.get_runtime_context().runtime_env.get("working_dir"))
