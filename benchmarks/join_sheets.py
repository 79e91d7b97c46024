"""Prints one sample sheet with the sections of several and absolute paths: `join_sheets.py A.csv B.csv > ALL.csv`."""

import csv
import sys
from pathlib import Path

PATHS = ("image", "expression", "positions", "labels")


def main() -> None:
    rows = [
        _absolute(row, sheet.parent)
        for sheet in map(Path, sys.argv[1:])
        for row in csv.DictReader(sheet.read_text().splitlines())
    ]
    writer = csv.DictWriter(sys.stdout, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)


def _absolute(row: dict[str, str], folder: Path) -> dict[str, str]:
    return row | {name: str((folder / row[name]).resolve()) for name in PATHS if row[name] and "://" not in row[name]}


if __name__ == "__main__":
    main()
