"""New pictures of slides that are done: a run that asks for other genes draws them from what is published.

Nothing is predicted again. A run that names no genes leaves the pictures as they are.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import ray

from mclstexp.data.stream import MAX_RETRIES
from mclstexp.errors import ConflictError, PredictError, UserError
from mclstexp.inference import ledger
from mclstexp.inference.ledger import Entry
from mclstexp.inference.model_facts import ModelFacts
from mclstexp.inference.publish import redraw_slide

_AT_ONCE = 4
_TRIES = 3


def redraw(
    settled: Mapping[str, Entry], out: str, facts: ModelFacts, genes: Sequence[str]
) -> Iterator[tuple[Entry, str]]:
    """Draws slides that are done and show other genes; yields each one's new entry and what went wrong, if anything."""
    wanted = _Wanted(out, facts, tuple(genes))
    left = [entry for entry in settled.values() if entry.state == "done" and genes and entry.genes != wanted.names]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        yield from pool.map(wanted.drawn, left)


@dataclass(frozen=True)
class _Wanted:
    """The genes that slides are to show."""

    out: str
    facts: ModelFacts
    genes: tuple[str, ...]

    @property
    def names(self) -> str:
        return ",".join(self.genes)

    def drawn(self, entry: Entry) -> tuple[Entry, str]:
        """Returns a slide's new entry and an empty text, or its old one and why it was not drawn."""
        try:
            return self._draw_until_kept(entry), ""
        except UserError as error:
            return entry, f"its other genes are not drawn: {error}"

    def _draw_until_kept(self, entry: Entry) -> Entry:
        for _ in range(_TRIES):
            with suppress(ConflictError):
                return self._draw(entry)
            there = ledger.entry(self.out, entry.slide_id)
            if there is None or there.state != "done":
                break
            entry = there
        raise ConflictError("another run is replacing its files; run the same command again")

    def _draw(self, entry: Entry) -> Entry:
        claim = entry.model_copy(update={"genes": ledger.DRAWING + self.names})
        claimed = ledger.claim_slide(self.out, claim, over=entry)
        task = ray.remote(num_cpus=0, max_retries=MAX_RETRIES)(_redraw_guarded)
        try:
            fault = str(ray.get(task.remote(entry.slide_id, self.out, self.facts, self.genes)))
        except ray.exceptions.RayError as error:
            fault = str(error)
        if fault:
            raise PredictError(fault)
        new = entry.model_copy(update={"genes": self.names})
        ledger.fulfil(self.out, new, claimed)
        return new


def _redraw_guarded(slide_id: str, out: str, facts: ModelFacts, genes: Sequence[str]) -> str:
    """Draws a slide; returns a user's error as text, for raised it would be wrapped into a traceback."""
    try:
        redraw_slide(slide_id, out, facts, genes)
    except (UserError, FileNotFoundError) as error:
        return str(error)
    return ""
