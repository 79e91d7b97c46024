#!/usr/bin/env python
"""Makes a tile table of the sections in a sample sheet; a second run redoes only what changed."""

import tempfile
from typing import TYPE_CHECKING

import _launch  # first: puts the project on the path
from _cli import JobArguments, describe, parse, run

from ingest.readers import READERS

if TYPE_CHECKING:
    from ingest.prepare import PrepareReport

EXAMPLE = "python jobs/prepare.py --samples cohort/samples.csv --out s3://bucket/tiles --tiles.size_px 224"
BLOCKS = ("storage", "cluster", "tiles")
FORMATS = f"Formats of sections in the sample sheet: {', '.join(READERS)}, and slide for a slide without counts."


class PrepareArguments(JobArguments):
    """The sections, and where their tiles go."""

    samples: str | None = None
    """Sample sheet (.csv): one row per section, with file paths relative to it or s3:// URIs."""
    dataset: str | None = None
    """Instead of --samples, a public data set: her2st, her2st_all, cscc, alex10x or hest."""
    source: str | None = None
    """Folder of the data set, as published."""
    out: str
    """Root of the tile table: a folder or s3:// URI."""


def main() -> None:
    """Prepares, or prints the plan, and prints the result."""
    arguments, config = parse(PrepareArguments, f"{__doc__}\n\n{FORMATS}", EXAMPLE, BLOCKS)
    _require_one_sheet(arguments)
    from ingest.prepare import dry_run, prepare

    if arguments.dry_run:
        print(describe(config, BLOCKS))
        with tempfile.TemporaryDirectory() as scratch:
            print(dry_run(_sample_sheet(arguments, scratch), arguments.out, config))
        return
    from mclstexp import cluster, progress

    _launch.connect(config)
    named = {"--samples": arguments.samples, "--source": arguments.source, "--out": arguments.out}
    cluster.require_shared(config, [f"{name} {uri}" for name, uri in named.items() if uri], uses_tracking=False)
    with progress.bars() as show:
        report = prepare(_sample_sheet(arguments, arguments.out), arguments.out, config, show)
    _print_sections(report)
    if report.sources:
        print(report.sources)
    print(f"views of each spot: {', '.join(report.manifest.views)}")
    print(f"{len(report.redone)} sections cut, {len(report.unchanged)} unchanged, {len(report.removed)} removed")
    print(f"tile table {report.root}")


def _require_one_sheet(arguments: PrepareArguments) -> None:
    from mclstexp.errors import ConfigError

    if (arguments.samples is None) == (arguments.dataset is None):
        raise ConfigError("give either --samples SHEET.csv, or --dataset NAME and --source DIR for a public data set")
    if (arguments.dataset is None) != (arguments.source is None):
        raise ConfigError("--dataset NAME and --source DIR go together: the source is the data set's published folder")


def _sample_sheet(arguments: PrepareArguments, folder: str) -> str:
    """Returns the sample sheet's URI; the sheet of a data set is written to `folder`."""
    if arguments.samples is not None:
        return arguments.samples
    from ingest.datasets import dataset_sheet
    from mclstexp import storage

    assert arguments.dataset is not None, "one sheet is required"
    assert arguments.source is not None, "a data set has a source"
    sheet = storage.join(folder, "samples.csv")
    storage.write(sheet, dataset_sheet(arguments.dataset, arguments.source).encode())
    return sheet


def _print_sections(report: "PrepareReport") -> None:
    from rich.console import Console
    from rich.table import Table

    sections = report.manifest.sections
    reasons = sorted({reason for entry in sections for reason in entry.rejected})
    table = Table("section", "patient", "measured", "spots", "labelled", "sentences", *reasons)
    for entry in sections:
        rejected = [str(entry.rejected.get(reason, 0)) for reason in reasons]
        counts = [str(entry.num_spots), str(entry.num_labelled), str(len(entry.row_groups)), *rejected]
        table.add_row(entry.section_id, entry.patient_id, "yes" if entry.measured else "no", *counts)
    Console(width=120).print(table)


if __name__ == "__main__":
    run(main)
