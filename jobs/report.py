#!/usr/bin/env python
"""Writes one HTML page from a result of jobs/evaluate.py or jobs/cross_validate.py: scores, gene maps, domains, curves.

The page needs no network and no other file. Its pictures (PNG), domains.csv and significant_genes.csv are written
beside it.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import _launch  # noqa: F401  first: puts the project on the path
from _cli import JobArguments, describe, parse, run
from _markers import markers
from pydantic import Field

from mclstexp.errors import UserError

if TYPE_CHECKING:
    from mclstexp.config import Config
    from mclstexp.report.page import PageOptions, Training
    from mclstexp.report.result import ScoreRecord
    from mclstexp.settings import TrackingConfig

EXAMPLE = "python jobs/report.py --run runs/scores/3f2a --cohort her2st"
BLOCKS = ("storage", "tracking")


class ReportArguments(JobArguments):
    """Which result to show, and what of it."""

    run: str
    """Result folder: the one with score_card.json."""
    out: str | None = None
    """Folder for report.html; default RUN/report."""
    cohort: str | None = None
    """Cohort whose sets of marker genes, from the markers file, are shown first."""
    markers: str | None = None
    """YAML file of marker genes by cohort and set; default jobs/configs/markers.yaml."""
    genes: tuple[str, ...] = ()
    """Genes to show before all others."""
    page_mb: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 40.0
    """Size limit of the page in megabytes; gene maps that do not fit are left out."""


def main() -> None:
    """Parses, reads the result, draws, and publishes the page."""
    arguments, config = parse(ReportArguments, __doc__ or "", EXAMPLE, BLOCKS)
    from mclstexp import storage
    from mclstexp.report.page import PAGE, PageOptions
    from mclstexp.report.result import read_record

    sets = markers(arguments.cohort, arguments.markers)
    options = PageOptions(sets, list(arguments.genes), int(arguments.page_mb * 1e6))
    record = read_record(arguments.run)
    out = storage.absolute(arguments.out or storage.join(arguments.run, "report"))
    if arguments.dry_run:
        print(describe(config, BLOCKS))
        print(_plan(record, options, out))
        return
    _write(arguments.run, record, options, config, out)
    print(f"page {storage.join(out, PAGE)}")


def _plan(record: "ScoreRecord", options: "PageOptions", out: str) -> str:
    runs = ", ".join(record.training_runs) or "none"
    return (
        f"{record.heading}\nwould draw {len(record.predictions)} section(s), {', '.join(record.predictions)}; sets of "
        f"marker genes: {', '.join(options.markers) or 'none'}; training curves of: {runs}; into {out}"
    )


def _write(uri: str, record: "ScoreRecord", options: "PageOptions", config: "Config", out: str) -> None:
    """Draws into scratch and uploads the page last, so that a published page is complete."""
    import tempfile
    from pathlib import Path

    from mclstexp import progress, storage
    from mclstexp.report.page import PAGE, write_report
    from mclstexp.report.result import open_result

    training = _training(config.tracking, record.training_runs)
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory() as folder, progress.bars() as show:
        write_report(open_result(uri, scratch), options, training, Path(folder), show)
        storage.upload_folder(folder, out, last=PAGE)


def _training(config: "TrackingConfig", runs: Mapping[str, str]) -> "Training":
    """Returns the curves of training runs; the first failure to reach the server ends the search."""
    from mclstexp import tracking
    from mclstexp.report.page import Training

    training = Training({}, [] if runs else ["The result names no training run."])
    for name, run_id in runs.items():
        try:
            curves = tracking.curves(config, run_id)
        except UserError as error:
            training.missing.append(f"No training curves: {error}")
            break
        if curves.empty:
            training.missing.append(f"Run {name}: tracking.uri={config.uri} has no loss of {run_id}.")
        else:
            training.curves[name] = curves
    return training


if __name__ == "__main__":
    run(main)
