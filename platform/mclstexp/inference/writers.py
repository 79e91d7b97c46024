"""What a prediction looks like on disk: one Parquet and one AnnData file a section.

Neither holds a time or a run's name, so that the same prediction gives the same bytes. `out_of_distribution` may be
missing: in Parquet as null, in AnnData as a nullable boolean, which readers older than anndata 0.8 do not know.
"""

from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mclstexp.data.genes import GenePanel, normalisers
from mclstexp.inference.model_version import ModelVersion
from mclstexp.inference.out_of_distribution import is_ood
from mclstexp.inference.retrieval import Retrieved

SPOT_COLUMNS = ("section_id", "patient_id", "spot_id", "array_row", "array_col", "x_px", "y_px", "x_um", "y_um")
OUT_OF_DISTRIBUTION = "out_of_distribution"
"""Column: whether a tile resembles nothing in the bank; missing where that is unknown."""


@dataclass(frozen=True)
class Provenance:
    """What a prediction was made from, the same in both files."""

    model_digest: str
    section_sha256: str
    unit: str
    mpp: float
    tile_size_px: int
    ood_similarity: float | None
    """Best cosine below which a tile is out of distribution; None: unknown."""

    def as_text(self) -> dict[str, str]:
        """Returns the fields as texts, the unknown ones empty."""
        return {name: "" if value is None else str(value) for name, value in vars(self).items()}


def provenance(model: ModelVersion, section_sha256: str) -> Provenance:
    """Returns the provenance of a section's prediction by a model version."""
    unit = normalisers(model.config.genes)[1].unit()
    return Provenance(model.digest, section_sha256, unit, model.mpp, model.tile_size_px, model.ood_similarity)


def write_parquet(path: Path, spots: pa.Table, found: Retrieved, panel: GenePanel, origin: Provenance) -> None:
    """Writes one row a spot: its place, confidence, and one float32 column a gene (named by gene id)."""
    table = spots.select(list(SPOT_COLUMNS))
    for name, values in _confidence(found).items():
        table = table.append_column(name, pa.array(values, pa.float32()))
    table = table.append_column(OUT_OF_DISTRIBUTION, pa.array(is_ood(found.similarity, origin.ood_similarity)))
    for gene, values in zip(panel.gene_id, found.prediction.T, strict=True):
        table = table.append_column(gene, pa.array(values, pa.float32()))
    names = {"genes": ",".join(panel.gene_id), "symbols": ",".join(panel.symbol)}
    pq.write_table(table.replace_schema_metadata(origin.as_text() | names), path, compression="zstd")


def write_h5ad(path: Path, spots: pa.Table, found: Retrieved, panel: GenePanel, origin: Provenance) -> None:
    """Writes an AnnData file: X float32 (spots, genes), obsm["spatial"] in level-0 pixels, units and origin in uns."""
    frame = spots.select(list(SPOT_COLUMNS)).to_pandas()
    flags = {OUT_OF_DISTRIBUTION: is_ood(found.similarity, origin.ood_similarity)}
    obs = frame.assign(**_confidence(found), **flags).set_index(frame["spot_id"].astype(str).rename(None))
    var = pd.DataFrame({"symbol": panel.symbol, "ensembl_id": panel.ensembl_id}, index=list(panel.gene_id))
    data = anndata.AnnData(
        X=found.prediction,
        obs=obs,
        var=var,
        obsm={"spatial": frame[["x_px", "y_px"]].to_numpy(np.float64)},
        uns={"prediction": origin.as_text() | {"spatial_unit": "px at slide level 0"}},
    )
    data.write_h5ad(path, compression="gzip")


def _confidence(found: Retrieved) -> dict[str, np.ndarray]:
    return {
        "similarity": found.similarity,
        "effective_donors": found.effective_donors,
        "donor_share": found.donor_share,
    }
