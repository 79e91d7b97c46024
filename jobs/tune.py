#!/usr/bin/env python
"""Searches settings: many trainings under Ray Tune, scored after every epoch on patients that none of them trains on.

Run the same command again and it goes on: no finished trial is repeated. Test patients (--split.test_*) are never seen.
"""

import _launch  # first: puts the project on the path
from _cli import Argument, describe, parse, run

EXAMPLE = "python jobs/tune.py --data s3://bucket/tiles --space jobs/configs/sweep.yaml --trials 20"
ARGUMENTS = [
    Argument("data", "tile table (made by jobs/prepare.py): a folder or s3:// URI"),
    Argument("space", "YAML file: dotted settings to lists of values or ranges"),
    Argument("trials", "how many trainings; a grid has one for each of its points [20]", False, "20"),
    Argument("search", "random, grid or optuna [random]", False, "random"),
    Argument("out", "where sweeps keep trials and results [runs/sweeps]", False, "runs/sweeps"),
    Argument("name", "the sweep's name; the same name goes on [made from settings, space and data]", False),
    Argument("promote", "register the best model as challenger, and as champion where it is better", is_switch=True),
]
SECTIONS = ("storage", "cluster", "genes", "split", "model", "train", "retrieval", "tune", "tracking")


def main() -> None:
    """Parses, checks, runs the trials, scores them, sums up, promotes."""
    arguments, config = parse(__doc__ or "", EXAMPLE, ARGUMENTS, SECTIONS)
    from mclstexp import cluster, storage
    from mclstexp.data.schema import load_manifest
    from mclstexp.model.encoders import require_encoder
    from mclstexp.model.losses import require_loss
    from tuning.forecast import plan
    from tuning.space import digest, load_space, num_trials, require_search
    from tuning.sweep import with_validation

    search, asked = require_search(arguments.search, arguments.trials)
    require_encoder(config.model.image_encoder, config.model.image_weights)
    require_loss(config)
    space = load_space(arguments.space, config)
    manifest = load_manifest(arguments.data)
    config = with_validation(manifest, config)
    trials = num_trials(space, search, asked)
    name = arguments.name or f"sweep-{config.digest()}-{manifest.digest()[:6]}-{digest(space)}-{search}{trials}"
    uri = storage.join(storage.absolute(arguments.out), name)
    _launch.connect(config)  # a plan says what runs side by side
    if arguments.dry_run:
        cluster.require(config)
        print(describe(config, SECTIONS))
        print(plan(manifest, config, space, search, trials))
        print(f"would go into {uri}")
        return
    _run(arguments, config, space, search, trials, name, uri)


def _run(arguments, config, space, search: str, trials: int, name: str, uri: str) -> None:  # noqa: ANN001
    from mclstexp import cluster, storage, tracking
    from tuning.results import BEST, publish, score_trials
    from tuning.sweep import open_sweep, run_trials

    cluster.require_shared(config, [f"--data {arguments.data}", f"--out {uri}"])
    cluster.require(config)
    tags = {"protocol": config.split.protocol}
    sweep = open_sweep(
        arguments.data, uri, config, space, search, trials, lambda: tracking.start_run(config, name, tags)
    )
    print(f"sweep {name}: {trials} trials, validated on {', '.join(config.split.validation_patients)}", flush=True)
    ended = run_trials(sweep)
    score_trials(sweep, ended)
    best = publish(sweep, ended)
    if arguments.promote:
        _promote(sweep, best)
    tracking.finish_run(config.tracking, sweep.plan.mlflow_run_id)
    print(f"MLflow run {sweep.plan.mlflow_run_id} at {config.tracking.uri}")
    print(f"trials and pictures {uri}")
    print(f"best settings {storage.join(uri, BEST)}")


def _promote(sweep, best) -> None:  # noqa: ANN001
    from tuning.promotion import promote

    promotion = promote(sweep, best)
    alias = "challenger and champion" if promotion.is_champion else "challenger only"
    print(f"version {promotion.version} of {sweep.plan.config.tracking.model_name} is {alias}: {promotion.reason}")


if __name__ == "__main__":
    run(main)
