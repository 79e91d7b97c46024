"""What a run does with every slide, and the digest of all that a slide's answer depends on.

A slide whose resolution is known does not depend on the assumed one, and none on what is allowed: so that a run with
another allowance keeps what is done. The price is two keys a slide, since only its inspection tells which holds.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from mclstexp import storage
from mclstexp.settings import TilesConfig

_VERSION = 1
"""Raise it when the same slide and plan give other tiles: all slides are then predicted anew."""
_DIGITS = 16


@dataclass(frozen=True)
class SlideSource:
    """One slide as the user names it."""

    slide_id: str
    patient_id: str
    site: str
    image: str
    """Absolute URI."""
    mpp: float | None
    """Micrometres per level-0 pixel, where the sheet says so."""


@dataclass(frozen=True)
class CohortPlan:
    """How the slides of a run become tiles."""

    out: str
    """URI of the run's output, above the staging folders."""
    tiles: TilesConfig
    """The model's, with this run's min_tissue and allow_upsampling."""
    mpp: float
    """Micrometres per tile pixel, the model's."""
    model_digest: str
    scratch: str
    """Local folder on every node for copies of remote slides."""
    scratch_budget_bytes: int
    """Most that the copies take on a node."""
    num_readers: int
    """Actors that read tiles, one CPU each; one more CPU must be left for inspection."""
    overlap: float = 0.0
    """Share of its edge that a tile has in common with its neighbour."""
    assume_mpp: float | None = None
    """Micrometres per level-0 pixel of slides of which neither sheet nor file says it."""
    allow_other_stains: bool = False
    """Whether images that do not look like H&E are predicted, with a flag, instead of quarantined."""
    positions: Mapping[str, pa.Table] = field(default_factory=dict)
    """Given tile centres by slide (slide_list.POSITION_SCHEMA); empty: a grid."""


def key(source: SlideSource, fingerprint: str, plan: CohortPlan, *, assumed: bool = False) -> str:
    """Returns 16 hex digits of everything that a slide's answer depends on.

    Args:
        fingerprint: the image's, as `fingerprint.fingerprint` gives it; where the image lies does not matter.
        assumed: whether its resolution is the plan's assumed one. A slide is done under either key.
    """
    given = plan.positions.get(source.slide_id)
    tiles = plan.tiles.model_dump(mode="json", include={"size_px", "encoding", "min_tissue"})
    return _digest(
        {
            "version": _VERSION,
            "slide": [source.slide_id, source.patient_id, source.site, source.mpp, fingerprint],
            "tiles": tiles,
            "jpeg_quality": plan.tiles.jpeg_quality if plan.tiles.encoding == "jpeg" else None,
            "mpp": plan.mpp,
            "assume_mpp": plan.assume_mpp if assumed else None,
            "overlap": plan.overlap,
            "positions": None if given is None else _digest(given.to_pydict()),
            "model": plan.model_digest,
        }
    )


def attempt_key(source: SlideSource, fingerprint: str, plan: CohortPlan) -> str:
    """Returns 16 hex digits of everything that a slide's quarantine depends on: the answer's and what is allowed."""
    allowed = [plan.assume_mpp, plan.allow_other_stains, plan.tiles.allow_upsampling]
    return _digest([key(source, fingerprint, plan), *allowed])


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:_DIGITS]


_END_BYTES = 2**20


def fingerprint(image: str) -> str:
    """Returns a token of a local or `s3://` image that changes when its content does, within the stated limits.

    Raises:
        FileNotFoundError: there is no such image.
        StorageError: it cannot be read.
    """
    size = storage.size(image)
    if storage.is_s3(storage.absolute(image)):
        version = storage.version(image)
        if version is None:
            raise FileNotFoundError(image)
        return f"{size}-{version.strip(chr(34))}"
    head = storage.read(image, 0, min(size, _END_BYTES))
    tail = storage.read(image, max(size - _END_BYTES, 0), min(size, _END_BYTES))
    return f"{size}-{hashlib.sha256(head + tail).hexdigest()}"
