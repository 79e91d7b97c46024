"""What stored features save and what they reach: epochs, checkpoints and score cards of jobs/configs/frozen.yaml.

    python benchmarks/frozen_features.py OUT/tiles densenet121_imagenet.pth OUT

Trains one run on the features of all sections, and takes the same steps in this process with a frozen encoder that
encodes every tile in every epoch. Then it cross-validates the recipe under both protocols, with float32 and with
float16 features; `results_table.py OUT/studies` prints the float32 studies. Prints Markdown for docs/results.md. It
keeps finished runs and folds: run it again to resume, but time only a run that was not interrupted.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402

from mclstexp.config import Config  # noqa: E402
from mclstexp.data.schema import load_manifest  # noqa: E402
from mclstexp.data.spots import Batch, make_reader, num_positions  # noqa: E402
from mclstexp.data.stream import read_ahead  # noqa: E402
from mclstexp.evaluation.save import RECORD, ROWS  # noqa: E402
from mclstexp.evaluation.scores import SCORES, read_table  # noqa: E402
from mclstexp.model.embed import network_of  # noqa: E402
from mclstexp.model.extract import features, wanted  # noqa: E402
from mclstexp.model.towers import build_network  # noqa: E402
from mclstexp.model.version import ModelVersion  # noqa: E402
from mclstexp.training.feed import make_feed  # noqa: E402
from mclstexp.training.share import share_of  # noqa: E402
from mclstexp.training.step import RankState, lone_rank, train_step  # noqa: E402

RUN, RUN_EPOCHS, WINDOW = "frozen-epochs", 40, 20
ENCODED_EPOCHS, READ_EPOCHS = 2, 20
PROTOCOLS = ("reference", "patient")
SHOWN = {"PCC all": ("all", "pcc"), "PCC HEG50": ("heg50", "pcc"), "MSE": ("all", "mse")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tiles", type=Path, help="tile table")
    parser.add_argument("weights", type=Path, help="weights of model.image_encoder in frozen.yaml, here DenseNet-121")
    parser.add_argument("out", type=Path, help="folder for run and studies")
    parsed = parser.parse_args()
    out, recipe = parsed.out.resolve(), Recipe(parsed.tiles, parsed.weights, parsed.out.resolve())

    recipe.run("train", "--out", out / "runs", "--name", RUN, "--train.epochs", RUN_EPOCHS, "--train.patience", 0)
    folder = out / "runs" / RUN
    model = ModelVersion.load(folder / "model")
    encoded_s, read_s = (
        time_epochs(model, str(parsed.tiles), num, encodes)
        for num, encodes in ((ENCODED_EPOCHS, True), (READ_EPOCHS, False))
    )
    run_s = epoch_seconds(out, folder)
    checkpoint = max(folder.glob("checkpoint_*/state.json")).parent
    checkpoint_mb = sum(file.stat().st_size for file in checkpoint.iterdir()) / 1e6

    for protocol in PROTOCOLS:
        recipe.study(protocol, "studies", "float32")
        recipe.study(protocol, "float16", "float16")

    print(f"\n| epoch | seconds | times faster |\n{'|---' * 3}|")
    print(f"| steps that encode every tile | {encoded_s:.1f} | |")
    print(f"| the same steps on stored features | {read_s:.3f} | {encoded_s / read_s:.0f} |")
    print(f"| the run, with a checkpoint of {checkpoint_mb:.1f} MB each | {run_s:.2f} | {encoded_s / run_s:.0f} |\n")
    for protocol in PROTOCOLS:
        print(float16_table(protocol, *(out / kind / f"frozen-{protocol}" for kind in ("studies", "float16"))))


class Recipe:
    """Runs jobs with frozen.yaml on one tile table."""

    def __init__(self, tiles: Path, weights: Path, out: Path) -> None:
        self._settings = ["--data", tiles, "--config", ROOT / "jobs" / "configs" / "frozen.yaml"]
        self._settings += ["--model.image_encoder", "densenet121", "--model.image_weights", weights]
        self._settings += ["--tracking.uri", f"sqlite:///{out / 'mlflow.db'}"]
        self._out = out
        out.mkdir(parents=True, exist_ok=True)

    def run(self, job: str, *arguments: object) -> None:
        """Runs one job to its end."""
        started = time.perf_counter()
        command = [sys.executable, ROOT / "jobs" / f"{job}.py", *self._settings, *arguments]
        subprocess.run([str(word) for word in command], check=True, stdout=sys.stderr)
        print(f"{job} {' '.join(map(str, arguments))}: {time.perf_counter() - started:.0f} s", flush=True)

    def study(self, protocol: str, folder: str, dtype: str) -> None:
        """Cross-validates the recipe."""
        named = ("--out", self._out / folder, "--name", f"frozen-{protocol}")
        self.run("cross_validate", "--protocol", protocol, *named, "--model.feature_dtype", dtype)


def time_epochs(model: ModelVersion, tiles: str, num_epochs: int, encodes: bool) -> float:
    """Returns the seconds of the fastest epoch of the same steps, which encodes every tile or reads stored features."""
    config, manifest, sections = model.config, load_manifest(tiles), model.training.sections
    reader = make_reader(tiles, manifest, model.panel, config, sections)
    if not encodes:
        assert model.encoder is not None
        stored = features(tiles, manifest, sections, model.encoder, wanted(config), make=False)
        reader = replace(reader, features=stored)
    feed = make_feed(config, reader, sections)
    state = rank_state(config, len(model.panel), num_positions(reader), manifest.tile_size_px, feed.num_steps())
    encode = replace(network_of(model), head=None).build(state.device)
    load = feed.loader if encodes else feed.loader.keeping()
    seconds = []
    for epoch in range(num_epochs):
        started = time.perf_counter()
        for batch in read_ahead([feed.rows(epoch, [], 0, 1)], load, feed.batch_shape(1).num_rows):
            train_step(state, share_of(encoded(batch, encode) if encodes else batch))
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def encoded(batch: Batch, encode: Callable[[np.ndarray], np.ndarray]) -> Batch:
    """Returns a batch with features, float32 (S, L, F), instead of its tiles, uint8 (S, L, size, size, 3)."""
    found = encode(batch["image"][batch["mask"]])
    features = np.zeros((*batch["mask"].shape, found.shape[1]), np.float32)
    features[batch["mask"]] = found
    return {name: values for name, values in batch.items() if name != "image"} | {"features": features}


def rank_state(config: Config, num_genes: int, positions: int, tile_size_px: int, num_steps: int) -> RankState:
    """Returns a network and its optimiser as a single worker has them."""
    network = build_network(config.model, num_genes, positions, tile_size_px).train()
    return lone_rank(config, network, num_steps * config.train.epochs)


def epoch_seconds(out: Path, folder: Path) -> float:
    """Returns the seconds between the ends of a run's epochs, checkpoints and all, from its MLflow run.

    It is the mean of the fastest `WINDOW` epochs in a row: the driver looks for metrics twice a second.
    """
    run_id = json.loads((folder / "run.json").read_text())["mlflow_run_id"]
    history = MlflowClient(f"sqlite:///{out / 'mlflow.db'}").get_metric_history(run_id, "epoch")
    ends: dict[int, int] = {}
    for point in history:
        ends[int(point.value)] = max(point.timestamp, ends.get(int(point.value), 0))
    end_s = [ends[epoch] / 1000 for epoch in sorted(ends)]
    return min(end_s[last] - end_s[last - WINDOW] for last in range(WINDOW, len(end_s))) / WINDOW


def float16_table(protocol: str, *studies: Path) -> str:
    """Returns Markdown: means of the model's and the floors' scores with float32 and with float16 features."""
    whole, half = (_rows(study) for study in studies)
    names = [score.name for score in SCORES]
    largest = (whole[names] - half[names]).abs().groupby("method").max()
    titles = [*SHOWN, "largest difference of PCC in any section", "of MSE"]
    lines = [f"Protocol {protocol}, float32 / float16 features:", "", _line(["method", *titles])]
    lines.append("|---" * (len(titles) + 1) + "|")
    for method in whole.index.unique("method"):
        cells = [
            " / ".join(
                _mean(rows.xs((method, genes), level=("method", "gene_set")), score, protocol) for rows in (whole, half)
            )
            for genes, score in SHOWN.values()
        ]
        lines.append(_line([method, *cells, *(f"{largest.loc[method, score]:.1e}" for score in ("pcc", "mse"))]))
    return "\n".join(lines).replace("nan", "-") + "\n"


def _mean(rows: pd.DataFrame, score: str, protocol: str) -> str:
    """Returns the mean as on score cards: over patients where whole patients are held out, else over sections."""
    unit = "patient_id" if protocol == "patient" else "section_id"
    return f"{rows.groupby(unit)[score].mean().mean():.4f}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rows(study: Path) -> pd.DataFrame:
    """Returns the scores of all folds in the models' own target, by method, section and set of genes."""
    cards = [read_table((path.parent / ROWS).read_bytes()) for path in sorted(study.glob(f"*/scores/{RECORD}"))]
    rows = pd.concat(cards, ignore_index=True)
    rows = rows[(rows["target"] == rows["target"].iloc[0]) & (rows["kind"] != "reference line")]
    return rows.set_index(["method", "section_id", "gene_set"])


if __name__ == "__main__":
    main()
