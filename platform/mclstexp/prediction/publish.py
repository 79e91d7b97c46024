"""The task behind the pipeline: from staging folders with all parts to published files and answers.

All files are made on local scratch, then uploaded whole, the table last. None holds a time or a run's name, so however
often publishing is interrupted and repeated, the bytes are the same; the price is scratch space for the slide's files.
A slide may be finished twice (if a process dies): the second time shares the claim of the first, or adopts its answer.
A slide mostly waits for the store, so a task finishes several at once, and does for one at once what has no order. It
needs neither weights nor torch.
"""

import tempfile
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from mclstexp import storage
from mclstexp.cluster import guarded
from mclstexp.errors import ConflictError, UserError
from mclstexp.prediction import ledger
from mclstexp.prediction.ledger import PREDICTED, Entry
from mclstexp.prediction.parts import SlideRecord, key_of_staging, read_record, read_thumbnail, remove_staging
from mclstexp.prediction.writers import WRITERS
from mclstexp.prediction.writers.slide import OutputInfo, PredictedSlide

PICTURE_RECORD = "overviews/{slide_id}.json"
OVERVIEW = "overviews/{slide_id}.png"
GEOJSON = "geojson/{slide_id}.geojson"
PICTURES = (PICTURE_RECORD, OVERVIEW, GEOJSON)
"""What `draw` makes of a published table: its record, which is removed first and written last, and the pictures."""
_NO_PICTURE = np.zeros((0, 0, 3), np.uint8)
_THREADS = 4
_RECORDED = ("fingerprint", "num_tiles", "missing_tiles", "left_out_positions", "tile_area_mm2", "tissue_area_mm2")


@dataclass(frozen=True)
class Staged:
    """A slide whose parts are all written."""

    slide_id: str
    staging: str
    """URI of its staging folder."""
    num_parts: int
    answer_keys: tuple[str, ...]
    """Keys of an answer that equals this run's."""


@dataclass(frozen=True)
class Outcome:
    """How the finishing of a slide ended."""

    slide_id: str
    entry: Entry | None = None
    """The slide's answer, this run's or another's; None after a fault."""
    fault: str = ""
    has_claimed: bool = False
    """Whether the fault came after the claim, so that some of the slide's files may be replaced."""


@dataclass(frozen=True)
class _Claim:
    entry: Entry
    version: str


def finish_slides(slides: Sequence[Staged], out: str, info: OutputInfo) -> list[Outcome]:
    """Finishes slides at once, each as `finish_slide`; a fault of one comes after the others have ended."""
    with ThreadPoolExecutor(len(slides)) as pool:
        return list(
            pool.map(lambda each: finish_slide(each.slide_id, each.staging, out, info, each.answer_keys), slides)
        )


def finish_slide(slide_id: str, staging: str, out: str, info: OutputInfo, answer_keys: Collection[str]) -> Outcome:
    """Adopts the answer that a slide has, or claims the slide, publishes its files, commits the answer, clears staging.

    Args:
        slide_id: the slide.
        staging: URI of its staging folder, with all parts.
        out: root of the predictions.
        info: the model that made the parts.
        answer_keys: keys of an answer that equals this run's.
    """
    claim = guarded(_adopt_or_claim, slide_id, staging, out, answer_keys)
    if isinstance(claim, UserError):
        return Outcome(slide_id, fault=str(claim))
    if isinstance(claim, Entry):
        return Outcome(slide_id, claim)
    entry = guarded(_publish_and_commit, claim, staging, out, info, answer_keys)
    if isinstance(entry, UserError):
        return Outcome(slide_id, fault=str(entry), has_claimed=True)
    guarded(remove_staging, staging)  # what stays after a fault is removed at the end of this run or the next
    return Outcome(slide_id, entry)


def publish_slide(staging: str, out: str, info: OutputInfo) -> SlideRecord:
    """Publishes a slide whose parts are all written; leaves staging folder and ledger to the caller.

    Makes the files of `WRITERS`, then removes the slide's pictures, which show an earlier table, and uploads the files
    below `out`, the table last. Without tissue a slide keeps only the files that need none.

    Args:
        staging: URI of the slide's staging folder.
        out: root of the predictions.
        info: the model that made the parts.

    Returns:
        The slide's record, with the number of tiles without pixels.

    Raises:
        PartError: a part is missing, or was damaged and is removed: it has to be made again, then published.
        FileNotFoundError: another file of the staging folder is missing.
        StorageError: another file of it is damaged, or something cannot be read or written.
    """
    with tempfile.TemporaryDirectory(prefix="mclstexp-") as scratch, ThreadPoolExecutor(_THREADS) as pool:
        picture = pool.submit(read_thumbnail, staging)
        record = read_record(staging)
        thumbnail = picture.result() if record.num_tiles else _NO_PICTURE
        files = {writer: Path(scratch, f"file{index}") for index, writer in enumerate(WRITERS)}
        slide = PredictedSlide(staging, files[WRITERS[0]], info, thumbnail, record)
        made = {writer: path for writer, path in files.items() if record.num_tiles or writer.without_tissue}
        for writer, path in made.items():
            writer.write(path, slide)

        uris = {writer: storage.join(out, writer.path.format(slide_id=record.slide_id)) for writer in WRITERS}
        pictures = [storage.join(out, path.format(slide_id=record.slide_id)) for path in PICTURES]
        storage.delete(pictures[0])  # their record, so that it never describes pictures that are gone
        under_way = [pool.submit(storage.delete, uri) for uri in pictures[1:]]
        under_way += [pool.submit(_replace, uris[writer], made.get(writer)) for writer in WRITERS[1:]]
        for each in under_way:
            each.result()
        _replace(uris[WRITERS[0]], made.get(WRITERS[0]))
        return slide.record if record.num_tiles else record


def _replace(uri: str, file: Path | None) -> None:
    """Uploads a file, or removes that of an earlier image."""
    if file is None:
        storage.delete(uri)
    else:
        storage.upload(file, uri)


def now() -> str:
    """Returns the time for an entry of the ledger."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _adopt_or_claim(slide_id: str, staging: str, out: str, answer_keys: Collection[str]) -> Entry | _Claim:
    existing = ledger.stored(out, slide_id)
    if existing.entry is not None and _is_answer(existing.entry, answer_keys):
        return existing.entry
    claim = Entry(slide_id=slide_id, key=key_of_staging(staging), state="publishing")
    return _Claim(claim, ledger.claim_slide(out, claim, over=existing))


def _publish_and_commit(claim: _Claim, staging: str, out: str, info: OutputInfo, answer_keys: Collection[str]) -> Entry:
    record = publish_slide(staging, out, info)
    found = {field: getattr(record, field) for field in _RECORDED}
    state = "done" if record.num_tiles else "empty"
    entry = claim.entry.model_copy(update=found | {"state": state, "finished": now()})
    try:
        ledger.commit(out, entry, claim.version)
        return entry
    except ConflictError:
        existing = ledger.entry(out, entry.slide_id)
        if existing is None or not _is_answer(existing, answer_keys):
            raise ConflictError("another run was replacing its files; run the same command again") from None
        return existing


def _is_answer(entry: Entry, answer_keys: Collection[str]) -> bool:
    return entry.state in PREDICTED and entry.key in answer_keys
