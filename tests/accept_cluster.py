"""Jobs submitted to a real Ray cluster of two node processes that know nothing of the checkout.

Each node has a home, a working folder, a Ray folder and an environment of its own: the head's has the dependencies
only, the other's an old copy of the project too, which fails when it is imported. Data, checkpoints, models and
predictions are on the S3 server, runs on an MLflow server, and nothing is done without the token.
"""

import json
import os
import secrets
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path

import psutil
import pytest

from mclstexp import storage
from mclstexp.data.schema import load_manifest

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parents[1]
TINY = str(Path("tests") / "tiny.yaml")
SHIPPED = ("mclstexp", "ingest", "tuning")
PREPARE, TRAIN, TUNE, PREDICT = (f"jobs/{verb}.py" for verb in ("prepare", "train", "tune", "predict"))


@dataclass(frozen=True)
class Job:
    """The end of a submitted job."""

    succeeded: bool
    output: str


@dataclass(frozen=True)
class Cluster:
    """How to reach the two nodes."""

    pythons: dict[str, str]
    """Each node's interpreter."""
    dashboard: str
    environment: dict[str, str]

    def submit(self, *job: str) -> Job:
        """Submits the checkout with an entry point and waits for its end.

        The end is polled for: the command itself waits some seconds more.
        """
        name = f"job-{secrets.token_hex(4)}"
        command = [self.pythons["head"], "-m", "ray.scripts.scripts", "job", "submit", "--address", self.dashboard]
        submitted = subprocess.run(
            [*command, "--no-wait", "--submission-id", name, "--working-dir", str(ROOT), *job],
            env=self.environment,
            cwd=self.environment["HOME"],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=300,
        )
        assert submitted.returncode == 0, submitted.stdout
        deadline = time.monotonic() + 900
        while (status := self._get(f"jobs/{name}")["status"]) in ("PENDING", "RUNNING"):
            assert time.monotonic() < deadline, self._get(f"jobs/{name}/logs")["logs"]
            time.sleep(0.3)
        return Job(status == "SUCCEEDED", self._get(f"jobs/{name}/logs")["logs"])

    def _get(self, path: str) -> dict:
        with _open(f"{self.dashboard}/api/{path}", self.environment["RAY_AUTH_TOKEN"]) as answer:
            return json.load(answer)

    def listed(self, kind: str) -> list[dict]:
        """Returns what Ray's state API lists: `nodes` or `actors`."""
        return self._get(f"v0/{kind}?limit=1000&detail=true")["data"]["result"]["result"]


@pytest.fixture(scope="module")
def cluster(_s3_server: str) -> Iterator[Cluster]:
    port, dashboard, token = _free_port(), _free_port(), secrets.token_hex(32)
    head = ["--head", f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
    head += [f"--ray-client-server-port={_free_port()}"]
    with tempfile.TemporaryDirectory(prefix="nodes-") as folder, ExitStack() as running:  # a short path, for sockets
        pythons = {
            "head": _interpreter(Path(folder, "bare"), installed=()),
            "worker": _interpreter(Path(folder, "old"), installed=SHIPPED),
        }
        user = _node_environment(Path(folder, "user"), pythons["head"], token)
        found = Cluster(pythons, f"http://127.0.0.1:{dashboard}", user)
        for name, options in (("head", head), ("worker", [f"--address=127.0.0.1:{port}"])):
            home = Path(folder, name)
            environment = _node_environment(home, pythons[name], token)
            running.enter_context(_started(_node(pythons[name], home, options), home, environment))
            _wait_for(f"{found.dashboard}/api/version", token, home / "log")
        _wait_for_nodes(found, 2)
        yield found


@pytest.fixture(scope="module")
def mlflow_server(_s3_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder, port = tmp_path_factory.mktemp("mlflow"), _free_port()
    command = [sys.executable, "-m", "mlflow", "server", f"--backend-store-uri=sqlite:///{folder}/mlflow.db"]
    command += ["--host=127.0.0.1", f"--port={port}", "--workers=1", "--no-serve-artifacts"]
    command += [f"--default-artifact-root={folder}/unused"]
    environment = dict(os.environ) | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # six processes of no use here
    with _started(command, folder, environment):
        _wait_for(f"http://127.0.0.1:{port}/health", None, folder / "log")
        yield f"http://127.0.0.1:{port}"


@pytest.mark.parametrize(("token", "status"), [(None, 401), ("0" * 64, 403)], ids=["none", "wrong"])
def test_without_the_token_nothing_is_submitted(cluster: Cluster, token: str | None, status: int) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        _open(f"{cluster.dashboard}/api/jobs/", token, {"entrypoint": "echo intruder"})
    assert refused.value.code == status
    with _open(f"{cluster.dashboard}/api/jobs/", cluster.environment["RAY_AUTH_TOKEN"]) as jobs:
        assert "intruder" not in jobs.read().decode()


@pytest.mark.parametrize(
    ("node", "message"), [("head", "No module named 'mclstexp'"), ("worker", "the old copy was imported")]
)
def test_the_nodes_do_not_know_the_checkout(cluster: Cluster, node: str, message: str) -> None:
    command = [cluster.pythons[node], "-c", "import ray, mclstexp"]
    tried = subprocess.run(command, cwd="/", env=cluster.environment, capture_output=True, text=True)
    assert message in tried.stderr


def test_what_one_node_alone_can_see_is_refused(cluster: Cluster) -> None:
    job = cluster.submit("--", "python", TRAIN, "--config", TINY, "--data", "/data/tiles", "--out", "s3://bucket/runs")
    assert not job.succeeded
    assert (
        "error: the cluster has 2 nodes, but only one node can see --data /data/tiles, "
        "tracking.uri=sqlite:///mlflow.db; use s3:// and an MLflow server, or storage.shared_paths=true"
    ) in job.output


def test_prepare_train_tune_and_predict_on_s3(cluster: Cluster, s3: str, cohort: str, mlflow_server: str) -> None:
    for file in Path(cohort).parent.iterdir():
        storage.upload(file, f"{s3}/cohort/{file.name}")
    tracking = ["--tracking.uri", mlflow_server, "--tracking.artifacts", f"{s3}/artifacts"]
    prepared = cluster.submit(
        "--", "python", PREPARE, "--config", TINY, "--samples", f"{s3}/cohort/samples.csv", "--out", f"{s3}/tiles"
    )
    assert prepared.succeeded, prepared.output
    assert len(load_manifest(f"{s3}/tiles").sections) == 7

    workers = ["--train.num_workers", "2", "--train.cpus_per_worker", "2"]  # three CPUs a node: one worker on each
    data = ["--data", f"{s3}/tiles", "--out", f"{s3}/runs", "--name", "first"]
    trained = cluster.submit("--", TRAIN, "--config", TINY, *data, *workers, *tracking)  # the short form: no "python"
    assert trained.succeeded, trained.output
    assert "model version models:/mclstexp/1" in trained.output
    assert storage.exists(f"{s3}/runs/first/model/files.json")
    workers_at = [actor["node_id"] for actor in cluster.listed("actors") if "RayTrainWorker" in actor["class_name"]]
    assert len(workers_at) == len(set(workers_at)) == 2

    searched = ["--space", "tests/tiny_space.yaml", "--search", "optuna", "--trials", "1"]
    searched += ["--split.validation_patients", "P2"]
    data = ["--data", f"{s3}/tiles", "--out", f"{s3}/sweeps", "--name", "first", "--train.epochs", "1"]
    tuned = cluster.submit("--", TUNE, "--config", TINY, *data, *searched, *tracking)
    assert tuned.succeeded, tuned.output
    assert f"best settings {s3}/sweeps/first/best.yaml" in tuned.output
    rows = storage.read(f"{s3}/sweeps/first/trials.csv").decode().splitlines()[1:]
    assert sorted(row.split(",")[1:3] for row in rows) == [["finished", "1"]]

    arguments = ["--model", "models:/mclstexp@champion", "--samples", f"{s3}/cohort", "--out", f"{s3}/predictions"]
    predicted = cluster.submit("--", "python", PREDICT, *arguments, *tracking)
    assert predicted.succeeded, predicted.output
    ledger = [json.loads(storage.read(uri)) for uri in storage.list_files(f"{s3}/predictions/ledger")]
    assert [entry["state"] for entry in ledger] == ["done"] * 7
    assert all(storage.exists(f"{s3}/predictions/{entry['slide_id']}.parquet") for entry in ledger)
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    assert all(secret not in job.output for job in (prepared, trained, tuned, predicted))


def _interpreter(folder: Path, installed: Sequence[str]) -> str:
    """Makes an environment of the dependencies and old copies of `installed`, and returns its Python.

    A .pth file that is found through another is not read, so that an editable install of the checkout stays unseen.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for name in installed:
        (packages / f"{name}.py").write_text("raise ImportError('the old copy was imported')\n")
    return str(folder / "bin" / "python")


def _node_environment(home: Path, python: str, token: str) -> dict[str, str]:
    home.mkdir()
    passed = {name: value for name, value in os.environ.items() if name.startswith("AWS_") or name == "LANG"}
    return passed | {
        "HOME": str(home),
        "PATH": f"{Path(python).parent}:/usr/bin:/bin",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_prestart_worker_first_driver": "0",  # idle processes without the project, which no job can use
    }


def _node(python: str, home: Path, options: list[str]) -> list[str]:
    return [
        *(python, "-m", "ray.scripts.scripts", "start", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=3"),
        "--include-log-monitor=false",
        *(f"--object-store-memory={200 * 2**20}", f"--temp-dir={home}/r", *options),
        f"--dashboard-agent-listen-port={_free_port()}",
    ]


@contextmanager
def _started(command: list[str], home: Path, environment: dict[str, str]) -> Iterator[None]:
    """Runs a server in its home; at the end kills it and all its descendants."""
    with open(home / "log", "w") as log:
        server = subprocess.Popen(command, cwd=home, env=environment, stdout=log, stderr=log)
    try:
        yield
    finally:
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        server.wait()
        psutil.wait_procs(family, timeout=10)


def _open(url: str, token: str | None, body: dict | None = None) -> HTTPResponse:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url, data, headers | {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=10)


def _wait_for(url: str, token: str | None, log: Path) -> None:
    deadline = time.monotonic() + 300
    while True:
        try:
            _open(url, token).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"{url} did not answer:\n{log.read_text()[-2000:]}"
            time.sleep(0.2)


def _wait_for_nodes(cluster: Cluster, count: int) -> None:
    deadline = time.monotonic() + 240
    while sum(node["state"] == "ALIVE" for node in cluster.listed("nodes")) < count:
        assert time.monotonic() < deadline, "the second node did not join"
        time.sleep(0.3)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
