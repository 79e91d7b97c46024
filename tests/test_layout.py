"""The house keeps its shape: rooms, arrows, and what travels to a cluster."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import _launch
import pytest

from mclstexp.config import load_config, override

ROOT = Path(__file__).parents[1]
ROOMS = {
    "mclstexp": ROOT / "platform" / "mclstexp",
    "ingest": ROOT / "ingest",
    "tuning": ROOT / "tuning",
    "jobs": ROOT / "jobs",
}
FORBIDDEN = {
    "mclstexp": {"ingest", "tuning", "jobs", "_launch", "_cli"},
    "ingest": {"tuning", "jobs", "_launch", "_cli"},
    "tuning": {"ingest", "jobs", "_launch", "_cli"},
    "jobs": set(),
}
MAY_IMPORT_MLFLOW = {"metric_log.py", "tracking.py", "registered_model.py"}
SETTINGS = sorted(
    path for path in (ROOT / "jobs" / "configs").glob("*.yaml") if path.name not in ("markers.yaml", "sweep.yaml")
)
SOURCES = [path for room in ROOMS.values() for path in room.rglob("*.py")]


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_point_one_way(room: str) -> None:
    for path in ROOMS[room].rglob("*.py"):
        assert not _imports(path) & FORBIDDEN[room], path


def test_only_tracking_and_the_registered_model_import_mlflow() -> None:
    importers = {path.name for path in SOURCES if "mlflow" in _imports(path)}
    assert importers == MAY_IMPORT_MLFLOW


def test_platform_is_a_source_root_and_no_package() -> None:
    assert [path.name for path in (ROOT / "platform").iterdir() if path.name != "__pycache__"] == ["mclstexp"]
    script = "import platform; print(platform.python_version())"
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip()


def test_what_ships_to_a_cluster_is_what_a_wheel_holds() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert tuple(wheel["packages"]) == _launch.PACKAGES


def test_decode_tasks_start_without_torch() -> None:
    script = "import sys, mclstexp.data.spots, mclstexp.data.random_spots; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "platform")}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


def test_files_stay_short() -> None:
    others = [path for folder in ("benchmarks", "tests") for path in (ROOT / folder).glob("*.py")]
    lengths = {path.name: len(path.read_text().splitlines()) for path in [*SOURCES, *others]}
    assert {name: length for name, length in lengths.items() if length > 300} == {}


@pytest.mark.parametrize("job", sorted(path.name for path in ROOMS["jobs"].glob("[!_]*.py")))
def test_jobs_can_be_run_as_they_are(job: str) -> None:
    path = ROOMS["jobs"] / job
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/usr/bin/env python\n")
    assert job not in ("ingest.py", "tuning.py"), "Ray would let the script shadow the package"


@pytest.mark.parametrize("file", SETTINGS, ids=lambda path: path.name)
def test_shipped_settings_load(file: Path) -> None:
    load_config(file)


REFERENCE_VARIANTS = {
    "cscc": {"retrieval.k": 600, "retrieval.distance": "l2"},
    "alex10x": {
        "genes.input": "per_gene",
        "model.input_scaling": "bgr255",
        "model.test_turns": True,
        "model.position": "pixel_table",
        "train.epochs": 15,
        "train.augmentation": "flips",
        "retrieval.distance": "l2",
    },
}


@pytest.mark.parametrize("cohort", REFERENCE_VARIANTS)
def test_the_published_recipe_differs_between_cohorts_where_the_published_code_does(cohort: str) -> None:
    configs = ROOT / "jobs" / "configs"
    published = load_config(configs / "reference.yaml")
    assert published.tiles.min_tissue == 0
    assert published.tiles.encoding == "png"
    assert load_config(configs / f"reference_{cohort}.yaml") == override(published, REFERENCE_VARIANTS[cohort])


def test_what_git_ignores_is_anchored_so_that_ray_ships_every_module() -> None:
    patterns = (ROOT / ".gitignore").read_text().split()
    caches = ("__pycache__/", "*.egg-info/", ".pytest_cache/", ".mypy_cache/", ".ruff_cache/")
    assert all(pattern.startswith("/") or pattern in caches for pattern in patterns)


def test_the_working_dir_stays_small_enough_to_submit() -> None:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    sizes = [(ROOT / name).stat().st_size for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    assert sum(sizes) < 5 * 2**20
