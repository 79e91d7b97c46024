#!/usr/bin/env python
"""Predicts expression for a cohort of H&E slides with a registered model version.

Run the same command again after an interruption: it does what is left. Slides that cannot be read are set aside with
the reason and do not stop the others.
"""

import _launch  # first: puts the project on the path
from _cli import Argument, describe, parse, run

from mclstexp.config import Config
from mclstexp.errors import ConfigError, PredictError

EXAMPLE = "python jobs/predict.py --model models:/mclstexp@champion --samples slides/ --out s3://bucket/predictions"
ARGUMENTS = [
    Argument("model", "models:/NAME@ALIAS, models:/NAME/VERSION, or a model folder"),
    Argument("samples", "slides: a sample sheet (.csv), a folder or an s3:// prefix"),
    Argument("out", "where SLIDE.parquet, SLIDE.h5ad, previews and overviews go"),
    Argument("genes", "A,B,...: genes drawn over the slide and written as GeoJSON [the panel's first, drawn]", False),
    Argument("spots", "CSV of section_id, x_px, y_px: tile centres instead of a grid", required=False),
    Argument("assume-mpp", "um/px of slides where neither file nor sheet says it", required=False),
    Argument("explain", "SLIDE,X,Y: lists the reference spots that the tile there was read from", required=False),
]
SECTIONS = ("storage", "cluster", "predict", "tracking")
MIN_CPUS = 3


def main() -> None:
    """Parses, fetches the version, and plans, explains or predicts."""
    arguments, config = parse(__doc__ or "", EXAMPLE, ARGUMENTS, SECTIONS)
    import tempfile

    from mclstexp import tracking
    from mclstexp.model.version import ModelVersion
    from mclstexp.prediction.cohort import open_cohort
    from mclstexp.prediction.slide_cache import clear

    with tempfile.TemporaryDirectory() as scratch:
        model = ModelVersion.load(tracking.fetch_model(config.tracking, arguments.model, scratch))
    mpp = _positive(arguments.assume_mpp)
    cohort = open_cohort(arguments.samples, model, arguments.out, config.predict, arguments.spots, mpp)
    genes = [name for name in (arguments.genes or "").split(",") if name]
    if arguments.explain or arguments.dry_run:
        try:
            _explain(arguments, model, cohort, genes) if arguments.explain else _plan(model, cohort, config)
        finally:
            clear(cohort.plan.scratch)
    else:
        _predict(arguments, model, cohort, genes, config)


def _positive(text: str | None) -> float | None:
    try:
        value = None if text is None else float(text)
    except ValueError:
        value = -1.0
    if value is not None and not 0 < value < float("inf"):
        raise ConfigError(f"--assume-mpp {text} is no resolution; give micrometres per pixel, such as 0.5")
    return value


def _plan(model, cohort, config: Config) -> None:  # noqa: ANN001
    import os

    import torch

    from mclstexp.prediction.forecast import forecast, forecast_on_a_gpu
    from mclstexp.prediction.pipeline import cluster_size, stages

    print(describe(config, SECTIONS))
    if "RAY_ADDRESS" in os.environ:
        _launch.connect(config)  # to a cluster that is there
        print(forecast_on_a_gpu(cohort, model, stages(*cluster_size(config.predict))))
        return
    asked, num_cpus = config.predict, config.cluster.local_cpus or max(os.cpu_count() or 1, MIN_CPUS)
    num_gpus = torch.cuda.device_count() if asked.num_gpus is None else asked.num_gpus
    print(forecast(cohort, model, stages(asked.num_cpus or num_cpus, num_gpus)))


def _explain(arguments, model, cohort, genes: list[str]) -> None:  # noqa: ANN001
    from rich.console import Console
    from rich.table import Table

    from mclstexp import storage
    from mclstexp.prediction import ledger
    from mclstexp.prediction.explain import explain_tile

    owner = ledger.owner(arguments.out)
    if owner is not None and owner.model_digest != model.digest:
        raise PredictError(f"{arguments.out} holds predictions by the model {owner.model_digest}, got {model.digest}")
    slide_id, *place = arguments.explain.split(",")
    try:
        x_px, y_px = map(float, place)
    except ValueError:
        raise ConfigError(f"--explain {arguments.explain} is not SLIDE,X,Y with level-0 pixels") from None
    spot_id, votes = explain_tile(cohort, model, slide_id, x_px, y_px, genes)
    table = Table(*votes.columns, title=f"{slide_id}, tile {spot_id}: the 20 votes of most weight of {len(votes)}")
    for row in votes.head(20).itertuples(index=False):
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row))
    Console(width=120).print(table)
    target = storage.join(storage.absolute(arguments.out), "explained", f"{slide_id}-{spot_id}.csv")
    storage.write(target, votes.to_csv(index=False).encode())
    print(f"all votes {target}")


def _predict(arguments, model, cohort, genes: list[str], config: Config) -> None:  # noqa: ANN001
    import time

    from mclstexp import cluster
    from mclstexp.prediction.run import predict_cohort

    _launch.connect(config, max(MIN_CPUS, config.predict.num_cpus or 0))
    cluster.require_to_predict(config)
    places = [f"--samples {arguments.samples}", f"--out {arguments.out}"]
    places += [f"--spots {arguments.spots}"] if arguments.spots else []
    cluster.require_shared(config, places, uses_tracking=arguments.model.startswith("models:/"))
    started = time.monotonic()
    try:
        with _bars() as show:
            report = predict_cohort(model, cohort.keyed, arguments.out, genes, show, config.predict)
    finally:
        cohort.release()
    _say(report, time.monotonic() - started, arguments.out)


def _bars():  # noqa: ANN202
    from contextlib import contextmanager

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    @contextmanager
    def shown():  # noqa: ANN202
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[tiles]:,} tiles"), TimeElapsedColumn())
        with Progress(TextColumn("predict: slides"), *columns) as bar:
            task = bar.add_task("slides", total=None, tiles=0)
            yield lambda report, total: bar.update(
                task, total=total, completed=len(report.entries), tiles=report.num_tiles
            )

    return shown()


def _say(report, seconds: float, out: str) -> None:  # noqa: ANN001
    """Prints what was done; ends with an error where slides have no prediction."""
    counts = report.counts()
    words = ", ".join(f"{counts[state]} {state}" for state in ("done", "empty", "skipped", "quarantined", "failed"))
    print(f"{words} of {sum(counts.values())} slides; {report.num_tiles:,} tiles in {seconds:.0f} s", end="")
    tiles = [entry.num_tiles for entry in report.entries.values() if entry.state == "done"]
    if tiles and report.num_tiles:  # an earlier run may have predicted some of their tiles
        rate = report.num_tiles / seconds
        hours = sum(tiles) / len(tiles) * 1000 / rate / 3600
        print(f" ({rate:.1f} tiles/s, {hours:.1f} h for 1,000 such slides)", end="")
    if report.num_redrawn:
        print(f"\n{report.num_redrawn} slides that were done were drawn with the genes that were asked for", end="")
    print(f"\nsummary {report.summary}\npredictions {out}")
    faults = [f"{name}: {reason}" for name, reason in report.faults().items()]
    if faults:
        listed = "\n  ".join(faults)
        raise PredictError(
            f"{len(faults)} slide(s) could not be predicted or drawn, the others are in {out}:\n  {listed}"
        )


if __name__ == "__main__":
    run(main)
