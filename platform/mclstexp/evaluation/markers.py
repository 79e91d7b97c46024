"""Marker genes: named sets of genes of a cohort, from a file that users edit.

The file (`jobs/configs/markers.yaml`) maps cohort to set to genes, so that one file serves all cohorts. It is not part
of the settings, because it changes what is looked at and no model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import yaml
from pydantic import Field, TypeAdapter, ValidationError

from mclstexp import storage
from mclstexp.data.genes import GenePanel, align
from mclstexp.errors import ConfigError, StorageError
from mclstexp.evaluation.scores import ALL, HEG, HVG
from mclstexp.messages import MAX_NAMED, did_you_mean

_RESERVED = (ALL, HEG, HVG)
_Genes = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
_FILE = TypeAdapter(dict[str, dict[str, _Genes]])


def load_markers(path: str | Path, cohort: str) -> dict[str, GenePanel]:
    """Returns the marker genes of one cohort by set, in the file's order.

    Args:
        path: a YAML file (local or `s3://`): cohort, set and a list of genes (symbols or Ensembl ids).
        cohort: the part of the file to read.

    Raises:
        ConfigError: the file is missing or malformed; the cohort is not in it; a set repeats a gene or has the name of
            a set that every score card has.
    """
    try:
        tree = yaml.safe_load(storage.read(str(path)).decode())
    except FileNotFoundError:
        raise ConfigError(f"cannot read the marker genes {path}: there is no such file") from None
    except (StorageError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the marker genes {path}: {error}") from error
    try:
        cohorts = _FILE.validate_python(tree)
    except ValidationError as error:
        raise ConfigError(f"{path} does not map cohort to set to a list of genes: {_faults(error)}") from None
    if cohort not in cohorts:
        raise ConfigError(f"{path} has no marker genes of cohort {cohort}; it has {', '.join(cohorts)}: add a section")
    for name, genes in cohorts[cohort].items():
        _check_set(f"{cohort}.{name} in {path}", name, genes)
    return {name: GenePanel.from_names(genes) for name, genes in cohorts[cohort].items()}


def require_markers(markers: Mapping[str, GenePanel], panel: GenePanel) -> None:
    """Checks that a panel has one of the marker genes at least; a score card names those that are missing.

    Raises:
        ConfigError: it has none; gives the nearest names of the panel.
    """
    columns, missing = marker_columns(markers, panel)
    if not markers or any(map(len, columns.values())):
        return
    names = list(dict.fromkeys(gene for genes in missing.values() for gene in genes))
    named = "; ".join(f"{gene} ({did_you_mean(gene, panel.names())})" for gene in names[:MAX_NAMED])
    raise ConfigError(
        f"the model's panel of {len(panel)} genes has none of the {len(names)} marker genes: {named}; correct the "
        "markers file or --cohort, or leave --cohort out"
    )


def marker_columns(
    markers: Mapping[str, GenePanel], panel: GenePanel
) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Returns by set the panel's columns of its genes, int32, and the genes that are not in the panel."""
    table = panel.to_table()
    rows = {name: align(genes, table) for name, genes in markers.items()}
    missing = {name: [markers[name].names()[index] for index in np.flatnonzero(rows[name] < 0)] for name in markers}
    return {name: columns[columns >= 0] for name, columns in rows.items()}, missing


def _check_set(where: str, name: str, genes: list[str]) -> None:
    if name in _RESERVED:
        raise ConfigError(f"{where}: every score card has {', '.join(_RESERVED)} of its own; give the set another name")
    repeated = sorted({gene for gene in genes if genes.count(gene) > 1})
    if repeated:
        raise ConfigError(f"{where} names {', '.join(repeated)} more than once; keep one")


def _faults(error: ValidationError) -> str:
    """Returns each fault with its key; YAML reads some gene names as dates, numbers or booleans."""
    faults = (
        f"{'.'.join(map(str, fault['loc'])) or 'the file'} is {fault['input']!r}: {fault['msg']}"
        for fault in error.errors()
    )
    return "; ".join(faults) + " (gene names that YAML reads as something else need quotes)"
