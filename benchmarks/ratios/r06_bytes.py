"""Bytes that a tile takes in a tile table, compressed as it is stored, beside its raw pixels (R6).

    python benchmarks/bench.py --only R6 --data DATA

A round is a section of DATA/samples.csv, prepared with the default encoding; of a painted cohort without.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "platform"), str(ROOT / "benchmarks")]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])

import numpy as np  # noqa: E402
from goals import say  # noqa: E402
from tile_stream import SIZE_PX, TileTable, stored_bytes, tile_table  # noqa: E402

from mclstexp.data.table import read_sentence  # noqa: E402
from mclstexp.slides.codec import decode_tile, encode_tile  # noqa: E402

RAW_BYTES = 3 * SIZE_PX**2
OTHER_QUALITIES = (75, 80, 90)


def share_at(table: TileTable, quality: int) -> float:
    """Returns the bytes of the stored tiles, encoded again at another quality, over those of raw pixels."""
    sizes = [
        len(encode_tile(decode_tile(tile.as_py()), "jpeg", quality))
        for name, group in table.manifest.sentences(table.section_ids)
        for tile in read_sentence(table.root, table.manifest.section(name), group)["image"]
    ]
    return float(np.mean(sizes)) / RAW_BYTES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with samples.csv")
    parser.add_argument("--rounds", type=int, default=5, help="unused: sizes do not vary")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = tile_table(arguments.data, folder)
        entries = [table.manifest.section(name) for name in table.section_ids]
        tiles = [stored_bytes(path) / entry.num_spots for path, entry in zip(table.files, entries, strict=True)]
        others = ", ".join(f"{share_at(table, quality):.3f} at {quality}" for quality in OTHER_QUALITIES)
    whole = float(np.median([entry.size_bytes / entry.num_spots for entry in entries]))
    detail = f"{table.detail}, a round per section; encoded again {others}; a row with its counts {whole:.0f} bytes"
    say("R6", [(size, float(RAW_BYTES)) for size in tiles], "bytes", detail)


if __name__ == "__main__":
    main()
