"""New pictures of slides that are done: a run that asks for other genes draws them from what is published.

Nothing is predicted again. A run that names no genes leaves the pictures as they are.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

import ray

from mclstexp.data.stream import MAX_RETRIES
from mclstexp.errors import ConflictError, UserError
from mclstexp.inference import ledger
from mclstexp.inference.ledger import Entry
from mclstexp.inference.model_facts import ModelFacts
from mclstexp.inference.publish import redraw_slide

_AT_ONCE = 4


def redraw(
    settled: Mapping[str, Entry], out: str, facts: ModelFacts, genes: Sequence[str]
) -> Iterator[tuple[Entry, str]]:
    """Draws slides that are done and show other genes; yields each one's new entry and what went wrong, if anything."""
    wanted = ",".join(genes)
    left = [entry for entry in settled.values() if entry.state == "done" and wanted not in ("", entry.genes)]
    draw = ray.remote(num_cpus=0, max_retries=MAX_RETRIES)(_redraw_guarded)
    for start in range(0, len(left), _AT_ONCE):
        some = left[start : start + _AT_ONCE]
        asked = [draw.remote(entry.slide_id, out, facts, genes) for entry in some]
        for entry, reference in zip(some, asked, strict=True):
            fault = _result(reference)
            drawn = entry if fault else entry.model_copy(update={"genes": wanted})
            if not fault and ledger.entry(out, entry.slide_id) == entry:  # else another run has made it anew
                with suppress(ConflictError):
                    ledger.record(out, drawn)
            yield drawn, fault


def _result(reference: ray.ObjectRef) -> str:
    try:
        return str(ray.get(reference))
    except ray.exceptions.RayError as error:
        return f"drawing it failed: {error}"


def _redraw_guarded(slide_id: str, out: str, facts: ModelFacts, genes: Sequence[str]) -> str:
    """Draws a slide; returns a user's error as text, for raised it would be wrapped into a traceback."""
    try:
        redraw_slide(slide_id, out, facts, genes)
    except (UserError, FileNotFoundError) as error:
        return f"its other genes are not drawn: {error}"
    return ""
