"""Shared real components: one local Ray, one S3 server, one synthetic cohort and its tile table, one kind of result.

The S3 server is SeaweedFS on loopback; MCLSTEXP_TEST_S3 (a URL, with AWS credentials beside it) names another one.
"""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = f"{ROOT / 'platform'}:{ROOT}:{ROOT / 'jobs'}"


@pytest.fixture(scope="session")
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The S3 endpoint's URL, after setting what Ray workers and child processes inherit."""
    endpoint = os.environ.get("MCLSTEXP_TEST_S3")
    empty_file = tmp_path_factory.mktemp("aws") / "none"
    empty_file.touch()
    with pytest.MonkeyPatch.context() as patch:
        if endpoint is None:
            endpoint = f"http://127.0.0.1:{_free_port()}"
            patch.setenv("AWS_ACCESS_KEY_ID", "test-key")
            patch.setenv("AWS_SECRET_ACCESS_KEY", secrets.token_hex(16))
            patch.setenv("AWS_CONFIG_FILE", str(empty_file))
            patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(empty_file))
            for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
                patch.delenv(name, raising=False)
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("PYTHONPATH", SOURCE_ROOTS)
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # as the jobs set it
        patch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # one process less to start for each run
        yield endpoint


@pytest.fixture(scope="session")
def ray_session(_environment: str) -> Iterator[None]:
    """A local Ray of this session's own, with more logical CPUs than the machine may have."""
    import ray

    ray.init(
        address="local",
        num_cpus=6,
        object_store_memory=400 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def _s3_server(_environment: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint's URL, with a server behind it."""
    if "MCLSTEXP_TEST_S3" in os.environ:
        yield _environment
        return
    folder = tmp_path_factory.mktemp("s3")
    command = _seaweed(folder, int(_environment.rsplit(":", 1)[1]))
    with open(folder / "log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log, cwd=folder) as server:
        try:
            _wait_until_healthy(_environment, server, folder / "log")
            yield _environment
        finally:
            server.kill()


@pytest.fixture
def s3(_s3_server: str) -> str:
    """A fresh, empty bucket: `s3://test-xxxx`."""
    import boto3

    bucket = f"test-{secrets.token_hex(6)}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The sample sheet of a tiny synthetic cohort: 3 patients with 2 sections each, and one H&E-only slide."""
    from ingest.synthetic import CohortSpec, make_cohort

    return make_cohort(tmp_path_factory.mktemp("cohort"), CohortSpec.tiny())


@pytest.fixture(scope="session")
def tiles(cohort: str, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The root of the cohort's tile table: 32 px tiles, sentences of at most 16 spots."""
    from ingest.prepare import prepare
    from mclstexp.config import Config, override

    config = override(Config(), {"tiles.size_px": 32, "tiles.sentence_length": 16})
    root = str(tmp_path_factory.mktemp("tiles") / "table")
    prepare(cohort, root, config, progress=False)
    return root


@pytest.fixture(scope="session")
def make_result() -> Callable[..., Path]:
    """Makes the result folder of an evaluation of two sections in a given folder: `make_result(folder, protocol)`.

    S1 is labelled and predicted well in its first gene, S-2 has no labels and lacks the last gene; names are nasty.
    """
    return _make_result


RESULT_GENES = {
    "ENSG1": "GNAS",
    "ENSG2": "</script><b>bold",
    "ENSG3": "a \"quoted\" & 'odd' <name>",
    "ENSG4": "",
    "ENSG5": "TWICE",
    "ENSG6": "TWICE",
    "ENSG7": "FLAT",
    "ENSG8": "ONLY-S1",
}
RESULT_UNIT = "ln(1 + x), <per spot> & more"


def _make_result(folder: Path, protocol: str = "reference", training_runs: dict[str, str] | None = None) -> Path:
    from mclstexp.evaluation.score_card import FLOOR, MODEL, ScoreCard
    from mclstexp.evaluation.tables import gene_sets, gene_table, set_table

    rng = np.random.default_rng(0)
    rows, per_gene, predictions = [], [], {}
    for name, num_genes in {"S1": 8, "S-2": 7}.items():
        ids = list(RESULT_GENES)[:num_genes]
        place = np.indices((7, 8)).reshape(2, -1).T[:, ::-1] * 100.0 + 250
        band = place[:, 0] > 550
        truth = rng.gamma(2.0, size=(len(place), num_genes)) + 6.0 * band[:, None] * (np.arange(num_genes) % 2)
        truth[:, 6] = 0.0
        said = truth + np.linspace(0.1, 4.0, num_genes) * rng.normal(size=truth.shape)
        labels = np.where(band, "cancer", "fat <&>").tolist() if name == "S1" else [None] * len(place)
        predictions[name] = f"{name}/sections/{name}.h5ad"
        _write_section(folder / predictions[name], name, ids, place, truth, said, labels, protocol)
        methods = {(MODEL, MODEL): said, ("ridge on RGB", FLOOR): said + 3 * rng.normal(size=truth.shape)}
        for (method, kind), values in methods.items():
            table = gene_table(truth, values, truth.sum(axis=1))
            of = {"section_id": name, "patient_id": name[0], "target": "per_spot", "method": method}
            own = of | {"num_spots": len(place), "kind": kind}
            rows.append(set_table(table, gene_sets(truth, {})).assign(**own))
            per_gene.append(table.assign(**of, gene=[RESULT_GENES[gene] or gene for gene in ids]))
    notes = ("LEAK that this protocol allows: <others> trained",) if protocol == "reference" else ()
    tables = pd.concat(rows, ignore_index=True), pd.concat(per_gene, ignore_index=True)
    genes = [symbol or gene for gene, symbol in RESULT_GENES.items()]
    ScoreCard(protocol, {"per_spot": RESULT_UNIT}, "abc", (*notes, "a note & more"), genes, *tables, None).save(folder)
    record = json.loads((folder / "score_card.json").read_text())
    record |= {"predictions": predictions, "training_runs": training_runs or {}}
    (folder / "score_card.json").write_text(json.dumps(record))
    for name in ("score_card", "per_gene", "gene_means"):
        table = pd.read_csv(folder / f"{name}.csv")
        table.insert(0, "protocol", protocol)
        table.to_csv(folder / f"{name}.csv", index=False)
    return folder


def _write_section(
    path: Path,
    name: str,
    ids: list[str],
    place: np.ndarray,
    truth: np.ndarray,
    said: np.ndarray,
    labels: list[str | None],
    protocol: str,
) -> None:
    import anndata

    obs = pd.DataFrame(
        {"section_id": name, "patient_id": name[0], "label": pd.Categorical(labels)},
        index=pd.Index([f"spot{index}" for index in range(len(place))], name="spot_id"),
    )
    obs[["x_px", "y_px"]], obs[["x_um", "y_um"]] = place, 2 * place
    var = pd.DataFrame({"symbol": [RESULT_GENES[gene] for gene in ids], "ensembl_id": ids}, index=ids)
    slide = np.full((100, 120, 3), (230, 200, 220), np.uint8)
    result = {"unit": RESULT_UNIT, "protocol": protocol, "heading": f"held out: {name}; protocol {protocol}"}
    image = {"images": {"hires": slide}, "scalefactors": {"tissue_hires_scalef": 0.1, "spot_diameter_fullres": 55.0}}
    data = anndata.AnnData(
        said.astype(np.float32),
        obs,
        var.rename_axis("gene_id"),
        layers={"measured": truth.astype(np.float32)},
        obsm={"spatial": place},
        uns={"result": result | {"model_digest": "abc"}, "spatial": {name: image}},
    )
    path.parent.mkdir(parents=True)
    data.write_h5ad(path)


def _seaweed(folder: Path, s3_port: int) -> list[str]:
    binary = Path(sys.executable).parent / "weed"
    ports = {name: _free_port() for name in ("master", "volume", "filer", "admin")}
    return [
        str(binary),
        "mini",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        *(f"-{name}.port={port}" for name, port in ports.items()),
        f"-s3.port={s3_port}",
        "-webdav=false",
        "-admin.ui=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.telemetry=false",
    ]


def _wait_until_healthy(endpoint: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{endpoint}/healthz", timeout=2) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise RuntimeError(f"the S3 server did not start:\n{log.read_text()[-2000:]}")


def _free_port() -> int:
    """Returns a port that is free together with the one 10000 above it, which SeaweedFS takes for gRPC."""
    for _ in range(100):
        port = 20000 + secrets.randbelow(12000)
        try:
            with socket.socket() as first, socket.socket() as second:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 10000))
                return port
        except OSError:
            continue
    raise RuntimeError("found no free port")
