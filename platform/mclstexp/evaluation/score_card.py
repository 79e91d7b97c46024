"""The score card: a model beside its floors, by section, patient and gene, as table, files and picture.

Scores are taken within a section, so that a small section weighs as much as a large one. Means are over patients, whose
sections are averaged first, or over sections as published where the protocol is `reference`.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Group

from mclstexp.evaluation.scores import ALL, AVERAGED, mean_intervals
from mclstexp.evaluation.sections import SectionResult, section_path, write_section_result
from mclstexp.evaluation.verdicts import verdict

MODEL, FLOOR, LINE = "model", "floor", "reference line"
ORACLE, CEILING = "library-size oracle", "noise ceiling"
_COUNTED = ("undefined", "undefined_density_free")
_OVER_ALL_GENES = ("pcc_density_free", "mse", "rmse", "mae", "undefined")
_PROTOCOLS = {
    "patient": "no patient of the training data is tested",
    "reference": "sections are left out as published; other sections of the tested patients may have trained",
}


@dataclass(frozen=True)
class ScoreCard:
    """All scores of one evaluation."""

    protocol: str
    targets: dict[str, str]
    """Units by the name of their target, the model's own first."""
    model_digest: str
    notes: tuple[str, ...]
    """What else a reader must know: training sections, leaks that the protocol allows, how floors were fitted."""
    genes: list[str]
    """Their labels, each once (`gene_labels.unique_labels`)."""
    rows: pd.DataFrame
    """One row a section, target, method and gene set: section_id, patient_id, num_spots, target, method, kind, and the
    columns of `tables.set_table`."""
    per_gene: pd.DataFrame
    """One row a section, target, method and gene: section_id, patient_id, target, method, gene (its label), and
    the columns of `scores.gene_scores`."""
    sections: tuple[SectionResult, ...] = ()
    """The predictions, where they are at hand; the first is drawn."""
    predictions: Mapping[str, str] = field(default_factory=dict)
    """Where each section's prediction lies within the result folder, where it is not among `sections`."""
    training_runs: Mapping[str, str] = field(default_factory=dict)
    """MLflow runs of the trainings behind this card, by name."""

    @property
    def target(self) -> str:
        """The name of the model's own target."""
        return next(iter(self.targets))

    @property
    def unit(self) -> str:
        """The column of what means are taken over."""
        return "section_id" if self.protocol == "reference" else "patient_id"

    def means(self) -> pd.DataFrame:
        """Returns the means over patients (`reference`: sections), a row a target, method and gene set.

        Columns: target, method, kind, gene_set; num_spots, undefined and undefined_density_free, summed over sections;
        and for each of pcc, pcc_density_free, mse, rmse and mae: the mean, NAME_low and NAME_high, its 95 % interval
        (`tables.mean_intervals`), and NAME_units, how many units have it.
        """
        return _means(self.rows, (), self.unit)

    def patients(self) -> pd.DataFrame:
        """Returns the same for each patient over its sections; patient_id stands first."""
        return _means(self.rows, ("patient_id",), "section_id")

    def gene_means(self) -> pd.DataFrame:
        """Returns each gene's mean correlation over units by target and method, as `tables.mean_intervals`."""
        return mean_intervals(self.per_gene, "pcc", ["target", "method", "gene"], self.unit)

    def scores(self) -> dict[str, dict[str, dict[str, float]]]:
        """Returns the means by target, method and short name.

        Names: pcc_GENE_SET; and over all genes pcc_density_free, mse, rmse, mae and undefined.
        """
        found: dict[str, dict[str, dict[str, float]]] = {target: {} for target in self.targets}
        for row in self.means().to_dict("records"):
            named = found[row["target"]].setdefault(row["method"], {})
            named[f"pcc_{row['gene_set']}"] = float(row["pcc"])
            if row["gene_set"] == ALL:
                named |= {name: float(row[name]) for name in _OVER_ALL_GENES}
        return found

    def heading(self) -> str:
        """Returns what every page of the result says: what was held out, and under which protocol."""
        sections = ", ".join(self.rows["section_id"].unique())
        return f"held out: {sections}; protocol {self.protocol}: {_PROTOCOLS[self.protocol]}"

    def verdicts(self) -> list[str]:
        """Returns one sentence a floor: on which means in the model's own target it is beaten, and on which it wins.

        A correlation that a method lacks counts as 0 here, see `verdicts.py`; the stated means leave it out.
        """
        rows, genes = (table[table["target"] == self.target] for table in (self.rows, self.per_gene))
        floors = rows.loc[rows["kind"] == FLOOR, "method"].unique()
        return [verdict(rows, genes, MODEL, str(name), self.unit) for name in floors]

    def table(self) -> Group:
        """Returns the card for the terminal, 120 columns wide."""
        from mclstexp.evaluation.show import card_tables

        return card_tables(self)

    def save(self, folder: str | Path) -> None:
        """Writes score_card.json, .csv and .png, per_gene.csv, gene_means.csv and sections/*.h5ad into a local folder.

        Every file names the protocol.
        """
        from mclstexp.evaluation.show import draw

        folder = Path(folder)
        record = {
            "heading": self.heading(),
            "protocol": self.protocol,
            "targets": self.targets,
            "model_digest": self.model_digest,
            "num_genes": len(self.genes),
            "notes": self.notes,
            "verdicts": self.verdicts(),
            "means": _records(self.means()),
            "patients": _records(self.patients()),
            "sections": _records(self.rows),
            "predictions": {**self.predictions, **{name: section_path(name) for name in self._own_sections()}},
            "training_runs": dict(self.training_runs),
        }
        (folder / "score_card.json").write_text(json.dumps(record, indent=1, allow_nan=False))
        tables = {"score_card": self.rows, "per_gene": self.per_gene, "gene_means": self.gene_means()}
        for name, table in tables.items():
            table.assign(protocol=self.protocol)[["protocol", *table.columns]].to_csv(
                folder / f"{name}.csv", index=False
            )
        draw(self, folder / "score_card.png")
        facts = {"unit": self.targets[self.target], "protocol": self.protocol, "heading": self.heading()}
        for result in self.sections:
            write_section_result(folder, result, facts | {"model_digest": self.model_digest})

    def _own_sections(self) -> list[str]:
        return [result.section.section_id for result in self.sections]

    def tags(self) -> dict[str, str]:
        """Returns the model's means in its own target as short texts, for the registry."""
        model = self.scores()[self.target][MODEL]
        means = {_plain(f"score.{name}"): f"{value:.4f}" for name, value in model.items()}
        return means | {"score.protocol": self.protocol}

    def metrics(self) -> dict[str, float]:
        """Returns all means for MLflow; undefined ones are left out.

        Names: `test/METHOD/SCORE` in the model's own target, `test/TARGET/METHOD/SCORE` in others.
        """
        return {
            _plain("/".join(["test", *([] if target == self.target else [target]), method, name])): value
            for target, methods in self.scores().items()
            for method, scores in methods.items()
            for name, value in scores.items()
            if math.isfinite(value)
        }


def _means(rows: pd.DataFrame, first: Sequence[str], unit: str) -> pd.DataFrame:
    by = [*first, "target", "method", "kind", "gene_set"]
    parts = [rows.groupby(by, sort=False)[["num_spots", *_COUNTED]].sum()]
    for name in AVERAGED:
        found = mean_intervals(rows, name, by, unit).set_index(by)[["mean", "low", "high", "num_units"]]
        parts.append(found.set_axis([name, f"{name}_low", f"{name}_high", f"{name}_units"], axis=1))
    return pd.concat(parts, axis=1).reset_index()


def _records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    return json.loads(rows.to_json(orient="records"))  # NaN becomes null


def _plain(name: str) -> str:
    """Returns a name in the letters that MLflow takes."""
    return re.sub(r"[^\w/.:-]", "_", name)
