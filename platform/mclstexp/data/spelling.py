"""Accents in the names of files.

An accented letter is one character or two, which look the same: macOS, keyboards and archives differ in it. A sheet
that was written on one machine has to find files that were named on another.
"""

import os
import unicodedata
from pathlib import Path
from typing import Literal

from mclstexp import storage

_FORMS: tuple[Literal["NFC", "NFD"], ...] = ("NFC", "NFD")


def as_spelled(uri: str) -> str:
    """Returns an absolute `uri` with its accents as the file or folder has them; as given if there is none."""
    uri = storage.absolute(uri)
    if uri.isascii():
        return uri
    if storage.is_s3(uri):
        forms = dict.fromkeys([uri, *(unicodedata.normalize(form, uri) for form in _FORMS)])
        return next((form for form in forms if storage.exists(form) or storage.list_files(form)), uri)
    path = Path("/")
    for part in Path(uri).parts[1:]:
        path /= part if (path / part).exists() else _spelled_in(path, part)
    return str(path)


def _spelled_in(folder: Path, name: str) -> str:
    """Returns how a local folder spells a name."""
    found = os.listdir(folder) if folder.is_dir() else []
    same = [other for other in found if unicodedata.normalize("NFC", other) == unicodedata.normalize("NFC", name)]
    return min(same, default=name)
