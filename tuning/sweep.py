"""A sweep: many trials under Ray Tune, the worse ones stopped early, resumed as a whole.

Ray Tune keeps which trials there are and what became of them, each trial's training keeps its own checkpoints. A
resumed sweep repeats no finished trial; unfinished ones go on from their last checkpoint, failed ones too where
tune.retry_failed asks for it. What a scheduler has learnt of trials that ended before is lost in a resume, so that
later ones are stopped a little later. How many trials run at once is bounded by a share that each holds of the
driver's node, since Ray Tune reserves nothing for what a trial's training claims; two sweeps from one node take
turns.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune
from ray._raylet import PlacementGroupID
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch
from ray.util.placement_group import PlacementGroup, remove_placement_group
from rich.progress import Progress

from mclstexp import cluster, storage
from mclstexp.cluster import config_for_tasks
from mclstexp.config import Config, override
from mclstexp.data.folds import make_split
from mclstexp.data.schema import Manifest, load_manifest
from mclstexp.errors import RunError
from mclstexp.training.run import identity
from mclstexp.training.validation import VALIDATION_PCC
from mclstexp.training.worker import PLACEMENT_GROUP
from tuning.space import Space, param_space
from tuning.study import StudyRecord, open_record
from tuning.trial import EPOCHS, TrialPlan, run_trial

RECORD, TRIALS, STATE = "sweep.json", "trials", "tune"
VALIDATION_SHARE = 0.25
_SEARCH_STATES = ("basic-variant-state-", "search_gen_state-")
_PARTS, _SHARED = 10_000, 9_900
"""Parts that Ray divides a resource into, and those that trials hold; others may need a little of it too."""
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its table of settings would be printed even at verbosity 0
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "2")  # a sweep that is killed early is known too
os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "1")  # the next is made up when there is room for it
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths are the driver's
logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a trial that failed is told by its reason

FINISHED, STOPPED, FAILED = "finished", "stopped early", "failed"


class _Record(StudyRecord):
    space: dict[str, str]
    search: str
    trials: int
    tune: dict[str, object]


@dataclass(frozen=True)
class Sweep:
    """An opened sweep."""

    plan: TrialPlan
    uri: str
    space: Space
    search: str
    trials: int


@dataclass(frozen=True)
class Trial:
    """What became of one trial."""

    name: str
    settings: dict[str, Any]
    state: str
    """`finished`, `stopped early` or `failed`."""
    epochs: int
    score: float
    """Its last validation score; NaN where there is none."""
    reason: str
    """Why it failed."""


def with_validation(manifest: Manifest, config: Config) -> Config:
    """Returns the configuration with validation patients: those that it asks for, else a quarter of the training ones.

    At least one is drawn, of those that no test holds. Early stopping is off: halving judges trials by their last
    scores, and stops them.

    Raises:
        SplitError: no patient would be left to train on.
    """
    split = make_split(manifest, config.split)
    if not split.validation:
        free = _patients(manifest, split.train) - _patients(manifest, split.test)
        count = max(1, round(VALIDATION_SHARE * len(free)))
        config = override(config, {"split.num_validation_patients": count}, "the sweep")
        split = make_split(manifest, config.split)
    changed: dict[str, object] = {
        "split.validation_patients": sorted(_patients(manifest, split.validation)),
        "split.num_validation_patients": 0,
        "train.validate_every": 1,
        "train.patience": 0,
    }
    return override(config, changed, "the sweep")


def _patients(manifest: Manifest, names: Iterable[str]) -> set[str]:
    return {manifest.section(name).patient_id for name in names}


def open_sweep(
    data: str, uri: str, config: Config, space: Space, search: str, trials: int, start_tracking: Callable[[], str]
) -> Sweep:
    """Returns the sweep at a place, new or as it was left.

    Raises:
        RunError: the place holds a sweep of other settings, data, space, search or length.
    """
    config = config_for_tasks(config)
    asked: dict[str, object] = {
        "identity": identity(config),
        "manifest_digest": load_manifest(data).digest(),
        "space": {name: str(entry) for name, entry in space.items()},
        "search": search,
        "trials": trials,
        "tune": config.tune.model_dump(mode="json", include={"grace_epochs", "reduction", "seed"}),
    }
    record = open_record(_Record, uri, RECORD, asked, start_tracking)
    plan = TrialPlan(storage.absolute(data), storage.join(uri, TRIALS), config, record.mlflow_run_id)
    return Sweep(plan, uri, space, search, trials)


def run_trials(sweep: Sweep) -> list[Trial]:
    """Runs all trials that have not ended yet, with a line for each score, and returns what became of all.

    Ray must be connected.

    Raises:
        RunError: it was interrupted, which Ray Tune takes for the end.
    """
    with shown(sweep.trials):
        results = _tuner(sweep).fit()
    # A result lacks the settings of a trial that failed before its first score; Ray Tune's own record has them.
    records, epochs = results._experiment_analysis.trials, sweep.plan.config.train.epochs
    ended = sum(_has_ended(record, epochs) for record in records)
    if ended < sweep.trials:
        raise RunError(f"interrupted after {ended} of {sweep.trials} trials; run the same command again to go on")
    return [_trial(record, results[place], epochs) for place, record in enumerate(records)]


def _has_ended(record: Any, epochs: int) -> bool:
    """Tells whether a trial has come to its end: an interrupt calls those under way terminated too."""
    last = record.last_result or {}
    return record.status == record.ERROR or bool(last.get("done")) or last.get(EPOCHS, 0) >= epochs


def _tuner(sweep: Sweep) -> tune.Tuner:
    def trial(settings: dict[str, Any]) -> None:
        run_trial(settings, sweep.plan)

    here = f"node:{ray.util.get_node_ip_address()}"  # the node that sees the driver's files
    share = _SHARED // at_once(sweep.plan.config) / _PARTS
    trainable = tune.with_resources(trial, {"cpu": 0, here: share})
    filesystem, root = storage.filesystem(sweep.uri)
    state = f"{root}/{STATE}"
    if _has_begun(sweep):
        again = sweep.plan.config.tune.retry_failed
        return tune.Tuner.restore(state, trainable, resume_errored=again, storage_filesystem=filesystem)
    return tune.Tuner(
        trainable,
        param_space=param_space(sweep.space, sweep.search) if sweep.search != "optuna" else {},
        tune_config=tune.TuneConfig(
            metric=VALIDATION_PCC,
            mode="max",
            num_samples=1 if sweep.search == "grid" else sweep.trials,
            search_alg=_searcher(sweep),
            scheduler=halving(sweep.plan.config),
        ),
        run_config=tune.RunConfig(
            name=STATE,
            storage_path=root,
            storage_filesystem=filesystem,
            verbose=0,
            callbacks=[ShowTrials(), ReleaseStopped()],
        ),
    )


def _has_begun(sweep: Sweep) -> bool:
    """Tells whether Ray Tune has recorded a trial and what it is to try next; it writes other files before."""
    written = {uri.rpartition("/")[2]: uri for uri in storage.list_files(storage.join(sweep.uri, STATE))}
    states = sorted(name for name in written if name.startswith("experiment_state-"))
    searched = any(name.startswith(_SEARCH_STATES) for name in written)
    return searched and bool(states) and bool(json.loads(storage.read(written[states[-1]]))["trial_data"])


def at_once(config: Config) -> int:
    """Returns how many trials run side by side."""
    held = cluster.runs_at_once(config)
    return min(held, config.tune.max_concurrent or held)


def _searcher(sweep: Sweep) -> Any:
    seed = sweep.plan.config.tune.seed
    if sweep.search == "optuna":
        return OptunaSearch(param_space(sweep.space, sweep.search), metric=VALIDATION_PCC, mode="max", seed=seed)
    return BasicVariantGenerator(random_state=seed)


def _trial(record: Any, result: tune.Result, epochs: int) -> Trial:
    metrics = result.metrics or {}
    done = int(metrics.get(EPOCHS, 0))
    state = FAILED if record.status == record.ERROR else FINISHED if done >= epochs else STOPPED
    return Trial(
        name=record.trial_id,
        settings=dict(record.config),
        state=state,
        epochs=done,
        score=float(metrics.get(VALIDATION_PCC, float("nan"))),
        reason=_reason(result.error),
    )


def _reason(error: Exception | None) -> str:
    """Returns what went wrong in a line: Ray hands over a traceback as text, whose last line says it."""
    lines = str(error or "").strip().splitlines()
    kind, colon, said = lines[-1].partition(": ") if lines else ("", "", "")
    return said if colon and kind.replace(".", "").isidentifier() else kind + colon + said


def halving(config: Config) -> "Halving":
    """Returns the scheduler that a configuration's `tune` section asks for."""
    tuning, epochs = config.tune, config.train.epochs
    return Halving(
        time_attr=EPOCHS,
        max_t=epochs,
        grace_period=min(tuning.grace_epochs, epochs),
        reduction_factor=tuning.reduction,
        stop_last_trials=False,
    )


class Halving(ASHAScheduler):
    """Ray Tune's scheduler, but a trial is judged at a rung's own epoch alone, and never at its last.

    Ray's would judge a trial at whatever epoch it reports first after a rung: in a resumed sweep, where nobody
    knows the rungs that it had passed, trials of epoch 26 would be compared with those of epoch 12. And it would
    stop a trial for the score of its last epoch, before that is logged.
    """

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """Tells whether a trial goes on."""
        done = result.get(EPOCHS)
        if done == self._max_t or done not in self.rungs():
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        """A trial has ended; its rungs have been recorded as it passed them."""
        self._trial_info.pop(trial.trial_id, None)

    def rungs(self) -> set[int]:
        """Returns the epochs after which trials are compared."""
        return {int(milestone) for bracket in self._brackets for milestone, _ in bracket._rungs}


_PATIENCE_S = 30.0


class ReleaseStopped(tune.Callback):
    """Removes the placement group of each trial that ended, once its process is gone.

    Not before: its training would take the loss of its workers for a fault and start others.
    """

    def __init__(self) -> None:
        self._ended: dict[str, str] = {}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial has ended or was stopped."""
        self._remember(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial has failed."""
        self._remember(trial)

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        """Called many times a second."""
        for name in [name for name in self._ended if not _is_alive(name)]:
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(self._ended.pop(name))))

    def on_experiment_end(self, trials: list[Any], **_: Any) -> None:
        """All trials have ended."""
        deadline = time.monotonic() + _PATIENCE_S
        while self._ended and time.monotonic() < deadline:
            self.on_step_end(0, trials)
            time.sleep(0.2)

    def _remember(self, trial: Any) -> None:
        held = (trial.last_result or {}).get(PLACEMENT_GROUP)
        if held:
            self._ended[trial.trial_id] = held


def _is_alive(trial: str) -> bool:
    """Tells whether a trial's board is there, which ends with its process."""
    try:
        ray.get_actor(trial)
    except ValueError:
        return False
    return True


_shown: list[tuple[Progress, Any]] = []  # Ray Tune stores its callbacks, and a bar cannot be stored


@contextmanager
def shown(num_trials: int) -> Iterator[None]:
    """Shows the bar while the block runs."""
    with Progress() as bar:
        _shown.append((bar, bar.add_task("trials", total=num_trials)))
        try:
            yield
        finally:
            _shown.pop()


class ShowTrials(tune.Callback):
    """Tells the bar of a sweep that is `shown`."""

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        """A trial has validated."""
        for bar, _task in _shown:
            line = f"trial {trial.trial_id}: epoch {result[EPOCHS]}, validation PCC {result[VALIDATION_PCC]:.4f}"
            bar.console.print(line, soft_wrap=True, highlight=False)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial has ended or was stopped."""
        _advance()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial has failed."""
        for bar, _task in _shown:
            bar.console.print(f"trial {trial.trial_id}: failed", soft_wrap=True, highlight=False)
        _advance()


def _advance() -> None:
    for bar, task in _shown:
        bar.advance(task)
