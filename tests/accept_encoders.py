"""One encoder of each family through embed, train, evaluate and predict, each job started as a user starts it.

The weights are random but in the published layout, saved as their authors save them: nothing needs a network. To take
minutes, all jobs join one Ray, two encoders are under way at a time, and there are few spots, because networks that are
built for 224 px are slow.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import anndata
import numpy as np
import pytest
import ray
import timm
import torch
from prepared_tables import copy_of
from torch import nn

from ingest.synthetic import CohortSpec, make_cohort
from mclstexp.data.features import FEATURES
from mclstexp.data.schema import MANIFEST

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parents[1]
MEASURED, SLIDE = ("P1S1", "P2S1", "P3S1"), "P4S1"
SWIGLU = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU, "init_values": 1e-5}
FAMILIES = {
    "h0-mini": (
        ("vit_base_patch14_reg4_dinov2", {"img_size": 224, "mlp_ratio": 5.33334, **SWIGLU}),
        ["--model.image_layers", "class_mean,class", "--model.feature_dtype", "float16"],
    ),
    "densenet121": (None, ["--model.image_layers", "transition3,norm", "--model.image_views", "image,image_wide"]),
    "resnet18": (None, []),
    "lunit-s16": (("vit_small_patch16_224", {}), []),
    "gigapath-flash": (("vit_small_patch16_224", {"mlp_ratio": 2048 / 384, **SWIGLU}), []),
}
"""The published network (None: torchvision's, random), and further settings; the slowest first."""
SMALL = ["--genes.num_genes", "20", "--split.test_patients", "P3", "--model.spot_width", "16"]
SMALL += ["--model.spot_layers", "1", "--train.epochs", "1", "--train.batch_sentences", "2"]


@pytest.fixture(scope="module")
def ray_here(_environment: str) -> Iterator[None]:
    """A Ray whose store holds the largest encoder twice."""
    ray.init(
        address="local",
        num_cpus=6,
        object_store_memory=2**30,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    yield
    ray.shutdown()


def _run(job: str, *arguments: str) -> str:
    """Runs a job on the tests' Ray and returns what it printed."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def sheets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Sheets: one measured section of each of three patients; a slide without counts."""
    folder = tmp_path_factory.mktemp("accept")
    spec = CohortSpec(
        num_patients=3, sections_per_patient=1, array_side=3, pitch_px=32, num_genes=40, median_counts=1500
    )
    made = make_cohort(folder / "made", spec)
    return copy_of(made, folder / "measured", MEASURED), copy_of(made, folder / "slide", [SLIDE])


@pytest.fixture(scope="module")
def tables(sheets: tuple[str, str], ray_here: None, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """Tile tables, without and with a wide view."""
    folder, wide = tmp_path_factory.mktemp("tables"), ["--tiles.wide_um", "64", "--tiles.wide_px", "32"]
    found = {False: str(folder / "plain"), True: str(folder / "wide")}
    for has_wide, root in found.items():
        _run(
            "prepare",
            "--samples",
            sheets[0],
            "--out",
            root,
            "--tiles.size_px",
            "32",
            *(wide if has_wide else ["--tiles.wide_um", "none"]),
        )
    return found


@pytest.fixture(scope="module")
def ended(
    tables: dict[bool, str],
    sheets: tuple[str, str],
    mlflow_template: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Future[None]]]:
    """Each family's jobs, two families at a time."""
    folders = {name: tmp_path_factory.mktemp(name) for name in FAMILIES}
    settings = {name: _encoder(name, folder) for name, folder in folders.items()}
    for name, folder in folders.items():
        shutil.copy(mlflow_template, folder / "mlflow.db")
        shutil.copytree(tables["image,image_wide" in settings[name]], folder / "tiles")
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(_all_jobs, name, settings[name], sheets[1], folders[name]) for name in FAMILIES}


def _encoder(name: str, folder: Path) -> Sequence[str]:
    """Returns the settings of an encoder, after writing its weights: by their seed, those of the random floor."""
    network, more = FAMILIES[name]
    chosen = ["--model.image_encoder", name, *more]
    if network is None:
        return [*chosen, "--model.image_weights", "random"]
    torch.manual_seed(0)
    state = timm.create_model(network[0], pretrained=False, num_classes=0, **network[1]).state_dict()
    torch.save(state, folder / "pytorch_model.bin")
    return [*chosen, "--model.image_weights", str(folder / "pytorch_model.bin")]


def _feature_tables(table: str) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in Path(table, FEATURES).glob(f"*/{MANIFEST}")}


def _all_jobs(name: str, encoder: Sequence[str], slide: str, folder: Path) -> None:
    """Runs the jobs on the tile table in a folder."""
    tracking = ["--tracking.uri", f"sqlite:///{folder}/mlflow.db"]
    table, version = str(folder / "tiles"), folder / "runs" / "run" / "model"
    frozen = ["--config", str(ROOT / "jobs/configs/frozen.yaml"), *encoder]
    embedded = _run("embed", "--data", table, *frozen)
    made = _feature_tables(table)
    (features,) = made
    assert f"\nfeatures {table}/{FEATURES}/{features}\n" in embedded

    runs = ["--data", table, "--out", str(folder / "runs"), "--name", "run", "--features", "require"]
    _run("train", *runs, *frozen, *SMALL, *tracking)
    record = json.loads((version / "model.json").read_text())["encoder"]
    assert record["name"] == name
    assert record["digest"] == json.loads(made[features])["encoder"]["digest"]
    assert (version / "encoder.safetensors").exists() == record["stores_weights"]

    _run("evaluate", "--model", str(version), "--data", table, "--out", str(folder / "scores"), *tracking)
    card = json.loads((folder / "scores" / "score_card.json").read_text())
    methods = {row["method"] for row in card["means"]}
    assert {"model", "train mean", "HEST-bench probe"} <= methods
    assert _feature_tables(table) == made, "only embed encodes tiles of the table"

    predictions = folder / "predictions"
    cpus = ["--predict.num_cpus", "3"]
    _run("predict", "--model", str(version), "--samples", slide, "--out", str(predictions), *cpus, *tracking)
    found = anndata.read_h5ad(predictions / f"{SLIDE}.h5ad")
    assert found.n_vars == 20
    assert np.isfinite(found.X).all()
    assert found.X.std() > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_an_encoder_goes_through_all_jobs(name: str, ended: dict[str, Future[None]]) -> None:
    ended[name].result()
