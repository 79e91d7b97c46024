"""Sections of patients whose expression follows three patterns that features show, with noise; no image, no table."""

import numpy as np

from mclstexp.data.genes import Normaliser
from mclstexp.data.measured import MeasuredSection
from mclstexp.model.bank import Bank
from mclstexp.model.fit_blend import FittedPrograms, fit_program_model
from mclstexp.model.retrieval import Retrieved, resolve
from mclstexp.model.training_spots import FeatureBlocks, TrainingSpots
from mclstexp.settings import RetrievalConfig

TARGET = Normaliser("per_spot_all", 1e4, "e")
BLOCKS = FeatureBlocks((6, 10, 8), near=(2, 0), level=2)
RETRIEVAL = RetrievalConfig(weighting="fixed_number", effective_donors=12)
NUM_GENES = 30
Simulated = tuple[MeasuredSection, np.ndarray]
"""A section and its features, float32 (n, 24)."""


def simulated_section(name: str, patient: str, seed: int, side: int = 8, depth: float = 400.0) -> Simulated:
    """Returns a section of side^2 spots, 100 um apart, whose level of expression and features differ by section.

    The third pattern is also that of depth, so that errors are larger where features show few counts.
    """
    rng = np.random.default_rng(seed)
    xy = np.stack(np.meshgrid(*[np.arange(side) * 100.0] * 2), axis=-1).reshape(-1, 2)
    waves = [xy[:, 0] / 150 + seed, xy[:, 1] / 120 + 2 * seed, xy.sum(axis=1) / 200 + seed]
    patterns = np.sin(np.stack(waves, axis=1))
    loadings = np.random.default_rng(99).normal(size=(3, NUM_GENES))
    shift = 0.2 * rng.normal(size=NUM_GENES)
    of_spot = depth * np.exp(0.8 * patterns[:, 2] + 0.2 * rng.normal(size=len(xy)))
    counts = rng.poisson(of_spot[:, None] * np.exp(0.5 * patterns @ loadings + shift) / NUM_GENES).astype(np.float32)
    features = patterns @ np.random.default_rng(98).normal(size=(3, 24)) + 0.3 * rng.normal(size=24)
    features += 0.5 * rng.normal(size=features.shape)
    spots = np.array([f"{name}-{index}" for index in range(len(xy))], object)
    totals = counts.sum(axis=1) + depth
    section = MeasuredSection(name, patient, spots, xy, xy, np.full(len(xy), None, object), counts, totals)
    return section, features.astype(np.float32)


def cohort(num_patients: int, per_patient: int = 1) -> list[Simulated]:
    """Returns the sections of patients P0, P1, ..."""
    return [
        simulated_section(f"S{patient}{index}", f"P{patient}", 10 * patient + index)
        for patient in range(num_patients)
        for index in range(per_patient)
    ]


def fit(training: list[Simulated]) -> tuple[TrainingSpots, FittedPrograms]:
    features = {section.section_id: values for section, values in training}
    spots = TrainingSpots([section for section, _ in training], features.__getitem__, BLOCKS, TARGET)
    return spots, fit_program_model(spots, RETRIEVAL)


def answer(spots: TrainingSpots, fitted: FittedPrograms, tested: Simulated) -> Retrieved:
    names = np.concatenate([section.spot_id for section in spots.sections])
    bank = Bank.of(fitted.keys, spots.expression, spots.section_id, spots.patient_id, names)
    section, features = tested
    return fitted.model.answer(features, section.xy_um, fitted.model.bank(bank), resolve(RETRIEVAL, len(bank)))
