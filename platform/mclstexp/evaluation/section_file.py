"""One scored section as a file: measured and predicted expression of its spots over the slide.

AnnData in the layout of Space Ranger's readers (`obsm["spatial"]`, `uns["spatial"]`), so that scanpy and squidpy draw
either over the slide, and the report needs neither the tile table nor the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from mclstexp.data.genes import GenePanel
from mclstexp.evaluation.domains import spot_pitch
from mclstexp.evaluation.measured import MeasuredSection

FOLDER = "sections"
MEASURED = "measured"
"""The layer with what was measured; `X` is what was predicted."""


@dataclass(frozen=True)
class SectionResult:
    """A held-out section with what was measured and predicted, in the model's own target."""

    section: MeasuredSection
    panel: GenePanel
    """The G genes."""
    truth: np.ndarray
    """(N, G)."""
    prediction: np.ndarray
    thumbnail: np.ndarray
    """The slide, uint8 (height, width, 3)."""
    thumbnail_scale: float
    """Level-0 pixels along a pixel of the thumbnail."""


def section_path(section_id: str) -> str:
    """Returns where a section's file lies within a result folder."""
    return f"{FOLDER}/{section_id}.h5ad"


def write_section_result(folder: str | Path, result: SectionResult, facts: Mapping[str, str]) -> None:
    """Writes one section into a local result folder, see `section_path`.

    `X` and `layers["measured"]` float32 (N, G); `obs` by spot id with section_id, patient_id, x_px, y_px, x_um, y_um
    and label (missing where there is none); `var` by gene id with symbol and ensembl_id; `obsm["spatial"]` in level-0
    pixels; `uns["spatial"][section_id]` with the slide; `uns["result"]` holds `facts`.
    """
    section, panel = result.section, result.panel
    places = {"x_px": section.place_px[:, 0], "y_px": section.place_px[:, 1]}
    places |= {"x_um": section.place[:, 0], "y_um": section.place[:, 1]}
    names = {"section_id": section.section_id, "patient_id": section.patient_id}
    label = pd.Categorical([name or None for name in section.label])
    data = anndata.AnnData(
        X=result.prediction.astype(np.float32),
        layers={MEASURED: result.truth.astype(np.float32)},
        obs=pd.DataFrame(names | places | {"label": label}, index=section.spot_id.astype(str)),
        var=pd.DataFrame({"symbol": panel.symbol, "ensembl_id": panel.ensembl_id}, index=list(panel.gene_id)),
        obsm={"spatial": section.place_px},
        uns={"result": dict(facts), "spatial": {section.section_id: _slide(result)}},
    )
    path = Path(folder, section_path(section.section_id))
    path.parent.mkdir(exist_ok=True)
    data.write_h5ad(path, compression="gzip")


def _slide(result: SectionResult) -> dict[str, object]:
    scale = 1 / result.thumbnail_scale
    return {
        "images": {"hires": result.thumbnail},
        "scalefactors": {
            "tissue_hires_scalef": scale,
            "spot_diameter_fullres": 0.5 * spot_pitch(result.section.place_px),
        },
    }
