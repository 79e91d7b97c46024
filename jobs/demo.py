#!/usr/bin/env python
"""Runs the main job end to end on this machine: cohort, tiles, training, score card, prediction.

Every step is a command that you can run yourself; each is printed before it runs.
"""

import argparse
import csv
import subprocess
import sys
import time
from pathlib import Path

import _launch  # first: puts the project on the path
from _cli import run

from mclstexp.errors import UserError

JOBS = Path(__file__).parent


def main() -> None:
    """Parses and runs the five steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", help="a sample sheet of real sections [a synthetic cohort is made]")
    parser.add_argument("--weights", help="ImageNet weights of DenseNet-121, a file [random weights]")
    parser.add_argument("--test-patient", help="the patient to hold out [the last in the sheet]")
    parser.add_argument("--out", default="demo", help="folder for everything that is made [demo]")
    arguments = parser.parse_args()
    out = Path(arguments.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    Steps(out, time.monotonic()).run_all(arguments)


class Steps:
    """The steps, with the time since the start."""

    def __init__(self, out: Path, started: float) -> None:
        self._out, self._started = out, started

    def run_all(self, arguments: argparse.Namespace) -> None:
        """Runs all steps and prints where everything lies."""
        out, tracking = self._out, ["--tracking.uri", f"sqlite:///{self._out}/mlflow.db"]
        self._say("1/5 cohort")
        sheet = Path(arguments.samples).absolute() if arguments.samples else self._make_cohort()
        name = "demo_real.yaml" if arguments.samples else "demo.yaml"
        config = ["--config", str(JOBS / "configs" / name)]
        changed = ["--split.test_patients", arguments.test_patient or _last_patient(sheet)]
        changed += ["--model.image_weights", str(Path(arguments.weights).absolute())] if arguments.weights else []
        self._run("2/5 tiles", "prepare.py", *config, "--samples", str(sheet), "--out", f"{out}/tiles")
        data = ["--data", f"{out}/tiles"]
        runs = ["--out", f"{out}/runs", "--name", "demo"]
        self._run("3/5 training", "train.py", *config, *changed, *data, *runs, *tracking)
        model = ["--model", "models:/mclstexp@champion"]  # the first version of a name is its champion
        self._run("4/5 score card", "evaluate.py", *model, *data, "--out", f"{out}/scores", *tracking)
        slides = ["--samples", self._slides(sheet, changed[1]), "--out", f"{out}/predictions"]
        self._run("5/5 prediction of H&E slides", "predict.py", *model, *slides, *tracking)
        self._say("done")
        print(f"tiles        {out}/tiles\ncheckpoints  {out}/runs\nscore card   {out}/scores/score_card.png")
        print(f"runs         mlflow ui --backend-store-uri sqlite:///{out}/mlflow.db")
        print(f"predictions  {out}/predictions")

    def _make_cohort(self) -> Path:
        from ingest.synthetic import CohortSpec, make_cohort

        return Path(make_cohort(self._out / "cohort", CohortSpec.demo()))

    def _slides(self, sheet: Path, test_patient: str) -> str:
        """Writes a sheet of the H&E-only slides, or where there are none of the held-out sections without counts."""
        rows = _rows(sheet)
        chosen = [row for row in rows if row["format"] == "slide"] or [
            row | {"format": "slide", "expression": "", "positions": "", "labels": ""}
            for row in rows
            if row["patient_id"] == test_patient
        ]
        path = self._out / "slides.csv"
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(row | {"image": str((sheet.parent / row["image"]).absolute())} for row in chosen)
        return str(path)

    def _run(self, title: str, job: str, *arguments: str) -> None:
        """Prints a job's command and runs it on this terminal."""
        self._say(title)
        print(f"$ python jobs/{job} {' '.join(arguments)}", flush=True)
        code = subprocess.run([sys.executable, str(JOBS / job), *arguments], cwd=_launch.ROOT, check=False).returncode
        if code:
            raise UserError(f"step {title} failed with exit code {code}; see above")

    def _say(self, title: str) -> None:
        print(f"\n[{time.monotonic() - self._started:4.0f} s] {title}", flush=True)


def _rows(sheet: Path) -> list[dict[str, str]]:
    with open(sheet, newline="") as file:
        return list(csv.DictReader(file))


def _last_patient(sheet: Path) -> str:
    return [row["patient_id"] for row in _rows(sheet) if row["format"] != "slide"][-1]


if __name__ == "__main__":
    run(main)
