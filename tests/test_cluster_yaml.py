"""cluster.yaml is what Ray's launcher takes, and asks for a token."""

import json
from pathlib import Path

import jsonschema
import ray
import yaml

ROOT = Path(__file__).parents[1]
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_it_fits_rays_own_schema_and_checks() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((Path(ray.__path__[0]) / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(CLUSTER, schema)
    validate_config(prepare_config(CLUSTER))


def test_head_holds_no_work_and_the_pools_are_spot() -> None:
    types = CLUSTER["available_node_types"]
    assert types[CLUSTER["head_node_type"]]["resources"] == {"CPU": 0}
    pools = {name: kind for name, kind in types.items() if name != CLUSTER["head_node_type"]}
    assert {kind["labels"]["pool"] for kind in pools.values()} == {"cpu", "gpu"}
    assert pools["cpu"]["min_workers"] >= 1, "Ray's launcher starts no node because of a label"
    assert all(kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"} for kind in pools.values())


def test_every_node_names_an_image_and_a_profile_and_knows_the_buckets_region() -> None:
    nodes = [kind["node_config"] for kind in CLUSTER["available_node_types"].values()]
    assert all(node["ImageId"].startswith("ami-") for node in nodes), "Ray's default image is too old"
    assert all(node["IamInstanceProfile"]["Name"] for node in nodes), "Ray gives its own profile to the head alone"
    region = f"AWS_REGION={CLUSTER['provider']['region']}"
    starts = [CLUSTER[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker")]
    assert all(region in command for command in (*starts, CLUSTER["setup_commands"][-1]))


def test_every_ray_command_carries_the_token_mode_and_the_dashboard_stays_on_loopback() -> None:
    commands = CLUSTER["head_start_ray_commands"] + CLUSTER["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in command for command in commands)
    assert "/home/ubuntu/.ray/auth_token" in CLUSTER["file_mounts"]
    assert any("--dashboard-host=127.0.0.1" in command for command in commands)


def test_nodes_install_the_same_versions_as_everybody() -> None:
    assert "./constraints.txt" in CLUSTER["file_mounts"].values()
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"ray=={ray.__version__}" in pins
    assert all("==" in pin and "/" not in pin for pin in pins)
