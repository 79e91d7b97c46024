#!/usr/bin/env python
"""Writes one HTML page from a result of jobs/evaluate.py: scores, gene maps, domains, training curves.

The page needs no network and no other file; its pictures (PNG), domains.csv and significant_genes.csv lie beside it.
"""

import _launch  # noqa: F401  first: puts the project on the path
from _cli import Argument, describe, parse, run
from _markers import ARGUMENTS as MARKER_ARGUMENTS
from _markers import markers

from mclstexp.errors import ConfigError, UserError

EXAMPLE = "python jobs/report.py --run runs/scores/3f2a --cohort her2st"
ARGUMENTS = [
    Argument("run", "result folder of jobs/evaluate.py: the one with score_card.json"),
    Argument("out", "where report.html goes [RUN/report]", required=False),
    *MARKER_ARGUMENTS,
    Argument("genes", "genes to show before all others: A,B,... [none]", required=False, default=""),
    Argument("page-mb", "megabytes that the page may have; gene maps that do not fit are left out [40]", False, "40"),
]
SECTIONS = ("storage", "tracking")


def main() -> None:
    """Parses, reads the result, draws, and puts the page where it belongs."""
    arguments, config = parse(__doc__ or "", EXAMPLE, ARGUMENTS, SECTIONS)
    from mclstexp import storage
    from mclstexp.report.result import read_record

    page_bytes = _page_bytes(arguments.page_mb)
    sets = markers(arguments)
    record = read_record(arguments.run)
    out = storage.absolute(arguments.out or storage.join(arguments.run, "report"))
    if arguments.dry_run:
        print(describe(config, SECTIONS))
        print(_plan(record, sets, out))
        return
    _write(arguments, config, record, sets, page_bytes, out)
    print(f"page {storage.join(out, 'report.html')}")


def _plan(record, sets, out: str) -> str:  # noqa: ANN001
    runs = ", ".join(record.training_runs) or "none"
    return (
        f"{record.heading}\nwould draw {len(record.predictions)} section(s), {', '.join(record.predictions)}; sets of "
        f"marker genes: {', '.join(sets) or 'none'}; training curves of: {runs}; into {out}"
    )


def _write(arguments, config, record, sets, page_bytes: int, out: str) -> None:  # noqa: ANN001
    """Draws into scratch and uploads the page last, so that a page that is there is whole."""
    import tempfile
    from pathlib import Path

    from rich.progress import Progress

    from mclstexp import storage
    from mclstexp.report.page import PAGE, PageOptions, write_report
    from mclstexp.report.result import open_result

    wishes = PageOptions(sets, [name for name in arguments.genes.split(",") if name], page_bytes)
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory() as folder, Progress() as bar:
        tasks: dict[str, int] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what)
            bar.update(tasks[what], completed=done, total=total)

        result = open_result(arguments.run, scratch)
        write_report(result, wishes, _training(config.tracking, record.training_runs), Path(folder), show)
        storage.upload_folder(folder, out, last=PAGE)


def _training(tracking_config, runs):  # noqa: ANN001, ANN202
    """Returns the curves of training runs; a server that is away is asked once."""
    from mclstexp import tracking
    from mclstexp.report.page import Training

    training = Training({}, [] if runs else ["The result names no training run."])
    for name, run_id in runs.items():
        try:
            curves = tracking.curves(tracking_config, run_id)
        except UserError as error:
            training.lacking.append(f"No training curves: {error}")
            break
        if curves.empty:
            training.lacking.append(f"Run {name}: tracking.uri={tracking_config.uri} has no loss of {run_id}.")
        else:
            training.curves[name] = curves
    return training


def _page_bytes(text: str) -> int:
    try:
        page_bytes = int(float(text) * 1e6)
    except (ValueError, OverflowError):
        page_bytes = 0
    if page_bytes <= 0:
        raise ConfigError(f"--page-mb {text} is no number of megabytes above 0; leave it out for 40")
    return page_bytes


if __name__ == "__main__":
    run(main)
