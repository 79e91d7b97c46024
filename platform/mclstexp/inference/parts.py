"""Parts of a slide's prediction: what was embedded and retrieved for 256 tiles, kept until the slide is published.

A part is one safetensors object, written whole. Nothing but its name is looked at when a run goes on; its content is
checked when it is read for publishing, and a damaged one is removed then, so that a listing stays one request and
the same command makes good what was lost.
"""

import re
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from mclstexp import storage
from mclstexp.errors import PartError
from mclstexp.inference.slide_record import PART_TILES, PARTS, part_name

CONFIDENCE = ("similarity", "effective_donors", "donor_share")
_PART_FILE = re.compile(r"(\d{5,})\.safetensors")


class Answer(Protocol):
    """What a model says of n tiles, as `retrieval.Retrieved`: `prediction` float32 (n, G), the others float32 (n,)."""

    @property
    def prediction(self) -> np.ndarray: ...  # noqa: D102

    @property
    def similarity(self) -> np.ndarray: ...  # noqa: D102

    @property
    def effective_donors(self) -> np.ndarray: ...  # noqa: D102

    @property
    def donor_share(self) -> np.ndarray: ...  # noqa: D102


@dataclass(frozen=True)
class Part:
    """The answer for n tiles that follow each other in the grid."""

    prediction: np.ndarray
    """float32 (n, G), in the model's unit; NaN where a tile is not complete."""
    similarity: np.ndarray
    """float32 (n,), as are the next two."""
    effective_donors: np.ndarray
    donor_share: np.ndarray
    complete: np.ndarray
    """bool (n,): whether the slide had pixels there."""


def write_part(staging_uri: str, part: int, found: Answer, complete: np.ndarray) -> None:
    """Writes one part, whole or not at all.

    Args:
        staging_uri: the slide's staging folder.
        part: its number.
        found: the answer for its n tiles; what it says of tiles that are not complete is replaced by NaN.
        complete: bool (n,), whether the slide had pixels there.
    """
    there = np.asarray(complete, bool)
    arrays = {"prediction": np.where(there[:, None], found.prediction, np.float32(np.nan))}
    arrays |= {name: np.where(there, getattr(found, name), np.float32(np.nan)) for name in CONFIDENCE}
    arrays = {name: values.astype(np.float32) for name, values in arrays.items()}
    storage.write(storage.join(staging_uri, part_name(part)), save(arrays | {"complete": there.astype(np.uint8)}))


def read_part(staging_uri: str, part: int, num_tiles: int, num_genes: int) -> Part:
    """Returns one part.

    Args:
        staging_uri: the slide's staging folder.
        part: its number.
        num_tiles: tiles of the whole slide.
        num_genes: genes of the panel.

    Raises:
        PartError: it is missing, truncated or of another shape; it has been removed, so that `parts_done` no longer
            names it.
    """
    uri = storage.join(staging_uri, part_name(part))
    length = min(PART_TILES, num_tiles - part * PART_TILES)
    try:
        arrays = load(storage.read(uri))
    except FileNotFoundError:
        raise PartError(f"{uri} is missing; run the same command again, which makes it anew") from None
    except SafetensorError as error:
        raise _removed(uri, str(error)) from None
    wanted = {"prediction": ((length, num_genes), "float32"), "complete": ((length,), "uint8")}
    wanted |= dict.fromkeys(CONFIDENCE, ((length,), "float32"))
    got = {name: (values.shape, str(values.dtype)) for name, values in arrays.items()}
    if got != wanted:
        raise _removed(uri, f"it has {_listed(got)}, wanted are {_listed(wanted)}")
    return Part(**arrays | {"complete": arrays["complete"].astype(bool)})


def parts_done(staging_uri: str) -> set[int]:
    """Returns the numbers of the parts that were written, in one listing."""
    names = [uri.rpartition("/")[2] for uri in storage.list_files(storage.join(staging_uri, PARTS))]
    return {int(match[1]) for match in map(_PART_FILE.fullmatch, names) if match}


def _removed(uri: str, fault: str) -> PartError:
    storage.delete(uri)
    return PartError(f"{uri} was damaged and is removed: {fault}; run the same command again, which makes it anew")


def _listed(arrays: dict[str, tuple[tuple[int, ...], str]]) -> str:
    return ", ".join(f"{name} {dtype} {shape}" for name, (shape, dtype) in sorted(arrays.items()))
