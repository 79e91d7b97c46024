"""A real tile table of a few spots, written without slides or Ray; its tiles are not images."""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mclstexp import storage
from mclstexp.data.gene_names import gene_names
from mclstexp.data.schema import (
    GENE_SCHEMA,
    MANIFEST,
    TILE_SCHEMA,
    Manifest,
    RowGroup,
    SectionEntry,
    encode_rows,
    load_manifest,
)
from mclstexp.data.table import tile_crc, write_section

NAMES = ("TP53", "ENSG00000141510", "ACTB", "CD74", "GNAS", "FASN", "VIM", "MUC1")


def empty_manifest(mpp: float = 0.5) -> Manifest:
    """Returns the manifest of a table without sections, with JPEG tiles of 32 px."""
    return Manifest(
        tile_size_px=32,
        mpp=mpp,
        encoding="jpeg",
        jpeg_quality=85,
        sentence_length=16,
        genes_file="",
        genes_sha256="",
        num_genes=0,
        sections=(),
    )


def random_counts(num_spots: int, seed: int, num_genes: int = len(NAMES)) -> np.ndarray:
    """Returns overdispersed counts, int32 (num_spots, num_genes)."""
    rng = np.random.default_rng(seed)
    return rng.poisson(rng.gamma(1.0, 2.0, (num_spots, num_genes))).astype(np.int32)


def make_sentence(section_id: str, counts: np.ndarray, xy_px: np.ndarray | None = None) -> pa.Table:
    """Returns one sentence (TILE_SCHEMA) of spots at `xy_px`, (n, 2); array positions and micrometres are all 0."""
    x_px, y_px = np.zeros((2, len(counts))) if xy_px is None else xy_px.T
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
    """Returns a manifest entry whose other fields are empty."""
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
    xy_px: Mapping[str, np.ndarray] | None = None,
    measures: Mapping[str, np.ndarray] | None = None,
) -> Manifest:
    """Writes a tile table with two sentences per section from each section's counts (n, G); returns its manifest.

    `measures` has the genes that a section measures, bool (G,); others do not say.
    """
    entries = []
    for section_id, counts in sections.items():
        xy = np.zeros((len(counts), 2)) if xy_px is None else xy_px[section_id]
        halves = zip(np.array_split(counts, 2), np.array_split(xy, 2), strict=True)
        sentences = [make_sentence(section_id, *half) for half in halves]
        written = write_section(root / f"{section_id}.parquet", sentences)
        known = {"file": f"{section_id}.parquet", "num_spots": len(counts)} | written.__dict__
        known["genes"] = encode_rows(measures[section_id]) if measures and section_id in measures else None
        entries.append(section_entry(section_id, section_id[0], **known))
    columns = list(zip(*(gene_names(name) for name in names), strict=True))
    pq.write_table(pa.table([list(column) for column in columns], schema=GENE_SCHEMA), root / "genes.parquet")
    manifest = Manifest(
        tile_size_px=8,
        mpp=1.0,
        encoding="jpeg",
        jpeg_quality=85,
        sentence_length=64,
        genes_file="genes.parquet",
        genes_sha256=sha256((root / "genes.parquet").read_bytes()).hexdigest(),
        num_genes=len(names),
        sections=tuple(entries),
    )
    storage.publish(str(root / MANIFEST), manifest.encode(), None)
    return load_manifest(str(root))


def manifest_of(groups: dict[str, int], spots: int = 10) -> Manifest:
    """Returns a manifest of sections with so many sentences of `spots` spots and 100 bytes each; there are no files."""
    entries = [
        section_entry(
            name,
            name[0],
            file=f"{name}.parquet",
            row_groups=tuple(RowGroup(offset=0, length=100, num_rows=spots) for _ in range(count)),
            num_spots=spots * count,
            max_array=3,
        )
        for name, count in groups.items()
    ]
    genes = {"genes_file": "g", "genes_sha256": "", "num_genes": 3}
    return Manifest(
        tile_size_px=32, mpp=1.0, encoding="jpeg", jpeg_quality=85, sentence_length=16, sections=tuple(entries), **genes
    )
