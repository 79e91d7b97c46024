"""New pictures of slides that are done: a run that asks for other genes draws them from what is published.

Nothing is predicted again. A run that names no genes leaves the pictures as they are.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import ray

from mclstexp import storage
from mclstexp.cluster import MAX_RETRIES
from mclstexp.data.genes import find_genes
from mclstexp.errors import ConflictError, UserError
from mclstexp.prediction import ledger
from mclstexp.prediction.ledger import Entry
from mclstexp.prediction.publish import _upload_pictures
from mclstexp.prediction.writers.geojson import write_geojson
from mclstexp.prediction.writers.h5ad import published_thumbnail
from mclstexp.prediction.writers.overview import draw_overview
from mclstexp.prediction.writers.table import OutputInfo, published_record

_AT_ONCE = 4
_TRIES = 3


def redraw(
    settled: Mapping[str, Entry], out: str, facts: OutputInfo, genes: Sequence[str]
) -> Iterator[tuple[Entry, str]]:
    """Draws slides that are done and show other genes; yields each one's new entry and what went wrong, if anything."""
    wanted = ",".join(genes)
    left = [entry for entry in settled.values() if entry.state == "done" and wanted not in ("", entry.genes)]
    draw = ray.remote(num_cpus=0, max_retries=MAX_RETRIES)(_drawn)
    for start in range(0, len(left), _AT_ONCE):
        some = left[start : start + _AT_ONCE]
        asked = [draw.remote(entry, out, facts, tuple(genes)) for entry in some]
        for entry, reference in zip(some, asked, strict=True):
            try:
                new, fault = ray.get(reference)
            except ray.exceptions.RayError as error:
                new, fault = entry, str(error)
            yield new, f"its other genes are not drawn: {fault}" if fault else ""


def _drawn(entry: Entry, out: str, facts: OutputInfo, genes: tuple[str, ...]) -> tuple[Entry, str]:
    """Returns a slide's new entry, or its old one and why it was not drawn: raised it would become a traceback."""
    try:
        return _draw_until_kept(entry, out, facts, genes)
    except (UserError, FileNotFoundError) as error:
        return entry, str(error)


def _draw_until_kept(entry: Entry, out: str, facts: OutputInfo, genes: tuple[str, ...]) -> tuple[Entry, str]:
    uploaded = False
    for _ in range(_TRIES):
        with suppress(ConflictError):  # another run is at work on the slide
            drawn = _draw(entry, out, facts, genes)
            if drawn:
                return drawn, ""
            uploaded = True
        there = ledger.entry(out, entry.slide_id)
        if there is None or there.state != "done":
            break
        entry = there
    fault = "another run was replacing its files; run the same command again"
    if uploaded:  # and our pictures may be among its own
        entry = entry.model_copy(update={"state": "failed", "reason": fault})
        ledger.set_aside(out, entry, also_predictions=True)
    return entry, fault


def _draw(entry: Entry, out: str, facts: OutputInfo, genes: tuple[str, ...]) -> Entry | None:
    """Returns a slide's new entry; None where another run took the claim after the pictures were replaced."""
    wanted = ",".join(genes)
    with redrawn(entry.slide_id, out, facts, genes) as replace_published:
        claim = entry.model_copy(update={"genes": ledger.DRAWING + wanted})
        claimed = ledger.claim_slide(out, claim, over=entry)
        replace_published()
        new = entry.model_copy(update={"genes": wanted})
        try:
            ledger.commit(out, new, claimed)
        except ConflictError:
            return None
    return new


@contextmanager
def redrawn(slide_id: str, out_uri: str, model_facts: OutputInfo, genes: Sequence[str]) -> Iterator[Callable[[], None]]:
    """Draws overview and GeoJSON of a published slide with other genes, as `publish_slide` would have.

    Args:
        slide_id: the slide.
        out_uri: root of the predictions.
        model_facts: the model that made them.
        genes: chosen genes by symbol, gene id or Ensembl id, at least one.

    Yields:
        What replaces the published ones; until it is called, nothing has changed.

    Raises:
        ConfigError: the panel lacks a chosen gene; names the nearest.
        FileNotFoundError: its table or AnnData file is gone.
        StorageError: its table is of an earlier version, or something cannot be read or written.
    """
    chosen = find_genes(model_facts.panel, genes)
    with tempfile.TemporaryDirectory(prefix="mclstexp-") as scratch:
        table, data, picture, squares = (Path(scratch, f"slide.{kind}") for kind in ("parquet", "h5ad", "png", "json"))
        storage.download(storage.join(out_uri, f"{slide_id}.parquet"), table)
        storage.download(storage.join(out_uri, f"{slide_id}.h5ad"), data)
        record, thumbnail = published_record(table), published_thumbnail(data, slide_id)
        draw_overview(picture, table, record, model_facts, chosen, thumbnail)
        write_geojson(squares, table, record, model_facts, chosen)
        yield lambda: _upload_pictures(picture, squares, slide_id, out_uri)
