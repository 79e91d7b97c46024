"""Which spots of an AnnData file are the section's: files of several sections (libraries) are chosen from, never mixed.

Sections of several slides share one array and one range of pixels, so that mixing them would cut tiles of one section
for spots of another.
"""

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from mclstexp.errors import SourceError
from mclstexp.messages import did_you_mean, some_of

ARRAY_COLUMNS = ("array_row", "array_col")
_LIBRARY = "library_id"
_SECTION_COLUMNS = (
    *("library", "sample_id", "sample", "sample_name", "section_id", "section", "section_name"),
    *("slide_id", "slide", "slice", "slice_id", "capture_area", "orig.ident", "batch"),
)
"""Columns of `obs`, in any case and without marks, that name sections in files where nothing else does."""
_MAX_REPEATED = 0.1  # share of spots of one section that may have another's array position, for example by rounding
_MIN_SPOTS = 16  # of a section, on average, in a column that is to name sections
_SEQUENCE = r"([ACGT]{16}|s_\d+um_\d+_\d+)"  # what Space Ranger calls a place of an array, whatever is before or after


class Choice(NamedTuple):
    """A section's spots in its file."""

    spots: np.ndarray
    """Which of the file's spots are the section's, bool (n,)."""
    num_nameless: int
    """Number of the file's spots that no section has, since the column that names sections is empty there."""


def choose_spots(obs: pd.DataFrame, libraries: Collection[str], wanted: str | None) -> Choice:
    """Returns which spots are the section's.

    Args:
        obs: table of the n spots.
        libraries: names in `uns["spatial"]`.
        wanted: the section's name in a column of `obs` or in `uns["spatial"]`; None: the file has one section.

    Raises:
        SourceError: the file has several sections and `wanted` is None or not among them, or nothing tells them apart;
            names column and sections.
    """
    names = _names(obs, libraries)
    chosen, num_nameless = np.full(len(obs), True), 0
    if wanted is None:
        _require_one_section(names, libraries, obs)
    elif (named := _named(names, libraries, wanted)) is not None:
        chosen, num_nameless = (named == wanted).to_numpy(), int((named == "").sum())
    if _repeats(obs[chosen]):
        raise SourceError(
            f"array positions or barcodes of its {int(chosen.sum())} spots repeat, so they are of several sections, "
            f"and no column of obs ({_LIBRARY}, {some_of(_SECTION_COLUMNS)} or any other) tells these apart: write one "
            "file per section"
        )
    return Choice(chosen, num_nameless)


def library_of(obs: pd.DataFrame, libraries: Collection[str], wanted: str | None) -> str | None:
    """Returns the name in `uns["spatial"]` of the section with the spots `obs`; None if none is certain."""
    if wanted in libraries:
        return wanted
    if found := _certain_libraries(_names(obs, libraries), libraries):
        return found[0]
    return next(iter(libraries)) if len(libraries) == 1 and wanted is None else None


def _require_one_section(names: Mapping[str, pd.Series], libraries: Collection[str], obs: pd.DataFrame) -> None:
    on_one_array = len(_array_positions(obs)) > 0 and not _repeats(obs)
    for name, texts in names.items():
        sections = [text for text in texts.unique() if text]
        is_certain = _plain(name) == _plain(_LIBRARY) or set(sections) <= set(libraries)
        if len(sections) > 1 and (is_certain or (not on_one_array and 2 * len(sections) <= len(texts))):
            raise SourceError(
                f"it holds {len(sections)} sections by obs[{name!r}]: {some_of(sections)}; choose one with the column "
                f"{_LIBRARY} of the sample sheet"
            )
    if len(libraries) > 1 and not _certain_libraries(names, libraries):
        raise SourceError(
            f"uns['spatial'] has the libraries {some_of(libraries)}, and no column of obs states which one the spots "
            f"belong to: choose it with the column {_LIBRARY} of the sample sheet"
        )


def _named(names: Mapping[str, pd.Series], libraries: Collection[str], wanted: str) -> pd.Series | None:
    """Returns the column that names a section; None if the file has one section, which is known by this name."""
    found = next((texts for texts in names.values() if (texts == wanted).any()), None)
    if found is not None:
        return found
    several = [texts for texts in names.values() if texts.nunique() > 1]
    if wanted in libraries and not several:
        return None
    known = [text for text in several[0].unique() if text] if several else [*libraries, *_constants(names)]
    advice = did_you_mean(wanted, dict.fromkeys(known)) if known else f"it names none, so leave {_LIBRARY} empty"
    raise SourceError(f"it has no section {wanted!r}, which {_LIBRARY} of the sample sheet names; {advice}")


def _certain_libraries(names: Mapping[str, pd.Series], libraries: Collection[str]) -> list[str]:
    constants = _constants(names)
    return [name for name in libraries if name in constants]


def _constants(names: Mapping[str, pd.Series]) -> set[str]:
    return {str(texts.iloc[0]) for texts in names.values() if texts.nunique() == 1}


def _repeats(obs: pd.DataFrame) -> bool:
    """Returns whether spots share places of an array, as those of several sections do."""
    return any(bool(each.duplicated().mean() > _MAX_REPEATED) for each in _places(obs))


def _tells_apart(column: pd.Series, obs: pd.DataFrame) -> bool:
    """Returns whether a column has a value for each of the sections of a file."""
    if pd.api.types.is_float_dtype(column) or not 1 < column.nunique() <= len(column) / _MIN_SPOTS:
        return False
    section = pd.factorize(column)[0]
    in_section = (each.assign(section=section[each.index]) for each in _places(obs))
    return not any(each.duplicated().mean() > _MAX_REPEATED for each in in_section)


def _places(obs: pd.DataFrame) -> list[pd.DataFrame]:
    """Returns the array positions and barcodes of the spots that have some, by row number."""
    array = _array_positions(obs.reset_index(drop=True))
    sequence = pd.Series(obs.index.astype(str)).str.extract(_SEQUENCE).dropna()
    return [each for each in (array, sequence) if len(each)]


def _array_positions(obs: pd.DataFrame) -> pd.DataFrame:
    """Returns the known array positions, float64 (n, 2): a negative number stands for none."""
    if not set(ARRAY_COLUMNS) <= set(obs):
        return obs.iloc[:0]
    array = obs[[*ARRAY_COLUMNS]].apply(lambda column: pd.to_numeric(column.astype(object), errors="coerce"))
    return array[(array >= 0).all(axis=1)]


def _names(obs: pd.DataFrame, libraries: Collection[str]) -> dict[str, pd.Series]:
    """Returns the columns that may name a spot's section, as text, the most certain first.

    These are `library_id`, columns whose values are all among the libraries, those with a usual name, and if places of
    the array repeat, any others that tell the sections apart.
    """
    written = {_plain(str(name)): name for name in obs}
    of_libraries = [name for name in obs if _are_among(obs[name], libraries)]
    usual = [written.get(_plain(name)) for name in _SECTION_COLUMNS]
    others = [name for name in obs if _tells_apart(obs[name], obs)] if _repeats(obs) else []
    order = [written.get(_plain(_LIBRARY)), *of_libraries, *usual, *others]
    return {str(name): _texts(obs[name]) for name in order if name is not None}


def _are_among(column: pd.Series, libraries: Collection[str]) -> bool:
    if not libraries or pd.api.types.is_float_dtype(column) or pd.api.types.is_bool_dtype(column):
        return False
    values = set(map(str, column.dropna().unique()))
    return bool(values) and values <= set(libraries)


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def _texts(column: pd.Series) -> pd.Series:
    """Returns cells as text, empty where one is missing; whole numbers have no fraction."""
    if pd.api.types.is_float_dtype(column) and (column.dropna() % 1 == 0).all():
        column = column.astype("Int64")
    return column.astype(object).where(column.notna(), "").astype(str)
