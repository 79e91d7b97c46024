"""A slide's prediction as one Parquet file, joined from its grid and its parts.

It is made first, with the expression of one group of parts in memory at a time, and the other files are made from it.
The price is that the table exists on scratch before anything is published. Only the grid is in memory whole, about 70
bytes per tile, and what `gather` keeps.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mclstexp.data.genes import GenePanel
from mclstexp.errors import StorageError
from mclstexp.model.calibration import SPREAD
from mclstexp.prediction.parts import CONFIDENCE, GRID_SCHEMA, SlideRecord, read_grid
from mclstexp.prediction.writers.gather import GROUP_TILES, Group, gather
from mclstexp.prediction.writers.slide import RECORD_KEY, OutputInfo, PredictedSlide, provenance_of

OUT_OF_DISTRIBUTION = "out_of_distribution"
_NAMES = ["section_id", "patient_id"]
SPOT_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in _NAMES),
        *GRID_SCHEMA,
        *((name, pa.float32()) for name in CONFIDENCE),
        (OUT_OF_DISTRIBUTION, pa.bool_()),  # null if the model has no threshold
    ]
)
"""The columns in front of the genes."""
ABSTAIN, SCALE = "abstain", "interval_scale"
_DOUBT_SCHEMA = pa.schema([(SPREAD, pa.float32()), (ABSTAIN, pa.bool_()), (SCALE, pa.float32())])
"""Behind them, of a calibrated model."""


def write_table(path: Path, slide: PredictedSlide) -> None:
    """Writes one row per tile: its position, confidence, and one float32 column per gene (named by gene id).

    Tiles without pixels are left out. A row group has at most 4,096 rows. The file's metadata is `provenance`, the
    panel's genes and symbols, and the slide's record with the number of tiles left out.

    A calibrated model adds `spread`, `abstain` and `interval_scale`. A gene's interval in a tile is its prediction plus
    and minus `interval_scale` times the gene's `half_width`, which are in the metadata in the order of its genes
    (`half_width_any_depth`: for an assay of fewer counts too). A program model also states there the squared error of
    the level of a patient left out, `level_mse`, and of the training mean, `level_mse_of_train_mean`; empty if unknown.

    Args:
        path: local file to write.
        slide: its staging folder has all parts; the rest of it is made from this table.

    Raises:
        PartError: a part is missing or was damaged.
        StorageError: the grid is damaged.
    """
    record, info = slide.inspected, slide.info
    assert record is not None
    grid = read_grid(slide.staging, record.num_tiles)
    num_tiles = num_rows = 0
    # Expression neither repeats nor is searched by range; dictionaries and statistics of it would only cost.
    options = {"use_dictionary": _NAMES, "write_statistics": spot_schema(info).names, "compression": "zstd"}
    with pq.ParquetWriter(path, table_schema(info), store_schema=False, **options) as writer:
        for group in gather(slide.staging, record, grid, info):
            tiles = grid.slice(num_tiles, len(group.complete))
            writer.write_table(_joined(tiles, group, record, info), GROUP_TILES)
            num_tiles, num_rows = num_tiles + len(tiles), num_rows + len(group.values)
            del group  # before the next one is made
        # A slide that was moved gives the same bytes, so the image's URI is left out.
        record = record.model_copy(update={"missing_tiles": record.num_tiles - num_rows, "image": ""})
        genes = {"genes": ",".join(info.panel.gene_id), "symbols": ",".join(info.panel.symbol)}
        metadata = provenance_of(record, info) | genes | _expected_errors(info) | {RECORD_KEY: record.model_dump_json()}
        writer.add_key_value_metadata(metadata)


def row_groups(table: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Yields the row groups of a table that `write_table` wrote, with all its columns or those named."""
    with pq.ParquetFile(table) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns, use_threads=False)  # a task each for 1,000 columns costs more


def spot_schema(info: OutputInfo) -> pa.Schema:
    """Returns the columns in front of the genes."""
    return SPOT_SCHEMA if info.calibration is None else pa.schema([*SPOT_SCHEMA, *_DOUBT_SCHEMA])


def table_schema(info: OutputInfo) -> pa.Schema:
    """Returns the schema of a slide's table."""
    return pa.schema([*spot_schema(info), *((gene, pa.float32()) for gene in info.panel.gene_id)])


def info_of(schema: pa.Schema) -> OutputInfo:
    """Returns what the schema of a table that `write_table` wrote states about its model.

    Raises:
        StorageError: a key is missing or has no valid value.
    """
    facts = {name.decode(): value.decode() for name, value in (schema.metadata or {}).items()}
    try:
        symbols, ood = tuple(facts["symbols"].split(",")), facts["ood_similarity"]
        genes = tuple(schema.names[-len(symbols) :])
        # A gene's id is its Ensembl id if it has one, else its symbol.
        ensembl_ids = tuple("" if gene == symbol else gene for gene, symbol in zip(genes, symbols, strict=True))
        return OutputInfo(
            panel=GenePanel(genes, symbols, ensembl_ids),
            unit=facts["unit"],
            model_digest=facts["model_digest"],
            tile_size_px=int(facts["tile_size_px"]),
            mpp=float(facts["mpp"]),
            ood_similarity=float(ood) if ood else None,
        )
    except (KeyError, ValueError) as error:
        raise StorageError(f"the table does not describe its model ({error})") from None


def _joined(tiles: pa.Table, group: Group, record: SlideRecord, info: OutputInfo) -> pa.Table:
    """Returns the rows of the complete tiles of a group."""
    names = [pa.repeat(name, len(group.values)) for name in (record.slide_id, record.patient_id)]
    return pa.table(
        [
            *names,
            *tiles.filter(pa.array(group.complete)).columns,
            *(pa.array(group.confidence[name]) for name in CONFIDENCE),
            _out_of_distribution(group.confidence["similarity"], info.ood_similarity),
            *_doubts(group, info),
            *map(pa.array, group.values.T),
        ],
        schema=table_schema(info),
    )


def _doubts(group: Group, info: OutputInfo) -> list[pa.Array]:
    """Returns the columns of `_DOUBT_SCHEMA`; none without a calibration."""
    if info.calibration is None:
        return []
    similarity, spread = (group.confidence[name] for name in ("similarity", SPREAD))
    is_far = np.zeros(len(spread), bool) if info.ood_similarity is None else similarity < info.ood_similarity
    scale = info.calibration.scale.of(spread, similarity).astype(np.float32)
    return [pa.array(spread), pa.array(info.calibration.abstain(spread, is_far)), pa.array(scale)]


def _expected_errors(info: OutputInfo) -> dict[str, str]:
    """Returns the genes' half widths and the errors of the slide's level as metadata."""
    levels = info.decoder.level.errors() if info.decoder else {}
    stated = {name: "" if error is None else repr(error) for name, error in levels.items()}
    if info.calibration is None:
        return stated
    found = {name: getattr(info.calibration, name) for name in ("half_width", "half_width_any_depth")}
    return stated | {name: ",".join(map(repr, values.tolist())) for name, values in found.items()}


def _out_of_distribution(similarity: np.ndarray, threshold: float | None) -> pa.Array:
    return pa.nulls(len(similarity), pa.bool_()) if threshold is None else pa.array(similarity < threshold)
