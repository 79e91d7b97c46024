"""Why training workers failed, in a sentence: Ray's own text of a dead worker fills a page and names no setting."""

import errno

import torch
from ray.exceptions import ActorDiedError, OutOfMemoryError

from mclstexp.config import Config
from mclstexp.errors import RunError, UserError

_NO_GPU_MEMORY = ("CUDA error: out of memory", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED")
_NO_MEMORY = "can't allocate memory"
"""In messages of plain RuntimeErrors, which torch raises besides its own kind."""
_KILLED = ("OOM killer", "NODE_OUT_OF_MEMORY")
"""In Ray's message of an actor whose process ended without a word, or that Ray killed for its memory."""


def cause_of(error: Exception, config: Config) -> UserError:
    """Returns the error of a worker that a user can fix, else one that states the restarts.

    Args:
        error: `ray.train.TrainingFailedError`, of workers or of the controller, which may see a death first.
        config: the settings of the run.
    """
    failures = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", error)]
    causes = [_unwrapped(failure) for failure in failures]
    for cause in causes:
        if isinstance(cause, UserError):
            return cause
    failed = f"training failed (train.max_failures={config.train.max_failures} restarts allowed)"
    for cause in causes:
        if what := _out_of_memory(cause):
            return RunError(f"{failed}: {what}; {against_memory(config)}")
    for cause in causes:
        if isinstance(cause, ActorDiedError):
            return RunError(f"{failed}: a worker died: {_reason(cause)}")
    return RunError(f"{failed}: {error}")


def against_memory(config: Config) -> str:
    """Returns what to set where a batch does not fit into memory."""
    train, model, ways = config.train, config.model, list[str]()
    if not model.freeze_encoder and model.batch_norm != "frozen":
        ways.append("use model.batch_norm=frozen, with which train.micro_batch limits memory")
    elif not model.freeze_encoder and train.micro_batch is None:
        ways.append("set train.micro_batch below the run's metric micro_batch (to 16 if it has none)")
    elif train.micro_batch is not None and train.micro_batch > 1:
        ways.append(f"lower train.micro_batch={train.micro_batch}")
    unit = "batch_sentences" if train.batching == "sentences" else "batch_spots"
    if (size := getattr(train, unit)) > train.num_workers:
        ways.append(f"lower train.{unit}={size}")
    return ", or ".join(ways or ["use nodes with more memory"])


def _unwrapped(failure: Exception) -> Exception:
    """Returns what Ray Train's health check, or Ray's error of a task, was about."""
    failure = getattr(failure, "health_check_failure", failure)
    cause = getattr(failure, "cause", None)
    return cause if isinstance(cause, Exception) else failure


def _out_of_memory(cause: Exception) -> str:
    """Returns in words how a worker ran out of memory; empty if it failed for another reason."""
    text = str(cause)
    if isinstance(cause, torch.OutOfMemoryError) or any(each in text for each in _NO_GPU_MEMORY):
        return "a worker's GPU has too little memory"
    no_memory = isinstance(cause, OSError) and cause.errno == errno.ENOMEM
    if isinstance(cause, MemoryError) or no_memory or _NO_MEMORY in text:
        return "a worker's node has too little memory"
    if isinstance(cause, OutOfMemoryError):
        return "Ray killed a worker because its node ran out of memory"
    ran = isinstance(cause, ActorDiedError) and not (cause.actor_init_failed or cause.preempted)
    if ran and any(each in text for each in _KILLED):
        return "a worker was killed from outside, as the system does when memory runs out, or crashed"
    return ""


def _reason(death: ActorDiedError) -> str:
    """Returns the lines in which Ray says why an actor died, without those of the actor and of a traceback."""
    lines = [line for line in death.error_msg.splitlines() if line.strip() and not line.startswith("\t")]
    if death.actor_init_failed:
        return lines[-1].strip()
    return " ".join(lines[1:] or lines)
