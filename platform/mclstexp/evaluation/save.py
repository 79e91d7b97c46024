"""A score card as a result folder: JSON, tables, a picture, and one file per predicted section.

`report` reads the folder again; every file names the protocol.
"""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from mclstexp.evaluation.score_card import ScoreCard
from mclstexp.evaluation.sections import section_path, write_section_result
from mclstexp.evaluation.show import draw

RECORD, ROWS, PER_GENE, GENE_MEANS = "score_card.json", "score_card.csv", "per_gene.csv", "gene_means.csv"
"""Upload `RECORD` last: a folder that has it is complete."""
_PICTURE = "score_card.png"


def save_card(card: ScoreCard, folder: str | Path) -> None:
    """Writes score_card.json, .csv and .png, per_gene.csv, gene_means.csv and sections/*.h5ad into a local folder."""
    folder = Path(folder)
    (folder / RECORD).write_text(json.dumps(_record(card), indent=1, allow_nan=False))
    for name, table in {ROWS: card.rows, PER_GENE: card.per_gene, GENE_MEANS: card.gene_means()}.items():
        table.assign(protocol=card.protocol)[["protocol", *table.columns]].to_csv(folder / name, index=False)
    draw(card, folder / _PICTURE)
    facts = {"unit": card.targets[card.target], "protocol": card.protocol, "heading": card.heading()}
    for result in card.sections:
        write_section_result(folder, result, facts | {"model_digest": card.model_digest})


def _record(card: ScoreCard) -> dict[str, Any]:
    own = [result.section.section_id for result in card.sections]
    return {
        "heading": card.heading(),
        "protocol": card.protocol,
        "targets": card.targets,
        "model_digest": card.model_digest,
        "num_genes": len(card.genes),
        "notes": card.notes,
        "verdicts": card.verdicts(),
        "means": _records(card.means()),
        "patients": _records(card.patients()),
        "sections": _records(card.rows),
        "predictions": {**card.predictions, **{name: section_path(name) for name in own}},
        "training_runs": dict(card.training_runs),
    }


def _records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    return json.loads(rows.to_json(orient="records"))  # NaN becomes null
