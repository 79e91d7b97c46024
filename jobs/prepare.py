#!/usr/bin/env python
"""Makes a tile table of the sections in a sample sheet; run again, it redoes only what changed."""

import _launch  # first: puts the project on the path
from _cli import Argument, describe, parse, run

EXAMPLE = "python jobs/prepare.py --samples cohort/samples.csv --out s3://bucket/tiles --tiles.size_px 224"
ARGUMENTS = [
    Argument("samples", "sample sheet (.csv): one row a section, file paths relative to it or s3:// URIs"),
    Argument("out", "root of the tile table: a folder or s3:// URI"),
]
SECTIONS = ("storage", "cluster", "tiles")


def main() -> None:
    """Parses, plans or prepares, prints what came of it."""
    arguments, config = parse(__doc__ or "", EXAMPLE, ARGUMENTS, SECTIONS)
    from ingest.prepare import plan, prepare

    if arguments.dry_run:
        print(describe(config, SECTIONS))
        print(plan(arguments.samples, arguments.out, config))
        return
    from mclstexp import resources

    _launch.connect(config)
    places = [f"--samples {arguments.samples}", f"--out {arguments.out}"]
    resources.require_shared(config, places, uses_tracking=False)
    report = prepare(arguments.samples, arguments.out, config)
    _print_summary(report)
    print(f"{len(report.redone)} sections cut, {len(report.unchanged)} unchanged, {len(report.removed)} removed")
    print(f"tile table {report.root}")


def _print_summary(report) -> None:  # noqa: ANN001
    from rich.console import Console
    from rich.table import Table

    sections = report.manifest.sections
    reasons = sorted({reason for entry in sections for reason in entry.rejected})
    table = Table("section", "patient", "measured", "spots", "sentences", *reasons)
    for entry in sections:
        rejected = [str(entry.rejected.get(reason, 0)) for reason in reasons]
        counts = [str(entry.num_spots), str(len(entry.row_groups)), *rejected]
        table.add_row(entry.section_id, entry.patient_id, "yes" if entry.measured else "no", *counts)
    Console().print(table)


if __name__ == "__main__":
    run(main)
