"""The score card: a model beside its floors, by section and by patient, as table, files and picture.

Scores are taken within a section and then averaged over a patient's sections and over all sections, as published;
so a small section weighs as much as a large one.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from rich.table import Table

from mclstexp.evaluation.metrics import Scores

MODEL, FLOOR, LINE = "model", "floor", "reference line"
METRICS = {"pcc_all": "PCC all", "pcc_heg50": "PCC HEG50", "mse": "MSE", "mae": "MAE", "undefined": "undefined"}
_CORRELATIONS = ("pcc_all", "pcc_heg50")
_COMPARED = (*_CORRELATIONS, "mse", "mae")
_PROTOCOLS = {
    "patient": "no patient of the training data is tested",
    "reference": "sections are left out as published; other sections of the tested patients may have trained",
}


@dataclass(frozen=True)
class SectionResult:
    """One held-out section: where its spots are, what was measured, and what the model said."""

    section_id: str
    place: np.ndarray
    """(N, 2) micrometres."""
    truth: np.ndarray
    """(N, G)."""
    prediction: np.ndarray


@dataclass(frozen=True)
class ScoreCard:
    """All scores of one evaluation."""

    protocol: str
    unit: str
    model_digest: str
    notes: tuple[str, ...]
    """What else a reader must know: training sections, leaks that the protocol allows, how floors were fitted."""
    genes: list[str]
    rows: pd.DataFrame
    """One row a section and method: section_id, patient_id, num_spots, method, kind, METRICS, rmse."""
    per_gene: pd.DataFrame
    """One row a section, method and gene: section_id, method, gene, truth_mean, pcc."""
    example: SectionResult
    """The section that is drawn."""

    def means(self) -> pd.DataFrame:
        """Returns each method's means over sections, in the order of the rows; `undefined` is summed."""
        return _means(self.rows, ["method", "kind"])

    def patients(self) -> pd.DataFrame:
        """Returns the same for each patient."""
        return _means(self.rows, ["patient_id", "method", "kind"])

    def title(self) -> str:
        """Returns what the numbers are of: sections, protocol, target."""
        sections = ", ".join(self.rows["section_id"].unique())
        return f"held out: {sections}; protocol: {self.protocol}; target: {self.unit}"

    def verdicts(self) -> list[str]:
        """Returns one sentence a floor: on which mean scores the model beats it, and on which the floor wins."""
        means = self.means().set_index("method")
        scores = {str(method): {name: float(row[name]) for name in _COMPARED} for method, row in means.iterrows()}
        floors = means.index[means["kind"] == FLOOR]
        return [_verdict(name, scores[MODEL], scores[name]) for name in floors]

    def table(self) -> Table:
        """Returns the means, and where there are several the patients' and sections', for the terminal."""
        facts = (
            f"score card of model {self.model_digest}, {len(self.genes)} genes\n"
            f"protocol {self.protocol}: {_PROTOCOLS[self.protocol]}\n{self.title()}"
        )
        undefined = "undefined: genes without a correlation, summed over sections and left out of the mean"
        caption = "\n".join([undefined, *self.notes, *self.verdicts()])
        table = Table("of", "method", "kind", title=facts, caption=caption, caption_justify="left")
        for heading in METRICS.values():
            table.add_column(heading, justify="right")
        _add_rows(table, f"{self.rows['section_id'].nunique()} section(s)", self.means())
        for column, rows in (("patient_id", self.patients()), ("section_id", self.rows)):
            if rows[column].nunique() > 1:
                for name, part in rows.groupby(column, sort=False):
                    _add_rows(table, f"{column.removesuffix('_id')} {name}", part)
        return table

    def save(self, folder: str | Path) -> None:
        """Writes score_card.json, score_card.csv, per_gene.csv and score_card.png into a local folder."""
        from mclstexp.evaluation.score_plot import draw

        folder = Path(folder)
        record = {
            "protocol": self.protocol,
            "unit": self.unit,
            "model_digest": self.model_digest,
            "num_genes": len(self.genes),
            "notes": self.notes,
            "verdicts": self.verdicts(),
            "means": _records(self.means()),
            "patients": _records(self.patients()),
            "sections": _records(self.rows),
        }
        (folder / "score_card.json").write_text(json.dumps(record, indent=1, allow_nan=False))
        self.rows.to_csv(folder / "score_card.csv", index=False)
        self.per_gene.to_csv(folder / "per_gene.csv", index=False)
        draw(self, folder / "score_card.png")

    def tags(self) -> dict[str, str]:
        """Returns the model's means as short texts, for the registry."""
        model = self.means().set_index("method").loc[MODEL]
        return {f"score.{name}": f"{model[name]:.4f}" for name in METRICS} | {"score.protocol": self.protocol}

    def metrics(self) -> dict[str, float]:
        """Returns all means as `test/METHOD/SCORE`, for MLflow; undefined ones are left out."""
        return {
            f"test/{row['method'].replace(' ', '_')}/{name}": float(row[name])
            for row in self.means().to_dict("records")
            for name in METRICS
            if math.isfinite(row[name])
        }


def score_row(
    section_id: str, patient_id: str, num_spots: int, method: str, kind: str, scores: Scores
) -> dict[str, object]:
    """Returns one row of `ScoreCard.rows`; a reference line, which has no unit, keeps its correlations only."""
    values = asdict(scores) | {"rmse": math.sqrt(scores.mse)}
    if kind == LINE:
        values |= dict.fromkeys(("mse", "mae", "rmse"), math.nan)
    return {
        "section_id": section_id,
        "patient_id": patient_id,
        "num_spots": num_spots,
        "method": method,
        "kind": kind,
    } | values


def _means(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    how = {name: "sum" if name == "undefined" else "mean" for name in METRICS}
    return rows.groupby(by, sort=False).agg({"num_spots": "sum"} | how).reset_index()


def _records(rows: pd.DataFrame) -> list[dict[str, object]]:
    return json.loads(rows.to_json(orient="records"))  # NaN becomes null


def _add_rows(table: Table, scope: str, rows: pd.DataFrame) -> None:
    for place, row in enumerate(rows.to_dict("records")):
        cells = ["-" if math.isnan(row[name]) else f"{row[name]:.4f}" for name in _COMPARED]
        label = f"{scope}, {row['num_spots']} spots" if place == 0 else ""
        table.add_row(label, row["method"], row["kind"], *cells, f"{row['undefined']:.0f}")
    table.add_section()


def _verdict(floor: str, model: dict[str, float], other: dict[str, float]) -> str:
    """A score that only the floor lacks is not compared; one that only the model lacks is lost."""
    compared = [name for name in _COMPARED if not math.isnan(other[name])]
    won = [name for name in compared if _better(name, model[name], other[name])]
    lost = [name for name in compared if name not in won]
    if not lost:
        return f"the model beats the {floor}: {_gaps(won, model, other)}"
    if not won:
        return f"the {floor} WINS; the model stands at {_gaps(lost, model, other)}"
    return (
        f"the model beats the {floor} on {_gaps(won, model, other)}; the {floor} WINS on the rest, the model stands at "
        f"{_gaps(lost, model, other)}"
    )


def _better(name: str, model: float, other: float) -> bool:
    return model > other if name in _CORRELATIONS else model < other


def _gaps(names: list[str], model: dict[str, float], other: dict[str, float]) -> str:
    """Returns the model's differences in words: absolute for correlations, in percent for errors."""
    return ", ".join(f"{METRICS[name]} {_gap(name, model[name], other[name])}" for name in names)


def _gap(name: str, model: float, other: float) -> str:
    if math.isnan(model):
        return "undefined"
    if name in _CORRELATIONS or other == 0:
        return f"{model - other:+.3f}"
    return f"{model / other - 1:+.1%}"
