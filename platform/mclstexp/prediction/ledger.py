"""What became of each slide of a cohort: one small object per slide.

An entry names everything that the answer depends on (its key), so that a run that is started again does what is left
or has changed, and nothing else. Before a run replaces a slide's files it claims the entry, and afterwards it exchanges
its claim for the answer. If a run with other settings claimed the slide in between, the exchange fails and the run
publishes again, so that an answer always belongs to its files. The price is one request per slide that has an entry at
the start of a run, and three per slide at its end.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from mclstexp import storage
from mclstexp.errors import ConflictError, PredictError

FOLDER, OWNER, SUMMARY = "ledger", "prediction.json", "summary.csv"
PREDICTED = ("done", "empty")
State = Literal["done", "empty", "quarantined", "failed", "publishing"]
"""`empty`: no tissue, so nothing to predict. `quarantined`: the slide cannot be read or may not be predicted. `failed`:
a fault that may pass. `publishing`: a claim by a run that is replacing the files, or died while it did."""
_THREADS = 32
_TRIES = 5


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Entry(_Record):
    """What became of one slide."""

    slide_id: str
    key: str
    """Digest of everything that the answer depends on; without an answer, of what the attempt depended on."""
    state: State
    fingerprint: str = ""
    """The image's, as `plan.fingerprint` returns it; empty in claims, and if the image could not be read."""
    reason: str = ""
    num_tiles: int = 0
    missing_tiles: int = 0
    """Tiles without pixels."""
    left_out_positions: int = 0
    """Given positions whose tile would extend beyond the image."""
    tile_area_mm2: float = 0.0
    tissue_area_mm2: float = 0.0
    finished: str = ""
    """When, ISO 8601 in UTC. The predictions themselves hold no time."""

    @model_validator(mode="before")
    @classmethod
    def _without_genes(cls, fields: Any) -> Any:
        """Drops `genes`, which older entries have: the genes of pictures, now recorded beside the pictures."""
        return (
            {name: value for name, value in fields.items() if name != "genes"} if isinstance(fields, dict) else fields
        )


@dataclass(frozen=True)
class Stored:
    """A slide's entry as it was read."""

    entry: Entry | None
    """None: it had none."""
    version: str | None
    """Of `storage.version`; None without an entry."""


class Owner(_Record):
    """Whose predictions a folder holds."""

    model_digest: str
    settings: dict[str, object]
    """How slides are cut, beyond what the model fixes."""


def owner(out: str) -> Owner | None:
    """Returns whose predictions a folder holds; None if it holds none.

    Raises:
        PredictError: its record cannot be read.
    """
    uri = storage.join(out, OWNER)
    try:
        return Owner.model_validate_json(storage.read(uri))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise PredictError(f"{uri} was written by another version or by hand: {error}; give another --out") from None


def claim_output(out: str, new: Owner) -> None:
    """Reserves an output for one model and one way of cutting slides.

    Raises:
        PredictError: it holds predictions by another model or under other settings; names both.
    """
    with suppress(ConflictError):  # it is claimed already
        storage.publish(storage.join(out, OWNER), new.model_dump_json(indent=1).encode(), previous=None)
    existing = owner(out)
    if existing is not None and existing != new:
        found, wanted = _in_words(existing), _in_words(new)
        raise PredictError(f"{out} holds predictions by {found}, this run uses {wanted}; give another --out")


def slides(out: str) -> list[str]:
    """Returns the slides that have an entry, sorted."""
    names = [uri.rpartition("/")[2] for uri in storage.list_files(storage.join(out, FOLDER))]
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json") and name[0] != ".")


def entries(out: str, slide_ids: Iterable[str]) -> dict[str, Entry]:
    """Returns the entries of slides that have one, by slide: only those of a listing are read.

    Raises:
        PredictError: an entry cannot be read.
    """
    existing = set(slides(out))
    names = [name for name in slide_ids if name in existing]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: entry(out, name), names)
        return {each.slide_id: each for each in found if each is not None}


def entry(out: str, slide_id: str) -> Entry | None:
    """Returns a slide's entry; None if it has none.

    Raises:
        PredictError: it cannot be read.
    """
    return stored(out, slide_id).entry


def stored(out: str, slide_id: str) -> Stored:
    """Returns a slide's entry and its version, from one request.

    Raises:
        PredictError: it cannot be read.
    """
    try:
        data, version = storage.read_with_version(_uri(out, slide_id))
        return Stored(Entry.model_validate_json(data), version)
    except FileNotFoundError:
        return Stored(None, None)
    except ValidationError as error:
        raise PredictError(f"{_uri(out, slide_id)} is not a ledger entry of this version: {error}; remove it") from None


def claim_slide(out: str, new: Entry, over: Stored) -> str:
    """States that a slide's files are about to be replaced; runs that make the same claim share it.

    Args:
        out: root of the predictions.
        new: the claim; it names neither the run nor the time.
        over: the entry that it replaces, as it was read.

    Returns:
        The claim's version, for `commit`.

    Raises:
        ConflictError: another run has written the entry in between.
    """
    if over.entry == new:  # some stores give equal bytes another version
        return str(over.version)
    try:
        return storage.publish(_uri(out, new.slide_id), _bytes(new), over.version)
    except ConflictError:
        existing = stored(out, new.slide_id)
        if existing.entry != new:
            raise
        return str(existing.version)


def commit(out: str, new: Entry, claimed: str) -> None:
    """Exchanges a claim for the answer.

    Raises:
        ConflictError: another run has written the entry in between, so that the files may be its own.
    """
    storage.publish(_uri(out, new.slide_id), _bytes(new), claimed)


def set_aside(out: str, new: Entry, also_predictions: bool = False) -> Entry:
    """Writes that a slide is quarantined or has failed, and returns the entry that it then has.

    A prediction of the same image stays. So does any prediction if the slide failed, because the image may be the same.

    Args:
        out: root of the predictions.
        new: the entry.
        also_predictions: whether to replace predictions too, because this run may have written among their files.

    Raises:
        ConflictError: other runs keep writing this slide's entry.
    """
    for tries_left in reversed(range(_TRIES)):
        existing = stored(out, new.slide_id)
        if existing.entry is not None and not also_predictions and _outlives(existing.entry, new):
            return existing.entry
        try:
            storage.publish(_uri(out, new.slide_id), _bytes(new), existing.version)
            return new
        except ConflictError:
            if not tries_left:
                raise
    raise AssertionError("the last try returns or raises")


def summarise(out: str, found: Mapping[str, Entry], facts: Mapping[str, float | None] = {}) -> str:
    """Writes a table with one row per slide, whatever became of it, and returns its URI.

    Args:
        out: root of the predictions.
        found: the entries by slide.
        facts: what the model states of each slide that it predicted, a column each; None is an empty cell.
    """
    uri = storage.join(out, SUMMARY)
    rows = [entry.model_dump() | (dict(facts) if entry.state == "done" else {}) for _, entry in sorted(found.items())]
    columns = [*Entry.model_fields, *facts]
    storage.write(uri, pd.DataFrame(rows, columns=columns).to_csv(index=False).encode())
    return uri


def _outlives(existing: Entry, fault: Entry) -> bool:
    same_image = fault.state == "failed" or existing.fingerprint in ("", fault.fingerprint)
    return existing.state in PREDICTED and same_image


def _uri(out: str, slide_id: str) -> str:
    return storage.join(out, FOLDER, f"{slide_id}.json")


def _bytes(written: Entry) -> bytes:
    return written.model_dump_json(indent=1).encode()


def _in_words(of: Owner) -> str:
    settings = ", ".join(f"{name}={value}" for name, value in of.settings.items())
    return f"the model {of.model_digest} with {settings}"
