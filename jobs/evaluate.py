#!/usr/bin/env python
"""Scores a model version on its held-out sections, beside floors."""

from pathlib import Path

import _launch  # first: puts the project on the path
from _cli import Argument, describe, parse, run

EXAMPLE = "python jobs/evaluate.py --model models:/mclstexp@champion --data s3://bucket/tiles --out s3://bucket/scores"
ARGUMENTS = [
    Argument("model", "models:/NAME@ALIAS, models:/NAME/VERSION, or a model folder"),
    Argument("data", "tile table with the model's training sections and those to score"),
    Argument("out", "where the score card goes [runs/scores/MODEL_DIGEST]", required=False),
    Argument("sections", "sections to score: A,B,... [those that the model held out]", required=False, default=""),
    Argument("probe-weights", "imagenet or a file: adds the ridge on that encoder's features [none]", required=False),
    Argument(
        "cohort", "adds the sets of marker genes that the markers file has for this cohort [none]", required=False
    ),
    Argument("markers", "YAML file of marker genes by cohort and set [jobs/configs/markers.yaml]", required=False),
]
MARKERS = Path(__file__).parent / "configs" / "markers.yaml"
SECTIONS = ("storage", "cluster", "tracking")


def main() -> None:
    """Parses, fetches the version, scores, saves, logs."""
    arguments, config = parse(__doc__ or "", EXAMPLE, ARGUMENTS, SECTIONS)
    import tempfile

    from mclstexp import resources, storage, tracking
    from mclstexp.data.schema import load_manifest
    from mclstexp.errors import ConfigError
    from mclstexp.evaluation.evaluate import held_out
    from mclstexp.evaluation.markers import load_markers
    from mclstexp.inference.model_version import ModelVersion
    from mclstexp.model.encoders import require_weights

    if arguments.markers and not arguments.cohort:
        raise ConfigError(f"--markers {arguments.markers} needs --cohort NAME: which of its cohorts is scored")
    markers = load_markers(arguments.markers or MARKERS, arguments.cohort) if arguments.cohort else {}
    with tempfile.TemporaryDirectory() as scratch:
        model = ModelVersion.load(tracking.fetch_model(config.tracking, arguments.model, scratch))
    arguments.sections = [name for name in arguments.sections.split(",") if name]
    arguments.out = arguments.out or f"runs/scores/{model.digest}"
    names = held_out(model, load_manifest(arguments.data), arguments.sections)
    require_weights(model.config.model.image_encoder, arguments.probe_weights or "random")
    if arguments.dry_run:
        print(describe(config, SECTIONS))
        print(f"would score {', '.join(names)} under the protocol {model.training.protocol} into {arguments.out}")
        return
    _launch.connect(config)
    resources.require_shared(config, [f"--data {arguments.data}", f"--out {arguments.out}"])
    card = _score(model, arguments, markers)
    _save(card, arguments, config)
    print(f"score card {storage.join(storage.absolute(arguments.out), 'score_card.json')}")


def _score(model, arguments, markers):  # noqa: ANN001, ANN202
    from rich.console import Console
    from rich.progress import Progress

    from mclstexp.evaluation.evaluate import evaluate

    with Progress() as bar:
        tasks: dict[str, int] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(f"tiles through {what}")
            bar.update(tasks[what], completed=done, total=total)

        card = evaluate(model, arguments.data, show, arguments.sections, arguments.probe_weights, markers)
    Console(width=120).print(card.table())
    return card


def _save(card, arguments, config) -> None:  # noqa: ANN001
    import tempfile

    from mclstexp import storage, tracking

    with tempfile.TemporaryDirectory() as folder:
        card.save(folder)
        for path in Path(folder).iterdir():
            storage.upload(path, storage.join(arguments.out, path.name))
        run_id = tracking.tag_version(config.tracking, arguments.model, card.tags())
        own_run = run_id is None
        if own_run:
            run_id = tracking.start_run(config, f"evaluate-{card.model_digest}", card.tags())
        metrics = tracking.MetricLog(config.tracking, run_id)
        metrics.log(0, card.metrics())
        metrics.close()
        tracking.log_artifacts(config.tracking, run_id, folder, "score_card")
        if own_run:
            tracking.finish_run(config.tracking, run_id)
        print(f"MLflow run {run_id} at {config.tracking.uri}")


if __name__ == "__main__":
    run(main)
