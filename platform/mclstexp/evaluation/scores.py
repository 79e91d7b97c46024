"""Tables of scores: by gene, by set of genes, and means over patients or sections with their intervals.

Scores are taken within a section and then averaged, as published, so a small section weighs as much as a large one.
All tables are long, one row a thing: the caller adds the columns that say which section, method and target.

Shapes: N spots, G genes.
"""

import io
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import scipy.stats

from mclstexp.evaluation.metrics import (
    centred,
    density_free_pearson,
    errors_per_gene,
    highest_genes,
    pearson_per_gene,
    variable_genes,
)

ALL, HEG, HVG = "all", "heg50", "hvg50"
AVERAGED = ("pcc", "pcc_density_free", "mse", "rmse", "mae")
"""Columns of a `set_table` that are averaged over units."""
NAMES = ("protocol", "section_id", "patient_id", "target", "method", "kind", "gene_set", "gene")
"""Columns of saved tables that hold names; all others hold numbers."""
LEVEL = 0.95
"""Coverage of the confidence intervals."""


def gene_scores(truth: np.ndarray, prediction: np.ndarray, totals: np.ndarray) -> pd.DataFrame:
    """Returns one prediction's scores of one section by gene: G rows in the panel's order.

    Columns, float64: truth_mean and truth_variance over spots (0 only where the gene is constant); pcc;
    pcc_density_free (`density_free_pearson`); mse; mae. A correlation is NaN where it is not defined.

    Args:
        truth: measured expression, (N, G).
        prediction: the same as predicted, in the same unit, (N, G).
        totals: each spot's measured count over all genes, (N,).
    """
    mse, mae = errors_per_gene(truth, prediction)
    return pd.DataFrame(
        {
            "truth_mean": truth.mean(axis=0, dtype=np.float64),
            "truth_variance": (centred(truth) ** 2).mean(axis=0),
            "pcc": pearson_per_gene(truth, prediction),
            "pcc_density_free": density_free_pearson(truth, prediction, totals),
            "mse": mse,
            "mae": mae,
        }
    )


def gene_sets(truth: np.ndarray, markers: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the columns of each set of genes that is scored by name: all, heg50, hvg50 and the markers' sets.

    Args:
        truth: measured expression of the section that is scored, (N, G), in the unit that is scored.
        markers: columns of the panel by name, see `markers.marker_columns`.
    """
    own = {ALL: np.arange(truth.shape[1]), HEG: highest_genes(truth), HVG: variable_genes(truth)}
    return own | dict(markers)


def set_table(genes: pd.DataFrame, sets: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Returns the scores of sets of genes, one row a set, from a `gene_scores` or a `noise_ceiling`.

    Columns: gene_set; num_genes; pcc and pcc_density_free, means over the genes where they are defined; undefined and
    undefined_density_free, how many are not; mse and mae over all spots and genes of the set; rmse, the root of mse.
    Errors are NaN where `genes` has none.
    """
    return pd.DataFrame([{"gene_set": name} | _set_row(genes.iloc[columns]) for name, columns in sets.items()])


def read_table(data: bytes) -> pd.DataFrame:
    """Returns a table of scores as it was before it was saved as CSV: a patient NA and a section 007 stay names."""
    table = pd.read_csv(io.BytesIO(data), dtype=str, keep_default_na=False)
    for name in table.columns.difference(list(NAMES)):
        table[name] = pd.to_numeric(table[name].replace("", None))
    return table


def mean_intervals(rows: pd.DataFrame, value: str, by: Sequence[str], unit: str) -> pd.DataFrame:
    """Returns the mean of a score over independent units with its 95 % confidence interval, one row a group.

    The interval is Student's, mean +- t(0.975, n - 1) s / sqrt(n) over the n units (1908,
    https://doi.org/10.1093/biomet/6.1.1), not a percentile bootstrap, which is too narrow for so few (Hesterberg 2015,
    https://doi.org/10.1080/00031305.2015.1089789). A unit's rows are averaged first: sections of one patient are not
    independent. A model is best compared with a floor by the interval of their difference.

    Args:
        rows: one row a section (and gene, method ...).
        value: the column that is averaged; NaN is left out and counted.
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
    errors = genes.reindex(columns=["mse", "mae"]).mean()
    return {
        "num_genes": len(genes),
        "pcc": genes["pcc"].mean(),
        "undefined": genes["pcc"].isna().sum(),
        "pcc_density_free": genes["pcc_density_free"].mean(),
        "undefined_density_free": genes["pcc_density_free"].isna().sum(),
        "mse": errors["mse"],
        "rmse": np.sqrt(errors["mse"]),
        "mae": errors["mae"],
    }
