#!/usr/bin/env python
"""Makes a tile table of the sections in a sample sheet; run again, it redoes only what changed."""

import argparse
import tempfile

import _launch  # first: puts the project on the path
from _cli import Argument, describe, parse, run

EXAMPLE = "python jobs/prepare.py --samples cohort/samples.csv --out s3://bucket/tiles --tiles.size_px 224"
ARGUMENTS = [
    Argument(
        "samples", "sample sheet (.csv): one row a section, file paths relative to it or s3:// URIs", required=False
    ),
    Argument("dataset", "instead of --samples a public data set: her2st, her2st_all, cscc or alex10x", required=False),
    Argument("source", "the data set's folder, as it is published", required=False),
    Argument("out", "root of the tile table: a folder or s3:// URI"),
]
SECTIONS = ("storage", "cluster", "tiles")


def main() -> None:
    """Parses, plans or prepares, prints what came of it."""
    arguments, config = parse(__doc__ or "", EXAMPLE, ARGUMENTS, SECTIONS)
    _require_one_sheet(arguments)
    from ingest.prepare import plan, prepare

    if arguments.dry_run:
        print(describe(config, SECTIONS))
        with tempfile.TemporaryDirectory() as scratch:
            print(plan(_sample_sheet(arguments, scratch), arguments.out, config))
        return
    from mclstexp import cluster

    _launch.connect(config)
    given = ("samples", "source", "out")
    places = [f"--{name} {value}" for name in given if (value := getattr(arguments, name))]
    cluster.require_shared(config, places, uses_tracking=False)
    report = prepare(_sample_sheet(arguments, arguments.out), arguments.out, config)
    _print_summary(report)
    if report.sources:
        print(report.sources)
    print(f"{len(report.redone)} sections cut, {len(report.unchanged)} unchanged, {len(report.removed)} removed")
    print(f"tile table {report.root}")


def _require_one_sheet(arguments: argparse.Namespace) -> None:
    from mclstexp.errors import ConfigError

    if (arguments.samples is None) == (arguments.dataset is None):
        raise ConfigError("give either --samples SHEET.csv, or --dataset NAME and --source DIR for a public data set")
    if (arguments.dataset is None) != (arguments.source is None):
        raise ConfigError("--dataset NAME and --source DIR go together: the source is the data set's published folder")


def _sample_sheet(arguments: argparse.Namespace, folder: str) -> str:
    """Returns the sample sheet's URI; a data set's sheet is made and kept in `folder`."""
    if arguments.samples is not None:
        return arguments.samples
    from ingest.datasets import dataset_sheet
    from mclstexp import storage

    sheet = storage.join(folder, "samples.csv")
    storage.write(sheet, dataset_sheet(arguments.dataset, arguments.source).encode())
    return sheet


def _print_summary(report) -> None:  # noqa: ANN001
    from rich.console import Console
    from rich.table import Table

    sections = report.manifest.sections
    reasons = sorted({reason for entry in sections for reason in entry.rejected})
    table = Table("section", "patient", "measured", "spots", "labelled", "sentences", *reasons)
    for entry in sections:
        rejected = [str(entry.rejected.get(reason, 0)) for reason in reasons]
        counts = [str(entry.num_spots), str(entry.num_labelled), str(len(entry.row_groups)), *rejected]
        table.add_row(entry.section_id, entry.patient_id, "yes" if entry.measured else "no", *counts)
    Console().print(table)


if __name__ == "__main__":
    run(main)
