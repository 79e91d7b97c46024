"""How a run turns each slide into tiles, and the digest of everything that a slide's answer depends on.

A slide whose resolution is known does not depend on the assumed one, and no answer depends on what a run allows, so
that a run that allows more keeps what is done. The price is two keys per slide: only its inspection tells which one is
its own.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from mclstexp import storage
from mclstexp.data.schema import IMAGE
from mclstexp.prediction.feature_files import FeatureNeeds
from mclstexp.settings import TilesConfig

_VERSION = 1
"""Raise it when the same slide and plan give other tiles: all slides are then predicted again."""
_DIGITS = 16
_END_BYTES = 2**20


@dataclass(frozen=True)
class SlideSource:
    """One slide as the user names it."""

    slide_id: str
    patient_id: str
    site: str
    image: str
    """Absolute URI; of the feature file if the plan takes features."""
    mpp: float | None
    """Micrometres per level-0 pixel, if the sheet states it."""


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
    """Disk limit for these copies on each node."""
    overlap: float = 0.0
    """Share of its edge that a tile has in common with its neighbour."""
    assume_mpp: float | None = None
    """Micrometres per level-0 pixel of slides whose resolution neither the sheet nor the file states."""
    allow_other_stains: bool = False
    """Whether images that do not look like H&E are predicted, with a flag, instead of quarantined."""
    positions: Mapping[str, pa.Table] = field(default_factory=dict)
    """Given tile centres by slide (cohort.POSITION_SCHEMA); empty: a grid."""
    views: tuple[str, ...] = (IMAGE,)
    """Views of a tile that the model reads, in its order; its digest covers them, and so `key` need not."""
    wide: tuple[int, float] | None = None
    """Edge of the wide view in pixels and its micrometres per pixel; None: the model does not read it."""
    features: FeatureNeeds | None = None
    """What the slides' feature files must contain; None: tiles are cut from images."""
    intervals: bool = False
    """Whether files have the ends of intervals."""


def key(source: SlideSource, fingerprint: str, plan: CohortPlan, *, assumed: bool = False) -> str:
    """Returns 16 hex digits of everything that a slide's answer depends on.

    Args:
        source: the slide.
        fingerprint: the image's, as `fingerprint` returns it. The image's URI does not matter.
        plan: how it becomes tiles.
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
            **({"intervals": True} if plan.intervals else {}),
        }
    )


def attempt_key(source: SlideSource, fingerprint: str, plan: CohortPlan) -> str:
    """Returns 16 hex digits of everything that a slide's quarantine depends on: the answer's key, what is allowed."""
    allowed: list[object] = [plan.assume_mpp, plan.allow_other_stains, plan.tiles.allow_upsampling]
    if plan.features is not None:  # a file that states no encoder counts as one of its folder's
        allowed.append(plan.features.folder)
    return _digest([key(source, fingerprint, plan), *allowed])


def fingerprint(image: str) -> str:
    """Returns a token of a local or `s3://` image that changes with its content, within limits.

    Slides are gigabytes, so none is read whole. On disk the token is the length and the SHA-256 of the first and last
    MiB, which hold headers and directories: an edit in between that keeps the length goes unseen. In object storage it
    is the length and the ETag: a copy that was uploaded in other parts counts as another file, which costs a new
    prediction. Companion files (the folder of an .mrxs, the parts of a .vms) are not looked at.

    Raises:
        FileNotFoundError: there is no such image.
        StorageError: it cannot be read.
    """
    if storage.is_s3(storage.absolute(image)):
        size, version = storage.size_and_version(image)
        return f"{size}-{version.strip(chr(34))}"
    size = storage.size(image)
    head = storage.read(image, 0, min(size, _END_BYTES))
    tail = storage.read(image, max(size - _END_BYTES, 0), min(size, _END_BYTES))
    return f"{size}-{hashlib.sha256(head + tail).hexdigest()}"


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:_DIGITS]
