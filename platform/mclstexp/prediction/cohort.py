"""From what a user names to slides that can be predicted: sources, plan, and each slide's keys.

Fingerprints are taken up front and many at a time, so that a run that is started again knows at once what is done; on
S3 that is two requests a slide.
"""

import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import gettempdir

import numpy as np
import pandas as pd
import pyarrow as pa
import ray
from ray.data import Dataset

from mclstexp import storage
from mclstexp.data.sheet import read_sheet
from mclstexp.errors import SheetError, SourceError, StorageError
from mclstexp.model.version import ModelVersion
from mclstexp.prediction.pipeline import tile_batches
from mclstexp.prediction.plan import CohortPlan, SlideSource, attempt_key, fingerprint, key
from mclstexp.prediction.run import Cohort
from mclstexp.prediction.slide_cache import clear
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


EXTENSIONS = (
    *("svs", "tif", "tiff", "ndpi", "vms", "vmu", "scn", "mrxs", "svslide", "bif"),
    *("jpg", "jpeg", "png"),
)
"""What OpenSlide or Pillow reads."""
_MAX_ID = 128
_MOST_NAMED = 20
POSITION_SCHEMA = pa.schema([("spot_id", pa.string()), ("x_px", pa.float64()), ("y_px", pa.float64())])
"""Given tile centres of a slide, in level-0 pixels."""


def list_slides(samples: str, out: str | None = None) -> list[SlideSource]:
    """Returns the slides of a sample sheet (.csv; rows of every format), a local folder or an `s3://` prefix.

    In a folder, at any depth, every file with one of `EXTENSIONS` is a slide; its id is the file's name without
    extension, with `_` for what is not in A-Z a-z 0-9 . _ -. Hidden files are left out, and what lies below `out`:
    pictures of an earlier run are no slides.

    Raises:
        SheetError: the sheet has faults, there is no slide, or two files give the same id.
    """
    if samples.lower().endswith(".csv"):
        return [
            SlideSource(row.section_id, row.patient_id, row.site, row.image, row.mpp) for row in read_sheet(samples)
        ]
    own = f"{storage.absolute(out)}/" if out else None
    uris = [uri for uri in storage.list_files(samples) if _is_slide(uri) and not (own and uri.startswith(own))]
    if not uris:
        raise SheetError(
            f"there is no slide under {samples}: give a sample sheet (.csv), or a folder or s3:// prefix that holds "
            f"files with one of the extensions {', '.join(EXTENSIONS)}"
        )
    slides = [SlideSource(name, name, "", uri, None) for uri in uris for name in [_slide_id(uri)]]
    _require_unique(samples, slides)
    return slides


def read_positions(uri: str) -> dict[str, pa.Table]:
    """Returns given tile centres (POSITION_SCHEMA) by slide, from a CSV of section_id, x_px, y_px and maybe spot_id.

    Without spot_id a slide's spots are numbered from 0 in the file's order.

    Raises:
        SheetError: lists every fault of the file with its row (the first 20 of many).
    """
    table = _read_csv(uri)
    faults = list(_column_faults(table.columns))
    if not faults:
        if "spot_id" not in table:
            table["spot_id"] = table.groupby("section_id").cumcount().astype(str)
        numbers = table[["x_px", "y_px"]].apply(pd.to_numeric, errors="coerce").astype("float64")
        faults = list(_row_faults(table, numbers))
    if faults:
        rest = [f"and {len(faults) - _MOST_NAMED} more"] if len(faults) > _MOST_NAMED else []
        listed = "\n  ".join([*faults[:_MOST_NAMED], *rest])
        raise SheetError(f"the table of spots {uri} has {len(faults)} fault(s):\n  {listed}")
    table[["x_px", "y_px"]] = numbers
    return {
        str(name): pa.Table.from_pandas(rows[POSITION_SCHEMA.names], POSITION_SCHEMA, preserve_index=False)
        for name, rows in table.groupby("section_id", sort=False)
    }


def require_positions(sources: Iterable[SlideSource], positions: Mapping[str, object]) -> None:
    """Checks that given spots and slides name each other: all slides are predicted at given spots, or none is.

    Raises:
        SheetError: a slide has no spots, or spots are of no slide; names them.
    """
    slides = {source.slide_id for source in sources}
    for what, names in (
        ("slides have no row in the table of spots", slides - set(positions)),
        ("sections of the table of spots are no slide of this run", set(positions) - slides),
    ):
        if positions and names:
            shown = ", ".join(sorted(names)[:_MOST_NAMED]) + (", ..." if len(names) > _MOST_NAMED else "")
            raise SheetError(f"{len(names)} {what}: {shown}")


def _is_slide(uri: str) -> bool:
    name = uri.rsplit("/", 1)[1]
    return not name.startswith(".") and name.lower().rpartition(".")[2] in EXTENSIONS and "." in name


def _slide_id(uri: str) -> str:
    name = uri.rsplit("/", 1)[1].rpartition(".")[0]
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)[:_MAX_ID]


def _require_unique(samples: str, slides: list[SlideSource]) -> None:
    files: dict[str, list[str]] = {}
    for slide in slides:
        files.setdefault(slide.slide_id, []).append(slide.image)
    doubled = [f"{name}: {', '.join(uris)}" for name, uris in files.items() if len(uris) > 1]
    if doubled:
        listed = "\n  ".join(doubled)
        raise SheetError(f"several files under {samples} give the same slide id; name them in a sheet:\n  {listed}")


def _read_csv(uri: str) -> pd.DataFrame:
    try:
        table = pd.read_csv(io.BytesIO(storage.read(uri)), dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except FileNotFoundError:
        raise SheetError(f"there is no table of spots {uri}") from None
    except (UnicodeDecodeError, ValueError) as error:
        raise SheetError(f"{uri} is no CSV file in UTF-8: {error}") from None
    return table.apply(lambda column: column.str.strip())


def _column_faults(columns: Iterable[str]) -> Iterator[str]:
    needed, known = ("section_id", "x_px", "y_px"), ("section_id", "x_px", "y_px", "spot_id")
    yield from (f"column {name} is missing" for name in needed if name not in columns)
    yield from (f"column {name!r} is unknown; known ones: {', '.join(known)}" for name in columns if name not in known)


def _row_faults(table: pd.DataFrame, numbers: pd.DataFrame) -> Iterator[str]:
    finite = {name: np.isfinite(numbers[name].to_numpy()) for name in numbers}
    doubled = table.duplicated(["section_id", "spot_id"])
    if table.empty:
        yield "there are no rows below the header"
    for row, (section, spot) in enumerate(zip(table["section_id"], table["spot_id"], strict=True)):
        line = f"row {row + 2}"
        for name in ("x_px", "y_px"):
            if not finite[name][row]:
                yield f"{line}, column {name}, got {table[name].iat[row]!r}: give a number of level-0 pixels"
        if not section:
            yield f"{line}, column section_id: it is empty"
        if not spot:
            yield f"{line}, column spot_id: it is empty"
        elif doubled.iat[row]:
            yield f"{line}, column spot_id: {spot!r} is already among the spots of {section}"
