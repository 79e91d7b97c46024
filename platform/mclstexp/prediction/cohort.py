"""The slides that a user names, how they are cut for one model, and the keys by which the ledger knows their answers.

Fingerprints of all slides are taken up front, many at once, so that a run that is started again knows immediately what
is done. On S3 that costs one request per slide.
"""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import gettempdir

import numpy as np
import pandas as pd
import pyarrow as pa
import ray

from mclstexp import storage
from mclstexp.cluster import guarded
from mclstexp.data.schema import IMAGE_WIDE
from mclstexp.data.sheet import read_sheet
from mclstexp.data.text_table import read_text_table
from mclstexp.errors import ModelError, SheetError, SourceError, UserError
from mclstexp.messages import did_you_mean, some_of
from mclstexp.model.version import ModelVersion
from mclstexp.prediction.ledger import PREDICTED, Entry
from mclstexp.prediction.origin import compare_origins
from mclstexp.prediction.plan import CohortPlan, SlideSource, attempt_key, fingerprint, key
from mclstexp.prediction.slide_cache import clear
from mclstexp.settings import PredictConfig

EXTENSIONS = (
    *("svs", "tif", "tiff", "btf", "tf2", "tf8", "ndpi", "vms", "vmu", "scn", "mrxs", "svslide", "bif"),
    *("jpg", "jpeg", "png", "jp2", "j2k", "jpx"),
)
"""Endings of a folder's files that are slides: what OpenSlide, tifffile or Pillow reads."""
_WITH_FOLDER = ".mrxs"  # the pixels of X.mrxs are in the folder X
POSITION_SCHEMA = pa.schema([("spot_id", pa.string()), ("x_px", pa.float64()), ("y_px", pa.float64())])
"""Given tile centres of a slide, in level-0 pixels."""
_TABLE_OF_SPOTS = "table of spots"
_MAX_ID = 128
_MAX_NAMED = 20
_THREADS = 32
_RELEASE_S = 60.0


@dataclass(frozen=True)
class Cohort:
    """The slides that a user names, and how they are cut for one model."""

    sources: Sequence[SlideSource]
    plan: CohortPlan
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Number of files in the folder that are no slides, by ending."""
    warnings: Sequence[str] = ()
    """What the sheet says against this model, in words."""

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of each image that can be reached, by slide."""
        return {name: found for name, found in self._looked_up.items() if isinstance(found, str)}

    @cached_property
    def unreachable(self) -> dict[str, str]:
        """Slides whose image is missing or whose store does not answer, with the reason; they fail."""
        return {name: str(found) for name, found in self._looked_up.items() if not isinstance(found, str)}

    @property
    def settings(self) -> dict[str, object]:
        """What all slides of one output have in common, beyond what the model fixes."""
        if self.plan.features is not None:
            return {"tiles": f"features of {self.plan.features.encoder}"}
        tiles = "given spots" if self.plan.positions else "a grid"
        return {"overlap": self.plan.overlap, "min_tissue": self.plan.tiles.min_tissue, "tiles": tiles}

    def source(self, slide_id: str) -> SlideSource:
        """Returns a slide by its id.

        Raises:
            SourceError: there is no such slide.
        """
        if slide_id not in self._by_id:
            hint = did_you_mean(slide_id, self._by_id)
            raise SourceError(f"there is no slide {slide_id} among the {len(self.sources)} samples; {hint}")
        return self._by_id[slide_id]

    def answer_keys(self, slide_id: str) -> tuple[str, ...]:
        """Returns the keys of an answer that equals this run's: with the slide's own resolution, and the assumed one.

        Empty if the image cannot be reached.
        """
        return self._answer_keys.get(slide_id, ())

    def attempt_key(self, slide_id: str) -> str:
        """Returns the key of an attempt that would end as this run's; empty if the image cannot be reached."""
        return self._attempt_keys.get(slide_id, "")

    def is_answer(self, entry: Entry) -> bool:
        """Returns whether a slide is predicted as this run would predict it."""
        return entry.state in PREDICTED and entry.key in self.answer_keys(entry.slide_id)

    def is_settled(self, entry: Entry, retry_quarantined: bool) -> bool:
        """Returns whether a slide needs no more work."""
        if self.is_answer(entry):
            return True
        same_attempt = entry.key == self._attempt_keys.get(entry.slide_id)
        return entry.state == "quarantined" and same_attempt and not retry_quarantined

    def release(self) -> None:
        """Removes the copies of remote slides from every node's scratch folder. Ray must be connected."""
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        clear_on = ray.remote(num_cpus=0)(clear)
        tasks = [clear_on.options(label_selector={"ray.io/node-id": node}).remote(self.plan.scratch) for node in nodes]
        ray.wait(tasks, num_returns=len(tasks), timeout=_RELEASE_S)  # a node that has just died takes its copies along

    @cached_property
    def _by_id(self) -> dict[str, SlideSource]:
        return {source.slide_id: source for source in self.sources}

    @cached_property
    def _answer_keys(self) -> dict[str, tuple[str, ...]]:
        return {
            name: tuple(key(self._by_id[name], found, self.plan, assumed=assumed) for assumed in (False, True))
            for name, found in self.fingerprints.items()
        }

    @cached_property
    def _attempt_keys(self) -> dict[str, str]:
        return {name: attempt_key(self._by_id[name], found, self.plan) for name, found in self.fingerprints.items()}

    @cached_property
    def _looked_up(self) -> dict[str, str | UserError]:
        """The fingerprint of each slide's image, or why there is none."""
        with ThreadPoolExecutor(_THREADS) as pool:
            found = pool.map(lambda source: guarded(fingerprint, source.image), self.sources)
            return dict(zip((source.slide_id for source in self.sources), found, strict=True))


def open_cohort(
    samples: str,
    model: ModelVersion,
    out: str,
    config: PredictConfig,
    spots: str | None = None,
    assume_mpp: float | None = None,
) -> Cohort:
    """Returns the slides of a sample sheet, folder or `s3://` prefix, to be cut as a model's training tiles were.

    Raises:
        SheetError: the sheet or the table of spots has faults, there is no slide, or slides are of another species than
            the model's.
    """
    sources, left_out = list_slides(samples, out)
    warnings = compare_origins(read_sheet(samples) if is_sheet(samples) else [], model.training)
    positions = read_positions(spots) if spots else {}
    require_positions(sources, positions)
    plan = replace(plan_of(model, out, config, assume_mpp), positions=positions)
    return Cohort(sources, plan, left_out, warnings)


def plan_of(model: ModelVersion, out: str, config: PredictConfig, assume_mpp: float | None) -> CohortPlan:
    """Returns how slides are cut as a model's training tiles were.

    Raises:
        ModelError: intervals are asked of a model that has none.
    """
    if config.intervals and model.calibration is None:
        raise ModelError(
            f"predict.intervals=true, and model {model.digest} (model.predictor={model.config.model.predictor}) is not "
            "calibrated; a model with model.predictor=programs is. Predict without intervals, or train one"
        )
    free = {"min_tissue": config.min_tissue, "allow_upsampling": config.allow_upsampling}
    return CohortPlan(
        out=storage.absolute(out),
        tiles=model.config.tiles.model_copy(update=free | {"size_px": model.tile_size_px}),
        mpp=model.mpp,
        model_digest=model.digest,
        scratch=str(Path(config.scratch or gettempdir(), f"mclstexp-slides-{os.getuid()}")),
        scratch_budget_bytes=int(config.scratch_gb * 1e9),
        overlap=config.overlap,
        assume_mpp=assume_mpp,
        allow_other_stains=config.other_stains,
        views=model.config.model.image_views,
        wide=model.wide if IMAGE_WIDE in model.config.model.image_views else None,
        intervals=config.intervals,
    )


def is_sheet(samples: str) -> bool:
    """Returns whether a cohort is named by a sheet; otherwise by a folder or prefix."""
    return samples.lower().endswith(".csv") or storage.exists(samples)


def list_slides(samples: str, out: str | None = None) -> tuple[list[SlideSource], dict[str, int]]:
    """Returns the slides of a sample sheet (a file; rows of every format), a local folder or an `s3://` prefix.

    The second value is the number of files of a folder that are no slides, by ending, most frequent first.

    In a folder, at any depth, every file with one of `EXTENSIONS` is a slide; its id is the file's name without
    extension, with `_` for characters outside A-Z a-z 0-9 . _ -. Hidden files are passed over, as are everything
    below `out` (pictures of an earlier run are not slides) and the data folders of .mrxs slides.

    Raises:
        SheetError: the sheet has faults, there is no slide, or two files give the same id.
    """
    if is_sheet(samples):
        rows = read_sheet(samples)
        return [SlideSource(row.section_id, row.patient_id, row.site, row.image, row.mpp) for row in rows], {}
    uris = _visible_files(samples, out)
    images = [uri for uri in uris if _ending(uri) in EXTENSIONS]
    left_out = dict(Counter(_ending(uri) for uri in uris if _ending(uri) not in EXTENSIONS).most_common())
    if not images:
        found = f" ({left_out_files(left_out)})" if left_out else ""
        raise SheetError(
            f"there is no slide under {samples}{found}: give a sample sheet (.csv), or a folder or s3:// prefix that "
            f"holds files with one of the extensions {', '.join(EXTENSIONS)}"
        )
    slides = [SlideSource(name, name, "", uri, None) for uri in images for name in [slide_name(uri)]]
    require_unique(samples, slides)
    return slides, left_out


def left_out_files(counts: Mapping[str, int]) -> str:
    """Returns a sentence with the numbers of files left out, by ending."""
    num = sum(counts.values())
    listed = [f"{f'.{ending}' if ending else 'none'} {count}" for ending, count in counts.items()]
    return f"left out {num} file{'s' * (num > 1)} with other endings: {some_of(listed, _MAX_NAMED)}"


def read_positions(uri: str) -> dict[str, pa.Table]:
    """Returns given tile centres (POSITION_SCHEMA) by slide, from a CSV of section_id, x_px, y_px and maybe spot_id.

    Without spot_id a slide's spots are numbered from 0 in the file's order.

    Raises:
        SheetError: lists every fault of the file with its row (the first 20 of many).
    """
    text = read_text_table(uri, _TABLE_OF_SPOTS)
    faults = list(_column_faults(text.columns))
    if not faults:
        table = pd.DataFrame([cells for _, cells in text.rows], columns=[*dict.fromkeys(text.columns)], dtype=object)
        if "spot_id" not in table:
            table["spot_id"] = table.groupby("section_id").cumcount().astype(str)
        pixels = table[["x_px", "y_px"]].map(text.number)
        numbers = pixels.apply(pd.to_numeric, errors="coerce").astype("float64")
        faults = list(_row_faults([line for line, _ in text.rows], table, numbers))
    if faults:
        rest = [f"and {len(faults) - _MAX_NAMED} more"] if len(faults) > _MAX_NAMED else []
        listed = "\n  ".join([*faults[:_MAX_NAMED], *rest])
        raise SheetError(f"the {_TABLE_OF_SPOTS} {uri} has {len(faults)} fault(s):\n  {listed}")
    table[["x_px", "y_px"]] = numbers
    return {
        str(name): pa.Table.from_pandas(rows[POSITION_SCHEMA.names], POSITION_SCHEMA, preserve_index=False)
        for name, rows in table.groupby("section_id", sort=False)
    }


def require_positions(sources: Iterable[SlideSource], positions: Mapping[str, object]) -> None:
    """Checks that given spots and slides match: all slides are predicted at given spots, or none is.

    Raises:
        SheetError: slides have no spots, or spots belong to no slide; names them.
    """
    slides = {source.slide_id for source in sources}
    for what, names in (
        ("slides have no row in the table of spots", slides - set(positions)),
        ("sections of the table of spots are not slides of this run", set(positions) - slides),
    ):
        if positions and names:
            raise SheetError(f"{len(names)} {what}: {some_of(sorted(names), _MAX_NAMED)}")


def _visible_files(samples: str, out: str | None) -> list[str]:
    """Returns the files of a folder that are neither hidden nor outputs nor the data of an .mrxs slide."""
    uris = storage.list_files(samples)
    folders = [uri[: -len(_WITH_FOLDER)] for uri in uris if uri.lower().endswith(_WITH_FOLDER)]
    passed_over = tuple(f"{folder}/" for folder in [*folders, *([storage.absolute(out)] if out else [])])
    return [uri for uri in uris if not _name(uri).startswith(".") and not uri.startswith(passed_over)]


def _ending(uri: str) -> str:
    """Returns a file's ending in small letters, without the dot; empty if it has none."""
    stem, _, ending = _name(uri).rpartition(".")
    return ending.lower() if stem else ""


def _name(uri: str) -> str:
    return uri.rsplit("/", 1)[1]


def slide_name(uri: str) -> str:
    """Returns the id of a slide of a folder: its file's name without extension, with `_` for unusual characters."""
    name = _name(uri).rpartition(".")[0]
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)[:_MAX_ID]


def require_unique(samples: str, slides: Iterable[SlideSource]) -> None:
    """Checks that no two files of a folder give the same slide id.

    Raises:
        SheetError: some do; names them.
    """
    files: dict[str, list[str]] = {}
    for slide in slides:
        files.setdefault(slide.slide_id, []).append(slide.image)
    doubled = [f"{name}: {', '.join(uris)}" for name, uris in files.items() if len(uris) > 1]
    if doubled:
        listed = "\n  ".join(doubled)
        raise SheetError(f"several files under {samples} give the same slide id; name them in a sheet:\n  {listed}")


def _column_faults(columns: Collection[str]) -> Iterator[str]:
    needed, known = ("section_id", "x_px", "y_px"), ("section_id", "x_px", "y_px", "spot_id")
    yield from (f"column {name} is missing" for name in needed if name not in columns)
    yield from (f"column {name!r} is unknown; known ones: {', '.join(known)}" for name in columns if name not in known)
    yield from (f"column {name} appears twice" for name, times in Counter(columns).items() if times > 1)


def _row_faults(lines: Sequence[int], table: pd.DataFrame, numbers: pd.DataFrame) -> Iterator[str]:
    finite = {name: np.isfinite(numbers[name].to_numpy()) for name in numbers}
    doubled = table.duplicated(["section_id", "spot_id"])
    if table.empty:
        yield "there are no rows below the header"
    for row, (section, spot) in enumerate(zip(table["section_id"], table["spot_id"], strict=True)):
        line = f"row {lines[row]}"
        for name in ("x_px", "y_px"):
            if not finite[name][row]:
                yield f"{line}, column {name}, got {table[name].iat[row]!r}: give a number of level-0 pixels"
        if not section:
            yield f"{line}, column section_id: it is empty"
        if not spot:
            yield f"{line}, column spot_id: it is empty"
        elif doubled.iat[row]:
            yield f"{line}, column spot_id: {spot!r} is already among the spots of {section}"
