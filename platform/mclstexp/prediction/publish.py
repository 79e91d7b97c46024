"""From a slide's staging folder to its published files.

All files are made on local scratch, then uploaded whole, the table last. None holds a time or a run's name, so that
however often publishing was interrupted and begun again, the bytes are the same; the price is scratch space for the
slide's files. Neither memory nor imports are those of prediction: no weights, no torch.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from mclstexp import storage
from mclstexp.data.genes import find_genes
from mclstexp.prediction.parts import PREVIEW, SlideRecord
from mclstexp.prediction.writers.geojson import write_geojson
from mclstexp.prediction.writers.h5ad import write_h5ad
from mclstexp.prediction.writers.overview import draw_overview
from mclstexp.prediction.writers.table import OutputInfo, read_record, read_thumbnail, write_table

PREVIEWS, OVERVIEWS, GEOJSON = "previews", "overviews", "geojson"
OVERVIEW_GENES = 4
"""Genes of the overview where none are chosen: the first of the panel."""


def publish_slide(staging_uri: str, out_uri: str, model_facts: OutputInfo, genes: Sequence[str]) -> SlideRecord:
    """Publishes a slide of which all parts are there; staging folder and ledger are left to the caller.

    Writes below `out_uri`, in this order: previews/SLIDE.jpg, SLIDE.h5ad, overviews/SLIDE.png, geojson/SLIDE.geojson
    (for chosen genes; an earlier one is removed where none are chosen) and SLIDE.parquet.

    Args:
        staging_uri: the slide's staging folder.
        out_uri: root of the predictions.
        model_facts: the model that made the parts.
        genes: chosen genes by symbol, gene id or Ensembl id, for the GeoJSON file and the overview; may be empty.

    Returns:
        The slide's record with the number of tiles that it has no pixels of. A slide without tiles has a preview only.

    Raises:
        ConfigError: the panel lacks a chosen gene; names the nearest.
        PartError: a part is missing, or was damaged and is removed: it has to be made again, then published.
        FileNotFoundError: the staging folder lacks another file.
        StorageError: another file of it is damaged, or something cannot be read or written.
    """
    chosen = find_genes(model_facts.panel, genes)
    record = read_record(staging_uri)
    name = record.slide_id
    preview, shown_at = storage.read(storage.join(staging_uri, PREVIEW)), storage.join(out_uri, PREVIEWS, f"{name}.jpg")
    if not record.num_tiles:
        storage.write(shown_at, preview)
        for place in (f"{name}.parquet", f"{name}.h5ad", f"{OVERVIEWS}/{name}.png", f"{GEOJSON}/{name}.geojson"):
            storage.delete(storage.join(out_uri, place))  # of an earlier image
        return record
    thumbnail = read_thumbnail(staging_uri)
    shown = chosen or list(range(min(OVERVIEW_GENES, len(model_facts.panel))))
    with tempfile.TemporaryDirectory(prefix="mclstexp-") as scratch:
        table, data, picture, squares = (Path(scratch, f"slide.{kind}") for kind in ("parquet", "h5ad", "png", "json"))
        record = write_table(table, staging_uri, record, model_facts)
        write_h5ad(data, table, record, model_facts, thumbnail)
        draw_overview(picture, table, record, model_facts, shown, thumbnail)
        if chosen:
            write_geojson(squares, table, record, model_facts, chosen)
        storage.write(shown_at, preview)
        storage.upload(data, storage.join(out_uri, f"{name}.h5ad"))
        _upload_pictures(picture, squares if chosen else None, name, out_uri)
        storage.upload(table, storage.join(out_uri, f"{name}.parquet"))
    return record


def _upload_pictures(picture: Path, squares: Path | None, slide_id: str, out_uri: str) -> None:
    outline = storage.join(out_uri, GEOJSON, f"{slide_id}.geojson")
    storage.upload(picture, storage.join(out_uri, OVERVIEWS, f"{slide_id}.png"))
    storage.upload(squares, outline) if squares else storage.delete(outline)
