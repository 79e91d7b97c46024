#!/usr/bin/env python
"""Scores a model version on its held-out sections, or a recipe by cross-validation, beside floors.

With --protocol it trains and scores one model for each fold (`reference`: leave one section out, as published;
`patient`: leave one patient out); all settings of jobs/train.py are then options here too.
"""

import sys

import _launch  # first: puts the project on the path
from _cli import Argument, describe, parse, run
from _markers import ARGUMENTS as MARKER_ARGUMENTS
from _markers import markers

from mclstexp.errors import ConfigError

EXAMPLE = "python jobs/evaluate.py --model models:/mclstexp@champion --data s3://bucket/tiles --out s3://bucket/scores"
ARGUMENTS = [
    Argument("model", "models:/NAME@ALIAS, models:/NAME/VERSION, or a model folder", required=False),
    Argument("protocol", "cross-validate instead: reference or patient", required=False),
    Argument("data", "tile table with the model's training sections and those to score"),
    Argument("out", "where the results go [runs/scores/MODEL_DIGEST, or runs/cross_validation]", required=False),
    Argument("name", "the cross-validation's name; the same name goes on [made from settings and data]", False),
    Argument("folds", "sections or patients to hold out in turn now: A,B,... [all]", required=False, default=""),
    Argument("sections", "sections to score: A,B,... [those that the model held out]", required=False, default=""),
    Argument("probe-weights", "imagenet or a file: adds the ridge on that encoder's features [none]", required=False),
    *MARKER_ARGUMENTS,
]
SECTIONS = ("storage", "cluster", "tracking")
STUDY_SECTIONS = ("storage", "cluster", "genes", "split", "model", "train", "retrieval", "tracking")


def main() -> None:
    """Parses, and scores a version or cross-validates a recipe."""
    is_study = any(word.partition("=")[0] == "--protocol" for word in sys.argv[1:])
    sections = STUDY_SECTIONS if is_study else SECTIONS
    arguments, config = parse(__doc__ or "", EXAMPLE, ARGUMENTS, sections)
    if is_study == bool(arguments.model) or arguments.protocol not in (None, "reference", "patient"):
        raise ConfigError("give either --model, or --protocol reference or --protocol patient")
    if is_study:
        _cross_validate(arguments, config)
    else:
        _evaluate(arguments, config)


def _evaluate(arguments, config) -> None:  # noqa: ANN001
    """Fetches the version, scores, saves, logs."""
    import tempfile

    from mclstexp import cluster, storage, tracking
    from mclstexp.data.schema import load_manifest
    from mclstexp.evaluation.evaluate import held_out
    from mclstexp.model.encoders import require_encoder
    from mclstexp.model.version import ModelVersion

    marker_sets = markers(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        model = ModelVersion.load(tracking.fetch_model(config.tracking, arguments.model, scratch))
    arguments.sections = [name for name in arguments.sections.split(",") if name]
    arguments.out = arguments.out or f"runs/scores/{model.digest}"
    names = held_out(model, load_manifest(arguments.data), arguments.sections)
    require_encoder(model.config.model.image_encoder, arguments.probe_weights or "random")
    if arguments.dry_run:
        print(describe(config, SECTIONS))
        print(f"would score {', '.join(names)} under the protocol {model.training.protocol} into {arguments.out}")
        return
    _launch.connect(config)
    cluster.require_shared(config, [f"--data {arguments.data}", f"--out {arguments.out}"])
    card = _score(model, arguments, marker_sets)
    _save(card, arguments, config)
    print(f"score card {storage.join(storage.absolute(arguments.out), 'score_card.json')}")


def _score(model, arguments, marker_sets):  # noqa: ANN001, ANN202
    from rich.console import Console
    from rich.progress import Progress

    from mclstexp.evaluation.evaluate import evaluate
    from mclstexp.evaluation.show import card_tables

    with Progress() as bar:
        tasks: dict[str, int] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(f"tiles through {what}")
            bar.update(tasks[what], completed=done, total=total)

        card = evaluate(model, arguments.data, show, arguments.sections, arguments.probe_weights, marker_sets)
    Console(width=120).print(card_tables(card))
    return card


def _save(card, arguments, config) -> None:  # noqa: ANN001
    from dataclasses import replace

    from mclstexp import tracking

    run_id = tracking.tag_version(config.tracking, arguments.model, card.tags())
    own_run = run_id is None
    if run_id is not None:
        card = replace(card, training_runs={arguments.model: run_id})
    if own_run:
        run_id = tracking.start_run(config, f"evaluate-{card.model_digest}", card.tags())
    _publish(card, arguments.out, config, run_id)
    if own_run:
        tracking.finish_run(config.tracking, run_id)


def _publish(card, out: str, config, run_id: str) -> None:  # noqa: ANN001
    """Puts a score card's files where they belong and logs them to an MLflow run."""
    import tempfile

    from mclstexp import storage, tracking
    from mclstexp.evaluation.save import save_card

    with tempfile.TemporaryDirectory() as folder:
        save_card(card, folder)
        storage.upload_folder(folder, out, last="score_card.json")
        metrics = tracking.metric_log(config.tracking, run_id)
        metrics.log(0, card.metrics())
        metrics.close()
        tracking.log_artifacts(config.tracking, run_id, folder, "score_card")
    print(f"MLflow run {run_id} at {config.tracking.uri}")


def _cross_validate(arguments, config) -> None:  # noqa: ANN001
    """Trains and scores every fold that is asked for and not scored yet, and writes one result of all scored ones."""
    from rich.console import Console

    from mclstexp import cluster, storage, tracking
    from mclstexp.data.schema import load_manifest
    from mclstexp.evaluation.show import card_tables
    from mclstexp.model.encoders import require_encoder
    from mclstexp.model.losses import require_loss
    from tuning import cross_validation as study_of
    from tuning.cross_validation import collect

    for weights in (config.model.image_weights, arguments.probe_weights or "random"):
        require_encoder(config.model.image_encoder, weights)
    require_loss(config)
    manifest, protocol = load_manifest(arguments.data), arguments.protocol
    only = [name for name in arguments.folds.split(",") if name]
    folds = study_of.make_folds(manifest, config, protocol, only)
    name = arguments.name or f"{protocol}-{config.digest()}-{manifest.digest()[:6]}"
    uri = storage.join(storage.absolute(arguments.out or "runs/cross_validation"), name)
    print(
        f"{len(folds)} folds ({', '.join(fold.name for fold in folds)}) of protocol {protocol}, into {uri}", flush=True
    )
    if arguments.dry_run:
        print(describe(config, STUDY_SECTIONS))
        print(f"each fold: {cluster.plan(config)}")
        return
    _launch.connect(config)
    cluster.require_shared(config, [f"--data {arguments.data}", f"--out {uri}"])
    cluster.require(config)
    tags = {"protocol": protocol}
    study = study_of.open_study(
        arguments.data,
        uri,
        protocol,
        config,
        lambda: tracking.start_run(config, name, tags),
        arguments.probe_weights,
        markers(arguments),
    )
    failed = _run_folds(folds, study)
    study_of.require_all(failed, folds, study)
    card = collect(study_of.scored_folds(manifest, study), study)
    Console(width=120).print(card_tables(card))
    _publish(card, uri, config, study.mlflow_run_id)
    tracking.finish_run(config.tracking, study.mlflow_run_id)
    print(f"score card {storage.join(uri, 'score_card.json')}")


def _run_folds(folds, study) -> dict[str, str]:  # noqa: ANN001
    from rich.progress import Progress

    from tuning.cross_validation import is_scored, run_folds

    with Progress() as bar:
        left = [fold for fold in folds if not is_scored(study, fold.name)]
        overall = bar.add_task("folds", total=len(folds), completed=len(folds) - len(left))
        tasks = {}

        def show(fold: str, share: float) -> None:
            if fold not in tasks:
                tasks[fold] = bar.add_task(f"fold {fold}: training", total=1.0)
            bar.update(tasks[fold], completed=share)
            if share == 1.0:
                bar.update(tasks[fold], description=f"fold {fold}: last epoch, bank, scores")

        return run_folds(folds, study, show, lambda: bar.advance(overall))


if __name__ == "__main__":
    run(main)
