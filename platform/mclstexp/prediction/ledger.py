"""What became of each slide of a cohort: one small object a slide.

An entry names everything that the answer depends on (its key), so that a run that is started again does what is left
or changed and nothing else. Before a run replaces a slide's files it claims the entry, and afterwards it exchanges its
claim for the answer: where another run with other settings claimed the slide meanwhile, that fails and the run begins
anew, so that an answer stands beside files of its own. The price is one request a slide at the start of a run and five
more at its end.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

from mclstexp import storage
from mclstexp.errors import ConflictError, PredictError

FOLDER, OWNER, SUMMARY = "ledger", "prediction.json", "summary.csv"
DRAWING = "drawing "
_READERS = 32
_TRIES = 5
PREDICTED = ("done", "empty")
State = Literal["done", "empty", "quarantined", "failed", "publishing"]
"""`empty`: no tissue, so nothing is written. `quarantined`: the slide is at fault. `failed`: a fault that may pass.
`publishing`: a claim, by a run that is replacing its files or died at it."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Entry(_Record):
    """What became of one slide."""

    slide_id: str
    key: str
    """Of everything that the answer depends on; where there is none, of what the attempt depended on."""
    state: State
    fingerprint: str = ""
    """Of the image, as `ingest.fingerprint` gives it; empty where it could not be read, and in claims."""
    reason: str = ""
    num_tiles: int = 0
    missing_tiles: int = 0
    """Tiles that the slide has no pixels of."""
    left_out_positions: int = 0
    """Given positions whose tile would lie off the image or cross its edge."""
    tile_area_mm2: float = 0.0
    tissue_area_mm2: float = 0.0
    genes: str = ""
    """Chosen genes of its overview and GeoJSON, with commas; empty: the overview shows the panel's first. While they
    are drawn anew: `DRAWING` and the genes to come."""
    finished: str = ""
    """When, ISO 8601 in UTC. The predictions themselves hold no time."""


class Owner(_Record):
    """Whose predictions a folder holds."""

    model_digest: str
    settings: dict[str, object]
    """How slides are cut, beyond what the model fixes."""


def owner(out: str) -> Owner | None:
    """Returns whose predictions a folder holds; None where it holds none.

    Raises:
        PredictError: its record cannot be read.
    """
    place = storage.join(out, OWNER)
    try:
        return Owner.model_validate_json(storage.read(place))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise PredictError(f"{place} was written by another version or by hand: {error}; give another --out") from None


def claim(out: str, new: Owner) -> None:
    """Reserves an output for one model and one way of cutting slides.

    Raises:
        PredictError: it holds predictions by another model or under other settings; names both.
    """
    with suppress(ConflictError):  # it is claimed already
        storage.publish(storage.join(out, OWNER), new.model_dump_json(indent=1).encode(), previous=None)
    there = owner(out)
    if there is not None and there != new:
        raise PredictError(f"{out} holds predictions by {_words(there)}, asked for {_words(new)}; give another --out")


def entries(out: str, slide_ids: Iterable[str]) -> dict[str, Entry]:
    """Returns the entries that slides have, by slide.

    Raises:
        PredictError: an entry cannot be read.
    """
    names = list(slide_ids)
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda name: entry(out, name), names)
        return {there.slide_id: there for there in found if there is not None}


def entry(out: str, slide_id: str) -> Entry | None:
    """Returns a slide's entry; None where it has none.

    Raises:
        PredictError: it cannot be read.
    """
    try:
        return Entry.model_validate_json(storage.read(_place(out, slide_id)))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise PredictError(f"{_place(out, slide_id)} is no ledger entry of this version: {error}; remove it") from None


def claim_slide(out: str, new: Entry, over: Entry | None) -> str:
    """Says that a slide's files are about to be replaced; runs that make the same claim share it.

    Args:
        out: root of the predictions.
        new: the claim; it says nothing of the run or the time.
        over: the entry that it takes the place of, as it was read.

    Returns:
        The claim's version, for `commit`.

    Raises:
        ConflictError: another run has written the entry meanwhile.
    """
    place = _place(out, new.slide_id)
    previous = storage.version(place)
    there = entry(out, new.slide_id)
    if there == new and previous == storage.version(place):  # some stores give equal bytes another version
        return str(previous)
    if there not in (over, new):
        raise ConflictError(f"another run has written {place} meanwhile")
    return storage.publish(place, _bytes(new), previous)


def commit(out: str, new: Entry, claimed: str) -> None:
    """Writes what came of a claim.

    Raises:
        ConflictError: another run has written the entry meanwhile, so that the files may be its own.
    """
    storage.publish(_place(out, new.slide_id), _bytes(new), claimed)


def set_aside(out: str, new: Entry, also_predictions: bool = False) -> None:
    """Writes that a slide was quarantined or has failed; a prediction of the same image stays, as it does where a
    failed run cannot know the image.

    Args:
        out: root of the predictions.
        new: the entry.
        also_predictions: whether no prediction stays, since this run may have written among its files.

    Raises:
        ConflictError: other runs keep writing this slide's entry.
    """
    place = _place(out, new.slide_id)
    for tries_left in reversed(range(_TRIES)):
        previous = storage.version(place)
        there = entry(out, new.slide_id)
        if there is not None and not also_predictions and _outlives(there, new):
            return
        try:
            storage.publish(place, _bytes(new), previous)
            return
        except ConflictError:
            if not tries_left:
                raise


def _outlives(there: Entry, fault: Entry) -> bool:
    same_image = fault.state == "failed" or there.fingerprint in ("", fault.fingerprint)
    return there.state in PREDICTED and same_image


def summarise(out: str, found: Mapping[str, Entry]) -> str:
    """Writes a table with a row a slide, whatever became of it, and returns its URI."""
    place = storage.join(out, SUMMARY)
    rows = [found[name].model_dump() for name in sorted(found)]
    storage.write(place, pd.DataFrame(rows, columns=list(Entry.model_fields)).to_csv(index=False).encode())
    return place


def _place(out: str, slide_id: str) -> str:
    return storage.join(out, FOLDER, f"{slide_id}.json")


def _bytes(written: Entry) -> bytes:
    return written.model_dump_json(indent=1).encode()


def _words(whose: Owner) -> str:
    settings = ", ".join(f"{name}={value}" for name, value in whose.settings.items())
    return f"the model {whose.model_digest} with {settings}"
