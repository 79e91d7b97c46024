"""Prediction of a tile table: embed, retrieve, write, one section after the other, resumable.

A section is done when its ledger entry says so, which is written after its files; the entry names the model and
the section's bytes, so that a run that is started again does what is left or changed and nothing else.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mclstexp import storage
from mclstexp.data.schema import Manifest, SectionEntry, load_manifest
from mclstexp.data.table import read_columns
from mclstexp.inference.embed import embed_sections, network_of
from mclstexp.inference.model_version import ModelVersion
from mclstexp.inference.retrieval import Retrieved
from mclstexp.inference.writers import SPOT_COLUMNS, provenance, write_h5ad, write_parquet

LEDGER = "ledger"


@dataclass(frozen=True)
class PredictReport:
    """What a run did."""

    predicted: list[str]
    skipped: list[str]
    """Sections that were done before."""
    empty: list[str]
    """Sections without a tile, of which nothing is written."""
    num_spots: int


def predict_table(model: ModelVersion, tiles: str, out: str, show: Callable[[int, int], None]) -> PredictReport:
    """Predicts all sections of a tile table that `out` does not hold yet.

    Args:
        model: the version to predict with.
        tiles: root of the tile table.
        out: where SECTION.parquet, SECTION.h5ad and the ledger go.
        show: called with (spots done, spots in all) as they are embedded.

    Raises:
        ModelError: the table was cut at another size or resolution than the model's tiles.
    """
    root, out = storage.absolute(tiles), storage.absolute(out)
    manifest = load_manifest(root)
    model.require_table(manifest)
    left = _left(manifest, out, model)
    total, embedded = sum(entry.num_spots for entry in left), 0

    def advance(num_spots: int) -> None:
        nonlocal embedded
        embedded += num_spots
        show(embedded, total)

    names = [entry.section_id for entry in left]
    network = network_of(model)
    for name, arrays in embed_sections(root, manifest, names, network, advance) if names else ():
        _publish(out, root, manifest.section(name), model, model.predict(arrays["embedding"]))
    skipped = [entry.section_id for entry in manifest.sections if entry.num_spots and entry.section_id not in names]
    empty = [entry.section_id for entry in manifest.sections if not entry.num_spots]
    return PredictReport(names, skipped, empty, total)


def is_done(out: str, entry: SectionEntry, model: ModelVersion) -> bool:
    """Tells whether `out` holds this section's prediction by this model from these bytes."""
    try:
        return json.loads(storage.read(_ledger(out, entry))) == _entry(entry, model)
    except FileNotFoundError:
        return False


def plan(manifest: Manifest, model: ModelVersion, out: str) -> str:
    """Returns what a run would do, in words."""
    left = _left(manifest, storage.absolute(out), model)
    spots = sum(entry.num_spots for entry in left)
    return f"{len(left)} of {len(manifest.sections)} sections to predict, {spots} tiles, {len(model.panel)} genes"


def _left(manifest: Manifest, out: str, model: ModelVersion) -> list[SectionEntry]:
    """Returns the sections to predict; one without tiles (a blank slide) has nothing to write."""
    return [entry for entry in manifest.sections if entry.num_spots and not is_done(out, entry, model)]


def _publish(out: str, root: str, entry: SectionEntry, model: ModelVersion, found: Retrieved) -> None:
    storage.delete(_ledger(out, entry))  # killed halfway, an earlier entry must not vouch for mixed files
    spots = read_columns(root, entry, SPOT_COLUMNS)
    origin = provenance(model, entry.sha256)
    with tempfile.TemporaryDirectory() as scratch:
        for suffix, write in (("parquet", write_parquet), ("h5ad", write_h5ad)):
            path = Path(scratch, f"{entry.section_id}.{suffix}")
            write(path, spots, found, model.panel, origin)
            storage.upload(path, storage.join(out, path.name))
    storage.write(_ledger(out, entry), json.dumps(_entry(entry, model)).encode())


def _ledger(out: str, entry: SectionEntry) -> str:
    return storage.join(out, LEDGER, f"{entry.section_id}.json")


def _entry(entry: SectionEntry, model: ModelVersion) -> dict[str, str | int]:
    return {"model": model.digest, "section_sha256": entry.sha256, "spots": entry.num_spots}
