"""One score card of a cross-validation, put together from those that its folds saved."""

import json
from collections.abc import Sequence
from typing import Any

import pandas as pd

from mclstexp import storage
from mclstexp.evaluation.cross_validation import RESULT, SCORES, Study
from mclstexp.evaluation.score_card import ScoreCard
from mclstexp.evaluation.tables import read_table

ROWS, PER_GENE = "score_card.csv", "per_gene.csv"
LEAK = "LEAK that this protocol allows: other sections of the tested patients trained"


def collect(folds: Sequence[str], study: Study) -> ScoreCard:
    """Returns one score card over the sections of scored folds; what only some folds note stands under their names."""
    records: list[dict[str, Any]] = []
    rows: list[pd.DataFrame] = []
    per_gene: list[pd.DataFrame] = []
    for fold in folds:
        place = storage.join(study.uri, fold, SCORES)
        records.append(json.loads(storage.read(storage.join(place, RESULT))))
        for name, parts in ((ROWS, rows), (PER_GENE, per_gene)):
            parts.append(read_table(storage.read(storage.join(place, name))).drop(columns="protocol"))
    genes = pd.concat(per_gene, ignore_index=True)
    leaks = any(note.startswith("LEAK") for record in records for note in record["notes"])
    noted = [[note for note in record["notes"] if not note.startswith("LEAK")] for record in records]
    shared = [note for note in noted[0] if all(note in notes for notes in noted)]
    own = [
        f"fold {fold}: {note}" for fold, notes in zip(folds, noted, strict=True) for note in notes if note not in shared
    ]
    digests = [record["model_digest"] for record in records]
    return ScoreCard(
        protocol=study.protocol,
        targets=records[0]["targets"],
        model_digest=digests[0] if len(folds) == 1 else f"{digests[0]} to {digests[-1]} ({len(folds)} folds)",
        notes=(*([LEAK] if leaks else []), "each fold has a model, a panel and floors of its own", *shared, *own),
        genes=sorted(genes["gene"].unique()),
        rows=pd.concat(rows, ignore_index=True),
        per_gene=genes,
        predictions={
            name: f"{fold}/{SCORES}/{path}"
            for fold, record in zip(folds, records, strict=True)
            for name, path in record["predictions"].items()
        },
        training_runs={name: run_id for record in records for name, run_id in record["training_runs"].items()},
    )
