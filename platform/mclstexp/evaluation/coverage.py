"""Whether a model's intervals hold on sections that it never saw, in the notes of the score card.

Shapes: N spots of a section, G genes.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from mclstexp.data.genes import Normaliser
from mclstexp.data.measured import MeasuredSection
from mclstexp.messages import some_of
from mclstexp.model.calibration import COVERAGE, Calibration
from mclstexp.model.retrieval import Retrieved


def coverage_notes(
    calibration: Calibration, sections: Sequence[MeasuredSection], answers: Mapping[str, Retrieved], target: Normaliser
) -> list[str]:
    """Returns what the model knows of its errors, and how many measured values its intervals contain.

    Args:
        calibration: of the model.
        sections: the held-out sections.
        answers: of the model, by section.
        target: the model's own.
    """
    truth = {each.section_id: each.expression(target) for each in sections}
    plain, wide = (
        {name: _share(values, answers[name], calibration, half_width) for name, values in truth.items()}
        for half_width in (calibration.half_width, calibration.half_width_any_depth)
    )
    by_section = some_of([f"{name} {share:.1%}" for name, share in plain.items()])
    return [
        calibration.summary(),
        f"intervals of nominal {COVERAGE:.0%} contain {_mean(plain, sections):.1%} of the measured values "
        f"({by_section}), those for any depth {_mean(wide, sections):.1%}",
    ]


def _share(truth: np.ndarray, found: Retrieved, calibration: Calibration, half_width: np.ndarray) -> float:
    """Returns the share of a section's measured values, (N, G), inside intervals of half widths (G,)."""
    scale = calibration.scale.of(found.spread, found.similarity)[:, None]
    measured = ~np.isnan(truth)
    return float((np.abs(truth - found.prediction) <= scale * half_width)[measured].mean())


def _mean(shares: Mapping[str, float], sections: Sequence[MeasuredSection]) -> float:
    """Returns the mean over patients of their sections' mean."""
    by_patient: dict[str, list[float]] = {}
    for section in sections:
        by_patient.setdefault(section.patient_id, []).append(shares[section.section_id])
    return float(np.mean([np.mean(each) for each in by_patient.values()]))
