"""What a section was made from, as a digest: the sheet's row and its files' content.

Content decides, not paths or dates, so that a cohort may move or be generated anew without being prepared again.
Object storage gives the content's tag for nothing; local files are hashed once and remembered by size and time of
change in `sources.json` beside the table, a cache that may be lost or stale without harm to what is read.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from ingest.readers import source_files
from ingest.sheet import SectionRow
from mclstexp import storage
from mclstexp.errors import SourceError

CACHE = "sources.json"
_PARALLEL = 16
_DIGITS = 16
Known = dict[str, tuple[int, int, str]]
"""Local path to size in bytes, time of change in ns, and content hash."""


def source_digests(rows: Iterable[SectionRow], known: Known) -> tuple[dict[str, str], Known]:
    """Returns each section's source digest by section id, and what is now known of local files.

    Raises:
        SourceError: a file is gone, or a Visium folder lacks one.
    """
    rows = list(rows)
    with ThreadPoolExecutor(_PARALLEL) as pool:
        files = dict(zip((row.section_id for row in rows), pool.map(source_files, rows), strict=True))
        uris = sorted({uri for parts in files.values() for uri in parts.values()})
        found = dict(zip(uris, pool.map(lambda uri: _stamp(uri, known.get(uri)), uris), strict=True))
    digests = {
        row.section_id: _row_digest(row, {part: found[uri][2] for part, uri in files[row.section_id].items()})
        for row in rows
    }
    return digests, {uri: stamp for uri, stamp in found.items() if not storage.is_s3(uri)}


def load_known(root: str) -> Known:
    """Returns what the last run left about local files; nothing where there is no such record."""
    try:
        tree = json.loads(storage.read(storage.join(root, CACHE)))
        return {uri: (int(size), int(changed), str(digest)) for uri, (size, changed, digest) in tree.items()}
    except (FileNotFoundError, ValueError, AttributeError, TypeError):
        return {}


def save_known(root: str, known: Known) -> None:
    """Leaves a record of local files for the next run."""
    storage.write(storage.join(root, CACHE), json.dumps(known, indent=1, sort_keys=True).encode())


def _stamp(uri: str, known: tuple[int, int, str] | None) -> tuple[int, int, str]:
    try:
        size, changed = (0, 0) if storage.is_s3(uri) else _size_and_time(uri)
    except FileNotFoundError:
        raise SourceError(f"there is no file {uri}") from None
    if known and known[:2] == (size, changed) and not storage.is_s3(uri):
        return known
    version = storage.version(uri)
    if version is None:
        raise SourceError(f"there is no file {uri}")
    return size, changed, version


def _size_and_time(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _row_digest(row: SectionRow, versions: dict[str, str]) -> str:
    facts = row.model_dump(exclude={*row.files}) | versions
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:_DIGITS]
