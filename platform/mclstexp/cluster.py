"""What knows Ray's cluster: its resources, files as tasks see them, ordered data streams, retries and guarded tasks.

Never hang: before anything starts, a run's request is compared with the cluster. Training workers that claim every CPU
would starve the data stream for ever, with a warning at most, so at least one CPU must be left. Where an autoscaler can
add nodes, it is asked for the missing ones, and `cluster.wait_s` limits the wait. The check counts what nodes have, not
what is free: other jobs on the cluster are not seen.
"""

import logging
import os
import socket
import stat
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import ray
import ray.data
from ray._private.utils import get_num_cpus
from ray.data import DataContext, ExecutionResources
from ray.util.annotations import RayDeprecationWarning

from mclstexp import storage
from mclstexp.config import Config, override
from mclstexp.errors import ResourceError, StorageError, UserError
from mclstexp.settings import FITTED_PANELS

MAX_RETRIES = 2
"""Restarts of a task or actor whose process died."""
KEEPING_MEMORY = {
    "env_vars": {
        "MALLOC_MMAP_THRESHOLD_": str(2**32),
        "MALLOC_TRIM_THRESHOLD_": str(2**36),
        "MALLOC_ARENA_MAX": "1",
    }
}
"""Runtime environment in which glibc keeps freed memory, for processes that compute with an encoder: by default it
returns each batch's activations to the system and requests them again.

One arena, because Ray calls these processes in threads, and the arenas of threads hold no block of over 64 MiB.
"""
_NUM_STARTS = 2
_START_S = 120  # Ray allows 30, in which a busy machine may not start it
_JOIN_S = 10.0
_SHORT_FOLDER = f"/tmp/ray-{os.getuid()}"
_MAX_SOCKET_BYTES = 103  # of a socket's path; Linux allows 107
_SOCKET = "/session_2026-11-28_21-34-47_123456_1234567/sockets/plasma_store.1"
"""A socket in Ray's folder, with the longest name."""
_POLL_S = 1.0
_ROUNDING = 1e-9
_SQLITE = "sqlite:///"
Result = TypeVar("Result")
Node = dict[str, Any]
"""An entry of `ray.nodes()`."""
_Bundles = Sequence[tuple[dict[str, float], dict[str, str]]]
"""Resources claimed together on one node, with the labels that the node must have."""


def connect(config: Config, runtime_env: Mapping[str, object], min_cpus: int = 2) -> None:
    """Joins the cluster that RAY_ADDRESS names (as under `ray job submit`), or starts Ray on this machine.

    Raises:
        ResourceError: Ray cannot be reached, or does not start.
    """
    arguments = {"runtime_env": dict(runtime_env), "log_to_driver": False, "configure_logging": False}
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        _start(arguments | local_ray(config, min_cpus) | {"_temp_dir": _short_folder()})
    else:
        _join(address, arguments)


def num_local_cpus(config: Config, min_cpus: int) -> int:
    """Returns the logical CPUs of a Ray on this machine: those that this process may use, as in a container."""
    return config.cluster.local_cpus or max(int(get_num_cpus(override_docker_cpu_warning=True)), min_cpus)


def local_ray(config: Config, min_cpus: int = 2) -> dict[str, Any]:
    """Returns the arguments of `ray.init` for a Ray on this machine, with enough logical CPUs for the run."""
    train = config.train
    needed = train.num_workers * (worker_cpus(config) + config.cluster.data_cpus)
    return {
        "address": "local",
        "num_cpus": num_local_cpus(config, max(needed, min_cpus)),
        "object_store_memory": config.cluster.object_store_mb * 2**20,
        "include_dashboard": False,
    }


def _start(arguments: Mapping[str, Any]) -> None:
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", str(_START_S))
    for start in range(_NUM_STARTS):
        try:
            ray.init(**arguments)
        except Exception as error:  # Ray raises plain exceptions, also for a start that took too long
            ray.shutdown()
            if start == _NUM_STARTS - 1:
                load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs"
                raise ResourceError(
                    f"Ray did not start on this machine ({load}), tried {_NUM_STARTS} times: {_first_line(error)}; "
                    "start the job again when the machine is less busy, or check the disk space and rights in "
                    "RAY_TMPDIR, TMPDIR or /tmp"
                ) from error
        else:
            return


def _join(address: str, arguments: Mapping[str, Any]) -> None:
    fix = "start that cluster, correct RAY_ADDRESS and the token (RAY_AUTH_TOKEN), or unset RAY_ADDRESS to work here"
    try:
        _require_listening(address)
        ray.init(**arguments)
    except Exception as error:
        ray.shutdown()
        raise ResourceError(
            f"cannot join the Ray cluster RAY_ADDRESS={address}: {_first_line(error)}; {fix}"
        ) from error


def _require_listening(address: str) -> None:
    """Raises OSError if nothing listens at `host:port`, which Ray would only tell after a quarter of an hour."""
    place = urlsplit(address if "://" in address else f"//{address}")
    if place.hostname and place.port:
        socket.create_connection((place.hostname, place.port), timeout=_JOIN_S).close()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _short_folder() -> str | None:
    """Returns a folder for Ray's files if sockets cannot have the path of its usual one; else None.

    Raises:
        ResourceError: there is none.
    """
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), None)
    usual = os.path.abspath(os.environ[name]) if name else "/tmp"
    is_short = len(os.fsencode(f"{usual}/ray{_SOCKET}")) <= _MAX_SOCKET_BYTES
    if is_short and usual.isascii():
        return None
    folder = Path(_SHORT_FOLDER)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
        fault = "" if is_own and os.access(folder, os.W_OK) else "it is not a folder that only you can write to"
    except OSError as error:
        fault = error.strerror or str(error)
    if fault:
        why = "is not ASCII" if is_short else "is too long"
        raise ResourceError(
            f"Ray needs a short path in ASCII: {name}={usual} {why} and {folder} cannot be used ({fault}); set "
            f"RAY_TMPDIR to a local folder of at most {_MAX_SOCKET_BYTES - len(_SOCKET) - len('/ray')} characters"
        )
    return f"{folder}/ray"  # Ray opens its own folder to all users


def worker_cpus(config: Config) -> int:
    """Returns the CPUs of each training worker, where `train.cpus_per_worker` leaves them open too.

    The only worker of a Ray on this machine gets all cores that its data stream leaves logical CPUs for.
    """
    train, room = config.train, config.cluster.local_cpus
    if train.cpus_per_worker is not None:
        return train.cpus_per_worker
    if train.num_workers > 1 or "RAY_ADDRESS" in os.environ:
        return 1
    if room is None and ray.is_initialized():
        room = int(ray.cluster_resources().get("CPU", 0))
    cores = int(get_num_cpus(override_docker_cpu_warning=True))
    return cores if room is None else max(1, min(cores, room - config.cluster.data_cpus))


def side_by_side(config: Config) -> Config:
    """Returns the configuration of runs that share a machine: workers have one CPU where it leaves that open."""
    return override(config, {"train.cpus_per_worker": config.train.cpus_per_worker or 1}, "runs side by side")


def worker_resources(config: Config) -> dict[str, float]:
    """Returns the resources that one training worker claims."""
    claimed: dict[str, float] = {"CPU": worker_cpus(config)}
    return claimed | {"GPU": config.train.gpus_per_worker} if config.train.use_gpu else claimed


def worker_nodes(config: Config) -> dict[str, str] | None:
    """Returns the label selector that keeps training workers off the nodes that decode for them."""
    return {"pool": f"!{config.cluster.data_pool}"} if config.cluster.data_pool else None


def plan(config: Config) -> str:
    """Returns in words what a training run requests."""
    train, gpus = config.train, f"{config.train.gpus_per_worker:g} GPU and " if config.train.use_gpu else ""
    return (
        f"{train.num_workers} training worker(s) with {gpus}{worker_cpus(config)} CPU(s) each, "
        f"{config.cluster.data_cpus} CPU(s) each for its data stream (at least 1 in all), "
        f"{train.max_failures} restart(s) after failures"
    )


def require(config: Config) -> None:
    """Checks that the cluster can hold the training workers and leaves a CPU for their data.

    Raises:
        ResourceError: it cannot, even after `cluster.wait_s`; states the numbers and the setting to change.
    """
    pool = {"pool": config.cluster.data_pool} if config.cluster.data_pool else {}
    bundles = [(worker_resources(config), worker_nodes(config) or {})] * config.train.num_workers
    _require(lambda nodes: _shortage(config, nodes), [*bundles, ({"CPU": 1}, pool)], config.cluster.wait_s)


def require_to_predict(config: Config) -> None:
    """Checks that the cluster has the CPUs and GPUs that the settings of prediction name.

    Raises:
        ResourceError: it does not, even after `cluster.wait_s`; states the numbers and the settings to change.
    """
    requested = {"CPU": config.predict.num_cpus or 0, "GPU": config.predict.num_gpus or 0}
    bundles: _Bundles = [({kind: 1.0}, {}) for kind, number in requested.items() for _ in range(number)]
    _require(lambda nodes: _shortage_to_predict(requested, nodes), bundles, config.cluster.wait_s)


def runs_at_once(config: Config) -> int:
    """Returns how many training runs like this, with their data streams, fit on the cluster at once (at least 1)."""
    data_cpus = 0 if config.cluster.data_pool else config.cluster.data_cpus
    slots = sum(_slots(config, node, data_cpus) for node in _hosts(config, _alive_nodes()))
    return max(1, slots // config.train.num_workers)


def share_of_run(config: Config) -> dict[str, float]:
    """Returns the `cpu` and `gpu` that each of `runs_at_once` may use to embed tiles while the others train or embed.

    Embedders take half of it (`tile_stream.num_embedders`), which leaves a CPU to read tiles whatever the other runs
    do. At least two CPUs and one GPU: with fewer a run could never embed.
    """
    nodes, runs = _alive_nodes(), runs_at_once(config)
    cpus, gpus = (sum(_has(node, kind) for node in nodes) for kind in ("CPU", "GPU"))
    return {"cpu": max(2, cpus // runs), "gpu": max(1, gpus // runs)}


def require_shared(config: Config, uris: Iterable[str], uses_tracking: bool = True) -> None:
    """Refuses paths that only one node can see when the work runs on several nodes, or not on the head.

    Args:
        uris: paths or URIs, each after the name of its argument, such as `--out s3://bucket/runs`.
        uses_tracking: whether the job talks to MLflow.

    Raises:
        ResourceError: names each local path or SQLite tracking URI and the fix.
    """
    nodes = _alive_nodes()
    if config.storage.shared_paths or (len(nodes) == 1 and _has(nodes[0], "CPU")):
        return
    local = [uri for uri in uris if not storage.is_s3(uri.partition(" ")[2])]
    if uses_tracking and not config.tracking.uri.startswith(("http://", "https://")):
        local.append(f"tracking.uri={config.tracking.uri}")
    if local:
        size = f"{len(nodes)} nodes" if len(nodes) > 1 else "a head that takes no work, and other nodes may join"
        raise ResourceError(
            f"the cluster has {size}, but only one node can see {', '.join(local)}; use s3:// and an MLflow server, or "
            "storage.shared_paths=true if all nodes mount the same paths"
        )


def _alive_nodes() -> list[Node]:
    return [node for node in ray.nodes() if node["Alive"]]


def _require(shortage: Callable[[list[Node]], str], bundles: _Bundles, wait_s: float) -> None:
    """Raises the shortage of the nodes, if any, after waiting for an autoscaler to add some."""
    fault = shortage(_alive_nodes())
    if fault and wait_s:
        deadline = time.monotonic() + wait_s
        with _requested(bundles):
            while (fault := shortage(_alive_nodes())) and time.monotonic() < deadline:
                time.sleep(_POLL_S)
    if fault:
        raise ResourceError(fault)


@contextmanager
def _requested(bundles: _Bundles) -> Iterator[None]:
    """Requests the run's nodes from an autoscaler: no task of the run is pending yet, so it would add none."""
    from ray.autoscaler.sdk import request_resources

    resources, selectors = ([*each] for each in zip(*bundles, strict=True))
    request_resources(bundles=resources, bundle_label_selectors=selectors)
    try:
        yield
    finally:
        request_resources(bundles=[])  # else the nodes would never be removed


def _shortage_to_predict(requested: Mapping[str, int], nodes: list[Node]) -> str:
    """Returns which of the requested CPUs and GPUs are missing; empty if none."""
    existing = {kind: sum(_has(node, kind) for node in nodes) for kind in requested}
    short = [kind for kind in requested if existing[kind] < requested[kind]]
    if not short:
        return ""
    found = " and ".join(f"{requested[kind]} {kind}(s), the cluster has {existing[kind]}" for kind in short)
    return (
        f"prediction requests {found}; lower predict.num_cpus and predict.num_gpus, or leave them empty to use what "
        "the cluster has, or raise cluster.wait_s if nodes can be added"
    )


def _shortage(config: Config, nodes: list[Node]) -> str:
    """Returns why the run does not fit; empty if it fits."""
    train, pool = config.train, config.cluster.data_pool
    total_cpus, total_gpus = (sum(_has(node, kind) for node in nodes) for kind in ("CPU", "GPU"))
    if train.use_gpu and total_gpus < train.num_workers * train.gpus_per_worker:
        return (
            f"the run requests {train.num_workers * train.gpus_per_worker:g} GPU(s) (train.num_workers, "
            f"train.gpus_per_worker), the cluster has {total_gpus}; lower "
            "train.num_workers, or set train.use_gpu=false, or raise cluster.wait_s if nodes can be added"
        )
    hosts = _hosts(config, nodes)
    slots = sum(_slots(config, node) for node in hosts)
    if slots < train.num_workers:
        outside = f" outside cluster.data_pool={pool}" if pool else ""
        return (
            f"the run requests {train.num_workers} worker(s) of {worker_cpus(config)} CPU(s), the cluster's "
            f"{len(hosts)} node(s){outside} with {sum(_has(node, 'CPU') for node in hosts)} CPU(s) hold {slots}; lower "
            "train.num_workers or train.cpus_per_worker, or raise cluster.local_cpus on one machine"
        )
    needed = train.num_workers * worker_cpus(config) + 1
    if total_cpus < needed:
        return (
            f"the run requests {needed} CPUs ({train.num_workers} worker(s) of {worker_cpus(config)} and 1 for their "
            f"data), the cluster has {total_cpus}; the data stream would starve: lower train.num_workers or "
            "train.cpus_per_worker, or raise cluster.local_cpus on one machine"
        )
    pools = {node["Labels"].get("pool") for node in nodes if _has(node, "CPU")}
    if pool and pool not in pools:
        return (
            f"cluster.data_pool={pool}, but no node with CPUs has the label pool={pool} (found: "
            f"{', '.join(sorted(filter(None, pools))) or 'none'}); start nodes with --labels pool={pool}, or leave "
            "cluster.data_pool empty, or raise cluster.wait_s if nodes can be added"
        )
    return ""


def _has(node: Node, kind: str) -> int:
    return int(node["Resources"].get(kind, 0))


def _hosts(config: Config, nodes: list[Node]) -> list[Node]:
    """Returns the nodes that training workers may go to."""
    pool = config.cluster.data_pool
    return [node for node in nodes if not pool or node["Labels"].get("pool") != pool]


def _slots(config: Config, node: Node, data_cpus: int = 0) -> int:
    """Returns how many training workers fit on a node, each with `data_cpus` for its data."""
    slots = _has(node, "CPU") // (worker_cpus(config) + data_cpus)
    if not config.train.use_gpu:
        return slots
    each = int(1 / config.train.gpus_per_worker + _ROUNDING)  # one GPU serves each worker
    return min(slots, _has(node, "GPU") * each)


def config_for_tasks(config: Config) -> Config:
    """Returns the configuration with absolute paths of its local files, for tasks. Ray must be connected.

    Unchanged if the job ships its working folder (`ray job submit`): tasks then start in a copy of it.
    """
    return config if _ships_working_folder() else with_absolute_paths(config)


def weights_for_tasks(weights: str | None) -> str | None:
    """Returns the name of image weights (as `model.image_weights`), its path made absolute in the same way."""
    return weights if weights is None or _ships_working_folder() else _absolute_weights(weights)


def with_absolute_paths(config: Config) -> Config:
    """Returns the configuration with paths made absolute from the folder of this process."""
    database, weights, panel = config.tracking.uri, config.model.image_weights, config.genes.panel
    changed: dict[str, object] = {"model.image_weights": _absolute_weights(weights)}
    if database.startswith(_SQLITE):
        changed["tracking.uri"] = _SQLITE + os.path.abspath(database.removeprefix(_SQLITE))
    if panel not in FITTED_PANELS:
        changed["genes.panel"] = storage.absolute(panel)
    return override(config, changed, "the paths that tasks see")


def _absolute_weights(weights: str) -> str:
    return weights if weights in ("random", "imagenet") else storage.absolute(weights)


def _ships_working_folder() -> bool:
    return bool(ray.get_runtime_context().runtime_env.get("working_dir"))


def guarded(function: Callable[..., Result], *arguments: object) -> Result | UserError:
    """Calls a function in a Ray task; returns a user's error as a value, because Ray would wrap a raised exception in
    its own traceback.
    """
    try:
        return function(*arguments)
    except UserError as error:
        return error
    except FileNotFoundError as error:
        return StorageError(f"there is no file {error}")


@contextmanager
def ordered(limits: ExecutionResources | None = None) -> Iterator[None]:
    """Datasets made inside the block keep their order, stay within `limits` and draw no progress bars of their own."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # Copying the context warns about its own deprecated fields, and a limit on the retries of a process that dies
        # can only be set by a deprecated one (default: no limit).
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", RayDeprecationWarning)
        context = DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        if limits is not None:
            context.execution_options.resource_limits = limits
        with DataContext.current(context):
            yield
