"""The score card: a model beside its floors, by section, patient and gene.

Scores are taken within a section, so that a small section weighs as much as a large one. Means are over patients, whose
sections are averaged first, or over sections as published where the protocol is `reference`. Some scores are about the
level of sections instead, their mean expression (`Score.of_level`). This module holds the numbers; `show.py` prints and
draws them, `save.py` writes them.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from mclstexp.evaluation import scores
from mclstexp.evaluation.scores import ALL, NOT_MEASURED, UNDEFINED, between_sections, mean_intervals, of_sections
from mclstexp.evaluation.sections import SectionResult
from mclstexp.evaluation.verdicts import verdict

MODEL, FLOOR, LINE = "model", "floor", "reference line"
"""Kinds of methods."""
ORACLE, CEILING = "library-size oracle", "noise ceiling"
"""The methods that are reference lines."""
_PROTOCOLS = {
    "patient": "no patient of the training data is tested",
    "reference": "sections are left out as published; other sections of the tested patients may have trained",
}


@dataclass(frozen=True)
class ScoreCard:
    """All scores of one evaluation."""

    protocol: str
    targets: dict[str, str]
    """The unit of each target by name, the model's own first."""
    model_digest: str
    notes: tuple[str, ...]
    """What else a reader must know: training sections, leaks that the protocol allows, how floors were fitted."""
    genes: list[str]
    """The genes' unique labels (`genes.unique_labels`)."""
    rows: pd.DataFrame
    """One row per section, target, method and gene set: section_id, patient_id, num_spots, target, method, kind, and
    the columns of `scores.set_table`."""
    per_gene: pd.DataFrame
    """One row per section, target, method and gene: section_id, patient_id, target, method, gene (its label), and
    the columns of `scores.gene_scores`."""
    sections: tuple[SectionResult, ...] = ()
    """The predictions, if they are in memory; the first is drawn."""
    predictions: Mapping[str, str] = field(default_factory=dict)
    """File of each section's prediction within the result folder, for those that are not among `sections`."""
    training_runs: Mapping[str, str] = field(default_factory=dict)
    """Ids of the MLflow runs that trained what this card scores, by name."""

    @property
    def target(self) -> str:
        """The name of the model's own target."""
        return next(iter(self.targets))

    @property
    def unit(self) -> str:
        """The column over whose values means are taken."""
        return "section_id" if self.protocol == "reference" else "patient_id"

    def heading(self) -> str:
        """Returns what every page of the result says: what was held out, and under which protocol."""
        sections = ", ".join(self.rows["section_id"].unique())
        return f"held out: {sections}; protocol {self.protocol}: {_PROTOCOLS[self.protocol]}"

    def verdicts(self) -> list[str]:
        """Returns one sentence per floor: on which means in the model's own target it is beaten, and on which it wins.

        An undefined correlation counts as 0 here (see `verdicts.py`); the stated means leave it out.
        """
        rows, genes = (table[table["target"] == self.target] for table in (self.rows, self.per_gene))
        floors = rows.loc[rows["kind"] == FLOOR, "method"].unique()
        return [verdict(rows, genes, MODEL, str(name), self.unit) for name in floors]

    def means(self) -> pd.DataFrame:
        """Returns the means over patients (`reference`: sections), one row per target, method and gene set.

        Columns: target, method, kind, gene_set; num_spots and the counts of genes that are undefined or not measured,
        summed over sections; and for each score: the mean, NAME_low and NAME_high, its 95 % interval
        (`scores.mean_intervals`), and NAME_units, the number of units that have it. Scores that compare sections have
        no interval, and are of all genes (`scores.between_sections`).
        """
        between = between_sections(self.per_gene, self.unit).assign(gene_set=ALL)
        return _means(self.rows, (), self.unit).merge(between, "left", ["target", "method", "gene_set"])

    def patients(self) -> pd.DataFrame:
        """Returns the same for each patient over its sections, with patient_id as first column."""
        return _means(self.rows, ("patient_id",), "section_id")

    def gene_means(self) -> pd.DataFrame:
        """Returns each gene's mean correlation over units by target and method, as `scores.mean_intervals`.

        `undefined` counts the sections that measure the gene, `not_measured` those that do not.
        """
        by = ["target", "method", "gene"]
        means = mean_intervals(self.per_gene, "pcc", by, self.unit)
        unmeasured = self.per_gene.assign(count=self.per_gene["truth_mean"].isna()).groupby(by)["count"].sum()
        counts = unmeasured.reindex(pd.MultiIndex.from_frame(means[by])).to_numpy()
        return means.assign(undefined=means["undefined"] - counts, not_measured=counts)

    def scores(self) -> dict[str, dict[str, dict[str, float]]]:
        """Returns the means by target, method and short name.

        Names: NAME_GENE_SET for scores of sets (pcc_heg50); the plain name for the others, over all genes; and
        undefined.
        """
        found: dict[str, dict[str, dict[str, float]]] = {target: {} for target in self.targets}
        for row in self.means().to_dict("records"):
            named = found[row["target"]].setdefault(row["method"], {})
            for score in scores.SCORES:
                if score.of_sets:
                    named[f"{score.name}_{row['gene_set']}"] = float(row[score.name])
                elif row["gene_set"] == ALL:
                    named[score.name] = float(row[score.name])
            if row["gene_set"] == ALL:
                named[UNDEFINED] = float(row[UNDEFINED])
        return found

    def tags(self) -> dict[str, str]:
        """Returns the model's means in its own target as short texts, for the registry, without undefined ones."""
        model = self.scores()[self.target][MODEL]
        means = {_plain(f"score.{name}"): f"{value:.4f}" for name, value in model.items() if math.isfinite(value)}
        return means | {"score.protocol": self.protocol}

    def metrics(self) -> dict[str, float]:
        """Returns all means for MLflow, without undefined ones.

        Names: `test/METHOD/SCORE` in the model's own target, `test/TARGET/METHOD/SCORE` in the others.
        """
        return {
            _plain("/".join(["test", *([] if target == self.target else [target]), method, name])): value
            for target, methods in self.scores().items()
            for method, means in methods.items()
            for name, value in means.items()
            if math.isfinite(value)
        }


def _means(rows: pd.DataFrame, first: Sequence[str], unit: str) -> pd.DataFrame:
    by = [*first, "target", "method", "kind", "gene_set"]
    counted = [NOT_MEASURED, *(score.undefined for score in of_sections() if score.undefined)]
    parts = [rows.groupby(by, sort=False)[["num_spots", *counted]].sum()]
    for score in of_sections():
        name = score.name
        found = mean_intervals(rows, name, by, unit).set_index(by)[["mean", "low", "high", "num_units"]]
        parts.append(found.set_axis([name, f"{name}_low", f"{name}_high", f"{name}_units"], axis=1))
    return pd.concat(parts, axis=1).reset_index()


def _plain(name: str) -> str:
    """Returns a name with only the characters that MLflow accepts."""
    return re.sub(r"[^\w/.:-]", "_", name)
