"""Prediction of a cohort of slides: resumable, exactly once, and no slide stops another.

Slides stream through Ray Data part by part; a part is written to the slide's staging folder as soon as it is there, and
the slide is published when all its parts are. Whatever dies meanwhile, the same command does what is left: settled
slides are known from the ledger, written parts from the staging folder. A slide's files are replaced one by one, so
that a reader should go by the ledger, which is written last.
"""

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
from mclstexp.data.stream import MAX_RETRIES
from mclstexp.errors import ConflictError, StorageError, UserError
from mclstexp.inference import ledger
from mclstexp.inference.ledger import Entry, Owner
from mclstexp.inference.model_facts import ModelFacts, choose_genes
from mclstexp.inference.model_version import ModelVersion
from mclstexp.inference.predict_stage import Stages, cluster_size, facts_of, predicted_parts, stages
from mclstexp.inference.publish import publish_slide
from mclstexp.inference.redraw import redraw
from mclstexp.inference.slide_record import FAILED, QUARANTINED, TILES, SlideRecord
from mclstexp.inference.staging_folder import clear_staging, remove_staging
from mclstexp.settings import PredictConfig

MAX_TRIES = 3
"""Times that a slide is tried in one run."""
MIN_PUBLISHING = 4
"""Slides that are put together at once, at least; on large clusters one for every two readers."""
_DIED = f"a process that worked on it died in each of {MAX_TRIES} tries"


@dataclass(frozen=True)
class Cohort:
    """Slides to predict, and how their tiles are come by."""

    answer_keys: Mapping[str, Sequence[str]]
    """By slide: the keys of an answer that is what this run would give (see `ledger.Entry.key`)."""
    attempt_keys: Mapping[str, str]
    """By slide: the key of an attempt that would end as this run's would."""
    unreadable: Mapping[str, str]
    """Slides that are not there or cannot be reached, with the reason."""
    settings: Mapping[str, object]
    """How slides are cut, beyond what the model fixes."""
    tile_batches: Callable[[Sequence[str]], Dataset]
    """Makes the Dataset of the parts that slides still lack, see `predict_stage.predicted_parts`."""


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
    """Slides that were settled before and now show this run's genes."""
    undrawn: dict[str, str] = field(default_factory=dict)
    """Slides that were settled before and could not be drawn with this run's genes, with the reason."""
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
        config: how slides are cut and the bank is held.

    Raises:
        PredictError: `out` holds predictions by another model, or cut otherwise.
        ConfigError: the panel lacks one of `genes`.
        ResourceError: the cluster is too small.
    """
    out, facts = storage.absolute(out), facts_of(model)
    choose_genes(facts.panel, genes)
    dealt = stages(*cluster_size())
    cohort = make_cohort(dealt.num_readers)
    storage.require_conditional_puts(out)
    ledger.claim(out, Owner(model_digest=model.digest, settings=dict(cohort.settings)))
    there = ledger.entries(out, [*cohort.attempt_keys, *cohort.unreadable])
    again = config.retry_quarantined
    report = Report(skipped={name: entry for name, entry in there.items() if _stands(entry, cohort, again)})
    left = [name for name in cohort.attempt_keys if name not in report.skipped]
    total = len(left) + len(cohort.unreadable)
    run = _Run(
        _Work(model, cohort, out, facts, tuple(genes), dealt, config.bank_shards), report, lambda: show(report, total)
    )
    for name, reason in cohort.unreadable.items():
        run.fail(name, reason)
    run.run(left)
    for entry, fault in redraw(report.skipped, out, facts, genes):
        report.skipped[entry.slide_id] = entry
        report.num_redrawn += not fault
        report.undrawn |= {entry.slide_id: fault} if fault else {}
    found = {**report.skipped, **report.entries}
    report.summary = ledger.summarise(out, found)
    with suppress(StorageError):  # the next run clears what is left
        clear_staging(out, {name for name, entry in found.items() if entry.state != "failed"})
    return report


def _stands(entry: Entry, cohort: Cohort, retry_quarantined: bool) -> bool:
    """Tells whether running again would not change a slide's entry."""
    same_attempt = entry.key == cohort.attempt_keys.get(entry.slide_id)
    return _answers(entry, cohort) or (entry.state == "quarantined" and same_attempt and not retry_quarantined)


def _answers(entry: Entry, cohort: Cohort) -> bool:
    """Tells whether a slide was predicted as this run would."""
    return entry.state in ledger.PREDICTED and entry.key in cohort.answer_keys.get(entry.slide_id, ())


def _entry(
    slide_id: str, key: str, state: ledger.State, reason: str, record: SlideRecord | None, genes: Sequence[str]
) -> Entry:
    names = ("num_tiles", "missing_tiles", "left_out_positions", "tile_area_mm2", "tissue_area_mm2")
    found = {name: getattr(record, name) for name in names} if record else {}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    drawn = ",".join(genes) if state == "done" else ""
    return Entry(slide_id=slide_id, key=key, state=state, reason=reason, genes=drawn, finished=now, **found)


@dataclass(frozen=True)
class _Work:
    """What a run works with."""

    model: ModelVersion
    cohort: Cohort
    out: str
    facts: ModelFacts
    genes: tuple[str, ...]
    dealt: Stages
    bank_shards: int


class _Run:
    """One run's slides on their way: parts that are awaited, slides that are being published."""

    def __init__(self, work: _Work, report: Report, show: Callable[[], None]) -> None:
        self._work, self._report, self._show = work, report, show
        self._publish = ray.remote(num_cpus=0, max_retries=MAX_RETRIES)(_publish_guarded)
        self._publishing: dict[ray.ObjectRef, tuple[str, str]] = {}
        self._parts: Counter[str] = Counter()
        self._faults: dict[str, str] = {}
        """Why slides of the current try are not done, where something said so."""
        self._stopped = ""
        """Why the current try ended early, if it did."""

    def run(self, slide_ids: Sequence[str]) -> None:
        """Tries all slides, and those that failed again."""
        left = list(slide_ids)
        for _ in range(MAX_TRIES):
            if not left:
                return
            self._parts.clear()
            self._faults.clear()
            self._try(left)
            left = [name for name in left if not self._is_settled(name)]
        for name in left:
            self.fail(name, self._faults.get(name) or self._stopped or _DIED)

    def _try(self, slide_ids: Sequence[str]) -> None:
        work = self._work
        tiles = work.cohort.tile_batches(slide_ids)
        parts = predicted_parts(tiles, work.model, work.dealt, work.bank_shards)
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
            self.settle(name, "quarantined", str(row["reason"]))
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
        if there is not None:
            ledger.forget(work.out, name)  # its files are about to be replaced
        self._publishing[self._publish.remote(staging, work.out, work.facts, work.genes)] = (name, staging)

    def _is_settled(self, name: str) -> bool:
        with self._faults_of(name):
            return name in self._report.entries or self._takes(ledger.entry(self._work.out, name))
        return False  # nobody can tell now

    def _takes(self, there: Entry | None) -> bool:
        """Takes an answer that another run on the same output was first to give, and tells whether there is one."""
        if there is None or not _answers(there, self._work.cohort):
            return False
        self._report.entries[there.slide_id] = there
        return True

    def _published(self, wait: bool) -> None:
        """Settles slides whose files are there; waits for one where asked to."""
        done, _ = ray.wait(list(self._publishing), timeout=None if wait else 0) if self._publishing else ([], [])
        for reference in done:
            name, staging = self._publishing.pop(reference)
            try:
                record = ray.get(reference)
            except ray.exceptions.RayError as error:
                record = f"putting its files together failed: {error}"
            if isinstance(record, str):
                self._faults[name] = record
                continue
            key = staging.rpartition("-")[2]
            with self._faults_of(name):
                self.settle(name, "done" if record.num_tiles else "empty", key=key, record=record)
                remove_staging(staging)

    @contextmanager
    def _faults_of(self, name: str) -> Iterator[None]:
        """Keeps a fault of the store to the slide that it struck, which the next try takes up."""
        try:
            yield
        except StorageError as error:
            self._faults[name] = str(error)

    def fail(self, name: str, reason: str) -> None:
        """Gives a slide up in this run."""
        try:
            self.settle(name, "failed", reason)
        except StorageError as error:  # its entry cannot be written; the summary tells of it
            self._report.entries[name] = _entry(name, "", "failed", f"{reason}; {error}", None, ())

    def settle(
        self, name: str, state: ledger.State, reason: str = "", key: str = "", record: SlideRecord | None = None
    ) -> None:
        """Writes what became of a slide, unless another run on the same output has predicted it."""
        key = key or self._work.cohort.attempt_keys.get(name, "")
        entry = _entry(name, key, state, reason, record, self._work.genes)
        with suppress(ConflictError):
            ledger.record(self._work.out, entry)
        there = entry if state in ledger.PREDICTED else ledger.entry(self._work.out, name)
        self._report.entries[name] = there if there is not None and _answers(there, self._work.cohort) else entry
        self._show()


def _publish_guarded(staging: str, out: str, facts: ModelFacts, genes: tuple[str, ...]) -> SlideRecord | str:
    """Publishes a slide; returns a user's error as text, for raised it would be wrapped into a traceback."""
    try:
        return publish_slide(staging, out, facts, genes)
    except (UserError, FileNotFoundError) as error:
        return str(error)
