"""Prints the Markdown tables of docs/results.md from the finished folds of the studies that results.sh runs.

    python benchmarks/results_table.py OUT/studies

As on score cards, a row is the mean over the sections of all finished folds (as published) or, where whole patients are
held out, over each patient's mean. Floors are in the same table, fitted on the same folds. `undefined` is the share of
genes without a correlation because they do not vary; correlations are means over the others.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

from mclstexp.evaluation.scores import read_table  # noqa: E402

COLUMNS = {"PCC all": ("all", "pcc"), "PCC HEG50": ("heg50", "pcc"), "density-free": ("all", "pcc_density_free")}
COLUMNS |= {"MSE": ("all", "mse"), "MAE": ("all", "mae"), "undefined": ("all", "undefined_share")}
KIND_ORDER = ("model", "floor", "reference line")


def main() -> None:
    root = Path(sys.argv[1])
    for study in sorted(path.parent for path in root.glob("*/study.json")):
        folds = sorted(path.parent.parent for path in study.glob("*/scores/score_card.json"))
        if folds:
            print(f"\n## {study.name}\n\n{_recipe(study)}\n")
            print("\n".join(_tables(pd.concat([_rows(fold) for fold in folds], ignore_index=True))))
            for page in sorted(study.glob("report/domains.csv")):
                print(f"\nDomains against labels\n\n{_markdown(read_table(page.read_bytes()))}")


def _recipe(study: Path) -> str:
    """Returns the settings of a study that its table must name."""
    identity = json.loads((study / "study.json").read_text())["identity"]
    train, model, genes = (identity[name] for name in ("train", "model", "genes"))
    random_spots = train["batching"] == "random_spots"
    batch = f"{train['batch_spots']} spots" if random_spots else f"{train['batch_sentences']} sentences"
    panel, unit = Path(genes["panel"]).name, f"log base {genes['log_base']}, scale {genes['scale']:g}"
    return (
        f"{train['epochs']} epochs, batches of {batch}, precision {train['precision']}, seed {train['seed']}, encoder "
        f"{model['image_encoder']}, panel {panel}, own target {genes['target']} ({unit})"
    )


def _rows(fold: Path) -> pd.DataFrame:
    record = json.loads((fold / "scores" / "score_card.json").read_text())
    rows = pd.DataFrame(record["sections"])
    rows["undefined_share"] = rows["undefined"] / rows["num_genes"]
    return rows.assign(fold=fold.name, own=next(iter(record["targets"])), protocol=record["protocol"])


def _tables(rows: pd.DataFrame) -> Iterator[str]:
    """Yields two tables per target, the models' own target first: by method, and the model by section."""
    own = rows["own"].iloc[0]
    yield f"Sections {', '.join(sorted(rows['section_id'].unique()))} ({rows['fold'].nunique()} fold(s))"
    for target in sorted(rows["target"].unique(), key=lambda name: name != own):
        stated = rows[rows["target"] == target]
        yield f"\nTarget {target}\n\n{_markdown(_means(stated))}"
        model = stated[stated["kind"] == "model"]
        by_section = pd.concat([_means(part).assign(method=name) for name, part in model.groupby("section_id")])
        table = _markdown(by_section.rename(columns={"method": "section"}))
        yield f"\nThe model by section, target {target}\n\n{table}"


def _means(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns one row per method: means over patients if the protocol keeps them apart, else over sections."""
    unit = "patient_id" if (rows["protocol"] == "patient").all() else "section_id"
    order = rows.drop_duplicates("method").sort_values(
        "kind", key=lambda kinds: kinds.map(KIND_ORDER.index), kind="stable"
    )
    found = {}
    for title, (genes, score) in COLUMNS.items():
        by_unit = rows[rows["gene_set"] == genes].groupby(["method", unit])[score].mean()
        found[title] = by_unit.groupby("method").mean().reindex(order["method"])
    return pd.DataFrame(found).rename_axis("method").reset_index()


def _markdown(table: pd.DataFrame) -> str:
    lines = ["| " + " | ".join(map(str, table.columns)) + " |", "|" + "---|" * len(table.columns)]
    for row in table.itertuples(index=False):
        cells = ("-" if value != value else f"{value:.3f}" if isinstance(value, float) else str(value) for value in row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
