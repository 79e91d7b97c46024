"""From a run to a calibrated version on disk, and to the coverage of its intervals on the score card."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from program_version import program_version

from mclstexp.config import Config, override
from mclstexp.data.genes import GenePanel
from mclstexp.data.schema import load_genes
from mclstexp.errors import ModelError
from mclstexp.evaluation.evaluate import evaluate
from mclstexp.model.version import ModelVersion
from mclstexp.training.finish import finish, load_model
from mclstexp.training.run import open_run

SETTINGS = {
    "tiles.size_px": 32,
    "genes.num_genes": 12,
    "split.test_patients": ["P3"],
    "model.image_encoder": "small_cnn",
    "model.predictor": "programs",
    "model.freeze_encoder": True,
    "retrieval.weighting": "fixed_number",
    "train.epochs": 0,
    "train.precision": "fp32",
}


@pytest.mark.ray
def test_a_finished_run_is_calibrated_and_its_card_states_the_coverage(tiles: str, tmp_path: Path) -> None:
    run = open_run(tiles, str(tmp_path), "run", override(Config(), SETTINGS), lambda *_: "untracked")
    finish(run, None)
    model = load_model(run)
    calibration = model.calibration
    assert calibration is not None
    assert calibration.calibrated_on == "sections"  # of two patients
    assert set(calibration.left_out_coverage) == set(model.training.sections)
    assert all(0.6 < share < 1 for share in calibration.left_out_coverage.values())
    trust = pq.read_table(tmp_path / "run" / "model" / "trust.parquet")
    assert tuple(trust["gene_id"].to_pylist()) == model.panel.gene_id
    notes = [note for note in evaluate(model, tiles).notes if "intervals" in note]
    assert calibration.summary() in notes
    (covered,) = (
        re.search(r"contain ([\d.]+)% of the measured values \(P3S1 ([\d.]+)%, P3S2 ([\d.]+)%\)", note)
        for note in notes[1:]
    )
    mean, first, second = map(float, covered.groups())
    assert mean == pytest.approx((first + second) / 2, abs=0.1)
    assert 70 < mean < 100


@pytest.mark.ray
def test_a_finished_run_records_the_genes_of_shared_totals(tiles: str, tmp_path: Path) -> None:
    config = override(Config(), SETTINGS | {"genes.total": "shared"})
    run = open_run(tiles, str(tmp_path), "run", config, lambda *_: "untracked")
    finish(run, None)
    model = load_model(run)
    assert model.total_genes == GenePanel.from_table(load_genes(tiles, run.manifest)), "all sections list all genes"
    bank = model.bank
    assert bank is not None
    np.testing.assert_array_equal(bank.payload[bank.section_id == "P1S1"], run.reader.read_section("P1S1")["payload"])


def test_a_version_vouches_for_its_calibration(tmp_path: Path) -> None:
    version = program_version()
    version.save(tmp_path)
    files = json.loads((tmp_path / "files.json").read_text())
    assert {"calibration.json", "trust.parquet", "programs.safetensors"} <= set(files)
    loaded = ModelVersion.load(tmp_path)
    assert loaded.calibration is not None
    assert version.calibration is not None
    np.testing.assert_array_equal(loaded.calibration.half_width, version.calibration.half_width)
    path = tmp_path / "calibration.json"
    path.write_text(path.read_text().replace('"strength"', '"strength" '))
    with pytest.raises(ModelError, match=r"calibration\.json.*was changed after it was saved"):
        ModelVersion.load(tmp_path)


def test_a_program_model_without_calibration_loads_and_has_none(tmp_path: Path) -> None:
    version = program_version()
    version.calibration = None
    version.save(tmp_path)
    assert ModelVersion.load(tmp_path).calibration is None
