"""What all folds of a cross-validation say together: means with intervals by method, by unit and by gene.

Shapes: all tables are long; their columns are those of `ScoreCard.rows` and `ScoreCard.per_gene`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from rich.table import Table

from mclstexp.evaluation.tables import ALL, HEG, HVG, mean_intervals

SCORES = ("pcc", "pcc_density_free", "mse", "rmse", "mae")
_SHOWN = (
    *(("PCC all", ALL, "pcc"), ("PCC HEG50", HEG, "pcc"), ("PCC HVG50", HVG, "pcc")),
    *(("PCC all, density-free", ALL, "pcc_density_free"), ("MSE", ALL, "mse"), ("MAE", ALL, "mae")),
)
"""Heading, gene set and score."""
LEAK = "reference: other sections of the tested patients trained, as published; not a figure for new patients"
_NOTES = {"patient": "patient: no patient of a fold's training data is tested", "reference": LEAK}


@dataclass(frozen=True)
class Summary:
    """A cross-validation's result."""

    protocol: str
    methods: pd.DataFrame
    """One row a target, method, gene set and score: mean, low, high (95 %), num_units, undefined."""
    patients: pd.DataFrame
    """The same of each patient, over its sections."""
    genes: pd.DataFrame
    """One row a target, method and gene: the mean correlation over units with its interval."""
    sections: pd.DataFrame
    """All folds' rows."""

    def table(self) -> Table:
        """Returns the methods' means with intervals, in the model's own target, for the terminal."""
        target = self.sections["target"].iloc[0]
        units = self.methods["num_units"].max()
        title = f"{self.sections['section_id'].nunique()} sections, {units} units; target {target}\n{self.note()}"
        table = Table("method", "kind", *(heading for heading, _, _ in _SHOWN), title=title)
        own = self.methods[self.methods["target"] == target].set_index(["method", "gene_set", "score"])
        for method, kind in self.sections[["method", "kind"]].drop_duplicates().itertuples(index=False):
            cells = [_cell(own.loc[(method, genes, score)]) for _, genes, score in _SHOWN]
            table.add_row(method, kind, *cells)
        return table

    def note(self) -> str:
        """Returns what the protocol means for a reader."""
        return _NOTES[self.protocol]

    def save(self, folder: str | Path) -> None:
        """Writes summary.json and methods, patients, genes and sections as CSV into a local folder."""
        folder = Path(folder)
        for name in ("methods", "patients", "genes", "sections"):
            getattr(self, name).assign(protocol=self.protocol).to_csv(folder / f"{name}.csv", index=False)
        methods = json.loads(self.methods.to_json(orient="records"))  # NaN becomes null
        record = {"protocol": self.protocol, "note": self.note(), "methods": methods}
        (folder / "summary.json").write_text(json.dumps(record, indent=1))

    def metrics(self) -> dict[str, float]:
        """Returns the means as `cv/TARGET/METHOD/GENE_SET/SCORE`, for MLflow; undefined ones are left out."""
        defined = self.methods.dropna(subset="mean")
        names = ("target", "method", "gene_set", "score")
        return {
            "cv/" + "/".join(_plain(str(row[name])) for name in names): float(row["mean"])
            for row in defined.to_dict("records")
        }


def summarise(rows: pd.DataFrame, per_gene: pd.DataFrame, protocol: str, unit: str) -> Summary:
    """Returns the summary of all folds' rows; `unit` is the column of the independent unit."""
    by = ["target", "method", "kind", "gene_set"]
    methods = [mean_intervals(rows, score, by, unit).assign(score=score) for score in SCORES]
    patients = [mean_intervals(rows, score, ["patient_id", *by], "section_id").assign(score=score) for score in SCORES]
    genes = mean_intervals(per_gene, "pcc", ["target", "method", "gene"], unit)
    return Summary(protocol, pd.concat(methods, ignore_index=True), pd.concat(patients, ignore_index=True), genes, rows)


def _cell(row: pd.Series) -> str:
    if pd.isna(row["mean"]):
        return "-"
    if pd.isna(row["low"]):
        return f"{row['mean']:.3f}"
    return f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def _plain(text: str) -> str:
    """Returns a text in the letters that MLflow allows in a metric's name."""
    return "".join(letter if letter.isalnum() or letter in "_-. " else "_" for letter in text).replace(" ", "_")
