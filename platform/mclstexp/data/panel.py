"""Fits gene panels, and refuses sections that list panel genes under another name.

A gene that a section lists under another name looks as if the section did not measure it, or as zeros. Before anything
is trained or scored, sections' counts are therefore checked once more, which costs one read of each.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from mclstexp import storage
from mclstexp.data.genes import GenePanel, align, coverage
from mclstexp.data.schema import Manifest, load_genes
from mclstexp.data.table import read_counts
from mclstexp.data.variability import most_variable, most_variable_of_any
from mclstexp.errors import ConfigError, StorageError
from mclstexp.messages import some_of
from mclstexp.settings import FITTED_PANELS, GenesConfig

_JOIN = "prepare into a new --out, which joins a symbol without Ensembl id to the one Ensembl gene with that symbol"
_GIVE_BOTH = "give Ensembl ids and symbols side by side in at least one section's source, and prepare into a new --out"

log = logging.getLogger(__name__)


def fit_panel(root: str, manifest: Manifest, section_ids: Iterable[str], config: GenesConfig) -> GenePanel:
    """Returns the panel: the genes in a file, or the most variable ones of the given (training) sections.

    An `hvg` panel is ordered by variability, `hvg_union` by the gene table (`variability.py`), a file by itself.

    Raises:
        ConfigError: the panel file (local or `s3://`) is missing or names genes that no section measures
            (`genes.missing`), no gene is left, or a section lists the file's genes under another name.
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
            rows = _measured_rows(manifest, names, rows, table, config)
    if not rows:
        raise ConfigError(f"no gene is left for the panel {config.panel}: {_why_none(root, manifest, names, config)}")
    return GenePanel.from_table(table.take(pa.array(rows)))


def require_counts(
    root: str, manifest: Manifest, section_ids: Iterable[str], panel: str, rows: Sequence[int], genes: pa.Table
) -> None:
    """Refuses sections that would lack panel genes only because they list them under another name.

    Genes that a section does not measure, and measured ones without counts, are logged.

    Args:
        root: URI of the tile table.
        manifest: its manifest.
        section_ids: the sections.
        panel: name of the panel in messages.
        rows: the panel's rows in the gene table.
        genes: the gene table (GENE_SCHEMA).

    Raises:
        ConfigError: a section counts a panel gene in another row with the same symbol, or none of the panel's genes;
            names the section, the genes and the section's names for its genes.
    """
    twins = _twins(genes)
    for section_id in section_ids:
        counted = _counted(root, manifest, section_id)
        missing = [row for row in rows if not counted[row]]
        renamed = {row: twin for row in missing for twin in twins.get(row, ()) if counted[twin]}
        if renamed:
            raise ConfigError(
                f"{panel}: section {section_id} counts {len(renamed)} of its {len(rows)} genes under another name "
                f"({_pairs(renamed, genes)}), so that they would be missing; leave them out, or {_JOIN}"
            )
        if len(missing) == len(rows):
            raise ConfigError(
                f"{panel}: section {section_id} has no count of any of its {len(rows)} genes "
                f"({_examples(rows, genes)}); the section names its genes {_examples(np.flatnonzero(counted), genes)}. "
                f"Leave the section out; or, if these are the same genes, {_GIVE_BOTH}"
            )
        measures = manifest.measures(section_id)
        for what, part in (
            ("does not measure", [row for row in missing if not measures[row]]),
            ("has no count of", [row for row in missing if measures[row]]),
        ):
            if part:
                log.warning("%s: section %s %s %d of %d genes", panel, section_id, what, len(part), len(rows))


def _rows_of_file(config: GenesConfig, genes: pa.Table) -> list[int]:
    try:
        lines = [line.strip() for line in storage.read(config.panel).decode("utf-8-sig").splitlines()]
    except FileNotFoundError:
        raise ConfigError(f"genes.panel={config.panel}: there is no such file; give a file, hvg or hvg_union") from None
    except (StorageError, UnicodeDecodeError) as error:
        raise ConfigError(f"genes.panel={config.panel}: {error}; give a text file, hvg or hvg_union") from error
    names = list(dict.fromkeys(line for line in lines if line))
    times = Counter(genes["symbol"].to_pylist())
    wanted = GenePanel.from_names(names, times)
    columns = align(wanted, genes)
    if (columns < 0).any():
        _refuse_or_drop(config, coverage(wanted, columns))
    shared = [symbol for symbol, row in zip(wanted.symbol, columns, strict=True) if row >= 0 and times[symbol] > 1]
    if any(shared):
        what = "are the symbols of several genes, and the panel takes the first of each; give ids to choose"
        log.warning("genes.panel=%s: %s %s", config.panel, some_of([*filter(None, shared)]), what)
    return list(dict.fromkeys(int(row) for row in columns if row >= 0))


def _measured_rows(
    manifest: Manifest, section_ids: Iterable[str], rows: list[int], genes: pa.Table, config: GenesConfig
) -> list[int]:
    """Returns those of a panel file's rows that some training section measures.

    Raises:
        ConfigError: none measures one of them, and `genes.missing` is `error`.
    """
    measures = np.logical_or.reduce([manifest.measures(section_id) for section_id in section_ids])
    unknown = [row for row in rows if not measures[row]]
    if unknown:
        what = f"no training section measures {len(unknown)} of its {len(rows)} genes: {_examples(unknown, genes)}"
        _refuse_or_drop(config, what)
    return [row for row in rows if measures[row]]


def _refuse_or_drop(config: GenesConfig, what: str) -> None:
    """Raises an error about genes of the panel file, or logs that they are dropped, as `genes.missing` says."""
    if config.missing == "error":
        raise ConfigError(f"genes.panel={config.panel}: {what}; set genes.missing=drop to drop them")
    log.warning("genes.panel=%s: %s; dropped", config.panel, what)


def _why_none(root: str, manifest: Manifest, section_ids: list[str], config: GenesConfig) -> str:
    if config.panel not in FITTED_PANELS:
        return "the data has none of the genes in the file"
    few = f"none has counts in all training sections and in genes.min_spots={config.min_spots} of their spots"
    if config.panel == "hvg":
        few = (
            f"none is measured by genes.min_sections={config.min_sections:g} of the training sections, with counts in "
            f"all of these and in genes.min_spots={config.min_spots} of their spots"
        )
    return _why_none_shared(root, manifest, section_ids) or few


def _why_none_shared(root: str, manifest: Manifest, section_ids: Iterable[str]) -> str:
    """Returns why no gene has counts in all sections, by how each names its genes; empty if one has."""
    genes = load_genes(root, manifest)
    counted = {section_id: _counted(root, manifest, section_id) for section_id in section_ids}
    if np.logical_and.reduce(list(counted.values())).any():
        return ""
    names = "; ".join(f"{name} has {_examples(np.flatnonzero(rows), genes)}" for name, rows in counted.items())
    return f"the training sections share no gene: {names}. If these are the same genes, {_GIVE_BOTH}"


def _counted(root: str, manifest: Manifest, section_id: str) -> np.ndarray:
    """Returns which genes of the table have counts in a section, bool (genes,)."""
    return np.asarray(read_counts(root, manifest.section(section_id), manifest.num_genes).sum(axis=0)).ravel() > 0


def _twins(genes: pa.Table) -> dict[int, list[int]]:
    """Returns for each row the other rows with its symbol that may be the same gene: one of both has no Ensembl id."""
    symbols, ids = genes["symbol"].to_pylist(), genes["ensembl_id"].to_pylist()
    alone = {symbol: row for row, (symbol, ensembl) in enumerate(zip(symbols, ids, strict=True)) if not ensembl}
    twins: dict[int, list[int]] = {}
    for row, (symbol, ensembl) in enumerate(zip(symbols, ids, strict=True)):
        if ensembl and symbol in alone:
            twins.setdefault(row, []).append(alone[symbol])
            twins.setdefault(alone[symbol], []).append(row)
    return twins


def _pairs(renamed: dict[int, int], genes: pa.Table) -> str:
    ids = genes["gene_id"].to_pylist()
    return some_of([f"{ids[row]} as {ids[twin]}" for row, twin in renamed.items()])


def _examples(rows: Sequence[int] | np.ndarray, genes: pa.Table) -> str:
    ids = genes["gene_id"].to_pylist()
    return some_of([ids[row] for row in rows]) or "no counts at all"
