"""What is scored: the targets (units), and held-out sections with their prediction.

Shapes: N spots of one section, G genes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import anndata
import numpy as np
import pandas as pd

from mclstexp.data.genes import GenePanel, Normaliser, Total
from mclstexp.data.measured import XY_PX, XY_UM, MeasuredSection
from mclstexp.errors import ModelError
from mclstexp.evaluation.domains import spot_pitch
from mclstexp.model.bank import Bank

TARGETS = MappingProxyType(
    {
        "per_spot": Normaliser("per_spot_all", 1e4, "e"),
        "per_spot_panel": Normaliser("per_spot_panel", 1e4, "10"),
        "per_gene": Normaliser("per_gene", 1e4, "10"),
    }
)
"""By name: ours, ln(1 + 1e4 c / spot total over all genes); and mclSTExp's (2024, https://arxiv.org/abs/2407.08216)
training input, log10(1 + 1e4 c / spot total over the panel), and truth and payload, log10(1 + 1e4 c / gene total over
the section)."""
FOLDER = "sections"
MEASURED = "measured"
"""The layer of the measured expression; `X` is the prediction."""


@dataclass(frozen=True)
class SectionResult:
    """A held-out section with its measured and predicted expression in the model's own target."""

    section: MeasuredSection
    panel: GenePanel
    """The G genes."""
    truth: np.ndarray
    """(N, G); NaN for a gene that the section does not measure."""
    prediction: np.ndarray
    """(N, G)."""
    thumbnail: np.ndarray
    """The slide, uint8 (height, width, 3)."""
    thumbnail_scale: float
    """Level-0 pixels per pixel of the thumbnail."""


def scored_targets(own: Normaliser, seen: Normaliser) -> dict[str, Normaliser]:
    """Returns the targets of a score card by name, without repetition.

    The model's own target first, then `per_spot`, `per_gene` and the unit in which the model has `seen` its spots: in
    mclSTExp's recipe `per_spot_panel`, the per-spot unit of its published figures. A target that is not in `TARGETS`
    is named by its unit. `per_spot` divides by the model's own spot total (`genes.total`).
    """
    total: Total = "shared" if "shared" in (own.total, seen.total) else "all"
    known = {_with_total(target, total): name for name, target in TARGETS.items()}
    stated = (own, _with_total(TARGETS["per_spot"], total), TARGETS["per_gene"], seen)
    return {known.get(target, target.unit()): target for target in stated}


def _with_total(target: Normaliser, total: Total) -> Normaliser:
    return replace(target, total=total) if target.scheme == "per_spot_all" else target


def with_target(bank: Bank, training: Sequence[MeasuredSection], target: Normaliser) -> Bank:
    """Returns a bank with its payload in another target and the same keys, so the same neighbours and weights.

    Args:
        bank: of a model version.
        training: the version's training sections, in its order.
        target: the unit of the new payload.

    Raises:
        ModelError: the sections' spots are not the bank's.
    """
    sections = np.concatenate([np.full(len(section), section.section_id, object) for section in training])
    spots = np.concatenate([section.spot_id for section in training])
    if not (np.array_equal(sections, bank.section_id) and np.array_equal(spots, bank.spot_id)):
        raise ModelError(
            f"the bank's {len(bank)} spots of {', '.join(dict.fromkeys(bank.section_id))} and the tile table's "
            f"{len(spots)} spots of {', '.join(dict.fromkeys(sections))} are not the same in the same order, so that "
            "the model cannot answer in another target; score it on the tile table that it was trained on"
        )
    payload = np.concatenate([section.expression(target) for section in training])
    return replace(bank, payload=np.nan_to_num(payload, copy=False))


def section_path(section_id: str) -> str:
    """Returns the path of a section's file within a result folder."""
    return f"{FOLDER}/{section_id}.h5ad"


def write_section_result(folder: str | Path, result: SectionResult, facts: Mapping[str, str]) -> None:
    """Writes one section into a local result folder, see `section_path`.

    `X` and `layers["measured"]` float32 (N, G), the latter NaN for a gene that the section does not measure; `obs` by
    spot id with section_id, patient_id, x_px, y_px, x_um, y_um and label (missing for a spot without one); `var` by
    gene id with symbol and ensembl_id; `obsm["spatial"]` in level-0 pixels; `uns["spatial"][section_id]` with the
    slide; `uns["result"]` with `facts`.
    """
    section, panel = result.section, result.panel
    names = {"section_id": section.section_id, "patient_id": section.patient_id}
    coordinates = dict(zip((*XY_PX, *XY_UM), (*section.xy_px.T, *section.xy_um.T), strict=True))
    label = pd.Categorical([name or None for name in section.label])
    data = anndata.AnnData(
        X=result.prediction.astype(np.float32),
        layers={MEASURED: result.truth.astype(np.float32)},
        obs=pd.DataFrame(names | coordinates | {"label": label}, index=section.spot_id.astype(str)),
        var=pd.DataFrame({"symbol": panel.symbol, "ensembl_id": panel.ensembl_id}, index=list(panel.gene_id)),
        obsm={"spatial": section.xy_px},
        uns={"result": dict(facts), "spatial": {section.section_id: _slide(result)}},
    )
    path = Path(folder, section_path(section.section_id))
    path.parent.mkdir(exist_ok=True)
    data.write_h5ad(path, compression="gzip")


def _slide(result: SectionResult) -> dict[str, object]:
    """Returns the slide in scanpy's layout."""
    return {
        "images": {"hires": result.thumbnail},
        "scalefactors": {
            "tissue_hires_scalef": 1 / result.thumbnail_scale,
            "spot_diameter_fullres": 0.5 * spot_pitch(result.section.xy_px),
        },
    }
