"""The default recipe stays above the probe on patients that it never saw: each left out in turn, all scored together.

The cohort is synthetic, its slides are cut and encoded as the jobs do; nothing is trained and no Ray is needed. The
encoder has random weights, so the figures say nothing about real tissue.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_probe import plain_probe
from prepared_here import PreparedHere, prepare_here

from ingest.synthetic import CohortSpec, make_cohort
from mclstexp.config import Config, load_config, override
from mclstexp.data.genes import normalisers
from mclstexp.data.measured import MeasuredSection
from mclstexp.model.embed import ImageNetwork
from mclstexp.model.fit_blend import fit_program_model
from mclstexp.model.frozen import frozen_encoder
from mclstexp.model.retrieval import resolve
from mclstexp.model.training_spots import TrainingSpots
from mclstexp.slides.codec import decode_tile
from mclstexp.training.fit_programs import program_bank
from mclstexp.training.training_sections import feature_blocks

COHORT = CohortSpec(
    num_patients=4, sections_per_patient=1, array_side=10, pitch_px=32, num_genes=60, median_counts=2500
)
CUT = {"tiles.wide_um": 96.0, "tiles.wide_px": 32}
VIEWS = ("image", "image_wide")
Spots = tuple[list[MeasuredSection], dict[str, np.ndarray], tuple[int, ...]]
"""Sections, their features by section, float32 (n, views * layers), and the widths of a view's layers."""


@pytest.fixture(scope="module")
def recipe() -> Config:
    """default.yaml, on the cohort's tiles and with an encoder of random weights."""
    shipped = load_config(Path(__file__).parents[1] / "jobs" / "configs" / "default.yaml")
    assert shipped.model.image_views == ("all",)
    return override(shipped, {"model.image_weights": "random", "model.image_views": VIEWS, "train.precision": "fp32"})


@pytest.fixture(scope="module")
def spots(recipe: Config, tmp_path_factory: pytest.TempPathFactory) -> Spots:
    """The cohort as it is measured and seen."""
    folder = tmp_path_factory.mktemp("pooled")
    prepared = prepare_here(make_cohort(folder / "cohort", COHORT), str(folder / "tiles"), **CUT)
    encoder = frozen_encoder(recipe.model, 32, recipe.train.seed)
    tower = {f"encoder.{name}": value for name, value in encoder.state().items()}
    encode = ImageNetwork(recipe.model.model_dump(mode="json"), 32, tower, None, "fp32").build(torch.device("cpu"))
    sections, features = [], {}
    for name in (name for name, entry in prepared.entries.items() if entry.measured):
        rows = list(prepared.spots(name).values())
        sections.append(_measured(prepared, name, rows))
        features[name] = encode(*(np.stack([decode_tile(row[view]) for row in rows]) for view in VIEWS))
    return sections, features, encoder.record.widths


def _measured(prepared: PreparedHere, name: str, rows: Sequence[dict]) -> MeasuredSection:
    counts = np.zeros((len(rows), len(prepared.plan.genes)), np.float32)
    for spot, row in enumerate(rows):
        counts[spot, row["gene_index"]] = row["count"]
    xy_um, xy_px = (np.array([[row[f"x_{unit}"], row[f"y_{unit}"]] for row in rows]) for unit in ("um", "px"))
    names = np.array([row["spot_id"] for row in rows], object)
    patient, labels = prepared.entries[name].patient_id, np.full(len(rows), None, object)
    return MeasuredSection(name, patient, names, xy_um, xy_px, labels, counts, counts.sum(axis=1, dtype=np.float64))


def _correlations(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Returns each gene's correlation over the spots of one section, (G,)."""
    predicted, truth = (each - each.mean(axis=0) for each in (predicted.astype(np.float64), truth.astype(np.float64)))
    return (predicted * truth).sum(axis=0) / np.sqrt((predicted**2).sum(axis=0) * (truth**2).sum(axis=0))


def test_the_default_recipe_beats_the_probe_on_pooled_patients(recipe: Config, spots: Spots) -> None:
    sections, features, widths = spots
    target, blocks = normalisers(recipe.genes)[1], feature_blocks(widths, len(VIEWS))
    pcc, mse = (np.zeros((2, len(sections))) for _ in range(2))
    for fold, tested in enumerate(sections):
        training = [section for section in sections if section.patient_id != tested.patient_id]
        seen = TrainingSpots(training, features.__getitem__, blocks, target)
        fitted = fit_program_model(seen, recipe.retrieval)
        bank = fitted.model.bank(program_bank(seen, fitted.keys))
        retrieval = resolve(recipe.retrieval, len(bank))
        answered = fitted.model.answer(features[tested.section_id], tested.xy_um, bank, retrieval).prediction
        last = slice(sum(widths[:-1]), sum(widths))
        others = np.concatenate([features[section.section_id][:, last] for section in training])
        probed = plain_probe(others, seen.expression, features[tested.section_id][:, last])[1]
        truth = tested.expression(target)
        for method, predicted in enumerate((answered, probed)):
            pcc[method, fold] = _correlations(predicted, truth).mean()
            mse[method, fold] = ((predicted - truth) ** 2).mean()
    assert pcc[0].mean() > 1.15 * pcc[1].mean() > 0.2
    assert mse[0].mean() < mse[1].mean()
