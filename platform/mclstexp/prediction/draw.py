"""Pictures of chosen genes, drawn from published tables: an overview (PNG) and squares for QuPath (GeoJSON) per slide.

Drawing needs no model and predicts nothing. A record beside the pictures names the genes and the version of the table
that they show; it is written last, so that the same command draws only what is missing or out of date. The price is
that each slide's table and AnnData file (which has its thumbnail) are copied to scratch to draw it.
"""

import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import ray
from pydantic import BaseModel, ConfigDict, ValidationError

from mclstexp import storage
from mclstexp.cluster import MAX_RETRIES, guarded
from mclstexp.data.genes import find_genes
from mclstexp.errors import ConflictError, PredictError, StorageError, UserError
from mclstexp.messages import did_you_mean
from mclstexp.prediction import ledger
from mclstexp.prediction.publish import GEOJSON, OVERVIEW, PICTURE_RECORD
from mclstexp.prediction.writers import H5AD, TABLE
from mclstexp.prediction.writers.geojson import write_geojson
from mclstexp.prediction.writers.h5ad import published_thumbnail
from mclstexp.prediction.writers.overview import draw_overview
from mclstexp.prediction.writers.slide import OutputInfo, PredictedSlide, record_of
from mclstexp.prediction.writers.table import info_of
from mclstexp.progress import Show

NUM_FIRST_GENES = 4
"""Genes of an overview if none are chosen: the first of the panel."""
_TRIES = 3
_POLL_S = 1.0
"""All slides that ended are collected this often: a wait for each would look at every slide for every slide."""


class PictureRecord(BaseModel):
    """What the pictures of a slide show."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    genes: tuple[str, ...]
    """Gene ids, in the order of the pictures."""
    has_geojson: bool
    """Whether the genes were chosen, so that there is GeoJSON too."""
    model_digest: str
    table: str
    """Version of the table that was drawn (`storage.version`)."""


@dataclass
class DrawReport:
    """What came of drawing slides."""

    num_drawn: int = 0
    num_up_to_date: int = 0
    """Slides whose pictures already showed these genes."""
    faults: dict[str, str] = field(default_factory=dict)
    """Slides that could not be drawn, with the reason."""


def slides_to_draw(out: str, slide_ids: Sequence[str] = ()) -> list[str]:
    """Returns the slides that are done, or those named.

    Raises:
        PredictError: no slide is predicted, or one of those named has no prediction.
    """
    known = ledger.slides(out)
    unknown = [name for name in slide_ids if name not in known]
    if known and unknown:
        raise PredictError(f"{out} has no prediction of slide {unknown[0]}; {did_you_mean(unknown[0], known)}")
    entries = ledger.entries(out, slide_ids or known)
    if not slide_ids:
        entries = {name: entry for name, entry in entries.items() if entry.state == "done"}
    if not entries:
        raise PredictError(f"{out} contains no predicted slides; give the --out of jobs/predict.py")
    return list(entries)


def require_genes(out: str, slide_ids: Sequence[str], genes: Sequence[str]) -> None:
    """Checks that the panel has all chosen genes, by the metadata of the first table that can be read.

    All tables of an output have one panel. If none can be read, drawing each slide gives the reasons.

    Raises:
        ConfigError: it does not have some; names the nearest.
    """
    for slide_id in slide_ids:
        with suppress(StorageError):
            find_genes(_published_info(storage.absolute(out), slide_id).panel, genes)
            return


def draw_slides(out: str, slide_ids: Sequence[str], genes: Sequence[str], show: Show) -> DrawReport:
    """Draws slides in Ray tasks. Ray must be connected.

    Args:
        out: root of the predictions.
        slide_ids: the slides.
        genes: chosen genes by symbol, gene id or Ensembl id; none: the panel's first in an overview, and no GeoJSON.
        show: receives the number of slides that were looked at.

    Returns:
        What came of it. A fault of a slide stops no other.
    """
    out, report = storage.absolute(out), DrawReport()
    draw = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(guarded)
    drawing = {draw.remote(draw_slide, out, name, tuple(genes)): name for name in slide_ids}
    while drawing:
        show("draw slides", len(slide_ids) - len(drawing), len(slide_ids))
        ended, _ = ray.wait(list(drawing), num_returns=len(drawing), timeout=_POLL_S)
        for reference in ended:
            name = drawing.pop(reference)
            try:
                outcome: bool | UserError = ray.get(reference)
            except ray.exceptions.RayError as error:
                outcome = UserError(str(error))
            if isinstance(outcome, UserError):
                report.faults[name] = str(outcome)
            else:
                report.num_drawn += outcome
                report.num_up_to_date += not outcome
    show("draw slides", len(slide_ids), len(slide_ids))
    report.faults = dict(sorted(report.faults.items()))
    return report


def draw_slide(out: str, slide_id: str, genes: Sequence[str]) -> bool:
    """Draws a published slide, unless its pictures already show these genes of this table.

    If another process drew the slide at the same time, the pictures could be partly its own; then the slide is drawn
    again, so that record and pictures agree.

    Args:
        out: root of the predictions.
        slide_id: the slide.
        genes: chosen genes, as for `draw_slides`.

    Returns:
        Whether it was drawn.

    Raises:
        ConfigError: the panel does not have a chosen gene; names the nearest.
        PredictError: the slide is not done.
        FileNotFoundError: its table or AnnData file is gone.
        StorageError: its table is of an earlier version, or something cannot be read or written.
        ConflictError: another process kept drawing the slide.
    """
    entry = ledger.entry(out, slide_id)
    if entry is None or entry.state != "done":
        state = "not predicted" if entry is None else " ".join([entry.state, entry.reason]).strip()
        raise PredictError(f"there is no finished prediction to draw: the slide is {state}")
    for tries_left in reversed(range(_TRIES)):
        try:
            return _draw(out, slide_id, genes)
        except ConflictError:
            if not tries_left:
                raise
    raise AssertionError("the last try returns or raises")


def _draw(out: str, slide_id: str, genes: Sequence[str]) -> bool:
    table_uri, h5ad_uri, record_uri, overview_uri, geojson_uri = (
        storage.join(out, path.format(slide_id=slide_id)) for path in (TABLE, H5AD, PICTURE_RECORD, OVERVIEW, GEOJSON)
    )
    version = storage.version(table_uri)  # before the table is read: a later one makes the pictures out of date
    if version is None:
        raise FileNotFoundError(table_uri)
    info = _published_info(out, slide_id)
    columns = find_genes(info.panel, genes) or list(range(min(NUM_FIRST_GENES, len(info.panel))))
    record = PictureRecord(
        genes=info.panel.take(columns).gene_id,
        has_geojson=bool(genes),
        model_digest=info.model_digest,
        table=version,
    )
    pictures = [overview_uri, geojson_uri] if genes else [overview_uri]
    if _read_record(record_uri) == record and all(map(storage.exists, pictures)):
        return False
    with tempfile.TemporaryDirectory(prefix="mclstexp-") as scratch:
        table, data, overview, geojson = (Path(scratch, name) for name in ("table", "h5ad", "overview.png", "geojson"))
        storage.download(table_uri, table)
        storage.download(h5ad_uri, data)
        try:
            thumbnail = published_thumbnail(data, slide_id)
        except (OSError, KeyError, ValueError) as error:
            raise StorageError(f"{h5ad_uri} is damaged: {error}; {_how_to_predict_again(out, slide_id)}") from None
        slide = PredictedSlide("", table, info, thumbnail)
        draw_overview(overview, slide, columns)
        if genes:
            write_geojson(geojson, slide, columns)

        # The record is gone while pictures are replaced, so that it never describes those of another drawing.
        storage.delete(record_uri)
        storage.upload(overview, overview_uri)
        if genes:
            storage.upload(geojson, geojson_uri)
        else:
            storage.delete(geojson_uri)
        storage.publish(record_uri, record.model_dump_json(indent=1).encode(), previous=None)
    return True


def _published_info(out: str, slide_id: str) -> OutputInfo:
    uri = storage.join(out, TABLE.format(slide_id=slide_id))
    filesystem, path = storage.filesystem(uri)
    try:
        schema = pq.read_schema(path, filesystem=filesystem)
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot read {uri}: {error}") from None
    try:
        record_of(schema.metadata)
        return info_of(schema)
    except StorageError as error:
        fix = _how_to_predict_again(out, slide_id)
        raise StorageError(f"{uri} is of an earlier version: {error}; {fix}") from None


def _how_to_predict_again(out: str, slide_id: str) -> str:
    entry = storage.join(out, ledger.FOLDER, f"{slide_id}.json")
    return f"remove {entry} and run jobs/predict.py again with --out {out}, which predicts the slide again"


def _read_record(uri: str) -> PictureRecord | None:
    """Returns what a slide's pictures show; None if there is no record of this version."""
    try:
        return PictureRecord.model_validate_json(storage.read(uri))
    except (FileNotFoundError, ValidationError):
        return None
