"""Sample sheets of the public data sets of mclSTExp's paper (2024, https://arxiv.org/abs/2407.08216).

They describe the folders as published. Patients and omitted sections are the paper's. No data set states its
resolution, so it is computed from the array of spots: here for legacy ST, by the reader for Visium.
"""

import csv
import hashlib
import io
import math
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

from ingest.layout import array_mpp
from ingest.readers.legacy_st import read_layout
from ingest.readers.visium_files import find_files
from mclstexp import storage
from mclstexp.data.sheet import SectionRow
from mclstexp.data.text_table import read_text_table
from mclstexp.errors import ConfigError, SourceError
from mclstexp.messages import did_you_mean

_HER2ST = [f"{patient}{n}" for patient in "ABCDEFGH" for n in range(1, 7 if patient < "E" else 4)]
_HER2ST_PAPER = [name for name in _HER2ST if name not in ("A1", "H1", "H2", "H3")]
_CSCC = [(patient, f"{patient}_ST_rep{n}") for patient in ("P2", "P5", "P9", "P10") for n in (1, 2, 3)]
_SWARBRICK = ("1142243F", "CID4290", "CID4465", "CID44971", "CID4535", "1160920F")
_ALEX10X = {name: name for name in _SWARBRICK} | {"block1": "block", "block2": "block", "FFPE": "FFPE"}

Row = dict[str, str]
"""A row of the sample sheet, by column."""


class _Folder:
    """A published folder, which collects the parts that are missing."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.missing: list[str] = []

    def file(self, name: str) -> str:
        """Returns the URI of a file with a known name."""
        uri = storage.join(self.root, name)
        if not storage.exists(uri):
            self.missing.append(name)
        return uri

    def match(self, files: list[str], pattern: str, what: str) -> str:
        """Returns the URI of the one file whose name matches; the plain one if a compressed copy is beside it."""
        found = sorted(uri for uri in files if re.fullmatch(pattern, uri.rsplit("/", 1)[1], re.IGNORECASE))
        plain = [uri for uri in found if not (uri.endswith(".gz") and uri.removesuffix(".gz") in found)]
        if len(plain) != 1:
            self.missing.append(what + (f": found {', '.join(plain)}, expected one" if plain else ""))
        return plain[0] if plain else ""

    def visium(self, name: str) -> str:
        """Returns the URI of a Visium sample's folder."""
        uri = storage.join(self.root, name)
        try:
            find_files(uri)
        except SourceError as error:
            self.missing.append(str(error))
        return uri


@dataclass(frozen=True)
class _Dataset:
    """Layout of a data set."""

    rows: Callable[[_Folder], list[Row]]
    diameter_um: float | None = None
    """Diameter of the spots; only for legacy ST, where the reader does not know it."""
    pitch_um: float | None = None
    """Distance of neighbouring spots; only for legacy ST."""


def dataset_sheet(name: str, source: str) -> str:
    """Returns the sample sheet (CSV text) of a data set at `source`, a local folder or `s3://`.

    Args:
        name: `her2st` (HER2+ breast cancer, the paper's 32 sections), `her2st_all` (all 36), `cscc` (skin cancer, 12)
            `alex10x` (breast cancer by Visium, 9) or `hest` (HEST-1k, the sections that were downloaded).

    Raises:
        ConfigError: there is no such data set.
        SourceError: parts of the data set are missing (lists all), or a positions file is damaged.
    """
    if name not in _DATASETS:
        raise ConfigError(f"--dataset {name} is unknown; {did_you_mean(name, _DATASETS)}")
    dataset, folder = _DATASETS[name], _Folder(storage.absolute(source))
    rows = dataset.rows(folder)
    if folder.missing:
        listed = "\n  ".join(folder.missing)
        raise SourceError(
            f"{len(folder.missing)} part(s) of the data set {name} are missing in {folder.root}:\n  {listed}"
        )
    text = io.StringIO()
    writer = csv.DictWriter(text, list(SectionRow.model_fields), lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | _array_cells(row, dataset) for row in rows)
    return text.getvalue()


def _array_cells(row: Row, dataset: _Dataset) -> Row:
    """Returns the cells for spot diameter and resolution (from the array); empty if the reader finds both."""
    if dataset.pitch_um is None:
        return {}
    with (
        tempfile.TemporaryDirectory(prefix="mclstexp-") as scratch,
        storage.local_copy(row["positions"], scratch) as path,
    ):
        mpp = array_mpp(read_layout(path), dataset.pitch_um)
    return {"spot_diameter_um": f"{dataset.diameter_um:g}"} | ({} if mpp is None else {"mpp": f"{mpp:.4g}"})


def _her2st(folder: _Folder, names: list[str]) -> list[Row]:
    """HER2+ of Andersson et al. (2021, https://doi.org/10.1038/s41467-021-26271-2): the repository or its `data/`."""
    if not storage.list_files(storage.join(folder.root, "ST-cnts")):
        folder.root = storage.join(folder.root, "data")
    return [_her2st_row(folder, name) for name in names]


def _her2st_row(folder: _Folder, name: str) -> Row:
    images = f"ST-imgs/{name[0]}/{name}"
    row = {
        "section_id": name,
        "patient_id": name[0],
        "format": "legacy_st",
        "site": "her2st",
        "image": folder.match(storage.list_files(storage.join(folder.root, images)), r".*\.jpe?g", f"{images}/*.jpg"),
        "expression": folder.file(f"ST-cnts/{name}.tsv.gz"),
        "positions": folder.file(f"ST-spotfiles/{name}_selection.tsv"),
    }
    labels = storage.join(folder.root, f"ST-pat/lbl/{name}_labeled_coordinates.tsv")
    return row | ({"labels": labels} if storage.exists(labels) else {})


def _cscc(folder: _Folder) -> list[Row]:
    """Skin cancer of Ji et al. (2020, https://doi.org/10.1016/j.cell.2020.05.039): GSE144240's archive, unpacked."""
    files = storage.list_files(folder.root)
    return [_cscc_row(folder, files, patient, name) for patient, name in _CSCC]


def _cscc_row(folder: _Folder, files: list[str], patient: str, name: str) -> Row:
    start = r"(GSM\d+_)?"
    counts, spots = f"{name}_stdata.tsv", f"spot_data-selection-{name}.tsv"
    return {
        "section_id": name,
        "patient_id": patient,
        "format": "legacy_st",
        "site": "cscc",
        "image": folder.match(files, rf"{start}{name}\.jpe?g(\.gz)?", f"*_{name}.jpg.gz"),
        "expression": folder.match(files, rf"{start}{counts}(\.gz)?", f"*_{counts}.gz"),
        "positions": folder.match(files, rf"{start}{spots}(\.gz)?", f"*_{spots}.gz"),
    }


def _hest(folder: _Folder) -> list[Row]:
    """HEST-1k of Jaume et al. (2024, https://arxiv.org/abs/2406.16192), or the sections of it that were downloaded.

    Patients are only told apart within a data set: "Patient 1" of two data sets are two people. A section without
    patient is its own, since nothing says whose it is.
    """
    files = set(storage.list_files(folder.root))
    tables = [uri for uri in files if re.fullmatch(r"HEST_v\d+(_\d+)*\.csv", uri.rsplit("/", 1)[1])]
    if not tables:
        folder.missing.append("HEST_v*.csv (the metadata)")
        return []
    metadata = read_text_table(max(tables, key=_release), "metadata of HEST")
    lacking = [name for name in ("id", "patient", "dataset_title", *_HEST_NUMBERS) if name not in metadata.columns]
    folder.missing += [f"column {name} of the metadata" for name in lacking]
    sections = [cells for _, cells in metadata.rows if not lacking and files & set(_hest_files(folder, cells).values())]
    if not sections and not folder.missing:
        folder.missing.append("st/ID.h5ad and wsis/ID.tif of any section in the metadata")
    return [_hest_row(folder, files, cells) for cells in sections]


_HEST_NUMBERS = ("pixel_size_um_estimated", "spot_diameter", "inter_spot_dist")


def _release(uri: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", uri.rsplit("/", 1)[1])]


def _hest_files(folder: _Folder, cells: Row) -> Row:
    names = {"image": f"wsis/{cells['id']}.tif", "expression": f"st/{cells['id']}.h5ad"}
    return {column: storage.join(folder.root, name) for column, name in names.items()}


def _hest_row(folder: _Folder, files: set[str], cells: Row) -> Row:
    found = _hest_files(folder, cells)
    folder.missing += [uri.removeprefix(f"{folder.root}/") for uri in found.values() if uri not in files]
    mpp, diameter, pitch = (_positive(cells[name]) for name in _HEST_NUMBERS)
    named = cells["patient"].lower() not in ("", "nan", "na", "none", "unknown")
    title = cells["dataset_title"]
    patient = f"{_word(title)[:40]}.{hashlib.sha256(title.encode()).hexdigest()[:6]}.{_word(cells['patient'])}"
    return found | {
        "section_id": cells["id"],
        "patient_id": patient if named else cells["id"],
        "format": "h5ad",
        "site": "hest",
        "mpp": mpp,
        "spot_diameter_um": diameter,
        "pitch_um": pitch,
        "species": cells.get("species", ""),
        "organ": cells.get("organ", ""),
    }


def _positive(text: str) -> str:
    """Returns a number above 0 as it is written, else nothing."""
    try:
        return text if 0 < float(text) < math.inf else ""
    except ValueError:
        return ""


def _word(text: str) -> str:
    """Returns a text in the characters of an id."""
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")


def _alex10x(folder: _Folder) -> list[Row]:
    """Six sections of Wu et al. (2021, https://doi.org/10.1038/s41588-021-00911-1) and three of 10x Genomics."""
    return [
        {
            "section_id": name,
            "patient_id": patient,
            "format": "visium",
            "site": "swarbrick" if name in _SWARBRICK else "10x",
            "image": folder.file(f"{name}/image.tif"),
            "expression": folder.visium(name),
        }
        for name, patient in _ALEX10X.items()
    ]


_DATASETS = {
    "her2st": _Dataset(lambda folder: _her2st(folder, _HER2ST_PAPER), diameter_um=100, pitch_um=200),
    "her2st_all": _Dataset(lambda folder: _her2st(folder, _HER2ST), diameter_um=100, pitch_um=200),
    "cscc": _Dataset(_cscc, diameter_um=110, pitch_um=150),
    "alex10x": _Dataset(_alex10x),
    "hest": _Dataset(_hest),
}
