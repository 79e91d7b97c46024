"""The scores of a prediction: one list, and the tables by gene, by set of genes and averaged over patients.

To add a score, write its function in `metrics.py` and one line in `SCORES`: the tables here, the score card, the
terminal, the verdicts and the report all walk over that list. Scores are taken within a section and then averaged, as
published, so a small section weighs as much as a large one; a few compare the levels of sections, their mean
expression. All tables are long; the caller adds the columns that name the section, target and method.

Shapes: N spots, G genes.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.stats

from mclstexp.evaluation.metrics import (
    absolute_error_per_gene,
    centred,
    density_free_pearson,
    highest_genes,
    pearson_between,
    pearson_per_gene,
    squared_error_per_gene,
    squared_level_error,
    variable_genes,
)

ALL, HEG, HVG = "all", "heg50", "hvg50"
SET_TITLES = {ALL: "all", HEG: "HEG50", HVG: "HVG50"}
"""Titles of the sets of genes that every score card has."""
UNDEFINED = "undefined"
"""The column that counts the measured genes without a `pcc`."""
NOT_MEASURED = "not_measured"
"""The column that counts the genes that the section does not measure, which have no score there."""
PREDICTED_MEAN = "predicted_mean"
"""The column of a gene's mean prediction over the section's spots."""
NAMES = ("protocol", "section_id", "patient_id", "target", "method", "kind", "gene_set", "gene")
"""Columns of saved tables that hold names; all others hold numbers."""
LEVEL = 0.95
"""Coverage of the confidence intervals."""


@dataclass(frozen=True)
class Score:
    """One score: how it is computed, and where people see it.

    Raises ValueError unless exactly one of `by_gene`, `from_others` and `between` is given, if `compared` has another
    set than those of `SET_TITLES` or one of a score `between` sections, and if a score that is not `of_sets` names a
    set other than all genes.
    """

    name: str
    """Its column in every table, and its name in MLflow."""
    title: str
    by_gene: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray] | None = None
    """From truth (N, G), prediction (N, G) and each spot's total count (N,): float64 (G,), NaN where not defined."""
    from_others: Callable[[Mapping[str, float]], float] | None = None
    """From the scores before it in `SCORES`, by name, of the same set of genes."""
    between: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    """From means of patients (or sections), truth (U, G) and prediction (U, G): float64 (G,), NaN where not defined. A
    single section has no such score."""
    undefined: str = ""
    """The column that counts the genes without it; such a gene counts as 0 in verdicts. Empty: always defined."""
    is_error: bool = False
    """Smaller is better."""
    needs_unit: bool = False
    """Means nothing where the prediction is in another unit than the truth."""
    of_level: bool = False
    """Compares the mean expression of sections, not their spots; the terminal shows it in a table of its own."""
    of_sets: bool = False
    """Shown for every set of genes; other scores are shown over all genes only."""
    printed: tuple[str, ...] = (ALL,)
    """Sets of genes over which the terminal shows it in the model's own target."""
    printed_in_others: tuple[str, ...] = ()
    """The same, in the other targets."""
    compared: tuple[str, ...] = (ALL,)
    """Sets of genes over which verdicts compare model and floor."""

    def __post_init__(self) -> None:
        if sum(way is not None for way in (self.by_gene, self.from_others, self.between)) != 1:
            raise ValueError(f"score {self.name}: give by_gene, from_others or between")
        if self.between and self.compared:
            raise ValueError(f"score {self.name}: sections do not have it one by one, so compared must be empty")
        if unknown := set(self.compared) - set(SET_TITLES):
            raise ValueError(f"score {self.name}: compared has {sorted(unknown)}, allowed: {', '.join(SET_TITLES)}")
        if not self.of_sets and {*self.printed, *self.printed_in_others, *self.compared} - {ALL}:
            raise ValueError(f"score {self.name}: to show it over sets of genes, set of_sets=True")


SCORES: tuple[Score, ...] = (
    Score(
        "pcc",
        "PCC",
        by_gene=lambda truth, prediction, totals: pearson_per_gene(truth, prediction),
        undefined=UNDEFINED,
        of_sets=True,
        printed=(ALL, HEG, HVG),
        printed_in_others=(ALL, HEG),
        compared=(ALL, HEG),
    ),
    Score("pcc_density_free", "PCC density-free", by_gene=density_free_pearson, undefined="undefined_density_free"),
    Score(
        "mse",
        "MSE",
        by_gene=lambda truth, prediction, totals: squared_error_per_gene(truth, prediction),
        is_error=True,
        needs_unit=True,
        printed_in_others=(ALL,),
    ),
    Score(
        "rmse",
        "RMSE",
        from_others=lambda scores: float(np.sqrt(scores["mse"])),
        is_error=True,
        needs_unit=True,
        printed=(),
        compared=(),
    ),
    Score(
        "mae",
        "MAE",
        by_gene=lambda truth, prediction, totals: absolute_error_per_gene(truth, prediction),
        is_error=True,
        needs_unit=True,
    ),
    Score(
        "level_mse",
        "MSE between sections",
        by_gene=lambda truth, prediction, totals: squared_level_error(truth, prediction),
        is_error=True,
        needs_unit=True,
        of_level=True,
        printed=(),
    ),
    Score(
        "level_pcc",
        "PCC between sections",
        between=pearson_between,
        undefined="undefined_level",
        of_level=True,
        printed=(),
        compared=(),
    ),
)


class ScoredSet(NamedTuple):
    """A score over a set of genes: one column of the tables that people read."""

    score: Score
    gene_set: str

    @property
    def title(self) -> str:
        """What people read, such as `PCC HEG50` or `MSE`."""
        if not self.score.of_sets:
            return self.score.title
        return f"{self.score.title} {SET_TITLES.get(self.gene_set, self.gene_set)}"


def of_sections() -> list[Score]:
    """Returns the scores that a single section has."""
    return [score for score in SCORES if score.between is None]


def gene_scores(truth: np.ndarray, prediction: np.ndarray, totals: np.ndarray) -> pd.DataFrame:
    """Returns the scores of each gene for one prediction of one section: G rows in the panel's order.

    Columns, float64: truth_mean and truth_variance over spots (0 only where the gene is constant), predicted_mean, and
    each score that is computed by gene. A correlation is NaN where it is not defined; all columns are for a gene that
    is not measured.

    Args:
        truth: measured expression, (N, G); NaN for a gene that the section does not measure.
        prediction: predicted expression in the same unit, (N, G).
        totals: each spot's measured count over all genes, (N,).
    """
    truth_mean = truth.mean(axis=0, dtype=np.float64)
    spread = {
        "truth_mean": truth_mean,
        "truth_variance": (centred(truth) ** 2).mean(axis=0),
        PREDICTED_MEAN: np.where(np.isnan(truth_mean), np.nan, prediction.mean(axis=0, dtype=np.float64)),
    }
    return pd.DataFrame(
        spread | {score.name: score.by_gene(truth, prediction, totals) for score in SCORES if score.by_gene}
    )


def without_unit(genes: pd.DataFrame) -> pd.DataFrame:
    """Returns a `gene_scores` table with NaN for the scores that need the prediction in the truth's unit."""
    return genes.assign(**{score.name: np.nan for score in SCORES if score.by_gene and score.needs_unit})


def with_only(genes: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """Returns a `gene_scores` table with the columns of `scores` as its scores, and NaN for all others."""
    masked = genes.assign(**{score.name: np.nan for score in SCORES if score.by_gene} | {PREDICTED_MEAN: np.nan})
    return masked.assign(**{str(name): scores[name] for name in scores})


def gene_sets(truth: np.ndarray, markers: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the panel's columns for each named set of genes: all, heg50 and hvg50 of the measured, and marker sets.

    Args:
        truth: measured expression of the scored section, (N, G), in the scored unit.
        markers: columns of the panel by name, see `markers.marker_columns`.
    """
    own = {ALL: np.arange(truth.shape[1]), HEG: highest_genes(truth), HVG: variable_genes(truth)}
    return own | dict(markers)


def set_table(genes: pd.DataFrame, sets: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Returns the scores of sets of genes, one row per set, from a `gene_scores` table.

    Columns: gene_set; num_genes, the measured ones, and not_measured, the others; and for each score its mean over the
    genes that have it (or what follows from the others: rmse is the root of mse), with the number of measured genes
    that do not have it. A score that is not in `genes` is NaN.
    """
    return pd.DataFrame([{"gene_set": name} | _set_row(genes.iloc[columns]) for name, columns in sets.items()])


def read_table(data: bytes) -> pd.DataFrame:
    """Returns a table of scores from its CSV as it was before saving: a patient NA and a section 007 stay names."""
    table = pd.read_csv(io.BytesIO(data), dtype=str, keep_default_na=False)
    for name in table.columns.difference(list(NAMES)):
        table[name] = pd.to_numeric(table[name].replace("", None))
    if "num_genes" in table and NOT_MEASURED not in table:
        table[NOT_MEASURED] = 0  # earlier versions scored every gene in every section
    return _with_newer_scores(table)


def between_sections(per_gene: pd.DataFrame, unit: str) -> pd.DataFrame:
    """Returns the scores that compare sections, one row per target and method.

    Args:
        per_gene: as `ScoreCard.per_gene`; the means of a unit's sections are averaged first.
        unit: the column of the independent unit: patient_id, or section_id as published.

    Returns:
        target, method, and for each score its mean over the genes that have it, the number of genes that do not, and
        NAME_units, the number of units.
    """
    rows = []
    for (target, method), own in per_gene.groupby(["target", "method"], sort=False):
        means = own.groupby([unit, "gene"], sort=False)[["truth_mean", PREDICTED_MEAN]].mean().unstack("gene")
        row: dict[str, object] = {"target": target, "method": method}
        for score in SCORES:
            if score.between:
                values = score.between(means["truth_mean"].to_numpy(), means[PREDICTED_MEAN].to_numpy())
                is_defined = ~np.isnan(values)
                row[score.name] = values[is_defined].mean() if is_defined.any() else np.nan
                row |= {score.undefined: (~is_defined).sum(), f"{score.name}_units": len(means)}
        rows.append(row)
    return pd.DataFrame(rows)


def mean_intervals(rows: pd.DataFrame, value: str, by: Sequence[str], unit: str) -> pd.DataFrame:
    """Returns the mean of a score over independent units with its 95 % confidence interval, one row per group.

    The interval is Student's, mean +- t(0.975, n - 1) s / sqrt(n) over the n units (1908,
    https://doi.org/10.1093/biomet/6.1.1), not a percentile bootstrap, which is too narrow for so few (Hesterberg 2015,
    https://doi.org/10.1080/00031305.2015.1089789). The rows of a unit are averaged first, because sections of one
    patient are not independent. To compare a model with a floor, use the interval of their difference.

    Args:
        rows: one row per section (and gene, method ...).
        value: the column to average; NaN is left out and counted.
        by: columns that name a group, such as target, method and gene_set.
        unit: the column of the independent unit: patient_id, or section_id as published.

    Returns:
        `by`, mean, low, high, num_units (with a value) and undefined (rows without one). The interval is NaN with
        fewer than two units.
    """
    of_units = rows.groupby([*by, unit], sort=False)[value].mean().groupby(level=list(by), sort=False)
    mean, num_units = of_units.mean(), of_units.count()
    reach = scipy.stats.t.ppf((1 + LEVEL) / 2, num_units - 1) * of_units.std() / np.sqrt(num_units)
    undefined = rows[value].isna().groupby([rows[column] for column in by], sort=False).sum()
    columns = {"mean": mean, "low": mean - reach, "high": mean + reach, "num_units": num_units, "undefined": undefined}
    return pd.DataFrame(columns).reset_index()


def _set_row(genes: pd.DataFrame) -> dict[str, float]:
    measured = genes["truth_mean"].notna() if "truth_mean" in genes else pd.Series(True, genes.index)
    row: dict[str, float] = {"num_genes": measured.sum(), NOT_MEASURED: (~measured).sum()}
    for score in of_sections():
        values = genes[score.name] if score.name in genes else pd.Series(np.nan, genes.index)
        row[score.name] = score.from_others(row) if score.from_others else values.mean()
        if score.undefined:
            row[score.undefined] = (values.isna() & measured).sum()
    return row


def _with_newer_scores(table: pd.DataFrame) -> pd.DataFrame:
    """Returns a table of an earlier version with NaN for what it does not have of `set_table` or `gene_scores`."""
    newer: list[str] = []
    if "num_genes" in table:
        newer = [name for score in of_sections() for name in (score.name, score.undefined) if name]
    elif "truth_mean" in table:
        newer = [PREDICTED_MEAN, *(score.name for score in SCORES if score.by_gene)]
    return table.assign(**{name: np.nan for name in newer if name not in table})
