"""A training worker that dies of memory is one sentence that names the setting."""

import errno
import os
import signal
from pathlib import Path

import pytest
import ray.train
import torch
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError
from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from mclstexp.config import Config, override
from mclstexp.errors import RunError, TableError
from mclstexp.training.failures import against_memory, cause_of

FROZEN = override(Config(), {"model.batch_norm": "frozen", "train.max_failures": 0})


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.ray
def test_a_worker_that_is_killed_is_one_sentence_with_the_setting(ray_session: None, tmp_path: Path) -> None:
    assert str(cause_of(_failure(_killed, tmp_path), FROZEN)) == (
        "training failed (train.max_failures=0 restarts allowed): a worker was killed from outside, as the system does "
        "when memory runs out, or crashed; set train.micro_batch below the run's metric micro_batch (to 16 if it has "
        "none), or lower train.batch_sentences=4"
    )


def test_memory_that_torch_cannot_get_is_one_sentence_with_the_setting() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**46)
    text = str(cause_of(WorkerGroupError("a page", {0: caught.value}), FROZEN))
    assert text.endswith("a worker's node has too little memory; " + against_memory(FROZEN))


def test_what_is_no_lack_of_memory_is_told_as_ray_tells_it() -> None:
    error = WorkerGroupError("KeyError: 'gene'", {0: KeyError("gene")})
    assert "KeyError: 'gene'" in str(cause_of(error, FROZEN))
    assert "micro_batch" not in str(cause_of(error, FROZEN))


def _failure(work: object, folder: Path) -> ray.train.TrainingFailedError:
    """Returns the error of a run whose only worker does this."""
    trainer = TorchTrainer(
        work,  # type: ignore[arg-type]
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(name="run", storage_path=str(folder), failure_config=FailureConfig(max_failures=0)),
    )
    with pytest.raises(ray.train.TrainingFailedError) as caught:
        trainer.fit()
    return caught.value


@pytest.mark.parametrize(
    ("cause", "text"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            "GPU has too little memory; set",
        ),
        (OutOfMemoryError("page"), "Ray killed a worker because its node ran out of memory; set train.micro_batch"),
        (MemoryError(), "a worker's node has too little memory; set train.micro_batch"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "a worker's node has too little memory"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors"), "a worker's GPU has too little memory"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "a worker's GPU has too little memory"),
        (RunError("the loss is nan at step 3"), "the loss is nan at step 3"),
        (RayTaskError("read", "Traceback of a page", TableError("tile 3 is damaged")), "tile 3 is damaged"),
        (
            RayTaskError("read", "Traceback of a page", TableError("tile 3 is damaged")).as_instanceof_cause(),
            "tile 3 is damaged",
        ),
    ],
)
def test_the_worker_that_failed_first_in_kind_is_named(cause: Exception, text: str) -> None:
    """The others lose their connection when one dies."""
    error = WorkerGroupError("a page", {0: RuntimeError("Connection closed by peer"), 1: cause})
    assert text in str(cause_of(error, FROZEN))
    assert "page" not in str(cause_of(error, FROZEN))


def _died(text: str, preempted: bool = False) -> ActorDiedError:
    reason = NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED if preempted else NodeDeathInfo.UNSPECIFIED
    context = {"error_message": text, "actor_id": b"1" * 16, "class_name": "RayTrainWorker", "pid": 7}
    return ActorDiedError(ActorDiedErrorContext(**context, node_death_info=NodeDeathInfo(reason=reason)))


ENDED = "Worker unexpectedly exits with a connection error code 2. (1) the process was killed by the OOM killer"
"""Of Ray 2.60's text of a process that ended without a word."""


@pytest.mark.parametrize(
    ("death", "text"),
    [
        (_died(ENDED), "a worker was killed from outside, as the system does when memory runs out, or crashed; set "),
        (_died(ENDED, preempted=True), f"a worker died: {ENDED}"),
        (_died("The actor died because its node has died."), "a worker died: The actor died because its node has"),
        (_died("It was killed by `ray.kill`."), "a worker died: It was killed by `ray.kill`."),
        (_died("Its placement group was removed."), "a worker died: Its placement group was removed."),
        (_died("Its owner has died."), "a worker died: Its owner has died."),
        (_died("runtime env setup failed"), "a worker died: runtime env setup failed"),
        (_died("Worker exits with an exit code 1."), "a worker died: Worker exits with an exit code 1."),
        (
            ActorDiedError(RayTaskError("__init__", "Traceback\n  page: OOM killer\nImportError: x", ImportError("x"))),
            "a worker died: ImportError: x",
        ),
        (ActorDiedError(), "a worker died: The actor died unexpectedly before finishing this task."),
    ],
)
def test_a_death_is_blamed_on_memory_only_where_ray_does(death: ActorDiedError, text: str) -> None:
    failures = {0: RuntimeError("Connection closed by peer"), 1: WorkerHealthCheckFailedError("a page", death)}
    found = str(cause_of(WorkerGroupError("a page", failures), FROZEN))
    assert text in found
    assert ("memory" in found) == ("memory" in text)
    assert "page" not in found
    assert "actor_id" not in found


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"model.freeze_encoder": True}, "lower train.batch_sentences=4"),
        (
            {},
            "use model.batch_norm=frozen, with which train.micro_batch limits memory, or lower train.batch_sentences=4",
        ),
        (
            {"model.batch_norm": "frozen", "train.micro_batch": 8},
            "lower train.micro_batch=8, or lower train.batch_sentences=4",
        ),
        ({"model.batch_norm": "frozen", "train.micro_batch": 1}, "lower train.batch_sentences=4"),
        ({"model.freeze_encoder": True, "train.batch_sentences": 1}, "use nodes with more memory"),
    ],
)
def test_the_setting_that_helps_is_one_that_the_run_can_have(settings: dict[str, object], text: str) -> None:
    assert text == against_memory(override(Config(), settings))
