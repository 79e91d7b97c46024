#!/usr/bin/env python
"""Searches settings: many trainings under Ray Tune, scored after every epoch on patients that none of them trains on.

Run the same command again and it resumes: no finished trial is repeated. Test patients (--split.test_*) are never seen.
"""

from typing import TYPE_CHECKING, Literal

import _launch  # first: puts the project on the path
from _cli import JobArguments, describe, parse, run
from _encoder import warn_of_augmentation, warn_of_encoder
from _patients import warn_of_similar_patients
from pydantic import Field

if TYPE_CHECKING:
    from mclstexp.config import Config
    from tuning.space import Space
    from tuning.sweep import Sweep, Trial

EXAMPLE = (
    "python jobs/tune.py --config jobs/configs/finetune.yaml --data s3://bucket/tiles --space jobs/configs/sweep.yaml"
)
BLOCKS = ("storage", "cluster", "genes", "split", "model", "train", "retrieval", "tune", "tracking")


class TuneArguments(JobArguments):
    """What to search over, and where the sweep goes."""

    data: str
    """Tile table (made by jobs/prepare.py): a folder or s3:// URI."""
    space: str
    """YAML file: dotted settings to lists of values or ranges."""
    trials: int = Field(20, ge=1)
    """Number of trainings; a grid has one for each of its points."""
    search: Literal["random", "grid", "optuna"] = "random"
    """How settings are chosen: at random, every point of a grid, or by Optuna from earlier scores."""
    out: str = "runs/sweeps"
    """Folder of the sweeps: trials and results."""
    name: str | None = None
    """Name of the sweep; the same name resumes it. Default made from settings, space and data."""
    promote: bool = False
    """Register the best model as challenger, and as champion if it is better."""
    features: Literal["make", "require"] = "make"
    """With a frozen encoder: make features that are not stored yet first, or require that all are stored."""


def main() -> None:
    """Parses, checks, runs the trials, scores them, publishes the results, promotes."""
    arguments, config = parse(TuneArguments, __doc__ or "", EXAMPLE, BLOCKS)
    from mclstexp import cluster, storage
    from mclstexp.data.schema import load_manifest
    from mclstexp.model.losses import require_loss
    from mclstexp.model.weights import require_encoder
    from mclstexp.training.run import with_views
    from mclstexp.training.stored import store_features
    from tuning.forecast import plan
    from tuning.space import feature_configs, load_space, num_trials
    from tuning.sweep import default_name, read_sections, with_validation

    require_encoder(config.model.image_encoder, layers=config.model.image_layers)
    require_loss(config)
    space = load_space(arguments.space, config)
    manifest = load_manifest(arguments.data)
    warn_of_similar_patients(manifest)
    warn_of_encoder(config.model, manifest)
    warn_of_augmentation(config)
    config = cluster.side_by_side(with_validation(manifest, with_views(config, manifest)))
    if arguments.features == "require":
        store_features(arguments.data, read_sections(manifest, config), feature_configs(space, config), make=False)
    search, trials = arguments.search, num_trials(space, arguments.search, arguments.trials)
    _launch.connect(config)  # a plan states how many trials run side by side
    name = arguments.name or default_name(arguments.out, manifest, config, space, search, trials)
    uri = storage.join(storage.absolute(arguments.out), name)
    cluster.require(config)
    if arguments.dry_run:
        print(describe(config, BLOCKS))
        print(plan(manifest, config, space, search, trials))
        print(f"would go into {uri}")
        return
    require_encoder(config.model.image_encoder, config.model.image_weights)
    _run(arguments, config, space, trials, uri)


def _run(arguments: TuneArguments, config: "Config", space: "Space", trials: int, uri: str) -> None:
    from mclstexp import cluster, progress, storage, tracking
    from tuning.results import BEST, publish, score_trials
    from tuning.sweep import open_sweep, run_trials

    name, tags = uri.rpartition("/")[2], {"protocol": config.split.protocol}

    def track(recorded: str | None) -> str:
        return tracking.start_run(config, name, tags, recorded)

    cluster.require_shared(config, [f"--data {arguments.data}", f"--out {uri}"])
    sweep = open_sweep(arguments.data, uri, config, space, arguments.search, trials, track)
    print(f"sweep {name}: {trials} trials, validated on {', '.join(config.split.validation_patients)}", flush=True)
    with progress.bars() as show:
        ended = run_trials(sweep, show)
        score_trials(sweep, ended, show)
    best = publish(sweep, ended)
    if arguments.promote:
        _promote(sweep, best)
    tracking.finish_run(config.tracking, sweep.plan.mlflow_run_id)
    print(f"MLflow run {sweep.plan.mlflow_run_id} at {config.tracking.uri}")
    print(f"trials and pictures {uri}")
    print(f"best settings {storage.join(uri, BEST)}")


def _promote(sweep: "Sweep", best: "Trial") -> None:
    from mclstexp import progress
    from tuning.promotion import promote

    with progress.bars() as show:
        promotion = promote(sweep, best, show)
    alias = "challenger and champion" if promotion.is_champion else "challenger only"
    print(f"version {promotion.version} of {sweep.plan.config.tracking.model_name} is {alias}: {promotion.reason}")


if __name__ == "__main__":
    run(main)
