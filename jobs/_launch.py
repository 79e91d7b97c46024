"""The only file that knows the layout: puts the project on the path and ships it to every node.

Every job imports it first. `platform/` is a source root without `__init__.py`, because the standard library owns
that name; the working copy always wins over an installed wheel.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("platform/mclstexp", "ingest", "tuning")
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # nodes have their environment; uv would build another
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's new default; without it every task warns
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # workers wait for this poll at each checkpoint

from mclstexp.config import Config  # noqa: E402


def connect(config: Config, min_cpus: int = 2) -> None:
    """Joins the cluster that the environment names (as under `ray job submit`), or starts Ray on this machine."""
    import ray

    from mclstexp import cluster

    modules = [str(ROOT / package) for package in PACKAGES]
    runtime_env = {"py_modules": modules, "env_vars": config.storage.environment()}
    local = {} if "RAY_ADDRESS" in os.environ else cluster.local_ray(config, min_cpus)
    ray.init(runtime_env=runtime_env, log_to_driver=False, configure_logging=False, **local)
