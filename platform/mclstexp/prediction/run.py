"""Prediction of a cohort of slides: resumable, exactly once, and no slide stops another.

Slides stream through Ray Data part by part; a part is written to the slide's staging folder as soon as it is there, and
the slide is published when all its parts are. Whatever dies meanwhile, the same command does what is left: settled
slides are known from the ledger, written parts from the staging folder. A slide's files are replaced one by one, so
that a reader should go by the ledger, which is written last.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import ray
from ray.data import Dataset
from ray.data.exceptions import ExecutionTimeoutError

from mclstexp import storage
from mclstexp.cluster import MAX_RETRIES
from mclstexp.data.genes import choose_genes
from mclstexp.errors import ConflictError, StorageError, UserError
from mclstexp.model.version import ModelVersion
from mclstexp.prediction import ledger
from mclstexp.prediction.draw import redraw
from mclstexp.prediction.ledger import PREDICTED, Entry, Owner
from mclstexp.prediction.parts import FAILED, QUARANTINED, TILES, SlideRecord, clear_staging, remove_staging
from mclstexp.prediction.pipeline import WorkerCounts, cluster_size, facts_of, predicted_parts, stages
from mclstexp.prediction.publish import publish_slide
from mclstexp.prediction.writers.table import OutputInfo
from mclstexp.settings import PredictConfig


@dataclass(frozen=True)
class Cohort:
    """Slides to predict, and how their tiles are come by."""

    answer_keys: Mapping[str, Sequence[str]]
    """By slide: the keys of an answer that is what this run would give (see `ledger.Entry.key`)."""
    attempt_keys: Mapping[str, str]
    """By slide: the key of an attempt that would end as this run's would."""
    fingerprints: Mapping[str, str]
    """By slide: the image's, see `ledger.Entry.fingerprint`."""
    unreadable: Mapping[str, str]
    """Slides that are not there or cannot be reached, with the reason."""
    settings: Mapping[str, object]
    """How slides are cut, beyond what the model fixes."""
    tile_batches: Callable[[Sequence[str]], Dataset]
    """Makes the Dataset of the parts that slides still lack, see `predict_stage.predicted_parts`."""

    def is_answer(self, entry: Entry) -> bool:
        """Tells whether a slide was predicted as this run would."""
        return entry.state in PREDICTED and entry.key in self.answer_keys.get(entry.slide_id, ())

    def stands(self, entry: Entry, retry_quarantined: bool) -> bool:
        """Tells whether running again would not change a slide's entry."""
        same_attempt = entry.key == self.attempt_keys.get(entry.slide_id)
        return self.is_answer(entry) or (entry.state == "quarantined" and same_attempt and not retry_quarantined)


@dataclass
class Report:
    """What a run did."""

    entries: dict[str, Entry] = field(default_factory=dict)
    """All slides that were tried."""
    skipped: dict[str, Entry] = field(default_factory=dict)
    """Slides that were settled before."""
    num_tiles: int = 0
    """Tiles that were embedded in this run."""
    num_redrawn: int = 0
    """Slides that were done, before or by another run meanwhile, and now show this run's genes."""
    undrawn: dict[str, str] = field(default_factory=dict)
    """Such slides that could not be drawn with this run's genes, with the reason."""
    summary: str = ""
    """URI of a table with a row a slide."""

    def counts(self) -> Counter[str]:
        """Returns the number of slides in each state, with `skipped` for those that were settled before."""
        return Counter([entry.state for entry in self.entries.values()] + ["skipped"] * len(self.skipped))

    def faults(self) -> dict[str, str]:
        """Returns the slides without a prediction or its pictures, with the reason; those of earlier runs too."""
        found = {**self.skipped, **self.entries}
        faults = {name: entry.reason for name, entry in found.items() if entry.state in ("quarantined", "failed")}
        return dict(sorted({**faults, **self.undrawn}.items()))


Show = Callable[[Report, int], None]
"""Called with what was done so far and the number of slides to do."""


def predict_cohort(
    model: ModelVersion,
    make_cohort: Callable[[int], Cohort],
    out: str,
    genes: Sequence[str],
    show: Show,
    config: PredictConfig,
) -> Report:
    """Predicts all slides that `out` does not hold yet. Ray must be connected.

    Args:
        model: the version to predict with.
        make_cohort: gives the slides, to be read by that many actors.
        out: where predictions, ledger and staging go.
        genes: names of genes that are drawn and written as GeoJSON, for slides that are done too; none: the panel's
            first are drawn, and slides that are done stay as they are.
        show: told of progress.
        config: how slides are cut, the bank is held and how much of the cluster is used.

    Raises:
        PredictError: `out` holds predictions by another model, or cut otherwise.
        ConfigError: the panel lacks one of `genes`.
        ResourceError: the cluster is too small.
    """
    out, facts = storage.absolute(out), facts_of(model)
    choose_genes(facts.panel, genes)
    dealt = stages(*cluster_size(config))
    cohort = make_cohort(dealt.num_readers)
    storage.require_conditional_puts(out)
    ledger.claim(out, Owner(model_digest=model.digest, settings=dict(cohort.settings)))
    there = ledger.entries(out, [*cohort.attempt_keys, *cohort.unreadable])
    again = config.retry_quarantined
    report = Report(skipped={name: entry for name, entry in there.items() if cohort.stands(entry, again)})
    left = [name for name in cohort.attempt_keys if name not in report.skipped]
    total = len(left) + len(cohort.unreadable)
    work = Work(model, cohort, out, facts, tuple(genes), dealt)
    run = CohortRun(work, report, lambda: show(report, total))
    for name, reason in cohort.unreadable.items():
        run.fail(name, reason)
    run.run(left)
    for entry, fault in redraw({**report.skipped, **report.entries}, out, facts, genes):
        of_which = report.skipped if entry.slide_id in report.skipped else report.entries
        of_which[entry.slide_id] = entry
        report.num_redrawn += not fault
        report.undrawn |= {entry.slide_id: fault} if fault else {}
    found = {**report.skipped, **report.entries}
    report.summary = ledger.summarise(out, found)
    with suppress(StorageError):  # the next run clears what is left
        clear_staging(out, {name for name, entry in found.items() if entry.state != "failed"})
    return report


MAX_TRIES = 3
"""Times that a slide is tried in one run."""
MIN_PUBLISHING = 4
"""Slides that are put together at once, at least; on large clusters one for every two readers."""
_PAUSE_S = 5.0
_DIED = f"a process that worked on it died in each of {MAX_TRIES} tries"
_RECORDED = ("num_tiles", "missing_tiles", "left_out_positions", "tile_area_mm2", "tissue_area_mm2")


@dataclass(frozen=True)
class _Publishing:
    """A slide whose files are being replaced."""

    claim: Entry
    claimed: str
    """The claim's version."""
    staging: str


@dataclass(frozen=True)
class Work:
    """What a run works with."""

    model: ModelVersion
    cohort: Cohort
    out: str
    facts: OutputInfo
    genes: tuple[str, ...]
    dealt: WorkerCounts


class CohortRun:
    """One run's slides on their way: parts that are awaited, slides that are being published."""

    def __init__(self, work: Work, report: Report, show: Callable[[], None]) -> None:
        self._work, self._report, self._show = work, report, show
        self._publish = ray.remote(num_cpus=0, max_retries=MAX_RETRIES)(_publish_guarded)
        self._publishing: dict[ray.ObjectRef, _Publishing] = {}
        self._parts: Counter[str] = Counter()
        self._faults: dict[str, str] = {}
        """Why slides of the current try are not done, where something said so."""
        self._stopped = ""
        """Why the current try ended early, if it did."""
        self._unsure: set[str] = set()
        """Slides that may have files of ours which no entry of ours vouches for: claimed, and not done by us."""

    def run(self, slide_ids: Sequence[str]) -> None:
        """Tries all slides, and those that failed again."""
        left = list(slide_ids)
        for _ in range(MAX_TRIES):
            if not left:
                return
            if self._unsure:  # another run on the same slides may be as quick as this one
                time.sleep(random.uniform(0, _PAUSE_S))
            self._parts.clear()
            self._faults.clear()
            self._try(left)
            left = [name for name in left if not self._is_settled(name)]
        for name in left:
            self.fail(name, self._faults.get(name) or self._stopped or _DIED)

    def _try(self, slide_ids: Sequence[str]) -> None:
        work = self._work
        tiles = work.cohort.tile_batches(slide_ids)
        parts = predicted_parts(tiles, work.model, work.dealt)
        self._stopped = ""
        try:
            for row in parts.iter_rows():
                with self._faults_of(str(row["slide_id"])):
                    self._take(row)
                self._published(wait=len(self._publishing) >= max(MIN_PUBLISHING, work.dealt.num_readers // 2))
        except (ray.exceptions.RayError, ExecutionTimeoutError) as error:  # what is left is tried again
            self._stopped = f"the stream of tiles ended: {error}"
        while self._publishing:
            self._published(wait=True)

    def _take(self, row: dict[str, Any]) -> None:
        name = str(row["slide_id"])
        if row["state"] == QUARANTINED:
            self._set_aside(name, "quarantined", str(row["reason"]))
        elif row["state"] == FAILED:
            self._faults[name] = str(row["reason"])
        else:
            self._parts[name] += 1
            if row["state"] == TILES:
                self._report.num_tiles += int(row["num_tiles"])
            if row["state"] != TILES or self._parts[name] == int(row["num_left"]):
                self._begin_publishing(name, str(row["staging"]))
        self._show()

    def _begin_publishing(self, name: str, staging: str) -> None:
        work, there = self._work, ledger.entry(self._work.out, name)
        if self._takes(there):
            return
        genes = ",".join(work.genes)
        claim = Entry(slide_id=name, key=staging.rpartition("-")[2], state="publishing", genes=genes)
        claimed = ledger.claim_slide(work.out, claim, over=there)
        self._unsure.add(name)
        reference = self._publish.remote(staging, work.out, work.facts, work.genes)
        self._publishing[reference] = _Publishing(claim, claimed, staging)

    def _is_settled(self, name: str) -> bool:
        with self._faults_of(name):
            return name in self._report.entries or self._takes(ledger.entry(self._work.out, name))
        return False  # nobody can tell now

    def _takes(self, there: Entry | None) -> bool:
        """Takes an answer that another run on the same output was first to give, and tells whether there is one."""
        if there is None or not self._work.cohort.is_answer(there):
            return False
        if there.slide_id in self._unsure and there.state == "done" and there.genes != ",".join(self._work.genes):
            return False  # our pictures may lie where its own should
        self._report.entries[there.slide_id] = there
        return True

    def _published(self, wait: bool) -> None:
        """Settles slides whose files are there; waits for one where asked to."""
        done, _ = ray.wait(list(self._publishing), timeout=None if wait else 0) if self._publishing else ([], [])
        for reference in done:
            there = self._publishing.pop(reference)
            name = there.claim.slide_id
            try:
                record = ray.get(reference)
            except ray.exceptions.RayError as error:
                record = f"putting its files together failed: {error}"
            if isinstance(record, str):
                self._faults[name] = record
                continue
            with self._faults_of(name):
                self._commit(there, record)
                remove_staging(there.staging)

    def _commit(self, published: _Publishing, record: SlideRecord) -> None:
        name, claim = published.claim.slide_id, published.claim
        found = {field: getattr(record, field) for field in _RECORDED} | {"fingerprint": record.fingerprint}
        state = {"state": "done"} if record.num_tiles else {"state": "empty", "genes": ""}
        entry = claim.model_copy(update=found | state | {"finished": _now()})
        try:
            ledger.commit(self._work.out, entry, published.claimed)
            self._unsure.discard(name)
        except ConflictError:
            if not self._takes(ledger.entry(self._work.out, name)):
                raise ConflictError("another run was replacing its files; run the same command again") from None
        self._report.entries.setdefault(name, entry)
        self._show()

    @contextmanager
    def _faults_of(self, name: str) -> Iterator[None]:
        """Keeps a fault of the store, or a claim that was lost, to its slide, which the next try takes up."""
        try:
            yield
        except (StorageError, ConflictError) as error:
            self._faults[name] = str(error)

    def fail(self, name: str, reason: str) -> None:
        """Gives a slide up in this run."""
        try:
            self._set_aside(name, "failed", reason, also_predictions=name in self._unsure)
        except StorageError as error:  # its entry cannot be written; the summary tells of it
            self._report.entries[name] = self._fault(name, "failed", f"{reason}; {error}")

    def _set_aside(self, name: str, state: ledger.State, reason: str, also_predictions: bool = False) -> None:
        entry = self._fault(name, state, reason)
        with suppress(ConflictError):
            ledger.set_aside(self._work.out, entry, also_predictions)
        if not self._takes(ledger.entry(self._work.out, name)):
            self._report.entries[name] = entry
        self._show()

    def _fault(self, name: str, state: ledger.State, reason: str) -> Entry:
        cohort = self._work.cohort
        key, image = cohort.attempt_keys.get(name, ""), cohort.fingerprints.get(name, "")
        return Entry(slide_id=name, key=key, state=state, fingerprint=image, reason=reason, finished=_now())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _publish_guarded(staging: str, out: str, facts: OutputInfo, genes: tuple[str, ...]) -> SlideRecord | str:
    """Publishes a slide; returns a user's error as text, for raised it would be wrapped into a traceback."""
    try:
        return publish_slide(staging, out, facts, genes)
    except (UserError, FileNotFoundError) as error:
        return str(error)
