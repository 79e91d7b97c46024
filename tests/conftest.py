"""Shared real components: one local Ray, one S3 server, one synthetic cohort and its tile table, one kind of result.

What is slow to make and used by several test files is made once, here: staged slides, a predicted cohort.

The S3 server is SeaweedFS on loopback; MCLSTEXP_TEST_S3 (a URL, with AWS credentials beside it) names another one.
"""

import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
from s3_server import S3Server, free_port

if TYPE_CHECKING:
    from predicted_cohort import PredictedCohort
    from staged_slides import Slide

    from mclstexp.evaluation.sections import SectionResult

os.environ.setdefault("RAY_AUTH_MODE", "token")  # as the jobs set it, and before anything imports Ray
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
            endpoint = f"http://127.0.0.1:{free_port()}"
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
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")  # workers wait for this poll at each checkpoint
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
def _own_s3(_environment: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server | None]:
    """This session's server; None where the tests use one that is not theirs."""
    if "MCLSTEXP_TEST_S3" in os.environ:
        yield None
        return
    server = S3Server(_environment, tmp_path_factory.mktemp("s3"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="session")
def _s3_server(_environment: str, _own_s3: S3Server | None) -> str:
    """The endpoint's URL, with a server behind it."""
    return _environment


@pytest.fixture
def s3_server(_own_s3: S3Server | None) -> S3Server:
    """The server behind `s3`, to be killed and started again."""
    if _own_s3 is None:
        pytest.skip("MCLSTEXP_TEST_S3 names a server that these tests may not kill")
    return _own_s3


@pytest.fixture
def s3(_s3_server: str) -> str:
    """A fresh, empty bucket: `s3://test-xxxx`."""
    import boto3

    bucket = f"test-{secrets.token_hex(6)}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database to be copied: MLflow takes seconds to make one."""
    import mlflow

    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


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

    config = override(Config(), {"tiles.size_px": 32, "tiles.sentence_length": 16, "tiles.wide_um": None})
    root = str(tmp_path_factory.mktemp("tiles") / "table")
    prepare(cohort, root, config)
    return root


@pytest.fixture(scope="session")
def two(cohort: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The sheet of two measured sections of different patients."""
    from prepared_tables import copy_of

    return copy_of(cohort, tmp_path_factory.mktemp("two"), ["P1S1", "P2S1"])


@pytest.fixture
def own_two(cohort: str, tmp_path: Path) -> str:
    """The same, to be changed."""
    from prepared_tables import copy_of

    return copy_of(cohort, tmp_path / "cohort", ["P1S1", "P2S1"])


@pytest.fixture(scope="session")
def predicted_cohort(
    tiles: str, cohort: str, ray_session: None, tmp_path_factory: pytest.TempPathFactory
) -> "PredictedCohort":
    """Slide files with faulty ones among them, an untrained model, and what it predicted in one calm run."""
    from predicted_cohort import predict_calmly

    return predict_calmly(tiles, cohort, tmp_path_factory.mktemp("predicted"))


@pytest.fixture(scope="session")
def staged(tmp_path_factory: pytest.TempPathFactory) -> "dict[str, Slide]":
    """A last short part and missing tiles; two row groups at another resolution; given positions."""
    from staged_slides import stage

    folder = tmp_path_factory.mktemp("staging")
    return {
        "A": stage(folder, "A", 30, 20, missing=7),
        "B": stage(folder, "B", 88, 50, scale=1.37, missing=40),
        "C": stage(folder, "C", 16, 16, given=True),
    }


@pytest.fixture(scope="session")
def make_result() -> Callable[..., Path]:
    """Makes the result folder of an evaluation of two sections in a given folder: `make_result(folder, protocol)`.

    S1 is labelled and predicted well in its first gene, S-2 has no labels and a panel without the last gene; names are
    nasty. `unmeasured` has the genes that a section does not measure, by their indices.
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


def _make_result(
    folder: Path,
    protocol: str = "reference",
    training_runs: dict[str, str] | None = None,
    unmeasured: dict[str, list[int]] | None = None,
) -> Path:
    from mclstexp.data.genes import GenePanel, unique_labels
    from mclstexp.evaluation.save import save_card
    from mclstexp.evaluation.score_card import FLOOR, MODEL, ScoreCard
    from mclstexp.evaluation.scores import gene_scores, gene_sets, set_table

    in_table = GenePanel(tuple(RESULT_GENES), tuple(RESULT_GENES.values()), tuple(RESULT_GENES)).names()
    rows, per_gene, results = [], [], []
    for name, num_genes in {"S1": 8, "S-2": 7}.items():
        result = _section_result(name, list(RESULT_GENES)[:num_genes])
        result.truth[:, (unmeasured or {}).get(name, [])] = np.nan
        results.append(result)
        noise = np.random.default_rng(1).normal(size=result.truth.shape)
        methods = {(MODEL, MODEL): result.prediction, ("ridge on RGB", FLOOR): result.prediction + 3 * noise}
        for (method, kind), values in methods.items():
            table = gene_scores(result.truth, values, result.section.totals)
            of = {"section_id": name, "patient_id": name[0], "target": "per_spot", "method": method}
            own = of | {"num_spots": len(result.section), "kind": kind}
            rows.append(set_table(table, gene_sets(result.truth, {})).assign(**own))
            labels = unique_labels(result.panel.names(), result.panel.gene_id, in_table)
            per_gene.append(table.assign(**of, gene=labels))
    leaks = ("LEAK that this protocol allows: <others> trained",) if protocol == "reference" else ()
    lacking = (unmeasured or {}).items()
    card = ScoreCard(
        protocol=protocol,
        targets={"per_spot": RESULT_UNIT},
        model_digest="abc",
        notes=(*leaks, "a note & more", *(f"section {name} does not measure {genes}" for name, genes in lacking)),
        genes=unique_labels(results[0].panel.names(), results[0].panel.gene_id, in_table),
        rows=pd.concat(rows, ignore_index=True),
        per_gene=pd.concat(per_gene, ignore_index=True),
        sections=tuple(results),
        training_runs=training_runs or {},
    )
    save_card(card, folder)
    return folder


def _section_result(name: str, genes: list[str]) -> "SectionResult":
    """56 spots in two bands that differ in every second gene; the prediction is worse from gene to gene."""
    from mclstexp.data.genes import GenePanel
    from mclstexp.data.measured import MeasuredSection
    from mclstexp.evaluation.sections import SectionResult

    rng = np.random.default_rng(0)
    xy_px = np.indices((7, 8)).reshape(2, -1).T[:, ::-1] * 100.0 + 250
    band = xy_px[:, 0] > 550
    truth = rng.gamma(2.0, size=(len(xy_px), len(genes))) + 6.0 * band[:, None] * (np.arange(len(genes)) % 2)
    truth[:, 6] = 0.0
    predicted = truth + np.linspace(0.1, 4.0, len(genes)) * rng.normal(size=truth.shape)
    labels = np.where(band, "cancer", "fat <&>").astype(object) if name == "S1" else np.full(len(xy_px), None)
    spots = np.array([f"spot{index}" for index in range(len(xy_px))], object)
    section = MeasuredSection(name, name[0], spots, 2 * xy_px, xy_px, labels, truth, truth.sum(axis=1))
    panel = GenePanel(tuple(genes), tuple(RESULT_GENES[gene] for gene in genes), tuple(genes))
    slide = np.full((100, 120, 3), (230, 200, 220), np.uint8)
    return SectionResult(section, panel, truth, predicted, slide, thumbnail_scale=10.0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints how many distinct bad or odd inputs the tests tried: each test marked `odd` tries one."""
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    tried = {report.nodeid for report in reports if report.when == "call" and "odd" in report.keywords}
    if tried:
        terminalreporter.write_line(f"{len(tried)} bad or odd inputs tried")
