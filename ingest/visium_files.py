"""Which files of a Space Ranger folder make a section: the names of v1, v2 and HD, and of published deposits.

Known names are looked up one by one and nothing is listed, so that links and object storage work and a folder with a
thousand other files costs nothing.
"""

from collections.abc import Sequence

from mclstexp import storage
from mclstexp.errors import SourceError

_BINS = "binned_outputs/square_016um"
_ROOTS = ("", "outs", _BINS, f"outs/{_BINS}")
_H5 = "filtered_feature_bc_matrix.h5"
_MATRIX_FOLDERS = ("filtered_feature_bc_matrix", "filtered_count_matrix")
_BESIDE_MATRIX = {
    "features": ("features.tsv.gz", "features.tsv", "genes.tsv.gz", "genes.tsv"),
    "barcodes": ("barcodes.tsv.gz", "barcodes.tsv"),
}
_SPATIAL = {
    "positions": ("tissue_positions.parquet", "tissue_positions.csv", "tissue_positions_list.csv"),
    "scalefactors": ("scalefactors_json.json",),
}


def find_visium_files(folder: str) -> dict[str, str]:
    """Returns a section's files by part: `h5`, or `matrix`, `features` and `barcodes`; `positions`, `scalefactors`.

    Args:
        folder: Space Ranger's `outs`, the folder that holds it, or one bin size's folder of Visium HD (of an HD run
            the 16 um bins are taken); local or `s3://`.

    Raises:
        SourceError: lists what is missing.
    """
    for root in (storage.join(folder, name) if name else folder for name in _ROOTS):
        if storage.exists(h5 := storage.join(root, _H5)):
            return _complete({"h5": h5}, [(storage.join(root, "spatial"), _SPATIAL)])
        for matrix_folder in (storage.join(root, name) for name in _MATRIX_FOLDERS):
            if matrix := _first(matrix_folder, ("matrix.mtx.gz", "matrix.mtx")):
                beside = [(matrix_folder, _BESIDE_MATRIX), (storage.join(root, "spatial"), _SPATIAL)]
                return _complete({"matrix": matrix}, beside)
    raise SourceError(
        f"{folder} has neither {_H5} nor matrix.mtx.gz in {' or '.join(_MATRIX_FOLDERS)}; looked in it and in "
        f"{', '.join(_ROOTS[1:])}: give Space Ranger's outs folder, or for other bins of Visium HD their own folder"
    )


def _complete(found: dict[str, str], wanted: Sequence[tuple[str, dict[str, tuple[str, ...]]]]) -> dict[str, str]:
    """Returns `found` with the wanted parts of each folder."""
    missing = []
    for folder, parts in wanted:
        for part, names in parts.items():
            if uri := _first(folder, names):
                found = found | {part: uri}
            else:
                missing.append(f"{folder} has no {' or '.join(names)}")
    if missing:
        raise SourceError("; ".join(missing))
    return found


def _first(folder: str, names: Sequence[str]) -> str | None:
    return next((uri for name in names if storage.exists(uri := storage.join(folder, name))), None)
