"""A training worker that dies of memory is one sentence that names the setting."""

import os
import signal
from pathlib import Path

import pytest
import ray.train
import torch
from ray.exceptions import OutOfMemoryError
from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer

from mclstexp.config import Config, override
from mclstexp.errors import RunError
from mclstexp.training.failures import against_memory, cause_of

FROZEN = override(Config(), {"model.batch_norm": "frozen", "train.max_failures": 0})


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.ray
def test_a_worker_that_is_killed_is_one_sentence_with_the_setting(ray_session: None, tmp_path: Path) -> None:
    assert str(cause_of(_failure(_killed, tmp_path), FROZEN)) == (
        "training failed (train.max_failures=0 restarts allowed): a worker was killed from outside, as the system does "
        "when memory runs out; set train.micro_batch, to 16 for example, or lower train.batch_sentences=4"
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
        (RunError("the loss is nan at step 3"), "the loss is nan at step 3"),
    ],
)
def test_the_worker_that_failed_first_in_kind_is_named(cause: Exception, text: str) -> None:
    """The others lose their connection when one dies."""
    error = WorkerGroupError("a page", {0: RuntimeError("Connection closed by peer"), 1: cause})
    assert text in str(cause_of(error, FROZEN))
    assert "page" not in str(cause_of(error, FROZEN))


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
            "lower train.micro_batch=8 or train.batch_sentences=4",
        ),
    ],
)
def test_the_setting_that_helps_is_one_that_the_run_can_have(settings: dict[str, object], text: str) -> None:
    assert text in against_memory(override(Config(), settings))
