#!/usr/bin/env python
"""Predicts expression for a cohort of H&E slides with a registered model version.

Run the same command again after an interruption: it does what is left. Slides that cannot be read are quarantined with
the reason and do not stop the others.
"""

from typing import TYPE_CHECKING

import _launch  # first: puts the project on the path
from _cli import JobArguments, describe, parse, run
from pydantic import Field, model_validator

from mclstexp.config import Config
from mclstexp.errors import ConfigError, PredictError

if TYPE_CHECKING:
    from mclstexp.model.version import ModelVersion
    from mclstexp.prediction.cohort import Cohort
    from mclstexp.prediction.draw import DrawReport
    from mclstexp.prediction.run import Report

EXAMPLE = "python jobs/predict.py --model models:/mclstexp@champion --samples slides/ --out s3://bucket/predictions"
BLOCKS = ("storage", "cluster", "predict", "tracking", "model.image_weights")
MIN_CPUS = 3


class PredictArguments(JobArguments):
    """What to predict."""

    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, or a model folder."""
    samples: str | None = None
    """Slides: a sample sheet (.csv), a folder or an s3:// prefix."""
    features: str | None = None
    """Folder or s3:// prefix of features that TRIDENT has extracted, one .h5 per slide, in the place of slides;
    --samples may then be a sheet with their patients and resolutions."""
    out: str
    """Where SLIDE.parquet, SLIDE.h5ad and previews go."""
    genes: tuple[str, ...] = ()
    """Genes to draw over all predicted slides at the end, as jobs/draw.py does; default none."""
    spots: str | None = None
    """CSV of section_id, x_px, y_px: tile centres instead of a grid."""
    assume_mpp: float | None = Field(None, gt=0)
    """Micrometres per pixel of slides whose resolution neither file nor sheet states."""
    explain: str | None = None
    """SLIDE,X,Y: lists the reference spots that the tile there was predicted from, and predicts nothing."""

    @model_validator(mode="after")
    def _has_slides(self) -> "PredictArguments":
        if self.samples is None and self.features is None:
            raise ValueError("give the slides with --samples, or features of them with --features")
        if self.features is not None and self.spots is not None:
            raise ValueError("--spots has no effect on --features, whose tiles are cut already; leave one out")
        return self


def main() -> None:
    """Parses, fetches the version, and plans, explains or predicts."""
    arguments, config = parse(PredictArguments, __doc__ or "", EXAMPLE, BLOCKS)
    import tempfile

    from mclstexp import tracking
    from mclstexp.data.genes import find_genes
    from mclstexp.model.version import ModelVersion
    from mclstexp.prediction.slide_cache import clear

    with tempfile.TemporaryDirectory() as scratch:
        model = ModelVersion.load(tracking.fetch_model(config.tracking, arguments.model, scratch))
    model.use_weights(config.model.image_weights)
    find_genes(model.panel, arguments.genes)
    cohort = _cohort(arguments, model, config)
    if not arguments.explain and not arguments.dry_run:
        _predict(arguments, model, cohort, config)
        return
    try:
        if arguments.explain:
            _explain(arguments, model, cohort)
        else:
            _plan(model, cohort, config)
    finally:
        clear(cohort.plan.scratch)


def _cohort(arguments: PredictArguments, model: "ModelVersion", config: Config) -> "Cohort":
    """Returns the slides to predict, by their images or by feature files."""
    from mclstexp.prediction.cohort import open_cohort
    from mclstexp.prediction.feature_cohort import open_feature_cohort

    out, samples, assumed = arguments.out, arguments.samples, arguments.assume_mpp
    if arguments.features is not None:
        return open_feature_cohort(arguments.features, model, out, config.predict, samples, assumed)
    assert samples is not None  # the arguments are checked
    return open_cohort(samples, model, out, config.predict, arguments.spots, assumed)


def _plan(model: "ModelVersion", cohort: "Cohort", config: Config) -> None:
    """Prints the settings and what the run would take."""
    import os

    import torch

    from mclstexp import cluster
    from mclstexp.prediction.forecast import forecast, forecast_on_a_gpu
    from mclstexp.prediction.pipeline import cluster_size, worker_counts

    print(describe(config, BLOCKS))
    _print_notes(cohort)
    if "RAY_ADDRESS" in os.environ:
        _launch.connect(config)  # to a running cluster
        print(forecast_on_a_gpu(cohort, model, worker_counts(*cluster_size(config.predict))))
        return
    predict, local_cpus = config.predict, cluster.num_local_cpus(config, MIN_CPUS)
    num_gpus = torch.cuda.device_count() if predict.num_gpus is None else predict.num_gpus
    print(forecast(cohort, model, worker_counts(predict.num_cpus or local_cpus, num_gpus)))


def _explain(arguments: PredictArguments, model: "ModelVersion", cohort: "Cohort") -> None:
    """Prints the strongest votes for one tile, and writes all of them."""
    from rich.console import Console
    from rich.table import Table

    from mclstexp import storage
    from mclstexp.prediction import ledger
    from mclstexp.prediction.explain import explain_tile, shares

    owner = ledger.owner(arguments.out)
    if owner is not None and owner.model_digest != model.digest:
        raise PredictError(f"{arguments.out} holds predictions by the model {owner.model_digest}, got {model.digest}")
    slide_id, *xy_px = str(arguments.explain).split(",")
    try:
        x_px, y_px = map(float, xy_px)
    except ValueError:
        raise ConfigError(f"--explain {arguments.explain} is not SLIDE,X,Y with level-0 pixels") from None
    spot_id, votes = explain_tile(cohort, model, slide_id, x_px, y_px, arguments.genes)
    table = Table(*votes.columns, title=f"{slide_id}, tile {spot_id}: the 20 largest of {len(votes)} votes")
    for row in votes.head(20).itertuples(index=False):
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row))
    Console(width=120).print(table)
    if words := shares(model):
        print(words)
    target = storage.join(storage.absolute(arguments.out), "explained", f"{slide_id}-{spot_id}.csv")
    storage.write(target, votes.to_csv(index=False).encode())
    print(f"all votes {target}")


def _predict(arguments: PredictArguments, model: "ModelVersion", cohort: "Cohort", config: Config) -> None:
    """Predicts the cohort and draws it."""
    import time

    from mclstexp import cluster
    from mclstexp.prediction.draw import DrawReport, draw_slides
    from mclstexp.prediction.run import predict_cohort
    from mclstexp.progress import bars

    _launch.connect(config, max(MIN_CPUS, config.predict.num_cpus or 0))
    cluster.require_to_predict(config)
    paths = {name: getattr(arguments, name) for name in ("samples", "features", "spots", "out")}
    uris = [f"--{name} {path}" for name, path in paths.items() if path]
    cluster.require_shared(config, uris, uses_tracking=arguments.model.startswith("models:/"))
    started, drawn = time.monotonic(), DrawReport()
    with bars() as show:
        try:
            report = predict_cohort(model, cohort, arguments.out, show, config.predict)
        finally:
            cohort.release()
        seconds = time.monotonic() - started
        if arguments.genes:
            drawn = draw_slides(arguments.out, report.done(), arguments.genes, show)
    _print_notes(cohort)
    _print(report, drawn, seconds, arguments)


def _print_notes(cohort: "Cohort") -> None:
    """Prints what the sheet says against the model, and how many files of the folder are no slides."""
    from mclstexp.prediction.cohort import left_out_files

    for warning in cohort.warnings:
        print(f"warning: {warning}")
    if cohort.left_out:
        print(left_out_files(cohort.left_out))


def _print(report: "Report", drawn: "DrawReport", seconds: float, arguments: PredictArguments) -> None:
    """Prints what was done; ends with an error if slides have no prediction or picture."""
    counts = report.counts()
    words = ", ".join(f"{counts[state]} {state}" for state in ("done", "empty", "skipped", "quarantined", "failed"))
    print(f"{words} of {counts.total()} slides; {report.num_tiles:,} tiles in {seconds:.0f} s", end="")
    tiles = [entry.num_tiles for entry in report.entries.values() if entry.state == "done"]
    if tiles and report.num_tiles:  # an earlier run may have predicted some of their tiles
        rate = report.num_tiles / seconds
        hours = sum(tiles) / len(tiles) * 1000 / rate / 3600
        print(f" ({rate:.1f} tiles/s, {hours:.1f} h for 1,000 such slides)", end="")
    if arguments.genes:
        print(f"\n{drawn.num_drawn} slides drawn, {drawn.num_up_to_date} already showed these genes", end="")
    print(f"\nsummary {report.summary}\npredictions {arguments.out}")
    faults = [f"{name}: {reason}" for name, reason in report.faults().items()]
    faults += [f"{name}: it could not be drawn: {reason}" for name, reason in drawn.faults.items()]
    if faults:
        listed = "\n  ".join(faults)
        raise PredictError(
            f"{len(faults)} slide(s) could not be predicted or drawn, the others are in {arguments.out}:\n  {listed}"
        )


if __name__ == "__main__":
    run(main)
