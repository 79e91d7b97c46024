"""The marker genes that a job's --cohort and --markers name."""

from pathlib import Path
from typing import TYPE_CHECKING

from mclstexp.errors import ConfigError

if TYPE_CHECKING:
    from mclstexp.data.genes import GenePanel

_SHIPPED = Path(__file__).parent / "configs" / "markers.yaml"


def markers(cohort: str | None, path: str | None) -> "dict[str, GenePanel]":
    """Returns the marker genes by set; none without a cohort.

    Args:
        cohort: the part of the file to use (--cohort).
        path: the file (--markers); None: the shipped one.

    Raises:
        ConfigError: --markers without --cohort, or as `load_markers`.
    """
    from mclstexp.evaluation.markers import load_markers

    if path and not cohort:
        raise ConfigError(f"--markers {path} needs --cohort NAME, one of the cohorts in the file")
    return load_markers(path or _SHIPPED, cohort) if cohort else {}
