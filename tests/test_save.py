"""The files of a result folder: the same numbers as the card, and a section that scanpy opens."""

import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from random_card import GENES, SECTIONS, TARGETS, random_card

from mclstexp.evaluation.save import save_card


def test_the_files_hold_the_same_numbers(tmp_path: Path) -> None:
    card = random_card(0.5, 2.0, protocol="reference")
    save_card(card, tmp_path)
    record = json.loads((tmp_path / "score_card.json").read_text())
    assert record["protocol"] == "reference"
    assert "may have trained" in record["heading"]
    assert record["targets"] == TARGETS
    assert record["means"][0]["pcc"] == pytest.approx(card.means()["pcc"][0])
    (constant,) = (
        row
        for row in record["means"]
        if (row["method"], row["target"], row["gene_set"]) == ("train mean", "per_spot", "all")
    )
    assert constant["pcc"] is None
    assert record["verdicts"] == card.verdicts()
    rows = pd.read_csv(tmp_path / "score_card.csv")
    pd.testing.assert_frame_equal(rows.drop(columns="protocol"), card.rows)
    for name in ("score_card", "per_gene", "gene_means"):
        assert set(pd.read_csv(tmp_path / f"{name}.csv")["protocol"]) == {"reference"}
    assert len(pd.read_csv(tmp_path / "per_gene.csv")) == len(TARGETS) * len(SECTIONS) * 4 * len(GENES)
    assert (tmp_path / "score_card.png").read_bytes().startswith(b"\x89PNG")


def test_a_sections_file_opens_in_scanpys_layout(tmp_path: Path) -> None:
    card = random_card(0.5, 2.0, protocol="reference")
    save_card(card, tmp_path)
    (result,) = card.sections
    assert json.loads((tmp_path / "score_card.json").read_text())["predictions"] == {"C1": "sections/C1.h5ad"}
    data = anndata.read_h5ad(tmp_path / "sections" / "C1.h5ad")
    np.testing.assert_array_equal(data.X, result.prediction.astype(np.float32))
    np.testing.assert_array_equal(data.layers["measured"], result.truth.astype(np.float32))
    np.testing.assert_array_equal(data.obsm["spatial"], result.section.xy_px)
    assert data.obs["label"].isna().tolist() == [False] * 20 + [True] * 10
    assert list(data.var["symbol"]) == GENES
    assert data.uns["result"]["protocol"] == "reference"
    assert "may have trained" in data.uns["result"]["heading"]
    slide = data.uns["spatial"]["C1"]
    assert slide["images"]["hires"].shape == (20, 24, 3)
    # a spot on the picture: level-0 pixels times the factor
    assert data.obsm["spatial"][:, 0].max() * slide["scalefactors"]["tissue_hires_scalef"] == pytest.approx(1450 / 80)
