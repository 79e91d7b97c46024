"""What knows Ray's cluster: its resources, files as tasks see them, ordered data streams, retries and guarded tasks.

Never hang: before anything starts, a run's request is compared with the cluster. Training workers that claim every CPU
would starve the data stream for ever, with a warning at most, so at least one CPU must be left. Where an autoscaler can
add nodes, it is asked for the missing ones, and `cluster.wait_s` limits the wait. The check counts what nodes have, not
what is free: other jobs on the cluster are not seen.
"""

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
import ray.data
from ray.data import DataContext, ExecutionResources
from ray.util.annotations import RayDeprecationWarning

from mclstexp import storage
from mclstexp.config import Config, override
from mclstexp.errors import ResourceError, StorageError, UserError
from mclstexp.settings import FITTED_PANELS

_POLL_S = 1.0
_ROUNDING = 1e-9
Node = dict[str, Any]
"""An entry of `ray.nodes()`."""
_Bundles = Sequence[tuple[dict[str, float], dict[str, str]]]
"""What is claimed together on one node, and the labels that the node must have."""


def local_ray(config: Config, min_cpus: int = 2) -> dict[str, object]:
    """Returns the arguments of `ray.init` for a Ray on this machine: logical CPUs enough for the run, at least some."""
    train = config.train
    needed = train.num_workers * (train.cpus_per_worker + config.cluster.data_cpus)
    num_cpus = config.cluster.local_cpus or max(os.cpu_count() or 1, needed, min_cpus)
    return {
        "address": "local",
        "num_cpus": num_cpus,
        "object_store_memory": config.cluster.object_store_mb * 2**20,
        "include_dashboard": False,
    }


def worker_resources(config: Config) -> dict[str, float]:
    """Returns what a training worker claims."""
    claimed: dict[str, float] = {"CPU": config.train.cpus_per_worker}
    return claimed | {"GPU": config.train.gpus_per_worker} if config.train.use_gpu else claimed


def worker_nodes(config: Config) -> dict[str, str] | None:
    """Returns the label selector of training workers: they stay off the nodes that decode for them."""
    return {"pool": f"!{config.cluster.data_pool}"} if config.cluster.data_pool else None


def plan(config: Config) -> str:
    """Returns what a training run asks for, in words."""
    train, gpus = config.train, f"{config.train.gpus_per_worker:g} GPU and " if config.train.use_gpu else ""
    return (
        f"{train.num_workers} training worker(s) with {gpus}{train.cpus_per_worker} CPU(s) each, "
        f"{config.cluster.data_cpus} CPU(s) each for its data stream (at least 1 in all), "
        f"{train.max_failures} restart(s) after failures"
    )


def require(config: Config) -> None:
    """Checks that the cluster can hold the training workers and leaves a CPU for their data.

    Raises:
        ResourceError: it cannot, even after `cluster.wait_s`; names the numbers and the setting to change.
    """
    pool = {"pool": config.cluster.data_pool} if config.cluster.data_pool else {}
    bundles = [(worker_resources(config), worker_nodes(config) or {})] * config.train.num_workers
    _require(lambda nodes: _lack(config, nodes), [*bundles, ({"CPU": 1}, pool)], config.cluster.wait_s)


def require_to_predict(config: Config) -> None:
    """Checks that the cluster has the CPUs and GPUs that prediction was told to use.

    Raises:
        ResourceError: it has not, even after `cluster.wait_s`; names the numbers and the settings to change.
    """
    asked = {"CPU": config.predict.num_cpus or 0, "GPU": config.predict.num_gpus or 0}
    bundles: _Bundles = [({kind: 1.0}, {}) for kind, number in asked.items() for _ in range(number)]
    _require(lambda nodes: _lack_to_predict(asked, nodes), bundles, config.cluster.wait_s)


def runs_at_once(config: Config) -> int:
    """Returns how many such training runs with their data streams the cluster holds side by side, at least 1."""
    data_cpus = 0 if config.cluster.data_pool else config.cluster.data_cpus
    slots = sum(_slots(config, node, data_cpus) for node in _hosts(config, _alive_nodes()))
    return max(1, slots // config.train.num_workers)


def share_of_run(config: Config) -> dict[str, float]:
    """Returns the `cpu` and `gpu` that each of `runs_at_once` may use to embed tiles, while the others train or embed.

    Embedders that take half of it (`embed.num_embedders`) leave a CPU to read tiles on, whatever the other runs do.
    Two CPUs at least, and a GPU where there is one: without a CPU for each a run could never embed.
    """
    nodes, runs = _alive_nodes(), runs_at_once(config)
    cpus, gpus = (sum(_has(node, kind) for node in nodes) for kind in ("CPU", "GPU"))
    return {"cpu": max(2, cpus // runs), "gpu": max(1, gpus // runs)}


def require_shared(config: Config, uris: Iterable[str], uses_tracking: bool = True) -> None:
    """Refuses places that only one node can see where the work is done on several, or on another than the head.

    Args:
        uris: paths or URIs, each with the name of its argument before it, such as `--out s3://bucket/runs`.
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
        size = f"{len(nodes)} nodes" if len(nodes) > 1 else "a head that takes no work and other nodes to come"
        raise ResourceError(
            f"the cluster has {size}, and {', '.join(local)} can be seen from one only; use s3:// and an "
            "MLflow server, or storage.shared_paths=true where all nodes mount the same paths"
        )


def _alive_nodes() -> list[Node]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _require(lack: Callable[[list[Node]], str], bundles: _Bundles, wait_s: float) -> None:
    """Raises what `lack` says of the nodes, after waiting for an autoscaler to add some."""
    fault = lack(_alive_nodes())
    if fault and wait_s:
        deadline = time.monotonic() + wait_s
        with _asked_for(bundles):
            while (fault := lack(_alive_nodes())) and time.monotonic() < deadline:
                time.sleep(_POLL_S)
    if fault:
        raise ResourceError(fault)


@contextmanager
def _asked_for(bundles: _Bundles) -> Iterator[None]:
    """Asks an autoscaler for the run's nodes: it acts on requests alone, and nothing of the run is pending yet."""
    from ray.autoscaler.sdk import request_resources

    resources, selectors = ([*each] for each in zip(*bundles, strict=True))
    request_resources(bundles=resources, bundle_label_selectors=selectors)
    try:
        yield
    finally:
        request_resources(bundles=[])  # or the nodes would never go


def _lack_to_predict(asked: Mapping[str, int], nodes: list[Node]) -> str:
    """Returns what of the asked CPUs and GPUs is not there, or nothing."""
    there = {kind: sum(_has(node, kind) for node in nodes) for kind in asked}
    lacking = [kind for kind in asked if there[kind] < asked[kind]]
    if not lacking:
        return ""
    found = " and ".join(f"{asked[kind]} {kind}(s), the cluster has {there[kind]}" for kind in lacking)
    return (
        f"prediction asks for {found}; lower predict.num_cpus and predict.num_gpus, or leave them empty to take what "
        "is there, or raise cluster.wait_s where nodes can be added"
    )


def _lack(config: Config, nodes: list[Node]) -> str:
    """Returns why the run does not fit, or nothing."""
    train, pool = config.train, config.cluster.data_pool
    total_cpus, total_gpus = (sum(_has(node, kind) for node in nodes) for kind in ("CPU", "GPU"))
    if train.use_gpu and total_gpus < train.num_workers * train.gpus_per_worker:
        return (
            f"the run asks for {train.num_workers * train.gpus_per_worker:g} GPU(s) (train.num_workers, "
            f"train.gpus_per_worker), the cluster has {total_gpus}; lower "
            "train.num_workers, or set train.use_gpu=false, or raise cluster.wait_s where nodes can be added"
        )
    hosts = _hosts(config, nodes)
    slots = sum(_slots(config, node) for node in hosts)
    if slots < train.num_workers:
        outside = f" outside cluster.data_pool={pool}" if pool else ""
        return (
            f"the run asks for {train.num_workers} worker(s) of {train.cpus_per_worker} CPU(s), the cluster's "
            f"{len(hosts)} node(s){outside} with {sum(_has(node, 'CPU') for node in hosts)} CPU(s) hold {slots}; lower "
            "train.num_workers or "
            "train.cpus_per_worker, or raise cluster.local_cpus on one machine"
        )
    needed = train.num_workers * train.cpus_per_worker + 1
    if total_cpus < needed:
        return (
            f"the run asks for {needed} CPUs ({train.num_workers} worker(s) of {train.cpus_per_worker} and 1 for their "
            f"data), the cluster has {total_cpus}; the data stream would starve: lower train.num_workers or "
            "train.cpus_per_worker, or raise cluster.local_cpus on one machine"
        )
    pools = {node["Labels"].get("pool") for node in nodes if _has(node, "CPU")}
    if pool and pool not in pools:
        return (
            f"cluster.data_pool={pool}, and no node with CPUs has the label pool={pool} (found: "
            f"{', '.join(sorted(filter(None, pools))) or 'none'}); start nodes with --labels pool={pool}, or leave "
            "cluster.data_pool empty, or raise cluster.wait_s where nodes can be added"
        )
    return ""


def _has(node: Node, kind: str) -> int:
    return int(node["Resources"].get(kind, 0))


def _hosts(config: Config, nodes: list[Node]) -> list[Node]:
    """Returns the nodes that training workers may go to."""
    pool = config.cluster.data_pool
    return [node for node in nodes if not pool or node["Labels"].get("pool") != pool]


def _slots(config: Config, node: Node, data_cpus: int = 0) -> int:
    """Returns how many training workers fit on a node, each with so many CPUs for its data."""
    slots = _has(node, "CPU") // (config.train.cpus_per_worker + data_cpus)
    if not config.train.use_gpu:
        return slots
    each = int(1 / config.train.gpus_per_worker + _ROUNDING)  # a worker's share lies on one GPU
    return min(slots, _has(node, "GPU") * each)


_SQLITE = "sqlite:///"


def config_for_tasks(config: Config) -> Config:
    """Returns the configuration with its local files named absolutely. Ray must be connected.

    It stays as it is where the job brings a working folder along (`ray job submit`): tasks begin in a copy of it.
    """
    return config if _have_working_folder() else with_absolute_paths(config)


def weights_for_tasks(weights: str | None) -> str | None:
    """Returns the name of image weights (as `model.image_weights`) in the same way."""
    return weights if weights is None or _have_working_folder() else _absolute_weights(weights)


def with_absolute_paths(config: Config) -> Config:
    """Returns the configuration with its local files named absolutely, by the folder of this process."""
    database, weights, panel = config.tracking.uri, config.model.image_weights, config.genes.panel
    changed: dict[str, object] = {"model.image_weights": _absolute_weights(weights)}
    if database.startswith(_SQLITE):
        changed["tracking.uri"] = _SQLITE + os.path.abspath(database.removeprefix(_SQLITE))
    if panel not in FITTED_PANELS:
        changed["genes.panel"] = storage.absolute(panel)
    return override(config, changed, "the paths that tasks see")


def _absolute_weights(weights: str) -> str:
    return weights if weights in ("random", "imagenet") else storage.absolute(weights)


def _have_working_folder() -> bool:
    return bool(ray.get_runtime_context().runtime_env.get("working_dir"))


MAX_RETRIES = 2
"""Restarts of a task or actor whose process died."""
Result = TypeVar("Result")


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
    """Datasets made inside keep their order, stay within `limits` and draw no progress bars of their own."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # Copying the context warns of its own deprecated fields, and bounded retries of a process that dies have no
        # other way in than a deprecated one (default: for ever).
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", RayDeprecationWarning)
        context = DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        if limits is not None:
            context.execution_options.resource_limits = limits
        with DataContext.current(context):
            yield
