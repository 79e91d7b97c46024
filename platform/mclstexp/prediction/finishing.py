"""The finishing tasks of a run: a few at once, and in each as many slides as have the parts of one group together.

A slide waits for the store for most of the time that its finishing takes, so small slides are finished side by side in
a task's threads; a large one has a task to itself. So a task needs the memory of one large slide, however many it
finishes. A process that dies takes all slides of its task along; they are finished again one by one, so that whichever
killed it stops no other.
"""

from collections import deque
from collections.abc import Iterable

import ray

from mclstexp.cluster import MAX_RETRIES, guarded
from mclstexp.errors import UserError
from mclstexp.prediction import ledger
from mclstexp.prediction.publish import Outcome, Staged, finish_slides
from mclstexp.prediction.writers.gather import GROUP_PARTS


class Finishing:
    """Slides that are being finished, and those that wait for it. Ray must be connected."""

    def __init__(self, out: str, info: ray.ObjectRef, max_tasks: int) -> None:
        """Takes the root of the predictions, the `OutputInfo` in the object store, and the most tasks at once."""
        self._out, self._info, self._max_tasks = out, info, max_tasks
        self._finish = ray.remote(num_cpus=0)(finish_slides)
        self._tasks: dict[ray.ObjectRef, list[Staged]] = {}
        self._waiting: deque[Staged] = deque()
        self._alone: deque[Staged] = deque()
        """Slides of a process that died."""

    @property
    def is_idle(self) -> bool:
        """Whether no slide is being finished."""
        return not self._tasks

    @property
    def is_full(self) -> bool:
        """Whether a task would be full with the slides that wait, and none is free."""
        return len(self._tasks) >= self._max_tasks and _num_parts(self._waiting) >= GROUP_PARTS

    def add(self, slide: Staged) -> None:
        """Starts finishing a slide, now or as soon as a task is free."""
        self._waiting.append(slide)
        self._start()

    def collect(self, wait: bool) -> list[Outcome]:
        """Returns the outcomes of the tasks that have ended; waits for one if `wait`."""
        if not self._tasks:
            return []
        number = 1 if wait else len(self._tasks)
        ended, _ = ray.wait(list(self._tasks), num_returns=number, timeout=None if wait else 0)
        outcomes = [outcome for task in ended for outcome in self._outcomes(task)]
        self._start()
        return outcomes

    def _start(self) -> None:
        while len(self._tasks) < self._max_tasks and (slides := self._next()):
            max_retries = MAX_RETRIES if len(slides) == 1 else 0
            task = self._finish.options(max_retries=max_retries).remote(slides, self._out, self._info)
            self._tasks[task] = slides

    def _next(self) -> list[Staged]:
        """Returns the slides of the next task; none if none waits."""
        if self._alone:
            return [self._alone.popleft()]
        slides: list[Staged] = []
        while self._waiting and (not slides or _num_parts([*slides, self._waiting[0]]) <= GROUP_PARTS):
            slides.append(self._waiting.popleft())
        return slides

    def _outcomes(self, task: ray.ObjectRef) -> list[Outcome]:
        slides = self._tasks.pop(task)
        try:
            outcomes: list[Outcome] = ray.get(task)
            return outcomes
        except ray.exceptions.RayError as error:
            if len(slides) > 1:
                self._alone.extend(slides)
                return []
            name, fault = slides[0].slide_id, f"publishing it failed: {error}"
            return [Outcome(name, fault=fault, has_claimed=self._may_be_claimed(name))]

    def _may_be_claimed(self, name: str) -> bool:
        """Returns whether a task that died may have begun to replace the slide's files."""
        existing = guarded(ledger.entry, self._out, name)
        return isinstance(existing, UserError) or (existing is not None and existing.state == "publishing")


def _num_parts(slides: Iterable[Staged]) -> int:
    """Returns the parts of slides, for each at least one."""
    return sum(max(1, slide.num_parts) for slide in slides)
