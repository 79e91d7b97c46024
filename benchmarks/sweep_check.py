"""Compares a sweep with early stopping with a full grid on the synthetic cohort: its choice, and its cost.

    python benchmarks/sweep_check.py --out /tmp/sweep_check

Temperature (10 and 0.0001 among them) times depth are trained in full under three seeds, then searched once with
successive halving. Prints each point's validation score over the seeds, the sweep's choice, and the epochs (passes over
all sentences) of both. Run it again to continue an interrupted check.
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import pandas as pd  # noqa: E402
import yaml  # noqa: E402

from ingest.synthetic import CohortSpec, make_cohort  # noqa: E402

TEMPERATURE, DEPTH = "model.temperature", "model.spot_layers"
SPACE = {TEMPERATURE: [0.0001, 0.07, 0.3, 10.0], DEPTH: [1, 2, 4]}
SETTINGS = {
    "tiles": {"size_px": 32, "sentence_length": 32, "jpeg_quality": 95},
    "genes": {"num_genes": 60},
    "split": {"test_patients": ["P7", "P8"], "validation_patients": ["P5", "P6"]},
    "model": {"image_encoder": "small_cnn", "spot_width": 64, "learn_temperature": False},
    "train": {"epochs": 12, "tower_lr": 2e-3},
    "tune": {"grace_epochs": 2, "reduction": 2},
    "cluster": {"local_cpus": 4},  # two trials at once
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    out = parser.parse_args().out.absolute()
    seeds = range(parser.parse_args().seeds)
    out.mkdir(parents=True, exist_ok=True)
    settings = SETTINGS | {"tracking": {"uri": f"sqlite:///{out}/mlflow.db"}}
    (out / "settings.yaml").write_text(yaml.safe_dump(settings))
    (out / "space.yaml").write_text(yaml.safe_dump(SPACE))
    if not (out / "tiles" / "manifest.json").exists():
        sheet = make_cohort(out / "cohort", CohortSpec.small())
        job("prepare", "--samples", sheet, "--config", out / "settings.yaml", "--out", out / "tiles")
    whole = ["--tune.grace_epochs", SETTINGS["train"]["epochs"]]
    grids = [sweep(out, f"grid{seed}", *whole, "--train.seed", seed) for seed in seeds]
    report(pd.concat(grids), sweep(out, "halving", "--train.seed", len(seeds)), len(seeds))


def sweep(out: Path, name: str, *more: object) -> pd.DataFrame:
    arguments = ["--data", out / "tiles", "--space", out / "space.yaml", "--out", out / "sweeps", "--name", name]
    if not (out / "sweeps" / name / "best.yaml").exists():
        job("tune", "--config", out / "settings.yaml", "--search", "grid", *arguments, *more)
    return pd.read_csv(out / "sweeps" / name / "trials.csv")


def job(verb: str, *arguments: object) -> None:
    subprocess.run([sys.executable, str(ROOT / "jobs" / f"{verb}.py"), *map(str, arguments)], check=True)


def report(grid: pd.DataFrame, halving: pd.DataFrame, num_seeds: int) -> None:
    points = grid.groupby([TEMPERATURE, DEPTH])["validation_pcc"].agg(["mean", "sem"])
    print(f"validation PCC over {num_seeds} seeds, with its standard error\n{points.round(4).to_string()}")
    best = points["mean"].idxmax()
    least = points.loc[best, "mean"] - points.loc[best, "sem"]
    chosen = halving[halving["state"] == "finished"].iloc[0]
    point = (chosen[TEMPERATURE], int(chosen[DEPTH]))
    names = " and ".join(f"temperature {temperature:g} with {depth} layers" for temperature, depth in (best, point))
    print(f"best of the grid and choice of the sweep: {names}, which has {points.loc[point, 'mean']:.4f} in the grid")
    print(f"within one standard error of the best (at least {least:.4f}): {points.loc[point, 'mean'] >= least}")
    by_temperature = points["mean"].unstack(TEMPERATURE).max()
    print(f"best depth of each temperature\n{by_temperature.round(4).to_string()}")
    passes, full = halving["epochs"].sum(), grid["epochs"].sum() / num_seeds
    print(f"epochs: {passes} of the grid's {full:.0f}, {passes / full:.0%}")


if __name__ == "__main__":
    main()
