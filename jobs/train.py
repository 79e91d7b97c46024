#!/usr/bin/env python
"""Trains the two towers on a tile table and registers the model version with its bank."""

import _launch  # first: puts the project on the path
from _cli import Argument, describe, parse, run

EXAMPLE = "python jobs/train.py --data s3://bucket/tiles --out s3://bucket/runs --train.num_workers 4 --train.use_gpu"
ARGUMENTS = [
    Argument("data", "tile table (made by jobs/prepare.py): a folder or s3:// URI"),
    Argument("out", "where runs keep checkpoints and models [runs]", required=False, default="runs"),
    Argument("name", "the run's name; the same name goes on where it stopped [made from settings and data]", False),
]
SECTIONS = ("storage", "cluster", "genes", "split", "model", "train", "retrieval", "tracking")


def main() -> None:
    """Parses, checks, trains, registers."""
    arguments, config = parse(__doc__ or "", EXAMPLE, ARGUMENTS, SECTIONS)
    from mclstexp.model.encoders import require_encoder
    from mclstexp.model.losses import require_loss

    require_encoder(config.model.image_encoder, config.model.image_weights)
    require_loss(config)
    if arguments.dry_run:
        print(describe(config, SECTIONS))
        print(_plan(arguments.data, config))
        return
    _launch.connect(config)
    from mclstexp import cluster, tracking
    from mclstexp.training import finish
    from mclstexp.training.run import open_run
    from mclstexp.training.trainer import fit

    cluster.require_shared(config, [f"--data {arguments.data}", f"--out {arguments.out}"])
    cluster.require(config)
    protocol = {"protocol": config.split.protocol}
    this = open_run(
        arguments.data,
        arguments.out,
        arguments.name,
        config,
        lambda full, name: tracking.start_run(full, name, protocol),
    )
    print(f"run {this.name}: {len(this.split.train)} training sections, {len(this.panel)} genes", flush=True)
    if finish.is_finished(this):
        print("the run is finished already; give another --name to repeat it")
    else:
        metrics = tracking.metric_log(config.tracking, this.mlflow_run_id)
        checkpoint = fit(this, metrics.log)
        metrics.close()
        finish.finish(this, checkpoint)
    _register(this, finish.model_uri(this))


def _register(this, folder: str) -> None:  # noqa: ANN001
    import tempfile

    from mclstexp import tracking

    config = this.config.tracking
    with tempfile.TemporaryDirectory() as scratch:
        local = tracking.fetch_model(config, folder, scratch)
        tags = {"protocol": this.config.split.protocol, "run": this.name}
        version = tracking.register(config, this.mlflow_run_id, local, tags)
    tracking.finish_run(config, this.mlflow_run_id)
    print(f"MLflow run {this.mlflow_run_id} at {config.uri}")
    print(f"model folder {folder}")
    print(f"model version models:/{config.model_name}/{version}")


def _plan(data: str, config) -> str:  # noqa: ANN001
    from mclstexp import cluster
    from mclstexp.data.folds import make_split
    from mclstexp.data.schema import load_manifest

    manifest = load_manifest(data)
    split = make_split(manifest, config.split)
    sides = {"train": split.train, "validation": split.validation, "test": split.test}
    lines = [cluster.plan(config)]
    for side, names in sides.items():
        entries = [manifest.section(name) for name in names]
        spots = sum(entry.num_spots for entry in entries)
        sentences = sum(len(entry.row_groups) for entry in entries)
        lines.append(f"{side}: {len(names)} sections, {sentences} sentences, {spots} spots ({', '.join(names) or '-'})")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
