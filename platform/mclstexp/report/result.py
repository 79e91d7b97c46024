"""A result folder as the report reads it, on disk or in object storage (written by `evaluation/save.py`).

Tables are small and read whole; predictions in object storage are copied to local scratch. They are opened one section
at a time, so that memory does not grow with the cohort.

Shapes: N spots of one section, G genes of its panel.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import anndata
import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mclstexp import storage
from mclstexp.data.genes import GenePanel
from mclstexp.errors import ResultError
from mclstexp.evaluation.save import GENE_MEANS, PER_GENE, RECORD
from mclstexp.evaluation.score_card import MODEL
from mclstexp.evaluation.scores import read_table
from mclstexp.evaluation.sections import MEASURED

_THUMBNAIL_PX = 900
_WRITE = "with jobs/evaluate.py or jobs/cross_validate.py and --out"  # its URI follows
Row = dict[str, Any]
"""One row of a table of scores; None for an undefined score."""


class ScoreRecord(BaseModel):
    """The saved score card; see `save.save_card`."""

    model_config = ConfigDict(frozen=True)

    heading: str
    protocol: str
    targets: dict[str, str]
    model_digest: str
    num_genes: int
    notes: tuple[str, ...]
    verdicts: tuple[str, ...]
    means: list[Row]
    patients: list[Row]
    sections: list[Row]
    predictions: Annotated[dict[str, str], Field(min_length=1)]
    """File of each section's prediction, relative to the folder."""
    training_runs: dict[str, str]
    """MLflow run ids by name."""

    @property
    def target(self) -> str:
        """The name of the model's own target."""
        return next(iter(self.targets))

    @property
    def unmeasured(self) -> list[str]:
        """The notes on genes that scored sections do not measure."""
        return [note for note in self.notes if " does not measure " in note]

    @property
    def leaks(self) -> list[str]:
        """The notes on leaks that the protocol allows."""
        return [note for note in self.notes if note.startswith("LEAK")]


@dataclass(frozen=True)
class Thumbnail:
    """A small picture of a slide, from its level-0 corner on."""

    rgb: np.ndarray
    """uint8 (height, width, 3)."""
    scale: float
    """Level-0 pixels per thumbnail pixel."""


@dataclass(frozen=True)
class Section:
    """One held-out section: its spots, and their measured and predicted expression in the model's own target."""

    section_id: str
    patient_id: str
    panel: GenePanel
    unit: str
    heading: str
    """What was held out with it, and the protocol."""
    xy_px: np.ndarray
    """float64 (N, 2), level-0 pixels."""
    xy_um: np.ndarray
    """float64 (N, 2), micrometres."""
    labels: np.ndarray
    """object (N,), a pathologist's label of each spot; not a str for a spot without one."""
    measured: np.ndarray
    """float32 (N, G)."""
    predicted: np.ndarray
    """float32 (N, G)."""
    thumbnail: Thumbnail


@dataclass(frozen=True)
class Result:
    """An opened result folder."""

    uri: str
    record: ScoreRecord
    per_gene: pd.DataFrame
    """Columns as in `ScoreCard.per_gene`; the model's own target only."""
    gene_means: pd.DataFrame
    """Columns as in `ScoreCard.gene_means`; the model's own target only."""
    files: dict[str, Path]
    """Local file of each section's prediction."""

    @cached_property
    def panel(self) -> GenePanel:
        """The genes of all sections in order of first appearance: folds may have panels of their own."""
        tables = pd.concat([self._genes(name) for name in self.files])
        return _panel(tables[~tables.index.duplicated()])

    @cached_property
    def num_spots(self) -> dict[str, int]:
        """Spots by section."""
        return {row["section_id"]: row["num_spots"] for row in self.record.sections}

    def heading(self, section: Section | None = None) -> str:
        """Returns what every picture says: what was held out, under which protocol, and what leaks."""
        return "\n".join([section.heading if section else self.record.heading, *self.record.leaks])

    def section(self, name: str) -> Section:
        """Returns one section's measured and predicted expression.

        Raises:
            ResultError: its file is damaged or incomplete.
        """
        with self._reading(name):
            data = anndata.read_h5ad(self.files[name])
            obs, text, image = data.obs, data.uns["result"], data.uns["spatial"][name]
            return Section(
                section_id=name,
                patient_id=str(obs["patient_id"].iloc[0]),
                panel=_panel(data.var),
                unit=str(text["unit"]),
                heading=str(text["heading"]),
                xy_px=obs[["x_px", "y_px"]].to_numpy(np.float64),
                xy_um=obs[["x_um", "y_um"]].to_numpy(np.float64),
                labels=obs["label"].to_numpy(object),
                measured=np.asarray(data.layers[MEASURED], np.float32),
                predicted=np.asarray(data.X, np.float32),
                thumbnail=_thumbnail(image["images"]["hires"], float(image["scalefactors"]["tissue_hires_scalef"])),
            )

    def _genes(self, name: str) -> pd.DataFrame:
        with self._reading(name), h5py.File(self.files[name]) as file:
            return read_elem(file["var"])[["symbol", "ensembl_id"]].astype(str)

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, KeyError) as error:
            uri = storage.join(self.uri, self.record.predictions[name])
            raise ResultError(
                f"the prediction of section {name}, {uri}, is damaged or incomplete: {error}; write it again "
                f"{_WRITE} {self.uri}"
            ) from error


def open_result(uri: str, scratch: str | Path) -> Result:
    """Returns the result of an evaluation or a cross-validation.

    Args:
        uri: the folder, local or s3://.
        scratch: an existing local folder for copies of files in object storage.

    Raises:
        ResultError: the folder has no score card, one of an older version, or not all files that it names.
    """
    uri = storage.absolute(uri)
    record = read_record(uri)
    per_gene, gene_means = (_own_target(_read(uri, name), record.target) for name in (PER_GENE, GENE_MEANS))
    files = {name: _fetch(uri, file, scratch) for name, file in record.predictions.items()}
    return Result(uri, record, per_gene, gene_means, files)


def read_record(uri: str) -> ScoreRecord:
    """Returns the score card of a result folder.

    Raises:
        ResultError: there is none, or one of an older version.
    """
    data = _read(uri, RECORD)
    try:
        return ScoreRecord.model_validate_json(data)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise ResultError(
            f"{RECORD} of {uri} is damaged or of an older version ({faults}); write it again {_WRITE} {uri}"
        ) from None


def model_rows(per_gene: pd.DataFrame) -> pd.DataFrame:
    """Returns the model's rows of a table by method."""
    return per_gene[per_gene["method"] == MODEL]


def _read(uri: str, name: str) -> bytes:
    try:
        return storage.read(storage.join(uri, name))
    except FileNotFoundError:
        raise ResultError(
            f"--run {uri} has no {name}: give the folder of an evaluation or a cross-validation, or write one {_WRITE} "
            f"{uri}"
        ) from None


def _own_target(data: bytes, target: str) -> pd.DataFrame:
    table = read_table(data)
    return table[table["target"] == target]


def _fetch(uri: str, file: str, scratch: str | Path) -> Path:
    """Returns a local path of a result's file: a copy of an object, a local file itself."""
    source = storage.join(uri, file)
    local = Path(scratch, file.replace("/", "_")) if storage.is_s3(uri) else Path(source)
    try:
        if storage.is_s3(uri):
            storage.download(source, local)
        storage.size(str(local))
    except FileNotFoundError:
        raise ResultError(f"{uri} has no {file}, which its {RECORD} names; write it again {_WRITE} {uri}") from None
    return local


def _thumbnail(rgb: np.ndarray, pixels_per_level_0: float) -> Thumbnail:
    """Returns a slide's picture with at most 900 px per side, the size of a map on a page."""
    image = Image.fromarray(rgb)
    image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    return Thumbnail(np.asarray(image), rgb.shape[1] / image.width / pixels_per_level_0)


def _panel(genes: pd.DataFrame) -> GenePanel:
    return GenePanel(tuple(map(str, genes.index)), *(tuple(map(str, genes[name])) for name in ("symbol", "ensembl_id")))
