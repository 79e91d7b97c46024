"""The files of a Visium section in a folder of Space Ranger, or of a deposit with a sample's name before each file's.

Names as Space Ranger writes them win. A folder with files of several samples is refused, because all slides have the
same barcodes: counts of one sample with positions of another would be read without a fault.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache

from ingest.readers.spots import PICTURES
from mclstexp import storage
from mclstexp.errors import SourceError

_BINS = "binned_outputs/square_016um"
_ROOTS = ("", "outs", _BINS, f"outs/{_BINS}")
_H5 = "filtered_feature_bc_matrix.h5"
_MATRIX = ("matrix.mtx.gz", "matrix.mtx")
_MATRIX_FOLDERS = ("filtered_feature_bc_matrix", "filtered_count_matrix", "")
_BESIDE_MATRIX = {
    "features": ("features.tsv.gz", "features.tsv", "genes.tsv.gz", "genes.tsv"),
    "barcodes": ("barcodes.tsv.gz", "barcodes.tsv"),
}
_POSITIONS = ("tissue_positions.parquet", "tissue_positions.csv", "tissue_positions_list.csv")
_SPATIAL = {
    "positions": (*_POSITIONS, *(f"{name}.gz" for name in _POSITIONS[1:])),
    "scalefactors": ("scalefactors_json.json", "scalefactors_json.json.gz"),
}
_PICTURES = {part: (f"tissue_{part}_image.png", f"tissue_{part}_image.png.gz") for part in PICTURES}
_NAMES = (_H5, *_MATRIX, *(name for parts in (_BESIDE_MATRIX, _SPATIAL) for names in parts.values() for name in names))
_KINDS = {"filtered", "feature", "bc", "count", "spatial"}
"""Words before a file's name that tell its kind, not its sample."""
_Lists = Callable[[str], Sequence[str]]
"""Lists the names of the files in a folder."""


def find_files(folder: str) -> dict[str, str]:
    """Returns a section's files by part.

    These are `h5`, or `matrix`, `features` and `barcodes`; `positions` and `scalefactors`; `hires` and `lowres` if the
    folder has them.

    Args:
        folder: Space Ranger's `outs`, its parent folder, or the folder of one bin size of Visium HD (of a whole HD run,
            the 16 um bins are used), or a folder with such files of one sample, in it and in `spatial`; local or
            `s3://`.

    Raises:
        SourceError: lists what is missing, or the files of several samples, or states what the folder holds instead.
    """
    names = cache(storage.list_folder)
    for prefixed in (False, True):
        for root in (_join(folder, name) for name in _ROOTS):
            if counts := _counts(names, root, prefixed):
                return _complete(names, root, counts)
    raise SourceError(_explained(names, folder))


def _join(folder: str, name: str) -> str:
    return storage.join(folder, name) if name else folder


def _counts(names: _Lists, root: str, prefixed: bool) -> dict[str, str]:
    """Returns the file of the count matrix, `h5` or `matrix`; none if there is none."""
    if h5 := _one(names, root, (_H5,), prefixed):
        return {"h5": h5}
    matrices = (_one(names, _join(root, name), _MATRIX, prefixed) for name in _MATRIX_FOLDERS)
    found = next(filter(None, matrices), None)
    return {"matrix": found} if found else {}


def _complete(names: _Lists, root: str, found: dict[str, str]) -> dict[str, str]:
    """Returns `found` with the files that belong to it."""
    spatial = storage.join(root, "spatial")
    if not names(spatial):
        spatial = root
    wanted = {part: (spatial, choices) for part, choices in _SPATIAL.items()}
    if "matrix" in found:
        beside = found["matrix"].rpartition("/")[0]
        wanted |= {part: (beside, choices) for part, choices in _BESIDE_MATRIX.items()}
    missing = []
    for part, (folder, choices) in (wanted | {part: (spatial, choices) for part, choices in _PICTURES.items()}).items():
        if uri := _one(names, folder, choices, prefixed=True):
            found = found | {part: uri}
        elif part in wanted:
            missing.append(f"{folder} has no {' or '.join(choices)}")
    if missing:
        raise SourceError("; ".join(missing))
    _require_one_sample([uri for part, uri in found.items() if part not in PICTURES])
    return found


def _one(names: _Lists, folder: str, choices: Sequence[str], prefixed: bool) -> str | None:
    """Returns the first of the files `choices` in a folder; with `prefixed`, also with a sample's name before it."""
    listed = names(folder)
    found = [name for name in choices if name in listed]
    if not found and prefixed:
        found = [
            name for choice in choices for name in listed if re.fullmatch(rf"(?!\._).+[._-]{re.escape(choice)}", name)
        ]
        _require_one_sample([storage.join(folder, name) for name in found])
    return storage.join(folder, found[0]) if found else None


def _require_one_sample(uris: Sequence[str]) -> None:
    sample_of = {uri: sample for uri in uris if (sample := _sample(uri.rpartition("/")[2]))}
    if len(set(sample_of.values())) > 1:
        listed = ", ".join(uri.rpartition("/")[2] for uri in sample_of)
        folder = next(iter(sample_of)).rpartition("/")[0]
        raise SourceError(f"{folder} has files of several samples: {listed}; make one folder for each section")


def _sample(name: str) -> tuple[str, ...]:
    """Returns the words before the known name of a file, without those that tell its kind."""
    before = next((name.removesuffix(known) for known in _NAMES if name != known and name.endswith(known)), "")
    return tuple(word for word in re.split("[._-]", before) if word and word not in _KINDS)


def _explained(names: _Lists, folder: str) -> str:
    """Returns what a folder without a known count matrix holds, in words."""
    if storage.exists(folder):
        return f"{folder} is a file: give the folder that it is in"
    segmented = "filtered_feature_cell_matrix.h5"
    for root in (_join(folder, name) for name in (*_ROOTS, "segmented_outputs", "outs/segmented_outputs")):
        if segmented in names(root):
            return (
                f"{root} holds segmented cells ({segmented}), not spots or bins: give the folder "
                "binned_outputs/square_016um or square_008um of the same run"
            )
        for bins in ("square_008um", "square_002um"):
            if _H5 in names(of_bins := storage.join(root, "binned_outputs", bins)):
                return f"{folder} has no {_BINS}: give the folder of the bins that it has, {of_bins}"
        if raw := [name for name in names(root) if "raw_feature_bc_matrix" in name]:
            return (
                f"{root} has only {raw[0]}, which lists all barcodes, most of them off the tissue: give the folder "
                f"with {_H5} of the same run"
            )
    return (
        f"{folder} has neither {_H5} nor matrix.mtx.gz in {' or '.join(filter(None, _MATRIX_FOLDERS))}; looked in it "
        f"and in {', '.join(_ROOTS[1:])}: give Space Ranger's outs folder, or the folder of other bins of Visium HD"
    )
