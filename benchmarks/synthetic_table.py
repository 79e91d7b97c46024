"""A tile table of repeated tiles of synthetic tissue, written in seconds: reading it costs what a real one costs."""

from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ingest.texture import draw_stain, paint, smooth_field
from mclstexp import storage
from mclstexp.data.gene_names import gene_names
from mclstexp.data.schema import GENE_SCHEMA, MANIFEST, TILE_SCHEMA, Manifest, SectionEntry
from mclstexp.data.table import tile_crc, write_section
from mclstexp.slides.codec import encode_tile

SECTIONS, DISTINCT_TILES, JPEG_QUALITY = 8, 16, 85
_COUNT_RATE = 0.3


def tissue(size_px: int, seed: int = 0) -> np.ndarray:
    """Returns a tile of synthetic tissue, uint8 (size, size, 3)."""
    rng = np.random.default_rng(seed)
    latents, density = np.stack([smooth_field(rng, size_px, 64) for _ in range(3)]), smooth_field(rng, size_px, 64)
    return paint(rng, latents, density, np.ones((size_px, size_px), bool), draw_stain(rng))


def write_tile_table(root: Path, size_px: int, num_sentences: int, length: int, num_genes: int) -> Manifest:
    """Writes a table of `SECTIONS` sections with `num_sentences` sentences of `length` spots in all."""
    root.mkdir(parents=True)
    sentence = _sentence(size_px, length, num_genes)
    names = [gene_names(f"GENE{number:04d}") for number in range(num_genes)]
    columns = [list(column) for column in zip(*names, strict=True)]
    pq.write_table(pa.table(columns, schema=GENE_SCHEMA), root / "genes.parquet")
    sections = [_section(root, f"S{number}", sentence, num_sentences // SECTIONS) for number in range(SECTIONS)]
    manifest = Manifest(
        tile_size_px=size_px,
        mpp=0.5,
        encoding="jpeg",
        jpeg_quality=JPEG_QUALITY,
        sentence_length=length,
        genes_file="genes.parquet",
        genes_sha256=sha256((root / "genes.parquet").read_bytes()).hexdigest(),
        num_genes=num_genes,
        sections=tuple(sections),
    )
    storage.publish(str(root / MANIFEST), manifest.encode(), None)
    return manifest


def _sentence(size_px: int, length: int, num_genes: int) -> pa.Table:
    rng = np.random.default_rng(0)
    tiles = [encode_tile(tissue(size_px, seed), "jpeg", JPEG_QUALITY) for seed in range(DISTINCT_TILES)]
    images = [tiles[row % DISTINCT_TILES] for row in range(length)]
    counts = rng.poisson(rng.gamma(1.0, _COUNT_RATE, (length, num_genes)))
    counts[:, 0] += 1  # no spot without counts
    x_um, y_um = rng.uniform(0, 2000, (2, length))
    columns = {
        **dict.fromkeys(("section_id", "patient_id", "spot_id"), [""] * length),
        **dict.fromkeys(("array_row", "array_col"), [0] * length),
        "x_px": 2 * x_um,
        "y_px": 2 * y_um,
        "x_um": x_um,
        "y_um": y_um,
        "image": images,
        "tissue_fraction": [1.0] * length,
        "label": pa.nulls(length, pa.string()),
        "crc": [tile_crc(image) for image in images],
        "gene_index": [np.flatnonzero(row) for row in counts],
        "count": [row[row > 0] for row in counts],
    }
    return pa.table(columns, schema=TILE_SCHEMA)


def _section(root: Path, name: str, sentence: pa.Table, num_sentences: int) -> SectionEntry:
    length = len(sentence)

    def named(number: int) -> pa.Table:
        spots = [f"{number}-{row}" for row in range(length)]
        names = {"section_id": [name] * length, "patient_id": [name] * length, "spot_id": spots}
        return pa.table({column: names.get(column, sentence[column]) for column in TILE_SCHEMA.names}, TILE_SCHEMA)

    written = write_section(root / f"{name}.parquet", map(named, range(num_sentences)))
    return SectionEntry(
        section_id=name,
        patient_id=name,
        site="",
        file=f"{name}.parquet",
        num_spots=num_sentences * length,
        measured=True,
        max_array=0,
        source_mpp=0.5,
        width_px=4000,
        height_px=4000,
        fingerprint="",
        rejects_file="",
        rejected={},
        num_labelled=0,
        thumbnail_file="",
        thumbnail_scale=1.0,
        **asdict(written),
    )
