"""Coverage of intervals on the score card."""

from dataclasses import replace

import numpy as np
from simulated_sections import TARGET, answer, cohort, fit

from mclstexp.evaluation.coverage import coverage_notes
from mclstexp.model.fit_calibration import fit_calibration


def test_the_card_states_the_share_inside_over_patients_then_by_section() -> None:
    sections = cohort(5)
    spots, fitted = fit(sections[:3])
    calibration = fit_calibration(spots, fitted)
    again = replace(sections[4][0], section_id="S41")  # a second section of P4
    tested = [sections[3][0], sections[4][0], again]
    features = [sections[index][1] for index in (3, 4, 4)]
    answers = {
        each.section_id: answer(spots, fitted, (each, seen)) for each, seen in zip(tested, features, strict=True)
    }
    facts, coverage = coverage_notes(calibration, tested, answers, TARGET)
    assert "calibrated on 3 left-out patients" in facts
    shares = []
    for section in tested:
        found = answers[section.section_id]
        width = calibration.scale.of(found.spread, found.similarity)[:, None] * calibration.half_width
        inside = np.abs(section.expression(TARGET) - found.prediction) <= width
        shares.append(inside.mean())
    mean = (shares[0] + (shares[1] + shares[2]) / 2) / 2
    assert f"intervals of nominal 90% contain {mean:.1%} of the measured values" in coverage
    assert f"(S30 {shares[0]:.1%}, S40 {shares[1]:.1%}, S41 {shares[2]:.1%})" in coverage


def test_genes_that_a_section_does_not_measure_have_no_part() -> None:
    sections = cohort(4)
    spots, fitted = fit(sections[:3])
    calibration = fit_calibration(spots, fitted)
    partial = replace(sections[3][0], unmeasured=np.arange(5))
    answers = {partial.section_id: answer(spots, fitted, sections[3])}
    _, note = coverage_notes(calibration, [partial], answers, TARGET)
    found = answers[partial.section_id]
    width = calibration.half_widths(found.spread, found.similarity)
    inside = np.abs(sections[3][0].expression(TARGET) - found.prediction) <= width
    assert f"contain {inside[:, 5:].mean():.1%} of" in note
