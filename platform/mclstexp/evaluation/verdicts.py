"""Who wins, in words: the model against each floor, score by score, with the interval of their difference.

Model and floor are compared within each section, so that what makes a section hard for both cancels out. With few
patients most intervals are wide; the words follow the mean, and the interval beside it says how certain that is.

Correlations are compared over the genes that vary in the section, and an undefined one counts as 0 there, because the
prediction is constant. The stated mean leaves it out instead, so that a method could win by predicting nothing for the
genes that it finds hard. Where a method has undefined genes, a difference here is therefore not that of the stated
means.
"""

import math
from typing import NamedTuple

import pandas as pd

from mclstexp.evaluation import scores
from mclstexp.evaluation.metrics import NUM_HIGHEST
from mclstexp.evaluation.scores import HEG, HVG, ScoredSet, mean_intervals

_HIGHEST_IN = {HEG: "truth_mean", HVG: "truth_variance"}
"""The column whose largest values select a set of genes."""
_EQUAL = 1e-5
"""Largest relative difference of errors that are equal but for rounding, such as those of a level that is the mean."""


def verdict(rows: pd.DataFrame, per_gene: pd.DataFrame, model: str, floor: str, unit: str) -> str:
    """Returns a sentence on which means a model beats a floor, and on which the floor wins.

    A score that the floor has nowhere is not compared; one that only the model has nowhere is lost. Equal errors, such
    as those of a model whose level is the train mean, are neither.

    Args:
        rows: as `ScoreCard.rows`, of one target.
        per_gene: as `ScoreCard.per_gene`, of the same target.
        model: the method to judge.
        floor: the method to compare it with.
        unit: the column over whose values means are taken.
    """
    compared = [ScoredSet(score, gene_set) for score in scores.SCORES for gene_set in score.compared]
    found = [_difference(rows, per_gene, model, floor, unit, each) for each in compared]
    differences = [each for each in found if each is not None]
    equal = ", ".join(each.compared.title for each in differences if each.is_equal)
    won, lost = (
        ", ".join(str(each) for each in differences if not each.is_equal and each.is_won == side)
        for side in (True, False)
    )
    words = _in_words(floor, won, lost)
    return f"{words}; it equals the {floor} in {equal}" if equal else words


def _in_words(floor: str, won: str, lost: str) -> str:
    if not lost:
        return f"the model beats the {floor}: {won}"
    if not won:
        return f"the {floor} WINS; the model stands at {lost}"
    return f"the model beats the {floor} on {won}; the {floor} WINS on the rest, the model stands at {lost}"


class _Difference(NamedTuple):
    compared: ScoredSet
    floor: float
    """The floor's mean."""
    difference: float
    """The model's mean minus the floor's; NaN where the model has none."""
    reach: float
    """Half of the difference's 95 % interval; NaN with fewer than two units."""

    @property
    def is_equal(self) -> bool:
        return self.compared.score.is_error and abs(self.difference) <= _EQUAL * self.floor

    @property
    def is_won(self) -> bool:
        return self.difference < 0 if self.compared.score.is_error else self.difference > 0

    def __str__(self) -> str:
        """In words: absolute for correlations, in percent of the floor for errors."""
        title = self.compared.title
        if math.isnan(self.difference):
            return f"{title} undefined"
        percent = self.compared.score.is_error and self.floor != 0
        scale, digits, sign = (100 / self.floor, 1, "%") if percent else (1.0, 3, "")
        reach = "" if math.isnan(self.reach) else f" ±{self.reach * scale:.{digits}f}{sign}"
        return f"{title} {self.difference * scale:+.{digits}f}{sign}{reach}"


def _difference(
    rows: pd.DataFrame, per_gene: pd.DataFrame, model: str, floor: str, unit: str, compared: ScoredSet
) -> _Difference | None:
    own, other = (
        _where_genes_vary(per_gene, method, compared) if compared.score.undefined else _stated(rows, method, compared)
        for method in (model, floor)
    )
    if other.isna().all():
        return None
    patients = rows.drop_duplicates("section_id").set_index("section_id")[["patient_id"]]
    of_sections = patients.assign(difference=own - other, floor=other, score=compared.title).reset_index()
    found = mean_intervals(of_sections, "difference", ["score"], unit).iloc[0]
    mean = mean_intervals(of_sections, "floor", ["score"], unit).iloc[0]["mean"]
    return _Difference(compared, mean, found["mean"], found["high"] - found["mean"])


def _stated(rows: pd.DataFrame, method: str, compared: ScoredSet) -> pd.Series:
    """Returns a method's score in each section, as the card states it."""
    own = rows[(rows["method"] == method) & (rows["gene_set"] == compared.gene_set)]
    return own.set_index("section_id")[compared.score.name]


def _where_genes_vary(per_gene: pd.DataFrame, method: str, compared: ScoredSet) -> pd.Series:
    """Returns a method's mean score in each section over the genes that vary, with 0 for an undefined one.

    NaN where the method has none in any section. A gene that a section does not measure has no variance there.
    """
    genes = per_gene[per_gene["method"] == method]
    if compared.gene_set in _HIGHEST_IN:
        ordered = genes.sort_values(_HIGHEST_IN[compared.gene_set], ascending=False, kind="stable")
        genes = ordered.groupby("section_id", sort=False).head(NUM_HIGHEST)
    genes = genes[genes["truth_variance"] > 0]
    values = genes[compared.score.name]
    return (values if values.isna().all() else values.fillna(0.0)).groupby(genes["section_id"]).mean()
