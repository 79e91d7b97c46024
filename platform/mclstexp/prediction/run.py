"""Prediction of a cohort of slides: resumable, exactly once, and no slide stops another.

Parts stream through Ray Data (`pipeline`), each written to its slide's staging folder as soon as it is answered. When
all parts of a slide are written, a task publishes it (`finishing`). Whatever dies, the same command does
what is left: the ledger knows settled slides, the staging folders know written parts. A slide's files are replaced one
by one, so a reader should go by the ledger, which is written last.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray.data.exceptions import ExecutionTimeoutError

from mclstexp import storage
from mclstexp.cluster import guarded
from mclstexp.errors import ConflictError, StorageError, UserError
from mclstexp.model.version import ModelVersion
from mclstexp.prediction import ledger
from mclstexp.prediction.cohort import Cohort
from mclstexp.prediction.finishing import Finishing
from mclstexp.prediction.ledger import Entry, Owner
from mclstexp.prediction.parts import clear_staging
from mclstexp.prediction.pipeline import (
    FAILED,
    QUARANTINED,
    TILES,
    WorkerCounts,
    cluster_size,
    pipeline,
    worker_counts,
)
from mclstexp.prediction.publish import Outcome, Staged, now
from mclstexp.prediction.writers.slide import OutputInfo
from mclstexp.progress import Show
from mclstexp.settings import PredictConfig

MAX_TRIES = 3
"""Times that a slide is tried in one run."""
MIN_FINISHING = 4
"""Finishing tasks at once, at least; on large clusters one for every two readers."""
_THREADS = 32
_MAX_PAUSE_S = 5.0
_DIED = f"a process that worked on it died in each of {MAX_TRIES} tries"


@dataclass
class Report:
    """What a run did."""

    entries: dict[str, Entry] = field(default_factory=dict)
    """All slides that were tried."""
    skipped: dict[str, Entry] = field(default_factory=dict)
    """Slides that were settled before."""
    num_tiles: int = 0
    """Tiles embedded in this run."""
    summary: str = ""
    """URI of a table with one row per slide."""

    def slides(self) -> dict[str, Entry]:
        """Returns the entries of all slides of the run."""
        return {**self.skipped, **self.entries}

    def done(self) -> list[str]:
        """Returns the slides that have a table."""
        return sorted(name for name, entry in self.slides().items() if entry.state == "done")

    def counts(self) -> Counter[str]:
        """Returns the number of slides in each state, with `skipped` for those that were settled before."""
        return Counter([entry.state for entry in self.entries.values()] + ["skipped"] * len(self.skipped))

    def faults(self) -> dict[str, str]:
        """Returns the slides without a prediction, with the reason; those of earlier runs too."""
        faulty = (entry for entry in self.slides().values() if entry.state in ("quarantined", "failed"))
        return dict(sorted((entry.slide_id, entry.reason) for entry in faulty))


@dataclass(frozen=True)
class RunContext:
    """What all slides of a run share."""

    model: ModelVersion
    cohort: Cohort
    out: str
    """Root of the predictions, an absolute URI."""
    info: ray.ObjectRef
    """The `OutputInfo` that all finishing tasks get, in the object store once."""
    workers: WorkerCounts


def predict_cohort(model: ModelVersion, cohort: Cohort, out: str, show: Show, config: PredictConfig) -> Report:
    """Predicts all slides that `out` does not hold yet. Ray must be connected.

    Args:
        model: the version to predict with.
        cohort: the slides.
        out: where predictions, ledger and staging go.
        show: receives the number of slides that were tried.
        config: how much of the cluster is used, and whether quarantined slides are tried again.

    Raises:
        PredictError: `out` holds predictions by another model, or cut otherwise.
        ResourceError: the cluster is too small.
    """
    out = storage.absolute(out)
    workers = worker_counts(*cluster_size(config))
    storage.require_conditional_puts(out)
    ledger.claim_output(out, Owner(model_digest=model.digest, settings=cohort.settings))
    existing = ledger.entries(out, [source.slide_id for source in cohort.sources])
    again = config.retry_quarantined
    report = Report(skipped={name: entry for name, entry in existing.items() if cohort.is_settled(entry, again)})
    left = [name for name in cohort.fingerprints if name not in report.skipped]
    total = len(left) + len(cohort.unreachable)
    context = RunContext(model, cohort, out, ray.put(OutputInfo.of_model(model, config.intervals)), workers)
    run = CohortRun(
        context, report, lambda: show("predict slides", len(report.entries), total, f"{report.num_tiles:,} tiles")
    )
    run.fail(cohort.unreachable)
    run.run(left)
    facts = model.programs.level.errors() if model.programs else {}
    report.summary = ledger.summarise(out, report.slides(), facts)
    with suppress(StorageError):  # the next run clears what is left
        clear_staging(out, {name for name, entry in report.slides().items() if entry.state != "failed"})
    return report


class CohortRun:
    """The slides of one run: counts the parts that are written, and finishes each slide that has all of them."""

    def __init__(self, context: RunContext, report: Report, show: Callable[[], None]) -> None:
        self._context, self._report, self._show = context, report, show
        self._finishing = Finishing(context.out, context.info, max(MIN_FINISHING, context.workers.num_readers // 2))
        self._num_written: Counter[str] = Counter()
        """Parts that are written in the current try."""
        self._faults: dict[str, str] = {}
        """Why slides of the current try are not done, if something reported it."""
        self._stopped = ""
        """Why the current try ended early, if it did."""
        self._unsure: set[str] = set()
        """Slides this run claimed but did not finish; their files may exist without a ledger entry."""

    def run(self, slide_ids: Sequence[str]) -> None:
        """Tries all slides, then those that failed again."""
        left = list(slide_ids)
        for _ in range(MAX_TRIES):
            if not left:
                return
            if self._unsure:  # another run on the same slides may be as quick as this one
                time.sleep(random.uniform(0, _MAX_PAUSE_S))
            self._num_written.clear()
            self._faults.clear()
            self._try(left)
            left = self._not_settled(left)
        self.fail({name: self._faults.get(name) or self._stopped or _DIED for name in left})

    def fail(self, reasons: Mapping[str, str]) -> None:
        """Gives slides up in this run."""
        with ThreadPoolExecutor(_THREADS) as pool:
            for entry in pool.map(self._failed, reasons, reasons.values()):
                self._report.entries[entry.slide_id] = entry
                self._show()

    def _failed(self, name: str, reason: str) -> Entry:
        try:
            return self._set_aside(name, "failed", reason, also_predictions=name in self._unsure)
        except UserError as error:  # its entry cannot be read or written; the summary has it
            return self._fault_entry(name, "failed", f"{reason}; {error}")

    def _try(self, slide_ids: Sequence[str]) -> None:
        cohort, workers = self._context.cohort, self._context.workers
        sources = [cohort.source(name) for name in slide_ids]
        self._stopped = ""
        try:
            for row in pipeline(sources, cohort.plan, self._context.model, workers).iter_rows():
                self._take(row)
                self._collect(wait=self._finishing.is_full)
        except (ray.exceptions.RayError, ExecutionTimeoutError) as error:  # what is left is tried again
            self._stopped = f"the stream of tiles ended: {error}"
        while not self._finishing.is_idle:
            self._collect(wait=True)

    def _take(self, row: dict[str, Any]) -> None:
        """Takes in one row of the pipeline."""
        name, state = str(row["slide_id"]), row["state"]
        if state == QUARANTINED:
            with self._keeping_faults(name):
                self._report.entries[name] = self._set_aside(name, "quarantined", str(row["reason"]))
        elif state == FAILED:
            self._faults[name] = str(row["reason"])
        else:
            self._num_written[name] += 1
            if state == TILES:
                self._report.num_tiles += int(row["num_tiles"])
            if state != TILES or self._num_written[name] == int(row["num_left"]):
                keys = self._context.cohort.answer_keys(name)
                self._finishing.add(Staged(name, str(row["staging"]), int(row["num_parts"]), keys))
        self._show()

    def _collect(self, wait: bool) -> None:
        """Collects the outcomes of finishing tasks that ended; waits for one if `wait`."""
        for outcome in self._finishing.collect(wait):
            self._settle(outcome)

    def _settle(self, outcome: Outcome) -> None:
        if outcome.entry is not None:
            self._report.entries[outcome.slide_id] = outcome.entry
            self._unsure.discard(outcome.slide_id)
            self._show()
            return
        self._faults[outcome.slide_id] = outcome.fault
        if outcome.has_claimed:
            self._unsure.add(outcome.slide_id)

    def _not_settled(self, slide_ids: Sequence[str]) -> list[str]:
        """Adopts answers that another run on the same output was first to give; returns the slides that have none."""
        left = [name for name in slide_ids if name not in self._report.entries]
        with ThreadPoolExecutor(_THREADS) as pool:
            for name, existing in zip(
                left, pool.map(partial(guarded, ledger.entry, self._context.out), left), strict=True
            ):
                if isinstance(existing, UserError):  # nobody can tell now
                    self._faults[name] = str(existing)
                elif existing is not None and self._context.cohort.is_answer(existing):
                    self._report.entries[name] = existing
        return [name for name in left if name not in self._report.entries]

    def _set_aside(self, name: str, state: ledger.State, reason: str, also_predictions: bool = False) -> Entry:
        """Returns the slide's entry: this fault, or the answer that another run was first to give."""
        entry, cohort = self._fault_entry(name, state, reason), self._context.cohort
        try:
            existing: Entry | None = ledger.set_aside(self._context.out, entry, also_predictions)
        except ConflictError:
            existing = ledger.entry(self._context.out, name)
        return existing if existing is not None and cohort.is_answer(existing) else entry

    def _fault_entry(self, name: str, state: ledger.State, reason: str) -> Entry:
        cohort = self._context.cohort
        image = cohort.fingerprints.get(name, "")
        key = cohort.attempt_key(name)
        return Entry(slide_id=name, key=key, state=state, fingerprint=image, reason=reason, finished=now())

    @contextmanager
    def _keeping_faults(self, name: str) -> Iterator[None]:
        """Keeps a fault of the store, or a lost claim, to its slide; the next try takes the slide up."""
        try:
            yield
        except (StorageError, ConflictError) as error:
            self._faults[name] = str(error)
