#!/usr/bin/env python
"""Cross-validates a recipe: trains and scores one model for each fold, beside floors, and joins the score cards.

`--protocol patient` holds out one patient after the other, `--protocol reference` one section after the other, as
published. Run the same command again and it resumes: no scored fold is repeated.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

import _launch  # first: puts the project on the path
from _cli import JobArguments, describe, parse, run
from _encoder import warn_of_augmentation, warn_of_encoder
from _markers import markers
from _patients import warn_of_similar_patients

if TYPE_CHECKING:
    from mclstexp.config import Config
    from mclstexp.evaluation.score_card import ScoreCard
    from tuning.cross_validation import Study

EXAMPLE = "python jobs/cross_validate.py --protocol patient --data s3://bucket/tiles --out s3://bucket/studies"
BLOCKS = ("storage", "cluster", "genes", "split", "model", "train", "retrieval", "tracking")


class CrossValidateArguments(JobArguments):
    """What to cross-validate, and where the results go."""

    former: ClassVar = {"probe-weights": "use --floor-weights"}
    protocol: Literal["patient", "reference"]
    """Held out in turn: each patient, or each section while its siblings may train (as published)."""
    data: str
    """Tile table (made by jobs/prepare.py): a folder or s3:// URI."""
    out: str = "runs/cross_validation"
    """Folder of the cross-validations: folds, models and results."""
    name: str | None = None
    """Name of the cross-validation; the same name resumes it. Default made from settings and data."""
    folds: tuple[str, ...] = ()
    """Patients or sections to hold out in turn now; default all."""
    features: Literal["make", "require"] = "make"
    """With a frozen encoder: make features that are not stored yet first, or require that all are stored."""
    floor_weights: str | None = None
    """`imagenet` or a file: adds a ridge on that encoder's features as a floor."""
    cohort: str | None = None
    """Cohort whose sets of marker genes, from the markers file, are scored too."""
    markers: str | None = None
    """YAML file of marker genes by cohort and set; default jobs/configs/markers.yaml."""


def main() -> None:
    """Parses, trains and scores the folds, joins their score cards."""
    arguments, config = parse(CrossValidateArguments, __doc__ or "", EXAMPLE, BLOCKS)
    from rich.console import Console

    from mclstexp import cluster, progress, storage, tracking
    from mclstexp.data.folds import make_split
    from mclstexp.data.schema import load_manifest
    from mclstexp.evaluation.save import RECORD
    from mclstexp.evaluation.show import card_tables
    from mclstexp.model.losses import require_loss
    from mclstexp.model.weights import require_encoder
    from mclstexp.training.complete import training_plan
    from mclstexp.training.run import with_views
    from mclstexp.training.stored import store_features
    from tuning import cross_validation as folds_of

    require_encoder(config.model.image_encoder, layers=config.model.image_layers)
    require_loss(config)
    config = cluster.side_by_side(config)
    marker_sets = markers(arguments.cohort, arguments.markers)
    manifest, protocol, floor = load_manifest(arguments.data), arguments.protocol, arguments.floor_weights
    warn_of_similar_patients(manifest)
    warn_of_encoder(config.model, manifest)
    warn_of_augmentation(config)
    config = with_views(config, manifest)
    folds = folds_of.make_folds(manifest, config, protocol, arguments.folds)
    name = arguments.name or folds_of.default_name(arguments.out, manifest, protocol, config, floor, marker_sets)
    uri = storage.join(storage.absolute(arguments.out), name)
    named = ", ".join(fold.name for fold in folds)
    print(f"{len(folds)} folds ({named}) of protocol {protocol}, into {uri}", flush=True)
    if arguments.dry_run:
        print(describe(config, BLOCKS))
        print(f"each fold: {cluster.plan(config)}")
        for fold in folds:
            train = make_split(manifest, fold.config.split).train
            print(f"fold {fold.name}: {training_plan(fold.config, manifest, train)}")
        return

    for weights in (config.model.image_weights, floor or "random"):
        require_encoder(config.model.image_encoder, weights)
    if arguments.features == "require":
        store_features(arguments.data, folds_of.read_sections(manifest, folds), [config], make=False)
    _launch.connect(config)
    cluster.require_shared(config, [f"--data {arguments.data}", f"--out {uri}"])
    cluster.require(config)

    def track(recorded: str | None) -> str:
        return tracking.start_run(config, name, {"protocol": protocol}, recorded)

    study = folds_of.open_study(arguments.data, uri, protocol, config, track, floor, marker_sets)
    with progress.bars() as show:
        failed = folds_of.run_folds(folds, study, show)
    folds_of.require_all(failed, folds, study)
    card = folds_of.collect(folds_of.scored_folds(manifest, study), study)
    Console(width=120).print(card_tables(card))
    _publish(card, study, config)
    print(f"MLflow run {study.mlflow_run_id} at {config.tracking.uri}")
    print(f"score card {storage.join(uri, RECORD)}")


def _publish(card: "ScoreCard", study: "Study", config: "Config") -> None:
    """Writes the joined score card beside the folds and into the study's MLflow run."""
    import tempfile

    from mclstexp import storage, tracking
    from mclstexp.evaluation.save import RECORD, save_card

    with tempfile.TemporaryDirectory() as folder:
        save_card(card, folder)
        storage.upload_folder(folder, study.uri, last=RECORD)
        metrics = tracking.metric_log(config.tracking, study.mlflow_run_id)
        metrics.log(0, card.metrics())
        metrics.close()
        tracking.log_artifacts(config.tracking, study.mlflow_run_id, folder, "score_card")
    tracking.finish_run(config.tracking, study.mlflow_run_id)


if __name__ == "__main__":
    run(main)
