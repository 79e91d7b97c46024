"""What a run of prediction is asked for, and what it did."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ray.data import Dataset

from mclstexp.inference.ledger import PREDICTED, Entry


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
