"""Panel genes that a section seems to lack only because it calls them otherwise.

A tile table says which genes a section counted, not which it looked for: a gene under another name reads as zeros.
So before anything is trained or scored, sections' counts are looked at once more; that costs a reading of each.
"""

import logging
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from mclstexp import storage
from mclstexp.data.genes import GenePanel, align, coverage
from mclstexp.data.schema import Manifest, load_genes
from mclstexp.data.table import read_counts
from mclstexp.data.variability import most_variable, most_variable_of_any
from mclstexp.errors import ConfigError, StorageError
from mclstexp.settings import FITTED_PANELS, GenesConfig

_MOST_NAMED = 5
_JOIN = "prepare into a new --out, which takes a symbol alone for the one Ensembl gene that has it"
_TELL = "give Ensembl ids and symbols side by side in one section's source at least, and prepare into a new --out"

log = logging.getLogger(__name__)


def require_counts(
    root: str, manifest: Manifest, section_ids: Iterable[str], panel: str, rows: Sequence[int], genes: pa.Table
) -> None:
    """Refuses sections that would give zeros for panel genes that they name otherwise; logs genes without counts.

    Args:
        section_ids: the sections.
        panel: what the panel is called in messages.
        rows: the panel's rows of the gene table.
        genes: the gene table (GENE_SCHEMA).

    Raises:
        ConfigError: a section counts a panel gene under another row of the same symbol, or none of the panel's genes;
            names section, genes and how the section names its own.
    """
    twins = _twins(genes)
    for section_id in section_ids:
        counted = _counted(root, manifest, section_id)
        lacking = [row for row in rows if not counted[row]]
        elsewhere = {row: twin for row in lacking for twin in twins.get(row, ()) if counted[twin]}
        if elsewhere:
            raise ConfigError(
                f"{panel}: section {section_id} counts {len(elsewhere)} of its {len(rows)} genes under another name "
                f"({_named(elsewhere, genes)}), so that they would be zero; leave them out, or {_JOIN}"
            )
        if len(lacking) == len(rows):
            raise ConfigError(
                f"{panel}: section {section_id} has no count of any of its {len(rows)} genes "
                f"({_examples(rows, genes)}); the section names its genes {_examples(np.flatnonzero(counted), genes)}. "
                f"Leave the section out; or, where these are the same genes, {_TELL}"
            )
        if lacking:
            log.warning("%s: section %s has no count of %d of %d genes", panel, section_id, len(lacking), len(rows))


def why_none_shared(root: str, manifest: Manifest, section_ids: Iterable[str], genes: pa.Table) -> str | None:
    """Returns why no gene has counts in all sections, by how each names its genes; None where one has."""
    counted = {section_id: _counted(root, manifest, section_id) for section_id in section_ids}
    if np.logical_and.reduce(list(counted.values())).any():
        return None
    names = "; ".join(f"{name} has {_examples(np.flatnonzero(rows), genes)}" for name, rows in counted.items())
    return f"the training sections share no gene: {names}. Where these are the same genes, {_TELL}"


def _counted(root: str, manifest: Manifest, section_id: str) -> np.ndarray:
    """Returns which genes of the table have counts in a section, bool (genes,)."""
    return np.asarray(read_counts(root, manifest.section(section_id), manifest.num_genes).sum(axis=0)).ravel() > 0


def _twins(genes: pa.Table) -> dict[int, list[int]]:
    """Returns by row the other rows of its symbol where one of both has no Ensembl id: maybe the same gene."""
    symbols, ids = genes["symbol"].to_pylist(), genes["ensembl_id"].to_pylist()
    alone = {symbol: row for row, (symbol, ensembl) in enumerate(zip(symbols, ids, strict=True)) if not ensembl}
    twins: dict[int, list[int]] = {}
    for row, (symbol, ensembl) in enumerate(zip(symbols, ids, strict=True)):
        if ensembl and symbol in alone:
            twins.setdefault(row, []).append(alone[symbol])
            twins.setdefault(alone[symbol], []).append(row)
    return twins


def _named(elsewhere: dict[int, int], genes: pa.Table) -> str:
    ids = genes["gene_id"].to_pylist()
    pairs = [f"{ids[row]} as {ids[twin]}" for row, twin in elsewhere.items()]
    return ", ".join(pairs[:_MOST_NAMED]) + (", ..." if len(pairs) > _MOST_NAMED else "")


def _examples(rows: Sequence[int] | np.ndarray, genes: pa.Table) -> str:
    """Returns how genes are named, with some of their names."""
    ids = [genes["gene_id"][int(row)].as_py() for row in rows[:_MOST_NAMED]]
    return (", ".join(ids) + (", ..." if len(rows) > _MOST_NAMED else "")) or "no counts at all"


def fit_panel(root: str, manifest: Manifest, section_ids: Iterable[str], config: GenesConfig) -> GenePanel:
    """Returns the panel: a file's genes, or the most variable ones of the given (training) sections.

    `hvg` keeps the order of variability, `hvg_union` that of the gene table (`variability.py`), a file its own.

    Raises:
        ConfigError: the panel file (local or `s3://`) is missing, or names genes that the data lacks
            (`genes.missing`), or no gene is left, or a section names the file's genes otherwise (`gene_naming.py`).
    """
    table, names = load_genes(root, manifest), list(section_ids)
    if config.panel == "hvg":
        rows = most_variable(root, manifest, names, config, table["gene_id"].to_pylist())
    elif config.panel == "hvg_union":
        rows = most_variable_of_any(root, manifest, names, config)
    else:
        rows = _rows_of_file(config, table)
        if rows:
            require_counts(root, manifest, names, f"genes.panel={config.panel}", rows, table)
    if not rows:
        raise ConfigError(f"no gene is left for the panel {config.panel}: {_why_none(root, manifest, names, config)}")
    picked = table.take(pa.array(rows))
    return GenePanel(*(tuple(picked[name].to_pylist()) for name in ("gene_id", "symbol", "ensembl_id")))


def _why_none(root: str, manifest: Manifest, section_ids: list[str], config: GenesConfig) -> str:
    if config.panel not in FITTED_PANELS:
        return "the file names none that the data has"
    few = f"none has counts in all training sections and in genes.min_spots={config.min_spots} of their spots"
    return why_none_shared(root, manifest, section_ids, load_genes(root, manifest)) or few


def _rows_of_file(config: GenesConfig, genes: pa.Table) -> list[int]:
    try:
        lines = [line.strip() for line in storage.read(config.panel).decode("utf-8-sig").splitlines()]
    except FileNotFoundError:
        raise ConfigError(f"genes.panel={config.panel}: there is no such file; give a file, hvg or hvg_union") from None
    except (StorageError, UnicodeDecodeError) as error:
        raise ConfigError(f"genes.panel={config.panel}: {error}; give a text file, hvg or hvg_union") from error
    names = list(dict.fromkeys(line for line in lines if line))
    asked = GenePanel.from_names(names)
    columns = align(asked, genes)
    if (columns < 0).any() and config.missing == "error":
        raise ConfigError(f"genes.panel={config.panel}: {coverage(asked, columns)}; set genes.missing=drop to go on")
    return list(dict.fromkeys(int(row) for row in columns if row >= 0))
