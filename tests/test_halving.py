"""Early stopping: who is stopped at which epoch, also after a resume."""

from types import SimpleNamespace

from mclstexp.config import Config, override
from mclstexp.training.validation import VALIDATION_PCC
from tuning.sweep import Halving, halving
from tuning.trial import EPOCHS

STOP, CONTINUE = "STOP", "CONTINUE"


def _scheduler(epochs: int, grace: int, reduction: int) -> Halving:
    settings = {"train.epochs": epochs, "tune.grace_epochs": grace, "tune.reduction": reduction}
    made = halving(override(Config(), settings))
    made.set_search_properties(VALIDATION_PCC, "max")
    return made


def _report(scheduler: Halving, name: str, epoch: int, score: float) -> str:
    trial = SimpleNamespace(trial_id=name)
    if name not in scheduler._trial_info:
        scheduler.on_trial_add(None, trial)
    return scheduler.on_trial_result(None, trial, {EPOCHS: epoch, VALIDATION_PCC: score})


def test_of_three_at_a_rung_the_best_goes_on() -> None:
    scheduler = _scheduler(30, 4, 3)
    assert scheduler.rungs() == {4, 12}
    assert [_report(scheduler, name, 3, score) for name, score in (("a", 0.1), ("b", 0.0))] == [CONTINUE] * 2
    said = [_report(scheduler, name, 4, score) for name, score in (("a", 0.3), ("b", 0.2), ("c", 0.1), ("d", 0.4))]
    assert said == [CONTINUE, STOP, STOP, CONTINUE]
    assert _report(scheduler, "a", 5, 0.0) == CONTINUE
    assert [_report(scheduler, name, 12, score) for name, score in (("d", 0.5), ("a", 0.4))] == [CONTINUE, STOP]


def test_trials_that_had_passed_their_rungs_before_a_resume_are_not_judged_there_again() -> None:
    scheduler = _scheduler(30, 4, 3)
    assert {_report(scheduler, name, 26, score) for name, score in (("a", 0.3), ("b", 0.2), ("c", 0.1))} == {CONTINUE}
    assert _report(scheduler, "d", 12, 0.05) == CONTINUE, "the first to come to this rung"


def test_no_trial_is_stopped_at_its_last_epoch() -> None:
    scheduler = _scheduler(4, 1, 2)
    assert 4 in scheduler.rungs()
    assert {_report(scheduler, name, 4, score) for name, score in (("a", 0.3), ("b", 0.2), ("c", 0.1))} == {CONTINUE}
    scheduler.on_trial_complete(None, SimpleNamespace(trial_id="a"), {EPOCHS: 4, VALIDATION_PCC: 0.3})
