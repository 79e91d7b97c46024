"""Tracking: runs, metrics and the registry, with servers that fail, killed drivers and artifacts in object storage."""

import json
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from random_version import random_version

from mclstexp import storage, tracking
from mclstexp.config import Config, override
from mclstexp.errors import ConfigError, ModelError, UserError
from mclstexp.model.version import ModelVersion

SETTINGS = {"model.image_encoder": "small_cnn", "model.spot_width": 16, "model.spot_layers": 1, "retrieval.k": 5}


def _save_version(folder: Path) -> ModelVersion:
    version = random_version()
    folder.mkdir()
    version.save(folder)
    return version


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """Returns settings with a database in its own folder, and that folder, with a model version in `version`."""
    folder = tmp_path_factory.mktemp("tracking")
    _save_version(folder / "version")
    return override(Config(), SETTINGS | {"tracking.uri": f"sqlite:///{folder}/mlflow.db"}), folder


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, list[str], Path]:
    """Returns the settings of a registry with two runs, the runs' ids and a folder to register."""
    path = tmp_path_factory.mktemp("registry")
    config = override(Config(), SETTINGS | {"tracking.uri": f"sqlite:///{path}/mlflow.db"})
    folder = path / "version"
    folder.mkdir()
    random_version().save(folder)
    runs = [tracking.start_run(config, name, {"a": "b"}) for name in ("first", "second")]
    log = tracking.metric_log(config.tracking, runs[0])
    for step in range(5):
        log.log(step, {"loss": 5.0 - step})
    log.close()
    return config, runs, folder


class _Server(BaseHTTPRequestHandler):
    """Answers log-batch as MLflow does: 503 while it is `away`, an error of its own for the metric `poison`."""

    away = True
    received: list[tuple[str, int]] = []  # noqa: RUF012
    wait_s = 0.0

    def do_POST(self) -> None:
        metrics = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["metrics"]
        time.sleep(self.wait_s)
        code, answer = 200, {}
        if self.away:
            code, answer = 503, {"error_code": "TEMPORARILY_UNAVAILABLE", "message": "away"}
        elif any(metric["key"] == "poison" for metric in metrics):
            code, answer = 400, {"error_code": "INVALID_PARAMETER_VALUE", "message": "no such metric"}
        else:
            self.received.extend((metric["key"], int(metric.get("step", 0))) for metric in metrics)
        body = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[type[_Server], Config]]:
    handler = type("Handler", (_Server,), {"received": []})
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "RETRY_S", 0.1)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield handler, override(Config(), {"tracking.uri": f"http://127.0.0.1:{http.server_port}"})
        http.shutdown()


def test_metrics_arrive_when_the_server_is_back(
    server: tuple[type[_Server], Config], caplog: pytest.LogCaptureFixture
) -> None:
    handler, config = server
    log = tracking.metric_log(config.tracking, "run")
    for step in range(10):
        log.log(step, {"loss": 1.0})
    time.sleep(0.3)
    assert handler.received == [], "the server must have been away"
    handler.away = False
    log.log(10, {"loss": 1.0})
    with caplog.at_level(logging.WARNING):
        log.close()
    assert handler.received == [("loss", step) for step in range(11)]
    assert not caplog.records


def test_a_server_that_stays_away_costs_a_limited_wait_and_is_reported(
    server: tuple[type[_Server], Config], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, config = server
    monkeypatch.setattr(tracking, "FLUSH_S", 0.5)
    log = tracking.metric_log(config.tracking, "run")
    for step in range(7):
        log.log(step, {"loss": 1.0, "seconds": 2.0})
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        log.close()
    assert time.monotonic() - started < 5
    assert "14 metric value(s) did not reach MLflow" in caplog.text
    log._thread.join(5)
    assert not log._thread.is_alive(), "a log that gave up must not go on sending"


def test_a_slow_server_does_not_delay_training(server: tuple[type[_Server], Config]) -> None:
    handler, config = server
    handler.away, handler.wait_s = False, 0.3
    log = tracking.metric_log(config.tracking, "run")
    started = time.monotonic()
    for step in range(200):
        log.log(step, {"loss": 1.0})
    assert time.monotonic() - started < 5  # one by one it would be a minute
    log.close()
    assert sorted(handler.received) == [("loss", step) for step in range(200)]


def test_a_metric_that_the_server_refuses_does_not_delay_others(
    server: tuple[type[_Server], Config], caplog: pytest.LogCaptureFixture
) -> None:
    handler, config = server
    handler.away = False
    log = tracking.metric_log(config.tracking, "run")
    log.log(0, {"poison": 1.0})
    deadline = time.monotonic() + 30
    while not log._lost and time.monotonic() < deadline:
        time.sleep(0.02)
    log.log(1, {"loss": 1.0})
    with caplog.at_level(logging.WARNING):
        log.close()
    assert handler.received == [("loss", 1)]
    assert "1 metric value(s) did not reach MLflow" in caplog.text


@pytest.mark.slow
def test_a_driver_killed_before_the_alias_was_set_gets_it_when_run_again(
    tracked: tuple[Config, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config, folder = tracked
    named = override(config, {"tracking.model_name": "killed"}).tracking
    run_id = tracking.start_run(config, "killed", {})

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", killed)
        with pytest.raises(KeyboardInterrupt):
            tracking.register(named, run_id, str(folder / "version"), {})
    assert tracking.register(named, run_id, str(folder / "version"), {}) == "1"
    fetched = tracking.fetch_model(named, "models:/killed@champion", str(tmp_path))
    assert ModelVersion.load(fetched).digest == ModelVersion.load(folder / "version").digest


def test_a_champion_chosen_by_hand_is_left_alone(tracked: tuple[Config, Path]) -> None:
    config, folder = tracked
    named = override(config, {"tracking.model_name": "chosen"}).tracking
    first, second = (tracking.start_run(config, name, {}) for name in ("one", "two"))
    for run_id in (first, second):
        tracking.register(named, run_id, str(folder / "version"), {})
    MlflowClient(named.uri).set_registered_model_alias("chosen", "champion", "2")
    tracking.register(named, first, str(folder / "version"), {})
    assert MlflowClient(named.uri).get_model_version_by_alias("chosen", "champion").version == 2


def test_nothing_is_written_into_the_working_folder(
    tracked: tuple[Config, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config, folder = tracked
    work, scratch = tmp_path / "work", tmp_path / "scratch"
    work.mkdir()
    scratch.mkdir()
    monkeypatch.chdir(work)
    named = override(config, {"tracking.model_name": "tidy"}).tracking
    run_id = tracking.start_run(config, "tidy", {})
    tracking.register(named, run_id, str(folder / "version"), {})
    tracking.fetch_model(named, "models:/tidy/1", str(scratch))
    tracking.finish_run(named, run_id)
    assert list(work.iterdir()) == []


def test_all_settings_are_logged_and_none_is_a_secret(
    tracked: tuple[Config, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = tracked
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    run = MlflowClient(config.tracking.uri).get_run(tracking.start_run(config, "settings", {"protocol": "patient"}))
    assert run.data.params["model.spot_width"] == "16"
    assert len(run.data.params) == sum(len(section) for section in config.model_dump().values())
    assert run.data.tags["protocol"] == "patient"
    assert "very-secret" not in str(run.to_dictionary())


@pytest.mark.slow
def test_artifacts_and_versions_live_in_object_storage(s3: str, tmp_path: Path) -> None:
    """MLflow finds the S3 server by the standard AWS variables alone."""
    saved = _save_version(tmp_path / "version")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    config = override(
        Config(), {"tracking.uri": f"sqlite:///{tmp_path}/mlflow.db", "tracking.artifacts": f"{s3}/artifacts"}
    )
    run_id = tracking.start_run(config, "s3", {})
    assert tracking.register(config.tracking, run_id, str(tmp_path / "version"), {}) == "1"
    tracking.log_artifacts(config.tracking, run_id, str(tmp_path / "version"), "again")
    fetched = tracking.fetch_model(config.tracking, "models:/mclstexp@champion", str(scratch))
    assert ModelVersion.load(fetched).digest == saved.digest
    stored = storage.list_files(f"{s3}/artifacts")
    assert any(uri.endswith("/again/model.json") for uri in stored)
    assert not any("__pycache__" in uri for uri in stored)
    assert not (tmp_path / "mlartifacts").exists()


def test_a_model_folder_may_be_in_object_storage(s3: str, tmp_path: Path) -> None:
    saved = _save_version(tmp_path / "version")
    for path in (tmp_path / "version").iterdir():
        storage.upload(path, f"{s3}/run/model/{path.name}")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    fetched = tracking.fetch_model(Config().tracking, f"{s3}/run/model", str(scratch))
    assert ModelVersion.load(fetched).digest == saved.digest


def test_an_unreachable_server_is_a_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = override(Config(), {"tracking.uri": "http://127.0.0.1:9"})
    with pytest.raises(UserError, match=r"tracking\.uri=http://127\.0\.0\.1:9 cannot be used"):
        tracking.start_run(config, "none", {})
    with pytest.raises(UserError, match=r"tracking\.uri=http://127\.0\.0\.1:9 cannot be used"):
        tracking.fetch_model(config.tracking, "models:/mclstexp@champion", "unused")
    with pytest.raises(UserError, match=r"tracking\.uri=http://127\.0\.0\.1:9 cannot be used"):
        tracking.log_artifacts(config.tracking, "0" * 32, ".", "none")


def test_looking_into_a_mistyped_database_does_not_create_it(tmp_path: Path) -> None:
    config = override(Config(), {"tracking.uri": f"sqlite:///{tmp_path}/mlfow.db"})
    with pytest.raises(ModelError, match=r"mlfow\.db names no file"):
        tracking.fetch_model(config.tracking, "models:/mclstexp@champion", str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("uri", ["models:/none@champion", "models:/none/1", "models:/none"])
def test_an_unknown_model_is_a_users_error(tracked: tuple[Config, Path], uri: str, tmp_path: Path) -> None:
    config, _ = tracked
    with pytest.raises(ModelError, match=f"there is no {uri} at"):
        tracking.fetch_model(config.tracking, uri, str(tmp_path))


@pytest.mark.parametrize("setting", ["tracking.uri", "storage.endpoint_url"])
def test_a_password_in_an_address_is_refused_and_not_repeated(setting: str) -> None:
    with pytest.raises(ConfigError, match="contains a password") as refused:
        override(Config(), {setting: "https://me:hunter2@server.example"})
    assert "hunter2" not in str(refused.value)
    assert override(Config(), {"tracking.uri": "https://server.example:5000"}).tracking.uri.endswith(":5000")


def test_curves_are_the_logged_metrics_by_step(tracked: tuple[Config, Path]) -> None:
    config, _ = tracked
    run_id = tracking.start_run(config, "curves", {})
    metrics = tracking.metric_log(config.tracking, run_id)
    for step in (10, 5, 20):
        metrics.log(step, {"loss": 1.0 / step, "epoch": 0.0} | ({"spots_per_s": 3.0} if step > 5 else {}))
    metrics.close()
    curves = tracking.curves(config.tracking, run_id).sort_values("step")
    assert curves["step"].tolist() == [5, 10, 20]
    assert curves["loss"].tolist() == [0.2, 0.1, 0.05]
    np.testing.assert_array_equal(curves["spots_per_s"], [np.nan, 3.0, 3.0])
    assert tracking.curves(config.tracking, "0" * 32).empty


def test_curves_create_no_database_and_name_the_missing_one(tmp_path: Path) -> None:
    config = override(Config(), {"tracking.uri": f"sqlite:///{tmp_path}/none.db"})
    with pytest.raises(UserError, match=r"no run abc: tracking.uri=.*none.db names no file"):
        tracking.curves(config.tracking, "abc")
    assert list(tmp_path.iterdir()) == []


def test_a_run_registers_once_and_the_first_version_is_champion(
    registry: tuple[Config, list[str], Path], tmp_path: Path
) -> None:
    config, (first, second), folder = registry
    register = [tracking.register(config.tracking, run, str(folder), {}) for run in (first, first, second, second)]
    assert register == ["1", "1", "2", "2"]
    champion = tracking.fetch_model(config.tracking, "models:/mclstexp@champion", str(tmp_path))
    assert ModelVersion.load(champion).digest == ModelVersion.load(folder).digest
    assert tracking.tag_version(config.tracking, "models:/mclstexp@champion", {"score": "1"}) == first
    for uri, hint in (
        ("models:/mclstexp@best", "has the versions 1, 2"),
        ("models:/mclstexp/3", "has the versions 1, 2"),
        ("models:/other@champion", "the models are mclstexp"),
    ):
        with pytest.raises(ModelError, match=hint):
            tracking.fetch_model(config.tracking, uri, str(tmp_path))


def test_metrics_and_parameters_reach_mlflow(registry: tuple[Config, list[str], Path]) -> None:
    config, (first, _), _ = registry
    client = MlflowClient(config.tracking.uri)
    history = client.get_metric_history(first, "loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(step, 5.0 - step) for step in range(5)]
    assert client.get_run(first).data.params["model.image_encoder"] == "small_cnn"


def test_a_dead_server_does_not_delay_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "FLUSH_S", 1.0)
    config = override(Config(), {"tracking.uri": "http://127.0.0.1:9"})
    log = tracking.metric_log(config.tracking, "no-run")
    started = time.monotonic()
    for step in range(100):
        log.log(step, {"loss": 1.0})
    assert time.monotonic() - started < 5
    log.close()
