"""Time of a sweep beside that of its trials, divided by those that run at once (R14).

    python benchmarks/bench.py --only R14

Trials are the product's: each a training on Ray Train within Ray Tune, two at once on a core each. A trial's time is
that of its own function, from Ray Tune's call to its return.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "platform"), str(ROOT / "benchmarks")]

import ray  # noqa: E402
from goals import say  # noqa: E402
from painted_table import configuration, make_table  # noqa: E402

import tuning.sweep  # noqa: E402
from mclstexp.data.schema import load_manifest  # noqa: E402
from tuning.space import Choice  # noqa: E402
from tuning.sweep import at_once, open_sweep, run_trials, with_validation  # noqa: E402
from tuning.trial import TrialPlan, run_trial  # noqa: E402

TRIALS, AT_ONCE, EPOCHS = 6, 2, 2
TEMPERATURES = tuple(0.1 * (1 + number) for number in range(TRIALS))
TIMES = "SWEEP_TRIAL_TIMES"


def timed_trial(settings: dict[str, Any], plan: TrialPlan) -> None:
    """Runs a trial, and adds its seconds to a file."""
    started = time.monotonic()
    run_trial(settings, plan)
    with open(os.environ[TIMES], "a") as file:
        file.write(f"{time.monotonic() - started}\n")


def sweep_s(data: str, folder: Path) -> tuple[float, float]:
    """Returns the seconds of a sweep, and of its trials divided by those that run at once."""
    Path(os.environ[TIMES]).write_text("")
    config = configuration(
        train__epochs=EPOCHS,
        train__batch_sentences=2,
        tune__grace_epochs=EPOCHS,
        tune__max_concurrent=AT_ONCE,
        tracking__uri=f"sqlite:///{folder}/mlflow.db",
    )
    config = with_validation(load_manifest(data), config)
    assert at_once(config) == AT_ONCE, at_once(config)
    space = {"model.temperature": Choice(TEMPERATURES)}
    sweep = open_sweep(data, str(folder), config, space, "grid", TRIALS, lambda recorded: recorded or "")
    started = time.monotonic()
    ended = run_trials(sweep)
    seconds = time.monotonic() - started
    assert all(trial.state == "finished" for trial in ended), ended
    return seconds, sum(map(float, Path(os.environ[TIMES]).read_text().split())) / AT_ONCE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="sweeps; at most 2")
    parser.add_argument("--data", help="unused")
    num_rounds = min(2, parser.parse_args().rounds)
    tuning.sweep.run_trial = timed_trial  # the sweep passes it to Ray Tune by this name
    with tempfile.TemporaryDirectory() as scratch:
        os.environ[TIMES] = f"{scratch}/times"
        ray.init(address="local", num_cpus=12, log_to_driver=False)
        data = make_table(scratch)
        found = [sweep_s(data, Path(scratch, f"sweep-{number}")) for number in range(num_rounds)]
        ray.shutdown()
    say("R14", found, "s", f"{TRIALS} trials, {AT_ONCE} at once, DenseNet-121, 224 px, {EPOCHS} epochs")


if __name__ == "__main__":
    main()
