"""A run that does not fit is refused with numbers and the setting to change, and all nodes must see its paths."""

import time

import pytest

from mclstexp import cluster
from mclstexp.config import Config, override
from mclstexp.errors import ResourceError
from mclstexp.model.tile_stream import num_embedders

LOCAL = ["--data tiles", "--out s3://bucket/runs"]


def _node(pool: str | None = None, **amounts: float) -> dict:
    """An alive entry of `ray.nodes()`."""
    return {"Alive": True, "Resources": amounts, "Labels": {"pool": pool} if pool else {}}


def _config(**settings: object) -> Config:
    named = {name.replace("_", ".", 1): value for name, value in settings.items()}
    return override(Config(), {"train.batch_sentences": 12, "train.cpus_per_worker": 1} | named)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The cluster's nodes, to be filled by the test."""
    alive: list[dict] = []
    monkeypatch.setattr(cluster, "_alive_nodes", lambda: alive)
    return alive


@pytest.mark.parametrize(
    ("alive", "settings"),
    [
        ([_node(CPU=2)], {}),
        ([_node(CPU=3), _node(CPU=3)], {"train_num_workers": 2, "train_cpus_per_worker": 2}),
        ([_node(CPU=0), _node(CPU=4, GPU=1), _node(CPU=8, GPU=2)], {"train_num_workers": 3, "train_use_gpu": True}),
        ([_node(CPU=2), _node("cpu", CPU=1)], {"cluster_data_pool": "cpu"}),
    ],
)
def test_what_fits_is_let_through(nodes: list[dict], alive: list[dict], settings: dict[str, object]) -> None:
    nodes += alive
    cluster.require(_config(**settings))


@pytest.mark.parametrize(
    ("alive", "settings", "message"),
    [
        ([_node(CPU=2)], {"train_num_workers": 2}, "requests 3 CPUs .* has 2; .* lower train.num_workers"),
        (
            [_node(CPU=3), _node(CPU=3)],
            {"train_cpus_per_worker": 4},
            r"1 worker\(s\) of 4 CPU\(s\), the cluster's 2 node\(s\) with 6 CPU\(s\) hold 0; .*cpus_per_worker",
        ),
        ([_node(CPU=3), _node(CPU=3)], {"train_num_workers": 3, "train_cpus_per_worker": 2}, "hold 2"),
        (
            [_node(CPU=16, GPU=1)],
            {"train_num_workers": 2, "train_use_gpu": True},
            r"requests 2 GPU\(s\) .* has 1; .*train.use_gpu=false",
        ),
        ([_node(CPU=16), _node(CPU=1, GPU=2)], {"train_num_workers": 2, "train_use_gpu": True}, "hold 1"),
        (
            [_node("cpu", CPU=2), _node(CPU=2)],
            {"train_num_workers": 3, "cluster_data_pool": "cpu"},
            r"1 node\(s\) outside cluster.data_pool=cpu with 2 CPU\(s\) hold 2",
        ),
        (
            [_node("gpu", CPU=8), _node("cpu", CPU=0)],
            {"cluster_data_pool": "cpu"},
            r"pool=cpu \(found: gpu\); start nodes with --labels pool=cpu",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(
    nodes: list[dict], alive: list[dict], settings: dict[str, object], message: str
) -> None:
    nodes += alive
    with pytest.raises(ResourceError, match=message):
        cluster.require(_config(**settings))


@pytest.mark.parametrize("num_workers", [1, 2, 6])
@pytest.mark.parametrize("cpus_per_worker", [1, 3])
def test_a_ray_on_this_machine_holds_every_run(nodes: list[dict], num_workers: int, cpus_per_worker: int) -> None:
    config = _config(train_num_workers=num_workers, train_cpus_per_worker=cpus_per_worker)
    nodes.append(_node(CPU=cluster.local_ray(config)["num_cpus"]))
    cluster.require(config)


@pytest.mark.parametrize(
    ("alive", "settings", "expected"),
    [
        ([_node(CPU=8)], {}, 4),
        ([_node(CPU=3), _node(CPU=3), _node(CPU=1)], {}, 2),
        ([_node(CPU=8), _node(CPU=8)], {"train_num_workers": 4}, 2),
        ([_node(CPU=3)], {"train_num_workers": 2}, 1),
        ([_node(CPU=8, GPU=1)], {"train_use_gpu": True, "train_gpus_per_worker": 0.5}, 2),
        ([_node(CPU=16, GPU=2)], {"train_use_gpu": True, "train_gpus_per_worker": 0.4}, 4),
        ([_node("cpu", CPU=8), _node(CPU=2), _node(CPU=3)], {"cluster_data_pool": "cpu"}, 5),
    ],
)
def test_runs_at_once_are_those_whose_workers_each_fit_a_node_with_their_data(
    nodes: list[dict], alive: list[dict], settings: dict[str, object], expected: int
) -> None:
    nodes += alive
    assert cluster.runs_at_once(_config(cluster_data_cpus=1, **settings)) == expected


@pytest.mark.parametrize(
    ("alive", "settings"),
    [
        ([_node(CPU=2)], {}),
        ([_node(CPU=4)], {}),
        ([_node(CPU=6)], {}),
        ([_node(CPU=9)], {"train_cpus_per_worker": 2}),
        ([_node(CPU=16)], {"train_cpus_per_worker": 3}),
        ([_node(CPU=3), _node(CPU=3), _node(CPU=1)], {}),
        ([_node(CPU=64), _node(CPU=64)], {"train_num_workers": 4, "train_cpus_per_worker": 3}),
        ([_node("cpu", CPU=1), _node(CPU=2)], {"cluster_data_pool": "cpu"}),
        ([_node("cpu", CPU=8), _node(CPU=2), _node(CPU=3)], {"cluster_data_pool": "cpu"}),
    ],
)
def test_runs_side_by_side_leave_a_cpu_to_read_on_whether_they_train_or_embed(
    nodes: list[dict], alive: list[dict], settings: dict[str, object]
) -> None:
    nodes += alive
    config = _config(cluster_data_cpus=1, **settings)
    runs, share = cluster.runs_at_once(config), cluster.share_of_run(config)
    embedders = num_embedders(int(share["cpu"]), 0)
    training = config.train.num_workers * config.train.cpus_per_worker
    for embedding in range(1, runs + 1):
        held = embedding * embedders + (runs - embedding) * training
        assert held < sum(node["Resources"]["CPU"] for node in alive), f"{embedding} of {runs} runs embed"


def test_a_run_alone_embeds_with_half_of_the_cpus_or_with_every_gpu(nodes: list[dict]) -> None:
    nodes += [_node(CPU=5), _node(CPU=4)]
    alone = _config(train_num_workers=4)
    assert num_embedders(int(cluster.share_of_run(alone)["cpu"]), 0) == 4
    nodes.append(_node(CPU=8, GPU=4))
    assert cluster.share_of_run(_config(train_num_workers=4, train_use_gpu=True)) == {"cpu": 17, "gpu": 4}
    assert cluster.share_of_run(_config(train_num_workers=2, train_use_gpu=True)) == {"cpu": 8, "gpu": 2}


def test_workers_stay_off_the_pool_that_decodes_for_them() -> None:
    assert cluster.worker_nodes(_config()) is None
    assert cluster.worker_nodes(_config(cluster_data_pool="cpu")) == {"pool": "!cpu"}


@pytest.mark.parametrize(
    ("settings", "cores", "expected"),
    [
        ({}, 8, 8),
        ({"train_cpus_per_worker": 3}, 8, 3),
        ({"train_num_workers": 2}, 8, 1),
        ({"cluster_local_cpus": 6, "cluster_data_cpus": 2}, 8, 4),
        ({"cluster_local_cpus": 2}, 1, 1),
    ],
)
def test_the_only_worker_here_has_all_cores(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], cores: int, expected: int
) -> None:
    monkeypatch.setattr(cluster, "get_num_cpus", lambda **_: cores)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    config = _config(**{"train_cpus_per_worker": None, **settings})
    assert cluster.worker_cpus(config) == expected
    assert cluster.side_by_side(config).train.cpus_per_worker == (config.train.cpus_per_worker or 1)


def test_a_worker_on_a_running_cluster_has_one_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert cluster.worker_cpus(_config(train_cpus_per_worker=None)) == 1


def test_all_cores_leave_a_logical_cpu_for_the_data(nodes: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "get_num_cpus", lambda **_: 8)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    config = _config(train_cpus_per_worker=None)
    nodes.append(_node(CPU=cluster.local_ray(config)["num_cpus"]))
    assert nodes[0]["Resources"]["CPU"] == 9
    cluster.require(config)


def test_the_number_of_local_cpus_can_be_set() -> None:
    started = cluster.local_ray(_config(cluster_local_cpus=5, cluster_object_store_mb=200))
    assert (started["num_cpus"], started["object_store_memory"]) == (5, 200 * 2**20)


def test_the_plan_names_what_a_run_claims() -> None:
    plan = cluster.plan(_config(train_num_workers=4, train_use_gpu=True, train_cpus_per_worker=2))
    assert plan.startswith("4 training worker(s) with 1 GPU and 2 CPU(s) each")


@pytest.mark.parametrize(
    "alive", [[_node(CPU=4), _node(CPU=4)], [_node(CPU=0)]], ids=["two nodes", "head and none yet"]
)
def test_paths_that_only_one_node_sees_are_refused(nodes: list[dict], alive: list[dict]) -> None:
    nodes += alive
    with pytest.raises(
        ResourceError, match=r"--data tiles, tracking.uri=sqlite:///mlflow.db; .*storage.shared_paths"
    ) as e:
        cluster.require_shared(Config(), LOCAL)
    assert "s3://bucket" not in str(e.value)
    with pytest.raises(ResourceError, match="one node can see --data tiles"):
        cluster.require_shared(Config(), LOCAL, uses_tracking=False)
    cluster.require_shared(override(Config(), {"storage.shared_paths": True}), LOCAL)
    cluster.require_shared(override(Config(), {"tracking.uri": "http://mlflow:5000"}), ["--data s3://bucket/tiles"])


def test_one_node_may_use_its_own_paths(nodes: list[dict]) -> None:
    nodes.append(_node(CPU=4))
    cluster.require_shared(Config(), LOCAL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, ""),
        ({"predict_num_cpus": 6, "predict_num_gpus": 1}, ""),
        ({"predict_num_cpus": 7, "predict_num_gpus": 1}, r"requests 7 CPU\(s\), the cluster has 6; lower predict\.num"),
        ({"predict_num_gpus": 2}, r"requests 2 GPU\(s\), the cluster has 1; .*cluster\.wait_s"),
    ],
)
def test_prediction_is_refused_what_the_cluster_lacks(nodes: list[dict], settings: dict, message: str) -> None:
    nodes += [_node(CPU=0), _node(CPU=2), _node(CPU=4, GPU=1)]
    if not message:
        cluster.require_to_predict(_config(**settings))
        return
    with pytest.raises(ResourceError, match=message):
        cluster.require_to_predict(_config(**settings))


@pytest.mark.ray
def test_a_real_cluster_is_asked_for_nodes_and_refused_in_time(ray_session: None) -> None:
    cluster.require(_config(train_num_workers=4))
    started = time.monotonic()
    with pytest.raises(
        ResourceError, match=r"requests 7 CPUs .* the cluster has 6; the data stream would starve: lower train\.num"
    ):
        cluster.require(_config(train_num_workers=6, cluster_wait_s=1.5))
    assert 1.5 <= time.monotonic() - started < 15
    started = time.monotonic()
    with pytest.raises(ResourceError, match=r"requests 1 GPU\(s\), the cluster has 0"):
        cluster.require_to_predict(_config(predict_num_gpus=1, cluster_wait_s=1.5))
    assert 1.5 <= time.monotonic() - started < 15
