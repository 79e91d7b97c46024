"""Whether slides are of the species and organs that a model was trained on, where sheet and model state them."""

from collections.abc import Iterable

from mclstexp.data.sheet import SectionRow
from mclstexp.errors import SheetError
from mclstexp.messages import some_of
from mclstexp.model.version import TrainingRecord


def compare_origins(rows: Iterable[SectionRow], training: TrainingRecord) -> list[str]:
    """Returns a warning if slides are of an organ that the model was not trained on.

    Raises:
        SheetError: slides are of another species: a model's genes are those of its species.
    """
    rows = list(rows)
    strange = _others({row.section_id: row.species for row in rows}, training.species)
    if strange:
        raise SheetError(
            f"the model was trained on {', '.join(training.species)}, but the sheet has slides of another species: "
            f"{strange}; use a model of that species, or leave the sheet's column species empty to predict all the same"
        )
    unseen = _others({row.section_id: row.organ for row in rows}, training.organs)
    return [f"the model was trained on {', '.join(training.organs)}, not on the organ of {unseen}"] if unseen else []


def _others(stated: dict[str, str], trained: tuple[str, ...]) -> str:
    """Returns the slides that state something else than what was trained on, in words; empty if none does."""
    others = [f"{name} ({value})" for name, value in stated.items() if value and trained and value not in trained]
    return some_of(others)
