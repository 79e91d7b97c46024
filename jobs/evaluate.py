#!/usr/bin/env python
"""Scores a model version on its held-out sections, beside floors."""

from typing import TYPE_CHECKING, ClassVar

import _launch  # first: puts the project on the path
from _cli import JobArguments, describe, parse, run
from _markers import markers

if TYPE_CHECKING:
    from mclstexp.config import Config
    from mclstexp.evaluation.score_card import ScoreCard
    from mclstexp.model.version import ModelVersion

EXAMPLE = "python jobs/evaluate.py --model models:/mclstexp@champion --data s3://bucket/tiles --out s3://bucket/scores"
BLOCKS = ("storage", "cluster", "tracking", "model.image_weights")


class EvaluateArguments(JobArguments):
    """What to score, and where the results go."""

    former: ClassVar = {"protocol": "use jobs/cross_validate.py --protocol", "probe-weights": "use --floor-weights"}
    model: str
    """Model version: models:/NAME@ALIAS, models:/NAME/VERSION, or a model folder."""
    data: str
    """Tile table with the model's training sections and the sections to score: a folder or s3:// URI."""
    out: str | None = None
    """Folder for the results; default runs/scores/MODEL_DIGEST."""
    sections: tuple[str, ...] = ()
    """Sections to score; default those that the model held out."""
    floor_weights: str | None = None
    """`imagenet` or a file: adds a ridge on that encoder's features as a floor."""
    cohort: str | None = None
    """Cohort whose sets of marker genes, from the markers file, are scored too."""
    markers: str | None = None
    """YAML file of marker genes by cohort and set; default jobs/configs/markers.yaml."""


def main() -> None:
    """Parses, fetches the model version, scores it, saves the score card and logs it."""
    arguments, config = parse(EvaluateArguments, __doc__ or "", EXAMPLE, BLOCKS)
    from rich.console import Console

    from mclstexp import cluster, progress, storage
    from mclstexp.data.schema import load_manifest
    from mclstexp.evaluation.evaluate import evaluate, held_out
    from mclstexp.evaluation.markers import require_markers
    from mclstexp.evaluation.save import RECORD
    from mclstexp.evaluation.show import card_tables
    from mclstexp.model.weights import require_encoder

    # Mistakes first
    marker_sets = markers(arguments.cohort, arguments.markers)
    model = _fetch(arguments.model, config)
    require_markers(marker_sets, model.panel)
    names = held_out(model, load_manifest(arguments.data), arguments.sections)
    out = arguments.out or f"runs/scores/{model.digest}"
    if arguments.dry_run:
        print(describe(config, BLOCKS))
        print(f"would score {', '.join(names)} under the protocol {model.training.protocol} into {out}")
        return

    require_encoder(model.config.model.image_encoder, arguments.floor_weights or "random")
    _launch.connect(config)
    cluster.require_shared(config, [f"--data {arguments.data}", f"--out {out}"])
    with progress.bars() as show:
        card = evaluate(model, arguments.data, show, names, arguments.floor_weights, marker_sets)
    Console(width=120).print(card_tables(card))
    _publish(card, arguments.model, out, config)
    print(f"score card {storage.join(storage.absolute(out), RECORD)}")


def _fetch(name: str, config: "Config") -> "ModelVersion":
    import tempfile

    from mclstexp import tracking
    from mclstexp.model.version import ModelVersion

    with tempfile.TemporaryDirectory() as scratch:
        model = ModelVersion.load(tracking.fetch_model(config.tracking, name, scratch))
    model.use_weights(config.model.image_weights)
    return model


def _publish(card: "ScoreCard", model: str, out: str, config: "Config") -> None:
    """Writes the score card to its folder and into MLflow.

    A registered version gets the scores as tags and in the run that trained it; any other model in a run of its own.
    """
    import tempfile
    from dataclasses import replace

    from mclstexp import storage, tracking
    from mclstexp.evaluation.save import RECORD, save_card

    trained_by = tracking.tag_version(config.tracking, model, card.tags())
    if trained_by is not None:
        card = replace(card, training_runs={model: trained_by})
        run_id = trained_by
    else:
        run_id = tracking.start_run(config, f"evaluate-{card.model_digest}", card.tags())
    with tempfile.TemporaryDirectory() as folder:
        save_card(card, folder)
        storage.upload_folder(folder, out, last=RECORD)
        metrics = tracking.metric_log(config.tracking, run_id)
        metrics.log(0, card.metrics())
        metrics.close()
        tracking.log_artifacts(config.tracking, run_id, folder, "score_card")
    print(f"MLflow run {run_id} at {config.tracking.uri}")
    if trained_by is None:
        tracking.finish_run(config.tracking, run_id)


if __name__ == "__main__":
    run(main)
