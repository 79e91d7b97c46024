"""A real tile table of a few spots, written without slides or Ray; its tiles are no images."""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mclstexp import storage
from mclstexp.data.schema import GENE_SCHEMA, MANIFEST, TILE_SCHEMA, Manifest, SectionEntry, gene_names, load_manifest
from mclstexp.data.table import tile_crc, write_section

NAMES = ("TP53", "ENSG00000141510", "ACTB", "CD74", "GNAS", "FASN", "VIM", "MUC1")


def random_counts(num_spots: int, seed: int, num_genes: int = len(NAMES)) -> np.ndarray:
    """Returns overdispersed counts, int32 (num_spots, num_genes)."""
    rng = np.random.default_rng(seed)
    return rng.poisson(rng.gamma(1.0, 2.0, (num_spots, num_genes))).astype(np.int32)


def make_sentence(section_id: str, counts: np.ndarray, places: np.ndarray | None = None) -> pa.Table:
    """Returns one sentence (TILE_SCHEMA) of spots at `places`, (n, 2) pixels; array and micrometres are all 0."""
    x_px, y_px = np.zeros((2, len(counts))) if places is None else places.T
    rows = range(len(counts))
    columns = {
        "section_id": [section_id] * len(counts),
        "patient_id": [section_id[0]] * len(counts),
        "spot_id": [str(row) for row in rows],
        **{name: [0] * len(counts) for name in ("array_row", "array_col", "x_um", "y_um")},
        "x_px": x_px,
        "y_px": y_px,
        "image": [b"tile"] * len(counts),
        "tissue_fraction": [1.0] * len(counts),
        "label": pa.nulls(len(counts), pa.string()),
        "crc": [tile_crc(b"tile")] * len(counts),
        "gene_index": [np.flatnonzero(row) for row in counts],
        "count": [row[row > 0] for row in counts],
    }
    return pa.table(columns, schema=TILE_SCHEMA)


def section_entry(section_id: str, patient_id: str, **known: object) -> SectionEntry:
    """Returns a manifest entry in which all that is not given is empty."""
    empty = {
        "site": "",
        "file": "",
        "size_bytes": 1,
        "sha256": "",
        "footer_offset": 0,
        "row_groups": (),
        "num_spots": 1,
        "measured": True,
        "max_array": 0,
        "source_mpp": 1.0,
        "width_px": 1,
        "height_px": 1,
        "fingerprint": "",
        "rejects_file": "",
        "rejected": {},
        "num_labelled": 0,
        "thumbnail_file": "",
        "thumbnail_scale": 1.0,
    }
    return SectionEntry.model_validate({"section_id": section_id, "patient_id": patient_id} | empty | known)


def make_table(
    root: Path,
    sections: dict[str, np.ndarray],
    names: Sequence[str] = NAMES,
    places: Mapping[str, np.ndarray] | None = None,
) -> Manifest:
    """Writes a tile table of two sentences a section, from each section's counts (n, G), and returns its manifest."""
    entries = []
    for section_id, counts in sections.items():
        place = np.zeros((len(counts), 2)) if places is None else places[section_id]
        halves = zip(np.array_split(counts, 2), np.array_split(place, 2), strict=True)
        sentences = [make_sentence(section_id, *half) for half in halves]
        written = write_section(root / f"{section_id}.parquet", sentences)
        place_of = {"file": f"{section_id}.parquet", "num_spots": len(counts)} | written.__dict__
        entries.append(section_entry(section_id, section_id[0], **place_of))
    columns = list(zip(*(gene_names(name) for name in names), strict=True))
    pq.write_table(pa.table([list(column) for column in columns], schema=GENE_SCHEMA), root / "genes.parquet")
    manifest = Manifest(
        tile_size_px=8,
        mpp=1.0,
        encoding="jpeg",
        jpeg_quality=90,
        sentence_length=64,
        genes_file="genes.parquet",
        genes_sha256=sha256((root / "genes.parquet").read_bytes()).hexdigest(),
        num_genes=len(names),
        sections=tuple(entries),
    )
    storage.publish(str(root / MANIFEST), manifest.encode(), None)
    return load_manifest(str(root))
