"""`make bench-gpu TOY=1`: every step runs through on a CPU; a step that fails or is late stops no other."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
ABSENT = ("distlib", "docker", "faiss", "litdata", "py_spy", "scanpy", "virtualenv", "webdataset")
"""Packages of tests and tools, and those that a machine without a network is not brought."""
REFUSING = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Absent())
"""


@pytest.fixture
def gpu() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import gpu

    yield gpu
    sys.path.remove(str(ROOT / "benchmarks"))


def test_every_step_runs_on_a_cpu_without_packages_that_a_run_does_not_need(tmp_path: Path, gpu: ModuleType) -> None:
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent" / "sitecustomize.py").write_text(REFUSING)
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
    environment["PYTHONPATH"] = str(tmp_path / "absent")
    page = PAGE.read_text()
    command = [sys.executable, "benchmarks/gpu.py", "--toy", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (file,) = tmp_path.glob("*.json")
    results = json.loads(file.read_text())
    assert set(gpu.GPU_GOALS) <= set(results["figures"])
    for name in gpu.GPU_GOALS.keys() - {"H10"}:  # a CPU has no busy share
        values = [figure["values"] for found, figure in results["figures"].items() if found.startswith(name)]
        assert values, name
        assert all(value > 0 for one in values for value in one), name
    assert len(results["costs"]) == 3
    assert "faults" not in results
    assert all(f"| {name} " in done.stdout for name in gpu.GPU_GOALS)
    assert PAGE.read_text() == page


STATES = 'from goals import state; import sys, time; state("{id}", [{value}], "toy")\n'


def _script(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.py"
    path.write_text(text)
    return path


def test_a_step_that_fails_or_is_late_is_stated_and_stops_no_other(tmp_path: Path, gpu: ModuleType) -> None:
    texts = {
        "h01_fails": STATES.format(id="H1", value=9) + 'raise ValueError("no kernel")',
        "h06_h07_late": STATES.format(id="H6", value=7) + "time.sleep(60)",
        "h08_silent": 'raise ValueError("no slide")',
        "h11_good": STATES.format(id="H11", value=5),
    }
    file = tmp_path / "results.json"
    planned = [gpu.Step.of(_script(tmp_path, name, text)) for name, text in texts.items()]
    faults = gpu.run_steps(planned, gpu.Record(file, is_shown=False), limit_s=8)
    results = json.loads(file.read_text())
    values = {name: figure["values"] for name, figure in results["figures"].items()}
    assert values == {"H1": [9], "H6": [7], "H7": [], "H8": [], "H11": [5]}
    assert results["faults"] == {
        "h01_fails": "it ended with 1: ValueError: no kernel",
        "h06_h07_late": "it took longer than 8 s",
        "h08_silent": "it ended with 1: ValueError: no slide",
    }
    assert faults == [f"{name}: {reason}" for name, reason in results["faults"].items()]
    shown = gpu.page_of(results, file.name)
    assert "not measured: it took longer than 8 s" in shown
    assert "| H11 | time to the first batch of training on a warm cluster (toy) | 5 s |" in shown


def test_a_step_that_runs_again_has_no_fault(tmp_path: Path, gpu: ModuleType) -> None:
    file = tmp_path / "results.json"
    script = _script(tmp_path, "h04_x", "sys.exit(1)")
    assert gpu.run_steps([gpu.Step.of(script)], gpu.Record(file, is_shown=False))
    script.write_text(STATES.format(id="H4", value=3))
    assert gpu.run_steps([gpu.Step.of(script)], gpu.Record(file, is_shown=False)) == []
    assert json.loads(file.read_text())["faults"] == {}


def test_another_day_keeps_rows_with_their_date_and_another_torch_none(tmp_path: Path, gpu: ModuleType) -> None:
    about = {"gpu": None, "cores": 2, "cpu": "EPYC", "torch": "2.11"}
    former = gpu.results_file(tmp_path, about)
    gpu.Record(former, is_shown=False).figure(gpu.Figure("H4", [3.0], "toy", "2020-01-02"))
    former.rename(tmp_path / f"2020-01-02{former.name.removeprefix(gpu.today())}")
    record = gpu.Record(gpu.results_file(tmp_path, about), is_shown=False)
    record.figure(gpu.Figure("H11", [5.0], "toy"))
    assert len(list(tmp_path.glob("*.json"))) == 2
    assert [row.split("|")[-2].strip() for row in record.rows().splitlines()[2:]] == ["2020-01-02", gpu.today()]
    other = gpu.Record(gpu.results_file(tmp_path, about | {"torch": "2.12"}), is_shown=False)
    assert "H4" not in other.rows()


def test_a_figure_is_written_before_its_step_ends(tmp_path: Path, gpu: ModuleType) -> None:
    file = tmp_path / "results.json"
    waits = f'import json, pathlib\nwhile not pathlib.Path("{file}").exists(): time.sleep(0.05)\n'
    reads = f'print(json.loads(pathlib.Path("{file}").read_text())["figures"]["H4"]["values"], file=sys.stderr)\n'
    script = _script(tmp_path, "h04_x", STATES.format(id="H4", value=3) + waits + reads)
    assert gpu.run_steps([gpu.Step.of(script)], gpu.Record(file, is_shown=False), limit_s=20) == []


def test_no_step_starts_when_no_time_is_left(tmp_path: Path, gpu: ModuleType) -> None:
    script = _script(tmp_path, "h04_x", STATES.format(id="H4", value=3))
    record = gpu.Record(tmp_path / "results.json", is_shown=False)
    assert gpu.run_steps([gpu.Step.of(script)], record, total_s=0.0) == ["h04_x: no time was left of 0 s"]
    assert "not measured: no time was left" in record.rows()
