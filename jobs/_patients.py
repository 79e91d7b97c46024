"""A warning before training: patients of a tile table who may be one."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mclstexp.data.schema import Manifest


def warn_of_similar_patients(manifest: "Manifest") -> None:
    """Prints which measured patients' ids differ only in case, separators or leading zeros."""
    from mclstexp.data.folds import similar_patients

    patients = {entry.section_id: entry.patient_id for entry in manifest.sections if entry.measured}
    for warning in similar_patients(patients):
        print(f"warning: {warning}", file=sys.stderr, flush=True)
