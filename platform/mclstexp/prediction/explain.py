"""Why a tile was predicted as it was: the reference spots that voted for it.

The tile (or its features, where others computed them) is read and embedded again, in this process, which costs a
second; a prediction need not keep anything for it.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from mclstexp.data.genes import AFTER_NAME, find_genes, unique_labels
from mclstexp.errors import ModelError, SourceError
from mclstexp.model.retrieval import explain
from mclstexp.model.version import ModelVersion
from mclstexp.prediction.cohort import Cohort
from mclstexp.prediction.inspect import corners, inspect
from mclstexp.prediction.parts import read_grid
from mclstexp.prediction.pipeline import answerer_for, embedding_device, reader_of


def explain_tile(
    cohort: Cohort, model: ModelVersion, slide_id: str, x_px: float, y_px: float, genes: Sequence[str]
) -> tuple[str, pd.DataFrame]:
    """Returns the name of the tile at a position and its votes, as `retrieval.explain` gives them.

    Args:
        cohort: has the slide.
        model: the version that predicts.
        slide_id: the slide.
        x_px, y_px: a position in level-0 pixels; of overlapping tiles the one with the nearest centre is meant.
        genes: names of panel genes whose payload is shown with each vote.

    Raises:
        SourceError: there is no such slide, it cannot be predicted, or no tile covers the position.
        ModelError: the model reads from no bank.
        ConfigError: the panel does not have a gene.
    """
    if model.bank is None:
        raise ModelError("the model is a direct regression: no reference spots vote for its predictions")
    source = cohort.source(slide_id)
    with tempfile.TemporaryDirectory() as scratch, reader_of(cohort.plan) as reader:
        inspection = inspect(source, replace(cohort.plan, out=scratch))
        record, size_px = inspection.record, cohort.plan.tiles.size_px
        table = read_grid(inspection.staging, record.num_tiles)
        left, top = corners(table, size_px, record.scale)
        row = _covering(left, top, size_px * record.scale, x_px, y_px, slide_id)
        columns = reader.read_part(source.image, table.slice(row, 1), record)
    if not columns.pop("complete")[0]:
        raise SourceError(f"slide {slide_id} has no pixels at {x_px:g}, {y_px:g}")
    answerer = answerer_for(model, cohort.plan)
    embedding = answerer.network.build(embedding_device(True))(*(values[:1] for values in columns.values()))
    chosen = find_genes(model.panel, genes)
    panel = model.panel.take(chosen)
    payload = dict(zip(unique_labels(panel.names(), panel.gene_id, form=AFTER_NAME), chosen, strict=True))
    votes = explain(answerer.queries(embedding)[0], model.bank, answerer.retrieval, len(model.bank), payload)
    return str(table["spot_id"][row]), votes


def shares(model: ModelVersion) -> str:
    """Returns in words what part votes have in a model's answers; empty if they are all of it."""
    if model.programs is None:
        return ""
    share, towers = model.programs.share, model.programs.tower_share
    found_by = f", found by towers to {towers:.0%} and else by features," if towers else ""
    return (
        f"retrieval from these spots{found_by} has {share:.0%} of the answer; a ridge on the features of the tile and "
        f"its neighbours has {1 - share:.0%}"
    )


def _covering(left: np.ndarray, top: np.ndarray, edge: float, x: float, y: float, slide_id: str) -> int:
    """Returns the tile over a position whose centre is nearest."""
    covers = (left <= x) & (x < left + edge) & (top <= y) & (y < top + edge)
    if not covers.any():
        raise SourceError(f"slide {slide_id} has no tile on tissue at {x:g}, {y:g}; its preview shows where they are")
    distance = np.hypot(left + edge / 2 - x, top + edge / 2 - y)
    return int(np.where(covers, distance, np.inf).argmin())
