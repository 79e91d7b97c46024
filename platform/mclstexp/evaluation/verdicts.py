"""Who wins, in words: the model against each floor, score by score, with the interval of their difference.

Model and floor are compared within each section, so that what makes a section hard for both cancels out. With few
patients most intervals are wide; the words go by the mean, and the interval beside it says how sure that is.

Correlations are compared over the genes that vary in the section, and one that is not defined there, because what was
predicted is constant, counts as 0: a stated mean leaves it out, so that a method would win by saying nothing of the
genes that it finds hard. Where a method lacks some, a difference here is therefore not that of the stated means.
"""

import math
from typing import NamedTuple

import pandas as pd

from mclstexp.evaluation.metrics import NUM_HIGHEST
from mclstexp.evaluation.scores import ALL, HEG, mean_intervals


class _Score(NamedTuple):
    title: str
    gene_set: str
    column: str

    @property
    def is_error(self) -> bool:
        return self.column in ("mse", "mae")


_COMPARED = (
    _Score("PCC all", ALL, "pcc"),
    _Score("PCC HEG50", HEG, "pcc"),
    _Score("PCC density-free", ALL, "pcc_density_free"),
    _Score("MSE", ALL, "mse"),
    _Score("MAE", ALL, "mae"),
)


class _Difference(NamedTuple):
    score: _Score
    floor: float
    """The floor's mean."""
    difference: float
    """The model's mean less the floor's; NaN where the model has none."""
    reach: float
    """Half of the difference's 95 % interval; NaN with fewer than two units."""

    @property
    def is_won(self) -> bool:
        return self.difference < 0 if self.score.is_error else self.difference > 0

    def __str__(self) -> str:
        """In words: absolute for correlations, in percent of the floor for errors."""
        if math.isnan(self.difference):
            return f"{self.score.title} undefined"
        percent = self.score.is_error and self.floor != 0
        scale, digits, sign = (100 / self.floor, 1, "%") if percent else (1.0, 3, "")
        reach = "" if math.isnan(self.reach) else f" ±{self.reach * scale:.{digits}f}{sign}"
        return f"{self.score.title} {self.difference * scale:+.{digits}f}{sign}{reach}"


def verdict(rows: pd.DataFrame, per_gene: pd.DataFrame, model: str, floor: str, unit: str) -> str:
    """Returns a sentence on which means a model beats a floor, and on which the floor wins.

    A score that the floor lacks everywhere is not compared; one that only the model lacks everywhere is lost.

    Args:
        rows: as `ScoreCard.rows`, of one target.
        per_gene: as `ScoreCard.per_gene`, of the same.
        model: the method that is judged.
        floor: the method that it is held against.
        unit: the column of what means are taken over.
    """
    compared = [
        found for score in _COMPARED if (found := _difference(rows, per_gene, model, floor, unit, score)) is not None
    ]
    won = ", ".join(str(each) for each in compared if each.is_won)
    lost = ", ".join(str(each) for each in compared if not each.is_won)
    if not lost:
        return f"the model beats the {floor}: {won}"
    if not won:
        return f"the {floor} WINS; the model stands at {lost}"
    return f"the model beats the {floor} on {won}; the {floor} WINS on the rest, the model stands at {lost}"


def _difference(
    rows: pd.DataFrame, per_gene: pd.DataFrame, model: str, floor: str, unit: str, score: _Score
) -> _Difference | None:
    own, other = (
        _errors(rows, method, score) if score.is_error else _correlations(per_gene, method, score)
        for method in (model, floor)
    )
    if other.isna().all():
        return None
    patients = rows.drop_duplicates("section_id").set_index("section_id")[["patient_id"]]
    of_sections = patients.assign(difference=own - other, floor=other, score=score.title).reset_index()
    found = mean_intervals(of_sections, "difference", ["score"], unit).iloc[0]
    mean = mean_intervals(of_sections, "floor", ["score"], unit).iloc[0]["mean"]
    return _Difference(score, mean, found["mean"], found["high"] - found["mean"])


def _errors(rows: pd.DataFrame, method: str, score: _Score) -> pd.Series:
    """Returns a method's error in each section."""
    own = rows[(rows["method"] == method) & (rows["gene_set"] == score.gene_set)]
    return own.set_index("section_id")[score.column]


def _correlations(per_gene: pd.DataFrame, method: str, score: _Score) -> pd.Series:
    """Returns a method's mean correlation in each section, as it is compared; NaN where it has none in any section."""
    genes = per_gene[per_gene["method"] == method]
    if score.gene_set == HEG:
        ordered = genes.sort_values("truth_mean", ascending=False, kind="stable")
        genes = ordered.groupby("section_id", sort=False).head(NUM_HIGHEST)
    genes = genes[genes["truth_variance"] > 0]
    values = genes[score.column]
    return (values if values.isna().all() else values.fillna(0.0)).groupby(genes["section_id"]).mean()
