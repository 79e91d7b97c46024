"""The house keeps its shape: rooms, arrows, and what travels to a cluster."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

import _launch
import pytest

from mclstexp.config import load_config, override

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = {"mclstexp": ROOT / "platform", "ingest": ROOT, "tuning": ROOT, "jobs": ROOT}
ROOMS_BEFORE = {
    "root": set(),
    "slides": {"root"},
    "data": {"root", "slides"},
    "model": {"root", "slides", "data"},
    "evaluation": {"root", "slides", "data", "model"},
    "training": {"root", "slides", "data", "model", "evaluation"},
    "prediction": {"root", "slides", "data", "model", "evaluation"},
    "report": {"root", "slides", "data", "model", "evaluation"},
    "ingest": {"root", "slides", "data"},
    "tuning": {"root", "slides", "data", "model", "evaluation", "training"},
    "jobs": {"root", "slides", "data", "model", "evaluation", "training", "prediction", "report", "ingest", "tuning"},
}
"""The rooms that each room may import; `root` are the modules directly in `mclstexp`."""
MAY_IMPORT_MLFLOW = {"tracking.py", "pyfunc.py"}
SETTINGS = sorted(
    path for path in (ROOT / "jobs" / "configs").glob("*.yaml") if path.name not in ("markers.yaml", "sweep.yaml")
)
SOURCES = [path for package, root in SOURCE_ROOTS.items() for path in (root / package).rglob("*.py")]


def _module_paths() -> dict[str, Path]:
    """Returns the file of each module, by its dotted name."""
    paths = {}
    for package, root in SOURCE_ROOTS.items():
        for path in (root / package).rglob("*.py"):
            name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            paths[name] = path
    return paths


PATHS = _module_paths()


def _imported(module: str, texts: Mapping[str, str]) -> set[str]:
    """Returns the modules of `texts` that one of them imports, at its top or anywhere else.

    Jobs import `_cli` and `_launch` by their bare names; the registry of readers names modules in its entries.
    """
    names = set()
    for node in ast.walk(ast.parse(texts[module])):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (members & set(texts)) or {node.module}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_reader":
            names |= {f"{module}.{value.value}" for value in node.args if isinstance(value, ast.Constant)}
    return {f"jobs.{name}" if name.startswith("_") else name for name in names} & set(texts)


def _run(module: str, texts: Mapping[str, str]) -> set[str]:
    """Returns the modules that run because of a module: what it imports, and the packages that hold those.

    Packages that hold the module itself have begun to run before it.
    """
    imported = _imported(module, texts)
    packages = {package for other in imported for package in _packages(other)}
    return imported | (packages & set(texts)) - _packages(module)


def _packages(module: str) -> set[str]:
    """Returns the names of all packages that hold a module."""
    parts = module.split(".")
    return {".".join(parts[:depth]) for depth in range(1, len(parts))}


def _room(module: str) -> str:
    package, _, rest = module.partition(".")
    if package == "mclstexp":
        return rest.partition(".")[0] if rest.partition(".")[0] in ROOMS_BEFORE else "root"
    return package


def _backward_arrows(texts: Mapping[str, str]) -> list[str]:
    """Returns imports of a room that is not before the importer's own."""
    return [
        f"{module} -> {other}"
        for module in texts
        for other in sorted(_imported(module, texts))
        if _room(other) != _room(module) and _room(other) not in ROOMS_BEFORE[_room(module)]
    ]


def _circles(texts: Mapping[str, str]) -> list[str]:
    """Returns the modules that import themselves by way of others."""
    reached = {module: _run(module, texts) - {module} for module in texts}
    for _ in texts:
        longer = {module: found.union(*(reached[other] for other in found)) for module, found in reached.items()}
        if longer == reached:
            break
        reached = longer
    return sorted(module for module, found in reached.items() if module in found)


TEXTS = {module: path.read_text() for module, path in PATHS.items()}


def test_rooms_import_only_those_before_them() -> None:
    assert _backward_arrows(TEXTS) == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert _circles(TEXTS) == []


@pytest.mark.parametrize(
    ("module", "planted", "arrow"),
    [
        ("mclstexp.data.table", "from mclstexp.model import bank", "mclstexp.data.table -> mclstexp.model.bank"),
        ("mclstexp.storage", "import mclstexp.data.schema", "mclstexp.storage -> mclstexp.data.schema"),
        (
            "mclstexp.prediction.plan",
            "def late():\n    from ingest.plan import make_plan",
            "mclstexp.prediction.plan -> ingest.plan",
        ),
        ("ingest.section", "from mclstexp.model.towers import TwoTowers", "ingest.section -> mclstexp.model.towers"),
        ("tuning.study", "from mclstexp.prediction.run import Report", "tuning.study -> mclstexp.prediction.run"),
    ],
)
def test_an_arrow_backwards_is_found(module: str, planted: str, arrow: str) -> None:
    assert _backward_arrows(TEXTS | {module: f"{TEXTS[module]}\n{planted}\n"}) == [arrow]


def test_a_circle_is_found_even_inside_a_function() -> None:
    assert "mclstexp.data.schema" in TEXTS["mclstexp.data.table"], "the circle needs one direction"
    planted = "def late():\n    from mclstexp.data.table import read_counts\n"
    found = _circles(TEXTS | {"mclstexp.data.schema": TEXTS["mclstexp.data.schema"] + planted})
    assert {"mclstexp.data.schema", "mclstexp.data.table"} <= set(found)


def test_readers_count_as_imported_by_their_registry() -> None:
    readers = {"legacy_st", "visium", "h5ad"}
    assert {f"ingest.readers.{name}" for name in readers} <= _imported("ingest.readers", TEXTS)
    planted = "from ingest.readers import READERS\n"
    found = _circles(TEXTS | {"ingest.readers.h5ad": TEXTS["ingest.readers.h5ad"] + planted})
    assert {"ingest.readers", "ingest.readers.h5ad"} <= set(found)


def test_a_circle_by_way_of_a_package_is_found() -> None:
    package, module = "mclstexp.prediction.writers", "mclstexp.prediction.forecast"
    texts = TEXTS | {
        package: f"from {module} import Rates\n",
        module: f"{TEXTS[module]}\nfrom {package}.slide import PredictedSlide\n",
    }
    assert {package, module} <= set(_circles(texts))


def test_only_tracking_and_pyfunc_import_mlflow() -> None:
    pattern = re.compile(r"^\s*(?:from|import) mlflow\b", re.MULTILINE)
    assert {path.name for path in SOURCES if pattern.search(path.read_text())} == MAY_IMPORT_MLFLOW


def test_platform_is_a_source_root_and_no_package() -> None:
    assert [path.name for path in (ROOT / "platform").iterdir() if path.name != "__pycache__"] == ["mclstexp"]
    script = "import platform; print(platform.python_version())"
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip()


def test_what_ships_to_a_cluster_is_what_a_wheel_holds() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert tuple(wheel["packages"]) == _launch.PACKAGES


@pytest.mark.parametrize(
    "module",
    [
        "ingest.header",
        "ingest.section",
        "mclstexp.data.features",
        "mclstexp.data.random_spots",
        "mclstexp.data.spots",
        "mclstexp.prediction.inspect",
        "mclstexp.prediction.tile_reader",
    ],
)
def test_tasks_that_read_slides_or_decode_tiles_start_without_torch(module: str) -> None:
    script = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


def test_files_stay_short() -> None:
    others = [path for folder in ("benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]
    lengths = {path.name: len(path.read_text().splitlines()) for path in [*SOURCES, *others]}
    assert {name: length for name, length in lengths.items() if length > 500} == {}


@pytest.mark.parametrize("job", sorted(path.name for path in (ROOT / "jobs").glob("[!_]*.py")))
def test_jobs_can_be_run_as_they_are(job: str) -> None:
    path = ROOT / "jobs" / job
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
