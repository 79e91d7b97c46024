"""Copies of sections of the synthetic cohort, changes to them, and tile tables prepared of them."""

import csv
import gzip
import shutil
from pathlib import Path

import pandas as pd

from ingest.prepare import prepare
from mclstexp import storage
from mclstexp.config import Config, override
from mclstexp.data.schema import load_genes, load_manifest
from mclstexp.data.table import read_sentence

SETTINGS = {"tiles.size_px": 32, "tiles.sentence_length": 16, "tiles.encoding": "png", "tiles.wide_um": None}
CONFIG = override(Config(), SETTINGS)


def copy_of(cohort, folder, names, **changes):
    """Copies some sections of the cohort, with other cells where `changes` says so; returns the sheet."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(cohort, newline="") as file:
        rows = [row | changes for row in csv.DictReader(file) if row["section_id"] in names]
    for row in rows:
        for column in ("image", "expression", "positions", "labels"):
            if row[column]:
                shutil.copy(Path(cohort).parent / row[column], folder / row[column])
    return write_sheet(folder, rows)


def write_sheet(folder, rows):
    with open(folder / "samples.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return str(folder / "samples.csv")


def edit_counts(sheet, section_id, edit):
    path = Path(sheet).parent / f"{section_id}.tsv.gz"
    table = edit(pd.read_csv(path, sep="\t", index_col=0))
    path.write_bytes(gzip.compress(table.to_csv(sep="\t").encode()))


def add_count(table):
    table.iloc[7, 3] += 1
    return table


def run(sheet, out, **settings):
    return prepare(sheet, str(out), override(CONFIG, settings))


def read_everything(root):
    """Reads and verifies every sentence; returns the spot ids by section."""
    manifest = load_manifest(root)
    load_genes(root, manifest)
    spots = {}
    for entry in manifest.sections:
        tables = [read_sentence(root, entry, index) for index in range(len(entry.row_groups))]
        spots[entry.section_id] = [name for table in tables for name in table["spot_id"].to_pylist()]
        assert len(spots[entry.section_id]) == entry.num_spots
    return spots


def files(root):
    return {uri: storage.version(uri) for uri in storage.list_files(str(root)) if not uri.endswith(".lock")}
