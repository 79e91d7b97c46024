#!/usr/bin/env python
"""Runs the main job end to end on this machine: cohort, tiles, training, score card, report, prediction.

Every step is a command that you can run yourself; each is printed before it runs.
"""

import argparse
import csv
import hashlib
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import _launch  # first: puts the project on the path
from _cli import run

from ingest.readers import READERS
from ingest.synthetic import CohortSpec, make_cohort
from mclstexp import storage
from mclstexp.data.sheet import SectionRow, read_sheet
from mclstexp.errors import UserError

JOBS = Path(__file__).parent


def main() -> None:
    """Parses and runs the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", help="a sample sheet of real sections [a synthetic cohort is made]")
    parser.add_argument("--weights", help="ImageNet weights of DenseNet-121, a file [random weights]")
    parser.add_argument("--test-patient", help="the patient to hold out [the last in the sheet]")
    parser.add_argument("--out", help="folder for everything that is made [demo, or demo-... named by the inputs]")
    arguments = parser.parse_args()
    out = Path(arguments.out or default_folder(arguments)).absolute()
    out.mkdir(parents=True, exist_ok=True)
    Steps(out, time.monotonic()).run_all(arguments)


def default_folder(arguments: argparse.Namespace) -> str:
    """Returns a folder for these inputs alone, so that demos of several cohorts or weights stand side by side."""
    inputs = [arguments.samples, arguments.weights, arguments.test_patient]
    if not any(inputs):
        return "demo"
    places = [storage.absolute(place) if place else "" for place in inputs[:2]]
    digest = hashlib.sha256(json.dumps([*places, arguments.test_patient]).encode()).hexdigest()[:8]
    return f"demo-{Path(arguments.samples).stem if arguments.samples else 'synthetic'}-{digest}"


class Steps:
    """The steps, with the time since the start."""

    def __init__(self, out: Path, started: float) -> None:
        self._out, self._started = out, started

    def run_all(self, arguments: argparse.Namespace) -> None:
        """Runs all steps and prints where everything lies."""
        out, tracking = self._out, ["--tracking.uri", f"sqlite:///{self._out}/mlflow.db"]
        self._say("1/6 cohort")
        sheet = arguments.samples or make_cohort(out / "cohort", CohortSpec.demo())
        rows = read_sheet(sheet, READERS)
        patient = arguments.test_patient or last_patient(rows)
        name = "demo_real.yaml" if arguments.samples else "demo.yaml"
        config = ["--config", str(JOBS / "configs" / name)]
        changed = ["--split.test_patients", patient]
        changed += ["--model.image_weights", str(Path(arguments.weights).absolute())] if arguments.weights else []
        self._run("2/6 tiles", "prepare.py", *config, "--samples", storage.absolute(sheet), "--out", f"{out}/tiles")
        data = ["--data", f"{out}/tiles"]
        runs = ["--out", f"{out}/runs", "--name", "demo"]
        self._run("3/6 training", "train.py", *config, *changed, *data, *runs, *tracking)
        model = ["--model", "models:/mclstexp@champion"]  # the first version of a name is its champion
        self._run("4/6 score card", "evaluate.py", *model, *data, "--out", f"{out}/scores", *tracking)
        self._run("5/6 report", "report.py", "--run", f"{out}/scores", *tracking)
        slides = write_slide_sheet(out / "slides.csv", rows, patient)
        predictions = ["--samples", slides, "--out", f"{out}/predictions"]
        self._run("6/6 prediction of H&E slides", "predict.py", *model, *predictions, *tracking)
        self._say("done")
        print(f"tiles        {out}/tiles\ncheckpoints  {out}/runs\nreport       {out}/scores/report/report.html")
        print(f"runs         mlflow ui --backend-store-uri sqlite:///{out}/mlflow.db")
        print(f"predictions  {out}/predictions")

    def _run(self, title: str, job: str, *arguments: str) -> None:
        """Prints a job's command and runs it on this terminal."""
        self._say(title)
        print(f"$ python jobs/{job} {shlex.join(arguments)}", flush=True)
        code = subprocess.run([sys.executable, str(JOBS / job), *arguments], cwd=_launch.ROOT, check=False).returncode
        if code:
            raise UserError(f"step {title} failed with exit code {code}; see above")

    def _say(self, title: str) -> None:
        print(f"\n[{time.monotonic() - self._started:4.0f} s] {title}", flush=True)


def last_patient(rows: list[SectionRow]) -> str:
    """Returns the patient of the sheet's last section with counts."""
    measured = [row.patient_id for row in rows if row.measured]
    if len(set(measured)) < 2:
        raise UserError(
            f"the sheet has counts of {len(set(measured))} patient(s); one to train on and one to score needed"
        )
    return measured[-1]


def write_slide_sheet(path: Path, rows: list[SectionRow], test_patient: str) -> str:
    """Writes a sheet of the H&E-only slides, or where there are none of the held-out slides without their counts."""
    chosen = [row for row in rows if not row.measured] or [row for row in rows if row.patient_id == test_patient]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["section_id", "patient_id", "format", "image", "mpp"])
        writer.writerows([row.section_id, row.patient_id, "slide", row.image, row.mpp] for row in chosen)
    return str(path)


if __name__ == "__main__":
    run(main)
