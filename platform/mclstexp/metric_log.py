"""Metrics on their way to MLflow, in a thread, so that a slow or dead server holds up no training."""

import logging
import threading
import time

from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

FLUSH_S, RETRY_S = 30.0, 2.0
_BATCH = 500  # MLflow takes at most 1000 metrics a request
_PASSING = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"}
log = logging.getLogger(__name__)


class MetricLog:
    """Sends metrics in the background: kept while the server is away, never waited for in training."""

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
        """Waits up to half a minute for what is under way and warns of what was lost."""
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
            except Exception as error:  # whatever happens to metrics, training goes on
                if getattr(error, "error_code", "") in _PASSING:  # MLflow keeps one of what is sent twice
                    time.sleep(RETRY_S)
                    continue
                self._lost += len(batch)
            with self._changed:
                del self._waiting[: len(batch)]

    def _next_batch(self) -> list[Metric]:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            return [] if self._given_up else self._waiting[:_BATCH]
