"""A sweep: many trials under Ray Tune, the worse ones stopped early, resumed as a whole.

Ray Tune records the trials and their states, each trial's training keeps its own checkpoints. A resumed sweep repeats
no finished trial; unfinished ones go on from their last checkpoint, and so do failed ones with tune.retry_failed. A
resumed scheduler no longer knows the scores of trials that ended before, so that it stops later trials a little later.

Ray Tune reserves nothing for what a trial's training claims. Each trial therefore holds a share of the driver's node,
which bounds the trials that run at once; two sweeps from one node take turns.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
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

from mclstexp import cluster, storage
from mclstexp.config import Config, override
from mclstexp.data.folds import make_split
from mclstexp.data.schema import Manifest, load_manifest
from mclstexp.data.totals import GeneCounts
from mclstexp.errors import ConfigError, RunError
from mclstexp.progress import Show, hidden
from mclstexp.training.run import TrackedRecord, former_digest, identity, planned, require_totals
from mclstexp.training.stored import store_features
from mclstexp.training.validation import VALIDATION_PCC
from mclstexp.training.worker import PLACEMENT_GROUP
from tuning.space import Space, digest, feature_configs, param_space
from tuning.study import Track, open_record, study_name
from tuning.trial import EPOCHS, TrialPlan, run_trial

os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its table of settings would be printed even at verbosity 0
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "2")  # so that a sweep that is killed early can be resumed too
os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "1")  # the next trial is drawn only when there is room for it
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths are the driver's
logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the results name the reason of a failed trial

RECORD, TRIALS, STATE = "sweep.json", "trials", "tune"
FINISHED, STOPPED, FAILED = "finished", "stopped early", "failed"
VALIDATION_SHARE = 0.25
_SEARCH_STATES = ("basic-variant-state-", "search_gen_state-")
_NODE_PARTS, _SHARED_PARTS = 10_000, 9_900
"""Parts into which Ray divides a node, and those that trials share; other work may need a little of it too."""
_PATIENCE_S = 30.0


class _Record(TrackedRecord):
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
    """The outcome of one trial."""

    name: str
    settings: dict[str, Any]
    state: str
    """`finished`, `stopped early` or `failed`."""
    epochs: int
    score: float
    """Its last validation score; NaN if it has none."""
    reason: str
    """Why it failed."""


def with_validation(manifest: Manifest, config: Config) -> Config:
    """Returns the configuration with validation patients: its own, else a quarter of the training patients.

    At least one is drawn, from the patients without a test section. Early stopping is off: halving compares trials by
    their last scores, and stops them. Epochs are as many as `train.min_steps` takes.

    Raises:
        SplitError: no patient would be left to train on.
        ConfigError: nothing is trained, so that no trial could be compared.
    """
    if not config.train.epochs:
        raise ConfigError(
            "train.epochs=0 leaves a sweep nothing to compare: trials are scored after each epoch; use --config "
            "jobs/configs/finetune.yaml, or another recipe that trains"
        )
    split = make_split(manifest, config.split)
    if not split.validation:
        free = manifest.patients(split.train) - manifest.patients(split.test)
        count = max(1, round(VALIDATION_SHARE * len(free)))
        config = override(config, {"split.num_validation_patients": count}, "the sweep")
        split = make_split(manifest, config.split)
    changed: dict[str, object] = {
        "split.validation_patients": sorted(manifest.patients(split.validation)),
        "split.num_validation_patients": 0,
        "train.validate_every": 1,
        "train.patience": 0,
    }
    config = planned(override(config, changed, "the sweep"), manifest, split.train)
    return override(config, {"train.min_steps": 0}, "the sweep")  # its epochs are planned, the same for all trials


def default_name(out: str, manifest: Manifest, config: Config, space: Space, search: str, trials: int) -> str:
    """Returns the name of a sweep that was given none; `out` is the folder of the sweeps. Ray must be connected."""
    former = f"sweep-{former_digest(config)}-{manifest.digest()[:6]}-{digest(space)}-{search}{trials}"
    request = _request(manifest, cluster.config_for_tasks(config), space, search, trials)
    return study_name(out, RECORD, f"sweep-{search}{trials}", request, former)


def open_sweep(data: str, uri: str, config: Config, space: Space, search: str, trials: int, track: Track) -> Sweep:
    """Returns the sweep at `uri`: a new one, or an earlier one as it was left. Ray must be connected.

    Raises:
        RunError: the folder holds a sweep of other settings, data, space, search or number of trials.
    """
    config = cluster.config_for_tasks(config)
    request = _request(load_manifest(data), config, space, search, trials)
    record = open_record(_Record, uri, RECORD, request, track)
    plan = TrialPlan(storage.absolute(data), storage.join(uri, TRIALS), config, record.mlflow_run_id)
    return Sweep(plan, uri, space, search, trials)


def read_sections(manifest: Manifest, config: Config) -> list[str]:
    """Returns the sections that the trials train on and validate on."""
    split = make_split(manifest, config.split)
    return [*split.train, *split.validation]


def run_trials(sweep: Sweep, show: Show = hidden) -> list[Trial]:
    """Runs all trials that have not ended yet and returns the outcomes of all. Ray must be connected.

    Features of frozen encoders are made before, so that no two trials make the same.

    Raises:
        RunError: an interrupt, after which Ray Tune returns as if all trials had ended.
        ConfigError, ModelError: features cannot be made, or spot totals of the sections are over other genes.
    """
    plan = sweep.plan
    manifest = load_manifest(plan.data)
    if not _has_begun(sweep):
        require_totals(GeneCounts(plan.data, manifest), make_split(manifest, plan.config.split), plan.config.genes)
    sections = read_sections(manifest, plan.config)
    store_features(plan.data, sections, feature_configs(sweep.space, plan.config), show)
    with _shown(show, sweep.trials):
        results = _tuner(sweep).fit()
    # The result of a trial that failed before its first score has no settings; Ray Tune's own record has them.
    records, epochs = results._experiment_analysis.trials, sweep.plan.config.train.epochs
    num_ended = sum(_has_ended(record, epochs) for record in records)
    if num_ended < sweep.trials:
        raise RunError(f"interrupted after {num_ended} of {sweep.trials} trials; run the same command again to go on")
    return [_trial(record, results[index], epochs) for index, record in enumerate(records)]


def at_once(config: Config) -> int:
    """Returns how many trials run side by side."""
    fitting = cluster.runs_at_once(config)
    return min(fitting, config.tune.max_concurrent or fitting)


def halving(config: Config) -> "Halving":
    """Returns the scheduler that the `tune` block of a configuration describes."""
    tuning, epochs = config.tune, config.train.epochs
    return Halving(
        time_attr=EPOCHS,
        max_t=epochs,
        grace_period=min(tuning.grace_epochs, epochs),
        reduction_factor=tuning.reduction,
        stop_last_trials=False,
    )


class Halving(ASHAScheduler):
    """Ray Tune's scheduler, but trials are compared only at rung epochs, never at the final epoch.

    Ray's would compare a trial at the first epoch that it reports after a rung. In a resumed sweep, which no longer
    knows the rungs that a trial has passed, it would compare trials at epoch 26 with others at epoch 12. And it would
    stop a trial at its final epoch, before that score is logged.
    """

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """Returns whether a trial goes on."""
        done = result.get(EPOCHS)
        if done == self._max_t or done not in self.rungs():
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        """Forgets a trial that has ended; its rungs were recorded as it passed them."""
        self._trial_info.pop(trial.trial_id, None)

    def rungs(self) -> set[int]:
        """Returns the epochs after which trials are compared."""
        return {int(milestone) for bracket in self._brackets for milestone, _ in bracket._rungs}


class ReleaseStopped(tune.Callback):
    """Removes the placement group of each trial that has ended, once its process is gone.

    Ray Tune stops a trial by ending its process. The training's actors end with it, its placement group does not: Ray
    Train's own cleaner asks Ray's dashboard, which a local Ray may not have, and which it does not find where two
    clusters run on one machine. Not before the process is gone: the training would take the loss of its workers for a
    fault and start others.
    """

    def __init__(self) -> None:
        self._ended: dict[str, str] = {}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Called when a trial has ended or was stopped."""
        self._remember(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Called when a trial has failed."""
        self._remember(trial)

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        """Called many times a second."""
        for name in [name for name in self._ended if not _is_alive(name)]:
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(self._ended.pop(name))))

    def on_experiment_end(self, trials: list[Any], **_: Any) -> None:
        """Called when all trials have ended."""
        deadline = time.monotonic() + _PATIENCE_S
        while self._ended and time.monotonic() < deadline:
            self.on_step_end(0, trials)
            time.sleep(0.2)

    def _remember(self, trial: Any) -> None:
        group = (trial.last_result or {}).get(PLACEMENT_GROUP)
        if group:
            self._ended[trial.trial_id] = group


class ShowTrials(tune.Callback):
    """Reports scores and ends of trials to the `Show` of the sweep that runs in this process."""

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        """Called when a trial has a validation score."""
        _show(trials, f"trial {trial.trial_id}: epoch {result[EPOCHS]}, validation PCC {result[VALIDATION_PCC]:.4f}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Called when a trial has ended or was stopped."""
        _show(trials, f"trial {trial.trial_id}: ended", trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Called when a trial has failed."""
        _show(trials, f"trial {trial.trial_id}: failed", trial)


_shows: list[tuple[Show, int]] = []
"""The `Show` of the running sweep and its number of trials: Ray Tune stores its callbacks, a bar cannot be stored."""


@contextmanager
def _shown(show: Show, num_trials: int) -> Iterator[None]:
    show("trials", 0, num_trials)
    _shows.append((show, num_trials))
    try:
        yield
    finally:
        _shows.pop()


def _show(trials: list[Any], note: str, ended: Any = None) -> None:
    """Shows a note and the ended trials: Ray Tune calls back before it marks the trial that has just `ended`."""
    num_ended = sum(trial.is_finished() or trial is ended for trial in trials)
    for show, num_trials in _shows:
        show("trials", num_ended, num_trials, note)


def _request(manifest: Manifest, config: Config, space: Space, search: str, trials: int) -> dict[str, object]:
    return {
        "identity": identity(config),
        "manifest_digest": manifest.digest(),
        "space": {name: str(entry) for name, entry in space.items()},
        "search": search,
        "trials": trials,
        "tune": config.tune.model_dump(mode="json", include={"grace_epochs", "reduction", "seed"}),
    }


def _tuner(sweep: Sweep) -> tune.Tuner:
    def trial(settings: dict[str, Any]) -> None:
        run_trial(settings, sweep.plan)

    here = f"node:{ray.util.get_node_ip_address()}"  # the node that sees the driver's files
    share = _SHARED_PARTS // at_once(sweep.plan.config) / _NODE_PARTS
    trainable = tune.with_resources(trial, {"cpu": 0, here: share})
    filesystem, root = storage.filesystem(sweep.uri)
    state = f"{root}/{STATE}"
    if _has_begun(sweep):
        # Earlier versions had scheduler and callbacks in modules of their own, by whose names Ray Tune pickled them.
        for former in ("halving", "progress", "release"):
            sys.modules.setdefault(f"tuning.{former}", sys.modules[__name__])
        retry = sweep.plan.config.tune.retry_failed
        return tune.Tuner.restore(state, trainable, resume_errored=retry, storage_filesystem=filesystem)
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


def _searcher(sweep: Sweep) -> Any:
    seed = sweep.plan.config.tune.seed
    if sweep.search == "optuna":
        return OptunaSearch(param_space(sweep.space, sweep.search), metric=VALIDATION_PCC, mode="max", seed=seed)
    return BasicVariantGenerator(random_state=seed)


def _has_begun(sweep: Sweep) -> bool:
    """Returns whether Ray Tune has recorded a trial and the state of the search; it writes other files before."""
    written = {uri.rpartition("/")[2]: uri for uri in storage.list_files(storage.join(sweep.uri, STATE))}
    states = sorted(name for name in written if name.startswith("experiment_state-"))
    has_search = any(name.startswith(_SEARCH_STATES) for name in written)
    return has_search and bool(states) and bool(json.loads(storage.read(written[states[-1]]))["trial_data"])


def _has_ended(record: Any, epochs: int) -> bool:
    """Returns whether a trial has ended; after an interrupt Ray Tune calls running trials terminated too."""
    last = record.last_result or {}
    return record.status == record.ERROR or bool(last.get("done")) or last.get(EPOCHS, 0) >= epochs


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
    """Returns an error in one line: Ray's is a traceback as text, whose last line has the message."""
    lines = str(error or "").strip().splitlines()
    kind, colon, message = lines[-1].partition(": ") if lines else ("", "", "")
    return message if colon and kind.replace(".", "").isidentifier() else kind + colon + message


def _is_alive(trial: str) -> bool:
    """Returns whether a trial's process lives: its board, an actor of the trial's name, ends with it."""
    try:
        ray.get_actor(trial)
    except ValueError:
        return False
    return True
