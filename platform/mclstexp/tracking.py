"""Everything that talks to MLflow: runs, metrics, artifacts, and the registry of model versions.

Only drivers call it, and it never uses MLflow's global state: the tracking URI is always the configured one. Metrics
are sent in the background, so that a slow server cannot hold up training; the price is that some may be lost.
"""

import json
import logging
import os
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlflow
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, Schema

from mclstexp import storage
from mclstexp.config import Config, leaf_fields
from mclstexp.errors import ModelError, UserError
from mclstexp.settings import TrackingConfig

CHAMPION, CHALLENGER = "champion", "challenger"
"""Aliases of a registered model's best version and of the latest one that a sweep found."""
GENES = "genes.csv"
"""Artifact of a run: how far each gene of its model can be trusted."""
FLUSH_S, RETRY_S = 30.0, 2.0
_MAX_BATCH = 500  # MLflow takes at most 1000 metrics per request
_TRANSIENT = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"}
_PACKAGE = Path(__file__).parent
_MODEL_CODE = _PACKAGE / "model" / "pyfunc.py"
_SQLITE = "sqlite:///"
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
logging.getLogger("alembic").setLevel(logging.WARNING)
logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
log = logging.getLogger(__name__)


class MetricLog:
    """Sends metrics in the background: they wait while the server is away, training never does."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client, self._run_id = client, run_id
        self._waiting: list[Metric] = []
        self._lost = 0
        self._closing = self._given_up = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Adds the metrics of a step."""
        now = int(time.time() * 1000)
        with self._changed:
            self._waiting += [Metric(name, float(value), now, step) for name, value in metrics.items()]
            self._changed.notify()

    def close(self) -> None:
        """Waits up to `FLUSH_S` for unsent metrics and warns of lost ones."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(FLUSH_S)
        with self._changed:
            self._given_up = True
            lost = self._lost + len(self._waiting)
        if lost:
            log.warning("%d metric value(s) did not reach MLflow; training is not affected", lost)

    def _send(self) -> None:
        while batch := self._next_batch():
            try:
                self._client.log_batch(self._run_id, metrics=batch)
            except Exception as error:  # no fault of tracking may stop training
                if getattr(error, "error_code", "") in _TRANSIENT:  # a value sent twice is kept once
                    time.sleep(RETRY_S)
                    continue
                self._lost += len(batch)
            with self._changed:
                del self._waiting[: len(batch)]

    def _next_batch(self) -> list[Metric]:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            return [] if self._given_up else self._waiting[:_MAX_BATCH]


def start_run(config: Config, name: str, tags: Mapping[str, str], recorded: str | None = None) -> str:
    """Starts an MLflow run with all settings as parameters and returns its id.

    `recorded` is the id of an earlier run to continue: it is returned, unless the tracking store answers that it has no
    such run (`tracking.uri` may have changed).

    Raises:
        UserError: the tracking server cannot be reached.
    """
    if recorded is not None and _has_run(_client(config.tracking), recorded):
        return recorded
    tree = config.model_dump(mode="json")
    params = [Param(key, str(tree[key.partition(".")[0]][key.partition(".")[2]])) for key in leaf_fields()]
    with _reachable(config.tracking):
        client = _client(config.tracking)
        run = client.create_run(_experiment(client, config.tracking), run_name=name, tags=dict(tags))
        client.log_batch(run.info.run_id, params=params)
    return str(run.info.run_id)


def finish_run(config: TrackingConfig, run_id: str, status: str = "FINISHED", tags: Mapping[str, str] = {}) -> None:
    """Marks a run as finished (or `KILLED`, `FAILED`), after setting tags.

    Raises:
        UserError: the tracking server cannot be reached.
    """
    with _reachable(config):
        for key, value in tags.items():
            _client(config).set_tag(run_id, key, value)
        _client(config).set_terminated(run_id, status)


def log_artifacts(config: TrackingConfig, run_id: str, folder: str, artifact_path: str) -> None:
    """Uploads a local folder's files to a run.

    Raises:
        UserError: the tracking server or its artifact store cannot be reached.
    """
    with _reachable(config):
        _client(config).log_artifacts(run_id, folder, artifact_path)


def log_trust(config: TrackingConfig, run_id: str, genes: pa.Table) -> None:
    """Logs how far each gene of a model can be trusted, as `genes.csv`, and the metric `trusted_genes`.

    Args:
        config: where the run is.
        run_id: the run that trained the model.
        genes: as `Calibration.genes` returns it.

    Raises:
        UserError: the tracking server or its artifact store cannot be reached.
    """
    with _reachable(config):
        _client(config).log_text(run_id, genes.to_pandas().to_csv(index=False), GENES)
        _client(config).log_metric(run_id, "trusted_genes", float(sum(genes["trusted"].to_pylist())))


def curves(config: TrackingConfig, run_id: str, names: Sequence[str] = ("loss", "spots_per_s")) -> pd.DataFrame:
    """Returns a training run's metrics, one row per logged step: `step`, then `names`. Empty for an unknown run.

    Raises:
        UserError: the tracking server cannot be reached.
    """
    _require_file(config, f"run {run_id}")
    with _reachable(config):
        history = {name: _client(config).get_metric_history(run_id, name) for name in names}
    found = {name: {metric.step: metric.value for metric in metrics} for name, metrics in history.items()}
    return pd.DataFrame(found, dtype=float).rename_axis("step").reset_index()


def metric_log(config: TrackingConfig, run_id: str) -> MetricLog:
    """Returns the log of a run's metrics; close it at the end."""
    return MetricLog(_client(config), run_id)


def register(config: TrackingConfig, run_id: str, model_folder: str, tags: Mapping[str, str]) -> str:
    """Registers a model folder as a new version of `model_name` and returns the version's number.

    A run has one version, however often this is called. The first version of a name becomes `champion`. The run gets
    what a calibrated model knows of its genes (`log_trust`).
    """
    client, name = _client(config), config.model_name
    with _reachable(config):
        known = client.search_model_versions(f"name = '{name}'")
        version = next((version for version in known if version.run_id == run_id), None)
        if version is None:
            _create_name(client, name)
            if (trust := Path(model_folder, "trust.parquet")).is_file():
                log_trust(config, run_id, pq.ParquetFile(trust).read())
            source = _upload(client, run_id, model_folder)
            version = client.create_model_version(name, source, run_id, tags=dict(tags))
        # A driver killed right after it created the first version leaves it without an alias.
        if int(version.version) == 1 and not client.get_registered_model(name).aliases:
            client.set_registered_model_alias(name, CHAMPION, version.version)
    return str(version.version)


def set_alias(config: TrackingConfig, version: str, alias: str) -> None:
    """Points an alias of `model_name` to a version.

    Raises:
        UserError: the tracking server cannot be reached, or there is no such version.
    """
    with _reachable(config):
        _client(config).set_registered_model_alias(config.model_name, alias, version)


def version_of(config: TrackingConfig, alias: str) -> str | None:
    """Returns the number of the version of `model_name` with an alias, if there is one.

    Raises:
        UserError: the tracking server cannot be reached.
    """
    with _reachable(config):
        models = _client(config).search_registered_models(f"name = '{config.model_name}'")
        aliases = _client(config).get_registered_model(config.model_name).aliases if models else {}
    return str(aliases[alias]) if alias in aliases else None  # SQLite gives a number, a server a text


def tag_version(config: TrackingConfig, model_uri: str, tags: Mapping[str, str]) -> str | None:
    """Sets tags on a registered version and returns its run's id; None if the URI is a folder.

    Raises:
        ModelError: there is no such version.
        UserError: the tracking server cannot be reached.
    """
    if not model_uri.startswith("models:/"):
        return None
    version = _find(config, model_uri)
    with _reachable(config):
        for key, value in tags.items():
            _client(config).set_model_version_tag(version.name, version.version, key, value)
    return str(version.run_id)


def fetch_model(config: TrackingConfig, model_uri: str, scratch: str) -> str:
    """Returns a local folder with a model version's files.

    Args:
        config: where the registry is.
        model_uri: models:/NAME@ALIAS, models:/NAME/VERSION, or a local folder.
        scratch: an existing local folder to download into.

    Raises:
        ModelError: there is no such model, version or alias; lists the existing ones.
        UserError: the tracking server or its artifact store cannot be reached.
    """
    if not model_uri.startswith("models:/"):
        if storage.is_s3(model_uri):
            return _download_folder(model_uri, scratch)
        return storage.absolute(model_uri)
    version = _find(config, model_uri)
    with _reachable(config):
        source = _client(config).get_model_version_download_uri(version.name, version.version)
        folder = mlflow.artifacts.download_artifacts(
            artifact_uri=f"{source}/artifacts/version", dst_path=scratch, tracking_uri=config.uri
        )
    return str(folder)


@contextmanager
def _reachable(config: TrackingConfig) -> Iterator[None]:
    """Raises errors of MLflow and its artifact stores as a UserError that names the setting."""
    try:
        yield
    except (MlflowException, BotoCoreError, Boto3Error, ClientError, OSError) as error:
        raise UserError(
            f"tracking.uri={config.uri} cannot be used: {error}; fix it and run the same command again"
        ) from error


def _client(config: TrackingConfig) -> MlflowClient:
    if (database := _database(config)) is not None:
        database.parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=config.uri, registry_uri=config.uri)


def _database(config: TrackingConfig) -> Path | None:
    """Returns the absolute path of the SQLite file; None if the URI is a server's."""
    return Path(config.uri.removeprefix(_SQLITE)).absolute() if config.uri.startswith(_SQLITE) else None


def _has_run(client: MlflowClient, run_id: str) -> bool:
    """Returns False only if the store answers that it has no such run; True while it cannot be reached."""
    try:
        client.get_run(run_id)
    except MlflowException as error:
        return bool(error.error_code != "RESOURCE_DOES_NOT_EXIST")
    return True


def _experiment(client: MlflowClient, config: TrackingConfig) -> str:
    found = client.get_experiment_by_name(config.experiment)
    if found is not None:
        return str(found.experiment_id)
    artifacts = config.artifacts and storage.absolute(config.artifacts)
    if artifacts is None and (database := _database(config)) is not None:
        artifacts = str(database.parent / "mlartifacts")
    try:
        return str(client.create_experiment(config.experiment, artifact_location=artifacts))
    except MlflowException:
        existing = client.get_experiment_by_name(config.experiment)  # another driver may just have created it
        if existing is None:
            raise
        return str(existing.experiment_id)


def _create_name(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _upload(client: MlflowClient, run_id: str, model_folder: str) -> str:
    """Stores the folder as a pyfunc from code among the run's artifacts, and returns its URI."""
    with tempfile.TemporaryDirectory() as scratch:
        packed, version = f"{scratch}/packed", f"{scratch}/version"
        shutil.copytree(model_folder, version)  # MLflow keeps an artifact under its folder's name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # MLflow asks for examples and type hints
            _save_pyfunc(packed, version)
        client.log_artifacts(run_id, packed, "model")
    return f"{client.get_run(run_id).info.artifact_uri}/model"


def _save_pyfunc(target: str, version: str) -> None:
    mlflow.pyfunc.save_model(
        target,
        python_model=str(_MODEL_CODE),
        artifacts={"version": version},
        signature=ModelSignature(inputs=_inputs(version)),
        code_paths=[str(_PACKAGE)],
        pip_requirements=[
            "torch",
            "torchvision",
            "timm",
            "safetensors",
            "huggingface_hub",
            "simplejpeg",
            "pyarrow",
            "pydantic",
            "ray[data]",
            "scipy",
        ],
    )


def _inputs(version: str) -> Schema:
    """Returns the columns that a model version takes: an image for each view of a spot, and perhaps its place."""
    record = json.loads(Path(version, "model.json").read_text())
    views = record["config"]["model"].get("image_views", ["image"])
    places = {"x_um": "double", "y_um": "double", "slide_id": "string"}
    columns = [ColSpec("binary", view) for view in views]
    columns += [ColSpec(kind, name, required=False) for name, kind in places.items()]
    return Schema([*columns])


def _find(config: TrackingConfig, model_uri: str) -> mlflow.entities.model_registry.ModelVersion:
    """Returns the registered version of a models:/ URI."""
    _require_file(config, model_uri)
    client, path = _client(config), model_uri.removeprefix("models:/")
    name, at, alias = path.partition("@")
    try:
        if at:
            return client.get_model_version_by_alias(name, alias)
        name, _, number = path.partition("/")
        return client.get_model_version(name, number)
    except MlflowException as error:
        with _reachable(config):
            registered = _registered(client, name)
        raise ModelError(f"there is no {model_uri} at tracking.uri={config.uri}; {registered}") from error


def _require_file(config: TrackingConfig, what: str) -> None:
    """Checks that an SQLite database exists: MLflow would create an empty one for a mistyped name."""
    database = _database(config)
    if database is not None and not database.is_file():
        raise ModelError(f"there is no {what}: tracking.uri={config.uri} names no file; give that of the training")


def _registered(client: MlflowClient, name: str) -> str:
    """Returns a clause on the versions of a name or, if it has none, on the names."""
    versions = client.search_model_versions(f"name = '{name}'")
    if versions:
        numbers = ", ".join(sorted((str(version.version) for version in versions), key=int))
        return f"{name} has the versions {numbers}"
    names = [model.name for model in client.search_registered_models()]
    return f"the models are {', '.join(names)}" if names else "no model is registered; train one first"


def _download_folder(uri: str, scratch: str) -> str:
    """Copies the files of a model folder in object storage into `scratch`, and returns it."""
    for file in storage.list_files(uri):
        storage.download(file, Path(scratch, file.rsplit("/", 1)[1]))
    return scratch
