"""The marker genes that a job's --cohort and --markers name."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from _cli import Argument

from mclstexp.errors import ConfigError

if TYPE_CHECKING:
    from mclstexp.data.genes import GenePanel

ARGUMENTS = [
    Argument(
        "cohort", "adds the sets of marker genes that the markers file has for this cohort [none]", required=False
    ),
    Argument("markers", "YAML file of marker genes by cohort and set [jobs/configs/markers.yaml]", required=False),
]
_SHIPPED = Path(__file__).parent / "configs" / "markers.yaml"


def markers(arguments: argparse.Namespace) -> "dict[str, GenePanel]":
    """Returns the marker genes by set; none without --cohort.

    Raises:
        ConfigError: --markers without --cohort, or as `load_markers`.
    """
    from mclstexp.evaluation.markers import load_markers

    if arguments.markers and not arguments.cohort:
        raise ConfigError(f"--markers {arguments.markers} needs --cohort NAME: which of its cohorts is meant")
    return load_markers(arguments.markers or _SHIPPED, arguments.cohort) if arguments.cohort else {}
