"""Weights from the Hugging Face hub, by repository and commit.

Licences are accepted on the hub's pages, and the token is known to `huggingface_hub` alone (`hf auth login` or
HF_TOKEN): it is in no setting and in no message.
"""

from functools import cache
from pathlib import Path

from mclstexp.errors import ModelError

_FILES = ("model.safetensors", "pytorch_model.bin")


@cache
def download(repository: str, commit: str | None) -> tuple[str, str]:
    """Returns the local path of a repository's weights and the commit that they are of; uses the hub's own cache.

    The hub is asked once per process, so that all of a job has the same commit.

    Args:
        repository: owner/name.
        commit: the commit that is meant; None: the newest.

    Raises:
        ModelError: they cannot be had; says what to do.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    names, unreached = (*_FILES, f"{repository.rpartition('/')[2]}.pth"), None
    for name in names:
        try:
            path = Path(hf_hub_download(repository, name, revision=commit))
        except RemoteEntryNotFoundError:
            continue
        except LocalEntryNotFoundError as error:  # without the hub, its cache may have the file under the next name
            unreached = error
            continue
        except Exception as error:  # of the hub, of its HTTP client or of the disk; they share no base
            raise _refused(repository, error) from error
        return str(path), path.parent.name
    if unreached is not None:
        raise _refused(repository, unreached) from unreached
    raise ModelError(
        f"model.image_weights=hub: {repository} has none of {', '.join(names)}; give a file with "
        "--model.image_weights FILE"
    )


def _refused(repository: str, error: Exception) -> ModelError:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return ModelError(
        f"model.image_weights=hub: {repository} cannot be read from the hub ({reason}). "
        "Accept its licence on the hub's page and log in with `hf auth login` (or set HF_TOKEN), or give a "
        "file with --model.image_weights FILE"
    )
