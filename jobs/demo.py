#!/usr/bin/env python
"""Runs the main job end to end on this machine: cohort, tiles, training, score card, report, prediction.

Every step is a command that you can run yourself; each is printed before it runs.
"""

import csv
import hashlib
import json
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import _launch  # first: puts the project on the path
from _cli import JobArguments, parse, run

from mclstexp.errors import UserError

if TYPE_CHECKING:
    from mclstexp.data.sheet import SectionRow

EXAMPLE = "python jobs/demo.py --samples samples.csv --weights densenet121.pth"
JOBS = Path(__file__).parent


class DemoArguments(JobArguments):
    """What the demo runs on."""

    samples: str | None = None
    """Sample sheet of real sections [a synthetic cohort is made]."""
    weights: str | None = None
    """File with ImageNet weights of DenseNet-121 [random weights]."""
    test_patient: str | None = None
    """Patient to hold out [the last in the sheet]."""
    out: str | None = None
    """Folder for everything that is made [demo, or demo-... named after the inputs]."""


def main() -> None:
    """Parses the command line and runs the steps."""
    arguments, _ = parse(DemoArguments, __doc__ or "", EXAMPLE, ())
    from ingest.readers import READERS
    from ingest.synthetic import CohortSpec, make_cohort
    from mclstexp.data.sheet import read_sheet

    out = Path(arguments.out or default_folder(arguments)).absolute()
    steps = Steps(out, arguments)
    steps.say("1/7 cohort")
    if arguments.samples:
        steps.run_all(arguments.samples, read_sheet(arguments.samples, READERS))
    elif arguments.dry_run:
        smaller = replace(CohortSpec.tiny(), num_patients=CohortSpec.demo().num_patients)
        with tempfile.TemporaryDirectory() as scratch:
            rows = read_sheet(make_cohort(scratch, smaller), READERS)
        steps.run_all(f"{out}/cohort/samples.csv", rows)
    else:
        sheet = make_cohort(out / "cohort", CohortSpec.demo())
        steps.run_all(sheet, read_sheet(sheet, READERS))


def default_folder(arguments: DemoArguments) -> str:
    """Returns a folder for these inputs alone, so that demos of several cohorts or weights do not mix."""
    from mclstexp import storage

    inputs = (arguments.samples, arguments.weights, arguments.test_patient)
    if not any(inputs):
        return "demo"
    uris = [storage.absolute(uri) if uri else "" for uri in inputs[:2]]
    digest = hashlib.sha256(json.dumps([*uris, arguments.test_patient]).encode()).hexdigest()[:8]
    return f"demo-{Path(arguments.samples).stem if arguments.samples else 'synthetic'}-{digest}"


class Steps:
    """The steps as commands, each printed before it runs (with --dry-run only printed)."""

    def __init__(self, out: Path, arguments: DemoArguments) -> None:
        self._out, self._arguments, self._started = out, arguments, time.monotonic()

    def run_all(self, sheet: str, rows: list["SectionRow"]) -> None:
        """Runs all steps on the sections of a sheet and prints where the results are."""
        from mclstexp import storage

        out, weights = self._out, self._arguments.weights
        tracking = ["--tracking.uri", f"sqlite:///{out}/mlflow.db"]
        patient = self._arguments.test_patient or last_patient(rows)
        name = "demo_real.yaml" if self._arguments.samples else "demo.yaml"
        config = ["--config", str(JOBS / "configs" / name)]
        changed = ["--split.test_patients", patient]
        changed += ["--model.image_weights", str(Path(weights).absolute())] if weights else []
        self._run("2/7 tiles", "prepare.py", *config, "--samples", storage.absolute(sheet), "--out", f"{out}/tiles")
        data = ["--data", f"{out}/tiles"]
        runs = ["--out", f"{out}/runs", "--name", "demo"]
        self._run("3/7 training", "train.py", *config, *changed, *data, *runs, *tracking)
        model = ["--model", "models:/mclstexp@champion"]  # the first version of a name is its champion
        self._run("4/7 score card", "evaluate.py", *model, *data, "--out", f"{out}/scores", *tracking)
        self._run("5/7 report", "report.py", "--run", f"{out}/scores", *tracking)
        slides = out / "slides.csv"
        if not self._arguments.dry_run:
            write_slide_sheet(slides, rows, patient)
        predictions = ["--samples", str(slides), "--out", f"{out}/predictions"]
        self._run("6/7 prediction of H&E slides", "predict.py", *model, *predictions, *tracking)
        self._run("7/7 pictures", "draw.py", "--predictions", f"{out}/predictions")
        self.say("done")
        print(f"tiles        {out}/tiles\ncheckpoints  {out}/runs\nreport       {out}/scores/report/report.html")
        print(f"runs         mlflow ui --backend-store-uri sqlite:///{out}/mlflow.db")
        print(f"predictions  {out}/predictions\npictures     {out}/predictions/overviews")

    def say(self, title: str) -> None:
        """Prints a step's title with the seconds since the start."""
        print(f"\n[{time.monotonic() - self._started:4.0f} s] {title}", flush=True)

    def _run(self, title: str, job: str, *arguments: str) -> None:
        """Prints a job's command and runs it on this terminal."""
        self.say(title)
        passed = [*arguments, *(["--verbose"] if self._arguments.verbose else [])]
        print(f"$ python jobs/{job} {shlex.join(passed)}", flush=True)
        if self._arguments.dry_run:
            return
        code = subprocess.run([sys.executable, str(JOBS / job), *passed], cwd=_launch.ROOT, check=False).returncode
        if code:
            raise UserError(f"step {title} failed with exit code {code}; see above")


def last_patient(rows: list["SectionRow"]) -> str:
    """Returns the patient of the sheet's last section with counts."""
    measured = [row.patient_id for row in rows if row.measured]
    if len(set(measured)) < 2:
        raise UserError(
            f"the sheet has counts of {len(set(measured))} patient(s), but needs one to train on and one to score"
        )
    return measured[-1]


def write_slide_sheet(path: Path, rows: list["SectionRow"], test_patient: str) -> str:
    """Writes a sheet of the H&E-only slides or, if there are none, of the held-out sections without their counts."""
    chosen = [row for row in rows if not row.measured] or [row for row in rows if row.patient_id == test_patient]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["section_id", "patient_id", "format", "image", "mpp"])
        writer.writerows([row.section_id, row.patient_id, "slide", row.image, row.mpp] for row in chosen)
    return str(path)


if __name__ == "__main__":
    run(main)
