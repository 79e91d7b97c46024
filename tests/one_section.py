"""A tile table of one section, complete with an entry in its manifest."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mclstexp import storage
from mclstexp.data import row_groups
from mclstexp.data.schema import (
    GENE_SCHEMA,
    MANIFEST,
    TILE_SCHEMA,
    WIDE_SCHEMA_VERSION,
    WIDE_TILE_SCHEMA,
    Manifest,
    SectionEntry,
)
from mclstexp.data.table import tile_crc, write_section
from mclstexp.slides.codec import encode_tile

NUM_GENES = 50


def sentence(first, num_spots, section_id="S1", measured=True):
    rng = np.random.default_rng(first)
    images = [encode_tile(rng.integers(0, 256, (16, 16, 3), np.uint8), "png", 90) for _ in range(num_spots)]
    genes = [np.sort(rng.choice(NUM_GENES, 7, replace=False)).tolist() for _ in range(num_spots)]
    spots = np.arange(first, first + num_spots)
    columns = {
        "section_id": [section_id] * num_spots,
        "patient_id": ["P"] * num_spots,
        "spot_id": [f"spot{i}" for i in spots],
        "array_row": pa.array(spots, pa.int32()),
        "array_col": pa.nulls(num_spots, pa.int32()),
        "x_px": spots * 10.0,
        "y_px": spots * 20.0,
        "x_um": spots * 5.0,
        "y_um": spots * 10.0,
        "image": images,
        "tissue_fraction": np.linspace(0, 1, num_spots).astype(np.float32),
        "label": pa.nulls(num_spots, pa.string()),
        "crc": pa.array(map(tile_crc, images), pa.uint32()),
        "gene_index": genes if measured else pa.nulls(num_spots, pa.list_(pa.int32())),
        "count": [rng.integers(1, 100, 7).tolist() for _ in spots]
        if measured
        else pa.nulls(num_spots, pa.list_(pa.int32())),
    }
    return pa.table(columns, schema=TILE_SCHEMA)


@dataclass
class Made:
    root: str
    entry: SectionEntry
    sentences: list[pa.Table]

    @property
    def uri(self):
        return storage.join(self.root, self.entry.file)


def make_one(folder, root=None, sentences=None, section_id="S1", measured=True, **wide):
    """Writes a table of one section at `root`, or in a folder, with scratch files in that folder.

    `wide` has wide_px and wide_mpp if the sentences have a wide view.
    """
    root = root or str(folder / "table")
    if sentences is None:
        sentences = [sentence(first, num, measured=measured) for first, num in ((0, 9), (9, 8), (17, 8))]
    local = folder / "scratch.parquet"
    written = write_section(local, sentences, WIDE_TILE_SCHEMA if wide else TILE_SCHEMA)
    storage.upload(local, storage.join(root, "tiles/S1.parquet"))
    entry = SectionEntry(
        section_id=section_id,
        patient_id="P",
        site="",
        file="tiles/S1.parquet",
        size_bytes=written.size_bytes,
        sha256=written.sha256,
        footer_offset=written.footer_offset,
        row_groups=written.row_groups,
        num_spots=sum(group.num_rows for group in written.row_groups),
        measured=measured,
        max_array=24,
        source_mpp=0.5,
        width_px=1000,
        height_px=1000,
        fingerprint="x-y",
        rejects_file="rejects/S1.parquet",
        rejected={},
        num_labelled=0,
        thumbnail_file="",
        thumbnail_scale=1.0,
    )
    write_manifest(root, entry, **wide)
    row_groups.read_footer.cache_clear()
    return Made(root, entry, sentences)


def write_manifest(root, entry, **wide):
    genes = pa.table({name: [f"{name}{i}" for i in range(NUM_GENES)] for name in GENE_SCHEMA.names}, schema=GENE_SCHEMA)
    buffer = pa.BufferOutputStream()
    pq.write_table(genes, buffer)
    manifest = Manifest(
        tile_size_px=16,
        mpp=0.5,
        encoding="jpeg",
        jpeg_quality=85,
        sentence_length=16,
        genes_file="genes.parquet",
        genes_sha256="",
        num_genes=NUM_GENES,
        sections=(entry,),
        **(wide | {"schema_version": WIDE_SCHEMA_VERSION} if wide else {}),
    )
    storage.write(storage.join(root, "genes.parquet"), buffer.getvalue().to_pybytes())
    storage.write(storage.join(root, MANIFEST), manifest.encode())
