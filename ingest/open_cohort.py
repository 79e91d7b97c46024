"""From what a user names to slides that can be predicted: sources, plan, and each slide's keys.

Fingerprints are taken up front and many at a time, so that a run that is started again knows at once what is done; on
S3 that is two requests a slide.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import gettempdir

import ray
from ray.data import Dataset

from ingest.cohort import tile_batches
from ingest.cohort_plan import CohortPlan, SlideSource, attempt_key, key
from ingest.fingerprint import fingerprint
from ingest.slide_list import list_slides, read_positions, require_positions
from ingest.staging import clear
from mclstexp import storage
from mclstexp.errors import SourceError, StorageError
from mclstexp.inference.cohort import Cohort
from mclstexp.inference.model_version import ModelVersion
from mclstexp.settings import PredictConfig

_AT_ONCE = 32
_RELEASE_S = 60.0


@dataclass(frozen=True)
class SlideCohort:
    """The slides that a user names, and how they are cut for one model."""

    sources: Sequence[SlideSource]
    plan: CohortPlan

    def source(self, slide_id: str) -> SlideSource:
        """Returns a slide by its id.

        Raises:
            SourceError: there is none.
        """
        for source in self.sources:
            if source.slide_id == slide_id:
                return source
        some = ", ".join(sorted(source.slide_id for source in self.sources)[:10])
        raise SourceError(f"there is no slide {slide_id} among the {len(self.sources)} samples: {some}")

    def release(self) -> None:
        """Removes the copies of remote slides from every node's scratch folder. Ray must be connected."""
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        clear_on = ray.remote(num_cpus=0)(clear)
        asked = [clear_on.options(label_selector={"ray.io/node-id": node}).remote(self.plan.scratch) for node in nodes]
        ray.wait(asked, num_returns=len(asked), timeout=_RELEASE_S)  # a node that has just gone takes its copies along

    def keyed(self, num_readers: int) -> Cohort:
        """Returns the cohort as prediction takes it, read by that many actors."""
        plan = replace(self.plan, num_readers=num_readers)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            found = dict(zip((s.slide_id for s in self.sources), pool.map(_look, self.sources), strict=True))
        there = [source for source in self.sources if not isinstance(found[source.slide_id], _Unreadable)]
        prints = {source.slide_id: str(found[source.slide_id]) for source in there}
        by_id = {source.slide_id: source for source in there}

        def batches(slide_ids: Sequence[str]) -> Dataset:
            return tile_batches([by_id[name] for name in slide_ids], plan)

        return Cohort(
            answer_keys={s.slide_id: _answer_keys(s, prints[s.slide_id], plan) for s in there},
            attempt_keys={s.slide_id: attempt_key(s, prints[s.slide_id], plan) for s in there},
            fingerprints=prints,
            unreadable={name: value.reason for name, value in found.items() if isinstance(value, _Unreadable)},
            settings=_settings(plan),
            tile_batches=batches,
        )


def open_cohort(
    samples: str,
    model: ModelVersion,
    out: str,
    config: PredictConfig,
    spots: str | None = None,
    assume_mpp: float | None = None,
) -> SlideCohort:
    """Returns the slides of a sample sheet, folder or `s3://` prefix, to be cut as a model's training tiles were.

    Raises:
        SheetError: the sheet or the table of spots has faults, or there is no slide.
    """
    sources = list_slides(samples, out)
    positions = read_positions(spots) if spots else {}
    require_positions(sources, positions)
    free = {"min_tissue": config.min_tissue, "allow_upsampling": config.allow_upsampling}
    plan = CohortPlan(
        out=storage.absolute(out),
        tiles=model.config.tiles.model_copy(update=free | {"size_px": model.tile_size_px}),
        mpp=model.mpp,
        model_digest=model.digest,
        scratch=str(Path(config.scratch or gettempdir(), f"mclstexp-slides-{os.getuid()}")),
        scratch_budget_bytes=int(config.scratch_gb * 1e9),
        num_readers=1,
        overlap=config.overlap,
        assume_mpp=assume_mpp,
        allow_other_stains=config.other_stains,
        positions=positions,
    )
    return SlideCohort(sources, plan)


@dataclass(frozen=True)
class _Unreadable:
    reason: str


def _look(source: SlideSource) -> str | _Unreadable:
    try:
        return fingerprint(source.image)
    except FileNotFoundError:
        return _Unreadable(f"there is no file {source.image}")
    except (SourceError, StorageError) as error:
        return _Unreadable(str(error))


def _answer_keys(source: SlideSource, found: str, plan: CohortPlan) -> list[str]:
    return [key(source, found, plan, assumed=assumed) for assumed in (False, True)]


def _settings(plan: CohortPlan) -> dict[str, object]:
    """Returns what all slides of one output have in common, beyond what the model fixes."""
    tiles = "given spots" if plan.positions else "a grid"
    return {"overlap": plan.overlap, "min_tissue": plan.tiles.min_tissue, "tiles": tiles}
