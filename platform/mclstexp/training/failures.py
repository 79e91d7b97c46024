"""Why training workers failed, in a sentence: Ray's own text of a dead worker fills a page and names no setting."""

import torch
from ray.exceptions import ActorDiedError, OutOfMemoryError

from mclstexp.config import Config
from mclstexp.errors import RunError, UserError

_CANNOT_ALLOCATE = "can't allocate memory"
"""In the message of torch's CPU allocator, which raises a plain RuntimeError."""
_NODE_DIED = "node has died"
"""In Ray's message of an actor that was lost with its machine."""


def cause_of(error: Exception, config: Config) -> UserError:
    """Returns the error of a worker that a user can fix, else one that states the restarts.

    Args:
        error: `ray.train.TrainingFailedError`, of workers or of the controller, which may see a death first.
        config: the settings of the run.
    """
    failures = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", error)]
    causes = [getattr(failure, "health_check_failure", failure) for failure in failures]
    for cause in causes:
        if isinstance(cause, UserError):
            return cause
    failed = f"training failed (train.max_failures={config.train.max_failures} restarts allowed)"
    for cause in causes:
        if what := _out_of_memory(cause):
            return RunError(f"{failed}: {what}; {against_memory(config)}")
    return RunError(f"{failed}: {error}")


def against_memory(config: Config) -> str:
    """Returns what to set where a batch does not fit into memory."""
    train, model = config.train, config.model
    by_sentence = train.batching == "sentences"
    batch = (
        f"train.batch_sentences={train.batch_sentences}" if by_sentence else f"train.batch_spots={train.batch_spots}"
    )
    if model.freeze_encoder:
        return f"lower {batch}"
    if model.batch_norm != "frozen":
        return f"use model.batch_norm=frozen, with which train.micro_batch limits memory, or lower {batch}"
    if train.micro_batch is None:
        return f"set train.micro_batch, to 16 for example, or lower {batch}"
    return f"lower train.micro_batch={train.micro_batch} or {batch}"


def _out_of_memory(cause: Exception) -> str:
    """Returns in words how a worker ran out of memory; empty if it failed for another reason."""
    if isinstance(cause, torch.OutOfMemoryError):
        return "a worker's GPU has too little memory"
    if isinstance(cause, MemoryError) or _CANNOT_ALLOCATE in str(cause):
        return "a worker's node has too little memory"
    if isinstance(cause, OutOfMemoryError):
        return "Ray killed a worker because its node ran out of memory"
    if isinstance(cause, ActorDiedError) and _NODE_DIED not in str(cause):
        return "a worker was killed from outside, as the system does when memory runs out"
    return ""
