"""Prediction of a cohort of real slide files: rows, faults, files, kills, and what a second run does."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
from PIL import Image
from s3_server import S3Server

from ingest.open_cohort import open_cohort
from mclstexp import storage
from mclstexp.config import Config, override
from mclstexp.data.genes import GenePanel, fit_panel
from mclstexp.data.images import decode_tile, encode_tile
from mclstexp.data.schema import load_manifest
from mclstexp.errors import ConfigError, PredictError, StorageError
from mclstexp.inference import ledger
from mclstexp.inference.bank import Bank
from mclstexp.inference.cohort import Cohort, Report
from mclstexp.inference.cosine import KEY_BLOCK
from mclstexp.inference.model_version import ModelVersion, TrainingRecord
from mclstexp.inference.predict import predict_cohort
from mclstexp.inference.retrieval import retrieve
from mclstexp.inference.shards import split_bank
from mclstexp.model.towers import TwoTowers
from mclstexp.training.trainer import recorded_tiles

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
pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def model(tiles: str, tmp_path_factory: pytest.TempPathFactory) -> ModelVersion:
    """An untrained model with a random bank of two key blocks, cut for the session's tile table."""
    manifest = load_manifest(tiles)
    config = override(Config(), SETTINGS | recorded_tiles(manifest))
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
    version = ModelVersion(config, panel, geometry, 0, record, weights, Bank(keys, payload, names, names, names))
    folder = tmp_path_factory.mktemp("version") / "model"
    folder.mkdir()
    version.save(folder)
    return ModelVersion.load(folder)


@pytest.fixture(scope="module")
def slides(cohort: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slides of several parts, one of a single part, a blank one and a truncated one."""
    folder = tmp_path_factory.mktemp("slides")
    texture = tifffile.imread(Path(cohort).parent / "P4S1.tif")
    times = -(-BIG_PX // texture.shape[0])
    large = np.tile(texture, (times, times, 1))[:BIG_PX, :BIG_PX]
    for name, image in (("big1", large), ("big2", large[::-1]), ("small", texture)):
        _write_slide(folder / f"{name}.tif", image)
    _write_slide(folder / "blank.tif", np.full_like(texture, 244))
    _write_slide(folder / "broken.tif", texture)
    whole = (folder / "broken.tif").read_bytes()
    (folder / "broken.tif").write_bytes(whole[: len(whole) // 2])
    return folder


def _write_slide(path: Path, image: np.ndarray) -> None:
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


def _predict(
    model: ModelVersion,
    slides: Path,
    out: Path | str,
    genes: tuple[str, ...] = (),
    idle: bool = False,
    **settings: object,
) -> Report:
    config = override(Config(), {f"predict.{name}": value for name, value in settings.items()}).predict
    cohort = open_cohort(str(slides), model, str(out), config)

    def make(num_readers: int) -> Cohort:
        made = cohort.keyed(num_readers)
        return replace(made, tile_batches=None) if idle else made

    return predict_cohort(model, make, str(out), genes, lambda report, total: None, config)


@pytest.fixture(scope="module")
def predicted(model: ModelVersion, slides: Path, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All slides predicted in one calm run."""
    out = tmp_path_factory.mktemp("predicted")
    report = _predict(model, slides, out, (model.panel.names()[2],))
    assert report.counts() == {"done": 3, "empty": 1, "quarantined": 1}
    return out


def _digests(folder: Path) -> dict[str, str]:
    """What was published: all but the ledger and its summary, which say when, what is left of staging, and locks."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    kept = [path for path in files if path.parts[0] not in ("ledger", "summary.csv", "staging")]
    return {str(path): hashlib.sha256((folder / path).read_bytes()).hexdigest() for path in kept}


def _ledger(out: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in (out / "ledger").glob("*.json")}


def _crop(slide: Path, x_px: float, y_px: float) -> np.ndarray:
    import openslide

    corner = (int(x_px) - TILE_PX // 2, int(y_px) - TILE_PX // 2)
    return np.asarray(openslide.OpenSlide(slide).read_region(corner, 0, (TILE_PX, TILE_PX)).convert("RGB"))


@pytest.mark.parametrize("name", GOOD)
def test_a_tile_gets_what_the_model_says_of_its_pixels(
    model: ModelVersion, slides: Path, predicted: Path, name: str
) -> None:
    """Crops of some tiles, encoded as training tiles were, through the towers themselves."""
    table = pq.read_table(predicted / f"{name}.parquet")
    picked = np.linspace(0, table.num_rows - 1, 25).astype(int)
    places = [(table["x_px"][row].as_py(), table["y_px"][row].as_py()) for row in picked.tolist()]
    tiles = [
        encode_tile(_crop(slides / f"{name}.tif", *place), "jpeg", model.config.tiles.jpeg_quality) for place in places
    ]
    batch = torch.from_numpy(np.stack([decode_tile(tile) for tile in tiles])).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        queries = model.towers().embed_images(batch).numpy()
    expected = retrieve(queries, model.bank, model.config.retrieval)
    found = np.stack([table[gene].to_numpy()[picked] for gene in model.panel.gene_id], axis=1)
    assert found == pytest.approx(expected.prediction, abs=1e-3)
    assert table["similarity"].to_numpy()[picked] == pytest.approx(expected.similarity, abs=1e-3)
    assert len(np.unique(found.round(4), axis=0)) > 12, "tiles must differ for this to mean anything"


def test_every_whole_tile_on_tissue_is_there_once(predicted: Path) -> None:
    table = pq.read_table(predicted / "big1.parquet")
    spots = table["spot_id"].to_pylist()
    assert len(set(spots)) == len(spots) > 256, "several parts"
    assert len(spots) <= (BIG_PX // TILE_PX) ** 2
    data = anndata.read_h5ad(predicted / "big1.h5ad")
    assert list(data.obs_names) == spots
    assert Image.open(predicted / "overviews" / "big1.png").size[0] > 100
    assert (predicted / "geojson" / "big1.geojson").is_file()


def test_faulty_slides_are_set_aside_with_the_reason_and_blank_ones_are_empty(predicted: Path) -> None:
    found = _ledger(predicted)
    assert {name: entry["state"] for name, entry in found.items()} == {
        **dict.fromkeys(GOOD, "done"),
        "blank": "empty",
        "broken": "quarantined",
    }
    assert "broken.tif" in found["broken"]["reason"]
    assert found["big1"]["num_tiles"] == pq.read_metadata(predicted / "big1.parquet").num_rows
    assert {path.stem for path in predicted.glob("*.parquet")} == set(GOOD)
    assert not list((predicted / "staging").iterdir())


def test_a_second_run_does_nothing(model: ModelVersion, slides: Path, predicted: Path) -> None:
    before = _digests(predicted)
    report = _predict(model, slides, predicted, idle=True)
    assert (report.counts(), set(report.faults())) == ({"skipped": 5}, {"broken"})
    assert _digests(predicted) == before


def test_a_run_with_other_genes_draws_what_is_done_and_predicts_nothing(
    model: ModelVersion, slides: Path, predicted: Path, tmp_path: Path
) -> None:
    shutil.copytree(predicted, tmp_path, dirs_exist_ok=True)
    names = model.panel.names()
    report = _predict(model, slides, tmp_path, (names[1], names[4]), idle=True)
    assert (report.counts(), report.num_redrawn) == ({"skipped": 5}, 3)
    squares = json.loads((tmp_path / "geojson" / "big1.geojson").read_text())["features"]
    assert set(squares[0]["properties"]["measurements"]) == {"similarity", names[1], names[4]}
    after, before = _digests(tmp_path), _digests(predicted)
    drawn = {f"{folder}/{name}" for name in GOOD for folder in ("overviews", "geojson")}
    assert {path.rpartition(".")[0] for path in after if after[path] != before[path]} == drawn
    assert _ledger(tmp_path)["big1"]["genes"] == f"{names[1]},{names[4]}"
    assert _predict(model, slides, tmp_path, (names[1], names[4]), idle=True).num_redrawn == 0
    assert _predict(model, slides, tmp_path, idle=True).num_redrawn == 0
    (tmp_path / "small.h5ad").unlink()
    before = _ledger(tmp_path)["small"]
    report = _predict(model, slides, tmp_path, (names[0],), idle=True)
    assert (report.num_redrawn, set(report.faults())) == (2, {"broken", "small"})
    assert "small.h5ad" in report.faults()["small"]
    assert _ledger(tmp_path)["small"] == before, "its pictures are still those that the ledger names"


def test_a_replaced_slide_is_done_again_and_no_other(
    model: ModelVersion, slides: Path, predicted: Path, tmp_path: Path
) -> None:
    for name in ("small", "blank"):
        (tmp_path / f"{name}.tif").write_bytes((slides / f"{name}.tif").read_bytes())
    out = tmp_path / "out"
    assert _predict(model, tmp_path, out).counts() == {"done": 1, "empty": 1}
    first = _digests(out)
    image = tifffile.imread(tmp_path / "small.tif")
    left = out / "staging" / "small-0123456789abcdef" / "slide.json"  # of a file that was replaced before it was done
    other = out / "staging" / "other-0123456789abcdef" / "slide.json"  # of a slide of another run
    for path in (left, other):
        path.parent.mkdir(parents=True)
        path.touch()
    _write_slide(tmp_path / "small.tif", image[::-1])
    report = _predict(model, tmp_path, out)
    assert report.counts() == {"done": 1, "skipped": 1}
    assert _digests(out)["small.parquet"] != first["small.parquet"]
    assert list((out / "staging").iterdir()) == [other.parent]


def test_an_output_belongs_to_one_model_and_one_way_of_cutting(
    model: ModelVersion, slides: Path, predicted: Path
) -> None:
    before = _digests(predicted)
    with pytest.raises(PredictError, match=r"holds predictions by .* overlap=0.0.*, asked for .*overlap=0.5"):
        _predict(model, slides, predicted, overlap=0.5)
    with pytest.raises(ConfigError, match="panel"):
        _predict(model, slides, predicted, ("NOGENE",))
    assert _digests(predicted) == before


def _processes(word: str, of: psutil.Process | None = None) -> list[psutil.Process]:
    """Ray workers of this session, or of one of its nodes, with a word in their title."""
    found = []
    for process in (of or psutil.Process()).children(recursive=True):
        with suppress(psutil.Error):
            if word in " ".join(process.cmdline()):
                found.append(process)
    return found


def _when(condition: Callable[[], object], act: Callable[[], None]) -> threading.Thread:
    """Does something as soon as a condition holds, meanwhile."""

    def wait() -> None:
        deadline = time.monotonic() + 300
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.005)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_passing_faults_of_the_store_and_runs_with_other_settings_cost_no_slide(
    predicted: Path, model: ModelVersion, slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run claims one slide while this one publishes it, and is done with another, with pictures of its own."""
    names = ("big1", "small")
    (tmp_path / "slides").mkdir()
    for name in names:
        shutil.copy(slides / f"{name}.tif", tmp_path / "slides")
    original, out, tries = ledger.fulfil, str(tmp_path / "out"), Counter()

    def fulfil(out: str, new: ledger.Entry, claimed: str) -> None:
        tries[new.slide_id] += 1
        turn = new.slide_id, tries[new.slide_id]
        if turn in (("big1", 1), ("small", 1)):
            mine = ledger.entry(out, new.slide_id)
            key = "theirs" if new.slide_id == "big1" else new.key
            theirs = ledger.Entry(slide_id=new.slide_id, key=key, state="publishing", genes="G")
            version = ledger.claim_slide(out, theirs, over=mine)
            if new.slide_id == "small":
                original(out, new.model_copy(update={"genes": "G"}), version)
        if turn == ("big1", 2):
            raise StorageError("the store said 503")
        original(out, new, claimed)

    monkeypatch.setattr(ledger, "fulfil", fulfil)
    report = _predict(model, tmp_path / "slides", out, (model.panel.names()[2],))
    assert (report.counts(), tries) == ({"done": 2}, {"big1": 3, "small": 2})
    assert _ledger(tmp_path / "out") == {name: report.entries[name].model_dump() for name in names}
    files, expected = _digests(tmp_path / "out"), _digests(predicted)
    assert files == {path: digest for path, digest in expected.items() if path in files}
    assert {"small.parquet", "overviews/small.png", "geojson/small.geojson"} < set(files)


def test_a_killed_embedder_and_a_sharded_bank_change_nothing(
    model: ModelVersion, slides: Path, predicted: Path, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill() -> None:
        for process in _processes("_Predict"):
            process.kill()
            killed.append(process.pid)

    assert [len(shard.keys) for shard in split_bank(model.bank, 2)] == [KEY_BLOCK, NUM_KEYS - KEY_BLOCK]
    killer = _when(lambda: list(tmp_path.rglob("*.safetensors")), kill)
    report = _predict(model, slides, tmp_path, (model.panel.names()[2],), bank_shards=2)
    killer.join()
    assert killed, "the fault must have hit"
    assert report.counts() == {"done": 3, "empty": 1, "quarantined": 1}
    assert _digests(tmp_path) == _digests(predicted)


@contextmanager
def _second_node() -> Iterator[psutil.Process]:
    """A node process beside this session's Ray, with three CPUs."""
    import ray

    address = ray.get_runtime_context().gcs_address
    with tempfile.TemporaryDirectory(prefix="node-") as folder:  # a short path, for sockets
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={address}"]
        command += ["--num-cpus=3", f"--object-store-memory={200 * 2**20}", f"--temp-dir={folder}/r"]
        with open(Path(folder, "log"), "w") as log:
            node = psutil.Popen([*command, "--include-log-monitor=false"], stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 240
            while sum(entry["Alive"] for entry in ray.nodes()) < 2:
                assert time.monotonic() < deadline, Path(folder, "log").read_text()[-2000:]
                time.sleep(0.2)
            yield node
        finally:
            _kill_node(node)


def _kill_node(node: psutil.Process) -> None:
    """Kills a node with all that it runs, as a machine that is switched off."""
    with suppress(psutil.NoSuchProcess):
        family = [node, *node.children(recursive=True)]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=60)


def test_a_node_that_dies_changes_nothing(model: ModelVersion, slides: Path, predicted: Path, tmp_path: Path) -> None:
    lost: list[psutil.Process] = []

    with _second_node() as node:

        def is_at_work() -> bool:
            lost[:] = [*_processes("_Read)", node), *_processes("_Predict)", node)]
            return bool(lost) and bool(list(tmp_path.rglob("grid.parquet")))

        killer = _when(is_at_work, lambda: _kill_node(node))
        report = _predict(model, slides, tmp_path, (model.panel.names()[2],))
        killer.join()
    assert lost, "the node must have been at work"
    if "failed" in report.counts():
        report = _predict(model, slides, tmp_path, (model.panel.names()[2],))
    assert (set(report.faults()), _digests(tmp_path)) == ({"broken"}, _digests(predicted))


def test_an_s3_server_that_dies_and_comes_back_changes_nothing(
    model: ModelVersion, slides: Path, predicted: Path, s3: str, s3_server: S3Server, tmp_path: Path
) -> None:
    under_way: list[bool] = []

    def restart() -> None:
        under_way.append(not storage.exists(f"{s3}/ledger/big2.json"))
        s3_server.kill()
        s3_server.start()

    killer = _when(lambda: [uri for uri in storage.list_files(f"{s3}/staging") if "/parts/" in uri], restart)
    genes = (model.panel.names()[2],)
    try:
        report = _predict(model, slides, s3, genes)
    except StorageError:  # it says what could not be read or written
        killer.join()
        report = _predict(model, slides, s3, genes)
    killer.join()
    if "failed" in report.counts():
        report = _predict(model, slides, s3, genes)
    assert (under_way, set(report.faults())) == ([True], {"broken"})
    for uri in storage.list_files(s3):
        target = tmp_path / uri.removeprefix(f"{s3}/")
        target.parent.mkdir(parents=True, exist_ok=True)
        storage.download(uri, target)
    assert _digests(tmp_path) == _digests(predicted)
    assert not (tmp_path / "staging").exists()


def _job(folder: Path, model: ModelVersion, slides: Path, *arguments: str) -> tuple[list[str], dict]:
    (folder / "model").mkdir(exist_ok=True)
    if not list((folder / "model").iterdir()):
        model.save(folder / "model")
    command = [sys.executable, str(ROOT / "jobs" / "predict.py"), "--model", "model", "--samples", str(slides)]
    command += ["--out", "out", "--tracking.uri", f"sqlite:///{folder}/mlflow.db", "--cluster.object_store_mb", "256"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    options = {"cwd": folder, "env": environment, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return [*command, *arguments], options


def test_a_killed_job_goes_on_even_where_two_go_on_at_once(
    model: ModelVersion, slides: Path, predicted: Path, tmp_path: Path
) -> None:
    command, options = _job(tmp_path, model, slides, "--genes", model.panel.names()[2])
    first = subprocess.Popen(command, start_new_session=True, **options)
    killer = _when(lambda: list(tmp_path.rglob("*.safetensors")), lambda: os.killpg(first.pid, signal.SIGKILL))
    killer.join()
    first.wait()
    assert not (tmp_path / "out" / "ledger" / "big2.json").exists(), "it must have been killed midway"
    again = subprocess.Popen(command, **options)
    report = _predict(model, slides, tmp_path / "out", (model.panel.names()[2],))
    said, _ = again.communicate(timeout=1500)
    assert again.returncode == 2, said
    assert "1 slide(s) could not be predicted" in said
    assert "broken: " in said
    assert list(report.faults()) == ["broken"]
    assert _digests(tmp_path / "out") == _digests(predicted)


def test_the_job_plans_and_explains(model: ModelVersion, slides: Path, predicted: Path, tmp_path: Path) -> None:
    command, options = _job(tmp_path, model, slides)
    planned = subprocess.run([*command, "--dry-run"], check=False, timeout=900, **options)
    assert planned.returncode == 0, planned.stdout
    assert "5 slides" in planned.stdout
    assert not (tmp_path / "out").exists()
    row = pq.read_table(predicted / "small.parquet").slice(5, 1).to_pylist()[0]
    asked = f"small,{row['x_px'] + 3},{row['y_px'] - 3}"
    gene = model.panel.names()[2]
    explained = subprocess.run([*command, "--explain", asked, "--genes", gene], check=False, timeout=900, **options)
    assert explained.returncode == 0, explained.stdout
    votes = np.genfromtxt(
        tmp_path / "out" / "explained" / f"small-{row['spot_id']}.csv",
        delimiter=",",
        names=True,
        dtype=None,
        encoding=None,
    )
    assert len(votes) == model.config.retrieval.k
    assert votes["weight"].sum() == pytest.approx(1, abs=1e-5)
    assert votes["weight"] @ votes[gene] == pytest.approx(row[model.panel.gene_id[2]], abs=1e-3)
