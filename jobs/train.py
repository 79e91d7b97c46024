#!/usr/bin/env python
"""Trains the two towers on a tile table and registers the model version with its bank.

Run the same command again and it resumes where it stopped.
"""

from typing import TYPE_CHECKING, Literal

import _launch  # first: puts the project on the path
from _cli import JobArguments, describe, parse, run
from _encoder import warn_of_augmentation, warn_of_encoder
from _patients import warn_of_similar_patients

if TYPE_CHECKING:
    from mclstexp.config import Config
    from mclstexp.training.run import Run

EXAMPLE = "python jobs/train.py --data s3://bucket/tiles --out s3://bucket/runs --train.num_workers 4 --train.use_gpu"
BLOCKS = ("storage", "cluster", "genes", "split", "model", "train", "retrieval", "tracking")


class TrainArguments(JobArguments):
    """What to train on, and where the run goes."""

    data: str
    """Tile table (made by jobs/prepare.py): a folder or s3:// URI."""
    out: str = "runs"
    """Folder of the runs: checkpoints and models."""
    name: str | None = None
    """Name of the run; the same name resumes it. Default made from settings and data."""
    features: Literal["make", "require"] = "make"
    """With a frozen encoder: make features that are not stored yet first, or require that all are stored."""


def main() -> None:
    """Parses, checks, trains, registers."""
    arguments, config = parse(TrainArguments, __doc__ or "", EXAMPLE, BLOCKS)
    from mclstexp.model.losses import require_loss
    from mclstexp.model.weights import require_encoder

    require_encoder(config.model.image_encoder, layers=config.model.image_layers)
    require_loss(config)
    if arguments.dry_run:
        print(describe(config, BLOCKS))
        print(_plan(arguments.data, config))
        return

    require_encoder(config.model.image_encoder, config.model.image_weights)
    if arguments.features == "require":
        _require_features(arguments.data, config)
    _launch.connect(config)
    from mclstexp import cluster, progress, tracking
    from mclstexp.training.complete import train_and_finish
    from mclstexp.training.finish import is_finished
    from mclstexp.training.run import open_run

    cluster.require_shared(config, [f"--data {arguments.data}", f"--out {arguments.out}"])
    cluster.require(config)

    def track(full: "Config", name: str, recorded: str | None) -> str:
        return tracking.start_run(full, name, {"protocol": config.split.protocol}, recorded)

    opened = open_run(arguments.data, arguments.out, arguments.name, config, track)
    warn_of_similar_patients(opened.manifest)
    warn_of_encoder(config.model, opened.manifest)
    warn_of_augmentation(config)
    print(f"run {opened.name}: {len(opened.split.train)} training sections, {len(opened.panel)} genes", flush=True)
    if is_finished(opened):
        print("the run is finished already; give another --name to repeat it")
    else:
        metrics = tracking.metric_log(config.tracking, opened.mlflow_run_id)
        try:
            with progress.bars() as show:
                train_and_finish(opened, metrics.log, show)
        finally:
            metrics.close()
    _register(opened)


def _require_features(data: str, config: "Config") -> None:
    from mclstexp.data.folds import make_split
    from mclstexp.data.schema import load_manifest
    from mclstexp.training.run import with_views
    from mclstexp.training.stored import store_features

    manifest = load_manifest(data)
    split = make_split(manifest, config.split)
    store_features(data, (*split.train, *split.validation), [with_views(config, manifest)], make=False)


def _plan(data: str, config: "Config") -> str:
    from mclstexp import cluster
    from mclstexp.data.folds import make_split
    from mclstexp.data.schema import load_manifest
    from mclstexp.data.totals import GeneCounts
    from mclstexp.training.complete import training_plan
    from mclstexp.training.run import require_totals

    manifest = load_manifest(data)
    warn_of_similar_patients(manifest)
    split = make_split(manifest, config.split)
    lines = [cluster.plan(config)]
    for side, names in {"train": split.train, "validation": split.validation, "test": split.test}.items():
        sentences, spots = len(manifest.sentences(names)), manifest.num_spots(names)
        lines.append(f"{side}: {len(names)} sections, {sentences} sentences, {spots} spots ({', '.join(names) or '-'})")
    lines.append(training_plan(config, manifest, split.train))
    return "\n".join([*lines, *require_totals(GeneCounts(data, manifest), split, config.genes)])


def _register(opened: "Run") -> None:
    import tempfile

    from mclstexp import tracking
    from mclstexp.training.finish import model_uri

    config, uri = opened.config.tracking, model_uri(opened)
    with tempfile.TemporaryDirectory() as scratch:
        folder = tracking.fetch_model(config, uri, scratch)
        tags = {"protocol": opened.config.split.protocol, "run": opened.name}
        version = tracking.register(config, opened.mlflow_run_id, folder, tags)
    tracking.finish_run(config, opened.mlflow_run_id)
    print(f"MLflow run {opened.mlflow_run_id} at {config.uri}")
    print(f"model folder {uri}")
    print(f"model version models:/{config.model_name}/{version}")


if __name__ == "__main__":
    run(main)
