"""Which spots of an AnnData file are the section's: files of several sections (libraries) are chosen from, never mixed.

Sections of several slides share one array and one range of pixels, so that mixing them would cut tiles of one section
for spots of another.
"""

from collections.abc import Collection, Mapping

import numpy as np
import pandas as pd

from mclstexp.errors import SourceError
from mclstexp.messages import did_you_mean, some_of

ARRAY_COLUMNS = ("array_row", "array_col")
_LIBRARY = "library_id"
_SECTION_COLUMNS = (
    *("library", "sample_id", "sample", "sample_name", "section_id", "section", "section_name"),
    *("slide_id", "slide", "slice", "slice_id", "orig.ident", "batch"),
)
"""Columns of `obs`, in any case, that name sections in files where nothing else does."""
_MAX_REPEATED = 0.1  # share of spots of one section that may have another's array position, for example by rounding


def choose_spots(obs: pd.DataFrame, libraries: Collection[str], wanted: str | None) -> np.ndarray:
    """Returns which spots are the section's, bool (n,).

    Args:
        obs: table of the n spots.
        libraries: names in `uns["spatial"]`.
        wanted: the section's name in a column of `obs` or in `uns["spatial"]`; None: the file has one section.

    Raises:
        SourceError: the file has several sections and `wanted` is None or not among them, or nothing tells them apart;
            names column and sections.
    """
    names = _names(obs, libraries)
    chosen = np.full(len(obs), True)
    if wanted is None:
        _require_one_section(names, libraries, obs)
    elif (named := _named(names, libraries, wanted)) is not None:
        chosen = named
    if _repeats(obs[chosen]):
        raise SourceError(
            f"the array positions of its {int(chosen.sum())} spots repeat, so they are of several sections, and no "
            f"column of obs ({_LIBRARY}, {some_of(_SECTION_COLUMNS)}) tells these apart: write one file per section"
        )
    return chosen


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
        is_certain = name.lower() == _LIBRARY or set(sections) <= set(libraries)
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


def _named(names: Mapping[str, pd.Series], libraries: Collection[str], wanted: str) -> np.ndarray | None:
    """Returns the spots of a section; None if the file has one section, which is known by this name."""
    found = next((texts for texts in names.values() if (texts == wanted).any()), None)
    if found is not None:
        return (found == wanted).to_numpy()
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
    return bool(_array_positions(obs).duplicated().mean() > _MAX_REPEATED)


def _array_positions(obs: pd.DataFrame) -> pd.DataFrame:
    return obs[[*ARRAY_COLUMNS]].dropna() if set(ARRAY_COLUMNS) <= set(obs) else obs.iloc[:0]


def _names(obs: pd.DataFrame, libraries: Collection[str]) -> dict[str, pd.Series]:
    """Returns the columns that may name a spot's section, as text, the most certain first.

    These are `library_id`, columns whose values are all among the libraries, and those with a usual name.
    """
    usual = {str(name).lower(): name for name in obs}
    of_libraries = [name for name in obs if _are_among(obs[name], libraries)]
    order = [usual.get(_LIBRARY), *of_libraries, *(usual.get(name) for name in _SECTION_COLUMNS)]
    return {str(name): _texts(obs[name]) for name in order if name is not None}


def _are_among(column: pd.Series, libraries: Collection[str]) -> bool:
    if not libraries or pd.api.types.is_float_dtype(column) or pd.api.types.is_bool_dtype(column):
        return False
    values = set(map(str, column.dropna().unique()))
    return bool(values) and values <= set(libraries)


def _texts(column: pd.Series) -> pd.Series:
    """Returns cells as text, empty where one is missing; whole numbers have no fraction."""
    if pd.api.types.is_float_dtype(column) and (column.dropna() % 1 == 0).all():
        column = column.astype("Int64")
    return column.astype(object).where(column.notna(), "").astype(str)
