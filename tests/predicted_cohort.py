"""A cohort of real slide files predicted in one calm run, and the means to predict it again."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from mclstexp.config import Config, override
from mclstexp.data.genes import GenePanel
from mclstexp.data.panel import fit_panel
from mclstexp.data.schema import load_manifest
from mclstexp.model.bank import Bank
from mclstexp.model.frozen import frozen_encoder
from mclstexp.model.retrieval import KEY_BLOCK
from mclstexp.model.towers import TwoTowers
from mclstexp.model.version import ModelVersion, TrainingRecord
from mclstexp.prediction import run
from mclstexp.prediction.cohort import open_cohort
from mclstexp.prediction.run import Report, predict_cohort
from mclstexp.progress import hidden
from mclstexp.training.run import recorded_tiles

ROOT = Path(__file__).parents[1]
TILE_PX, BIG_PX = 32, 800
NUM_KEYS = KEY_BLOCK + 20_000
SETTINGS = {
    "genes.num_genes": 10,
    "model.image_encoder": "small_cnn",
    "model.spot_layers": 1,
    "model.spot_width": 16,
    "model.embedding_dim": 8,
    "retrieval.k": 4,
    "retrieval.temperature": 0.1,
    "train.precision": "fp32",
}
GOOD = ("big1", "big2", "small")


@dataclass(frozen=True)
class PredictedCohort:
    """A folder of slides, the model, and the folder of what one calm run predicted."""

    model: ModelVersion
    slides: Path
    out: Path


def predict_calmly(tiles: str, cohort: str, folder: Path) -> PredictedCohort:
    """Makes slides and a model and predicts all slides in one run in which nothing goes wrong."""
    model, slides, out = untrained_model(tiles, folder / "model"), folder / "slides", folder / "out"
    make_slides(cohort, slides)
    out.mkdir()
    report = predict(model, slides, out, num_cpus=6)
    assert report.counts() == {"done": 3, "empty": 1, "quarantined": 1}
    return PredictedCohort(model, slides, out)


def untrained_model(tiles: str, folder: Path, **settings: object) -> ModelVersion:
    """Saves and loads an untrained model with a random bank of two key blocks, made for a tile table."""
    manifest = load_manifest(tiles)
    changed = {f"model.{name}": value for name, value in settings.items()}
    config = override(Config(), SETTINGS | recorded_tiles(manifest) | changed)
    measured = [entry.section_id for entry in manifest.sections if entry.measured]
    panel: GenePanel = fit_panel(tiles, manifest, measured, config.genes)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    names = np.array([f"P{i % 3}" for i in range(NUM_KEYS)], object)
    keys, payload = (rng.normal(size=(NUM_KEYS, width)).astype(np.float32) for width in (8, len(panel)))
    record = TrainingRecord(
        manifest_digest="m",
        protocol="patient",
        sections=("A",),
        patients=("A",),
        validation_sections=(),
        test_sections=(),
        epochs=1,
    )
    weights = TwoTowers(config.model, len(panel), 0, manifest.tile_size_px).state_dict()
    geometry = (manifest.tile_size_px, manifest.mpp)
    encoder = frozen_encoder(config.model, manifest.tile_size_px, 0) if config.model.freeze_encoder else None
    bank = Bank.of(keys, payload, names, names, names)
    version = ModelVersion(config, panel, geometry, 0, record, weights, bank, encoder=encoder)
    folder.mkdir()
    version.save(folder)
    return ModelVersion.load(folder)


def make_slides(cohort: str, folder: Path) -> None:
    """Two slides of several parts, one of a single part, a blank one and a truncated one."""
    folder.mkdir()
    texture = tifffile.imread(Path(cohort).parent / "P4S1.tif")
    times = -(-BIG_PX // texture.shape[0])
    large = np.tile(texture, (times, times, 1))[:BIG_PX, :BIG_PX]
    for name, image in (("big1", large), ("big2", large[::-1]), ("small", texture)):
        write_slide(folder / f"{name}.tif", image)
    write_slide(folder / "blank.tif", np.full_like(texture, 244))
    write_slide(folder / "broken.tif", texture)
    whole = (folder / "broken.tif").read_bytes()
    (folder / "broken.tif").write_bytes(whole[: len(whole) // 2])


def write_slide(path: Path, image: np.ndarray) -> None:
    """A tiled TIFF at 1 um/px, of the kind that OpenSlide reads."""
    with tifffile.TiffWriter(path) as file:
        file.write(
            image,
            tile=(256, 256),
            photometric="rgb",
            compression="jpeg",
            compressionargs={"level": 95},
            resolution=(10_000, 10_000),
            resolutionunit="CENTIMETER",
        )


def predict(
    model: ModelVersion,
    slides: Path,
    out: Path | str,
    *,
    idle: bool = False,
    num_cpus: int = 3,
    **settings: object,
) -> Report:
    """Predicts in this process; `idle`: starting the pipeline would be an error. Three CPUs: one actor per step."""
    changed = {f"predict.{name}": value for name, value in settings.items()} | {"predict.num_cpus": num_cpus}
    config = override(Config(), changed).predict
    cohort = open_cohort(str(slides), model, str(out), config)
    with pytest.MonkeyPatch.context() as patch:
        if idle:
            patch.setattr(run, "pipeline", None)
        return predict_cohort(model, cohort, str(out), hidden, config)


def digests(folder: Path) -> dict[str, str]:
    """Digests of what was published: all but ledger and summary, which hold times, staging and locks."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    kept = [path for path in files if path.parts[0] not in ("ledger", "summary.csv", "staging")]
    return {str(path): hashlib.sha256((folder / path).read_bytes()).hexdigest() for path in kept}


def ledger_entries(out: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in (out / "ledger").glob("*.json")}


def job(folder: Path, model: ModelVersion, slides: Path, *arguments: str) -> tuple[list[str], dict]:
    """Returns the command of the prediction job and its options for `subprocess`."""
    (folder / "model").mkdir(exist_ok=True)
    if not list((folder / "model").iterdir()):
        model.save(folder / "model")
    command = [sys.executable, str(ROOT / "jobs" / "predict.py"), "--model", "model", "--samples", str(slides)]
    command += ["--out", "out", "--tracking.uri", f"sqlite:///{folder}/mlflow.db", "--cluster.object_store_mb", "256"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    options = {"cwd": folder, "env": environment, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return [*command, *arguments], options
