"""Parts of messages that many errors share."""

import difflib
from collections.abc import Collection, Iterable

AGAINST_DIVERGENCE = "lower train.tower_lr and train.head_lr, raise train.warmup or use train.precision=fp32"
"""What to do when a training's numbers are no longer finite."""
MAX_NAMED = 5
"""Names that a message lists at most, unless it says otherwise."""


def did_you_mean(name: str, known: Iterable[str], num_nearest: int = 1) -> str:
    """Returns `did you mean A or B?` with the known names most like `name`, else the known names themselves.

    Upper and lower case count as equal.
    """
    known = list(known)
    if not known:
        return "there are none"
    folded = {other.lower(): other for other in known}
    nearest = [folded[match] for match in difflib.get_close_matches(name.lower(), folded, n=num_nearest)]
    return f"did you mean {' or '.join(nearest)}?" if nearest else f"known: {some_of(known)}"


def some_of(names: Collection[str], max_named: int = MAX_NAMED) -> str:
    """Returns the first names with commas, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - max_named} more" if len(listed) > max_named else ""
    return ", ".join(listed[:max_named]) + more


def duration(seconds: float) -> str:
    """Returns a forecast time in the unit that fits."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
