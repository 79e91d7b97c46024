"""The folders in which slides wait for their publishing, and how they go.

A folder's record goes first: without it nothing that is left there counts. Where another run on the same output is at
work on another version of a slide, it may lose parts and make them again; the price of needing no lock.
"""

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

from mclstexp import storage
from mclstexp.inference.slide_record import RECORD

STAGING = "staging"
_AT_ONCE = 16


def staging_folder(out: str, slide_id: str, key: str) -> str:
    """Returns the URI of the folder that keeps a slide's unfinished prediction under a key."""
    return storage.join(out, STAGING, f"{slide_id}-{key}")


def remove_staging(uri: str) -> None:
    """Removes one folder."""
    storage.delete(storage.join(uri, RECORD))
    storage.delete_folder(uri)


def clear_staging(out: str, slide_ids: Collection[str]) -> None:
    """Removes all folders of some slides, under whatever key: of settled ones none is of use."""
    root = storage.join(out, STAGING)
    found = {uri[len(root) + 1 :].partition("/")[0] for uri in storage.list_files(root)}
    folders = [storage.join(root, name) for name in sorted(found) if name.rpartition("-")[0] in slide_ids]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(remove_staging, folders))
