"""`make demo` as a new user sees it: it learns, its files exist, and no line of a library stands between its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
LIBRARY_LINE = re.compile(
    r"core_worker\.cc|Token auth|Progress bars disabled|alembic|mlflow\.(store|tracking)|^\(\w+ pid=|WARNING|INFO",
    re.MULTILINE,
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demo's folder and everything that it printed."""
    folder = tmp_path_factory.mktemp("accept") / "demo"
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
    command = [sys.executable, str(ROOT / "jobs" / "demo.py"), "--out", str(folder)]
    done = subprocess.run(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return folder, done.stdout


def test_no_line_of_a_library_is_printed(demo: tuple[Path, str]) -> None:
    assert LIBRARY_LINE.findall(demo[1]) == []


def test_the_model_beats_every_floor_in_correlation_and_error(demo: tuple[Path, str]) -> None:
    card = json.loads((demo[0] / "scores" / "score_card.json").read_text())
    rows = {(row["gene_set"], row["method"]): row for row in card["means"] if row["target"] == "per_spot"}
    floors = {method for _, method in rows if method.startswith(("ridge", "HEST"))}
    assert {"ridge on RGB", "ridge on frozen densenet121", "ridge on the model's features"} < floors
    for genes in ("all", "heg50"):
        for floor in floors:
            assert rows[genes, "model"]["pcc"] > rows[genes, floor]["pcc"], (genes, floor)
    for floor in (*floors, "train mean", "zeros"):
        assert rows["all", "model"]["mse"] < rows["all", floor]["mse"], floor
    assert rows["all", "model"]["pcc"] > 0.5
    assert rows["all", "model"]["mse"] < 0.6 * rows["all", "train mean"]["mse"]


def test_the_paths_printed_last_exist(demo: tuple[Path, str]) -> None:
    last = dict(line.split(maxsplit=1) for line in demo[1].rstrip().splitlines()[-6:])
    for name in ("tiles", "checkpoints", "report", "predictions", "pictures"):
        assert Path(last[name]).exists(), name
    assert last["runs"].startswith("mlflow ui --backend-store-uri sqlite:///")


def test_the_slide_without_counts_is_predicted(demo: tuple[Path, str]) -> None:
    predicted = anndata.read_h5ad(demo[0] / "predictions" / "P7S1.h5ad")
    assert predicted.shape == (165, 140)
    assert np.isfinite(predicted.X).all()
    assert (demo[0] / "predictions" / "overviews" / "P7S1.png").stat().st_size > 10_000
