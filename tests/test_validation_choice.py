"""The choice of k and temperature on validation sections."""

import numpy as np
import pytest

from mclstexp.model.bank import Bank
from mclstexp.model.retrieval import retrieve
from mclstexp.settings import RetrievalConfig
from mclstexp.training import validation
from mclstexp.training.validation import ValidationSection


def _bank(num_keys: int) -> Bank:
    rng = np.random.default_rng(0)
    names = np.array([str(i) for i in range(num_keys)], object)
    keys, payload = (rng.normal(size=(num_keys, width)).astype(np.float32) for width in (8, 5))
    return Bank.of(keys, payload, names, names, names)


def test_choice_finds_the_settings_that_predict_best() -> None:
    """The truth is the prediction with ten neighbours at temperature 0.5, which must win."""
    rng = np.random.default_rng(3)
    bank = _bank(500)
    queries = rng.normal(size=(200, 8)).astype(np.float32)
    truth = retrieve(queries, bank, RetrievalConfig(k=10, temperature=0.5)).prediction
    sections = [ValidationSection("P", queries, truth)]
    chosen = validation.choose(sections, bank, RetrievalConfig())
    assert (chosen.k, chosen.temperature) == (10, 0.5)
    assert validation.choose(sections, bank, RetrievalConfig(k=3)).k == 3


def test_choice_scores_within_sections_and_weighs_patients_equally() -> None:
    """One large section of P preferences few neighbours, two small ones of Q many; a level of its own tells nothing."""
    rng = np.random.default_rng(3)
    bank = _bank(500)
    preferences = [("P", 300, 10, 0.0), ("Q", 60, 400, 50.0), ("Q", 60, 400, 90.0), ("R", 60, 400, 0.0)]
    sections = []
    for patient, num, k, level in preferences:
        queries = rng.normal(size=(num, 8)).astype(np.float32)
        predicted = retrieve(queries, bank, RetrievalConfig(k=k, temperature=0.5)).prediction
        sections.append(ValidationSection(patient, queries, predicted + level))
    best = {}
    for k in (10, 400):
        config, of_patients = RetrievalConfig(k=k, temperature=0.5), {}
        for section in sections:
            predicted = retrieve(section.queries, bank, config).prediction
            genes = np.argsort(-section.truth.mean(axis=0))[:50]
            pcc = [np.corrcoef(section.truth[:, gene], predicted[:, gene])[0, 1] for gene in genes]
            of_patients.setdefault(section.patient_id, []).append(np.mean(pcc))
        best[k] = np.mean([np.mean(values) for values in of_patients.values()])
    assert abs(best[10] - best[400]) > 0.02, "the two must differ clearly"
    config = RetrievalConfig(temperature=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "TRIED_K", (10, 400))
        assert validation.choose(sections, bank, config).k == max(best, key=best.__getitem__)
