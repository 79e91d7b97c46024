"""Ray starts in a short folder, is tried again, and its faults are one sentence."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from mclstexp import cluster
from mclstexp.config import Config
from mclstexp.errors import ResourceError

LONG = "slurm_jobdir_of_a_user_with_a_long_name/1355700/tmp.t0016.scratch.local.of.this.job"
JOB = "import _launch, _cli, mclstexp.config as c; _cli.run(lambda: (_launch.connect(c.Config(), 2), job()))"


@pytest.fixture
def starts(monkeypatch):
    """The arguments of each call of `ray.init`; a fault put into `faults` is raised by the next one."""
    calls, faults = [], []

    def init(**arguments):
        calls.append(arguments)
        if faults:
            raise faults.pop(0)

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # the tests' own Ray goes on
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    return calls, faults


@pytest.mark.odd
@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_long_temporary_folder_is_not_used_for_sockets(starts, monkeypatch, tmp_path, name):
    monkeypatch.setenv(name, str(tmp_path / LONG))
    cluster.connect(Config(), {})
    folder = Path(starts[0][0]["_temp_dir"]).parent
    assert folder == Path(f"/tmp/ray-{os.getuid()}")
    assert (folder.stat().st_mode & 0o777, folder.stat().st_uid) == (0o700, os.getuid())


@pytest.mark.odd
def test_a_temporary_folder_beyond_ascii_is_not_used_for_sockets(starts, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/tmp/ü")
    cluster.connect(Config(), {})
    assert starts[0][0]["_temp_dir"] == f"/tmp/ray-{os.getuid()}/ray"


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_short_temporary_folder_is_left_to_ray(starts, monkeypatch, name):
    monkeypatch.setenv(name, "/tmp/x")
    cluster.connect(Config(), {})
    assert starts[0][0]["_temp_dir"] is None


def test_a_folder_is_short_if_and_only_if_ray_takes_its_sockets(starts, monkeypatch):
    from ray._private.utils import validate_socket_filepath

    for length in range(20, 60):
        folder = "/" + "x" * (length - 1)
        monkeypatch.setenv("TMPDIR", folder)
        cluster.connect(Config(), {})
        if starts[0].pop()["_temp_dir"] is None:
            validate_socket_filepath(f"{folder}/ray{cluster._SOCKET}")
        else:
            assert length > 30


@pytest.mark.odd
@pytest.mark.parametrize("blocked", ["of another user's", "a link", "open to all"])
def test_no_short_folder_is_a_sentence(starts, monkeypatch, tmp_path, blocked):
    own = tmp_path / "ray-own"
    if blocked == "a link":
        own.symlink_to(tmp_path)
    elif blocked == "open to all":
        own.mkdir()
        own.chmod(0o777)
    else:
        own.mkdir()
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    monkeypatch.setattr(cluster, "_SHORT_FOLDER", str(own))
    monkeypatch.setenv("TMPDIR", str(tmp_path / LONG))
    with pytest.raises(ResourceError, match=r"TMPDIR=.* is too long and .*only you can.*set RAY_TMPDIR to a local fol"):
        cluster.connect(Config(), {})


@pytest.mark.odd
def test_a_slow_start_is_tried_once_more(starts):
    calls, faults = starts
    faults += [Exception("The current node timed out during startup.")]
    cluster.connect(Config(), {})
    assert len(calls) == 2


@pytest.mark.odd
@pytest.mark.parametrize(
    "fault", [Exception("The node timed out.\nTrace"), RuntimeError(""), PermissionError(13, "no")]
)
def test_a_start_that_fails_twice_is_a_sentence(starts, fault):
    calls, faults = starts
    faults += [fault, fault]
    with pytest.raises(
        ResourceError, match=r"Ray did not start on this machine \(load .*tried 2 times: .+; start"
    ) as seen:
        cluster.connect(Config(), {})
    assert len(calls) == 2
    assert str(seen.value).isprintable()


@pytest.mark.odd
@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "nohost.invalid:6379", "http://x:y"])
def test_a_cluster_that_does_not_answer_is_a_sentence(address):
    with socket.socket() as free:  # bound, and nothing listens
        free.bind(("127.0.0.1", 0))
        done = _run("pass", RAY_ADDRESS=address.format(free.getsockname()[1]))
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: cannot join the Ray cluster RAY_ADDRESS=")
    assert line.endswith("unset RAY_ADDRESS to work here")


@pytest.mark.odd
def test_cpus_are_those_of_the_container(monkeypatch):
    monkeypatch.setattr("ray._private.utils._get_docker_cpus", lambda: 3.0)
    assert cluster.num_local_cpus(Config(), 2) == 3
    monkeypatch.setattr("ray._private.utils._get_docker_cpus", lambda: 0.5)
    assert cluster.num_local_cpus(Config(), 2) == 2


def _run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    jobs = Path(__file__).parents[1] / "jobs"
    whole = f"import sys; sys.path.insert(0, {str(jobs)!r})\ndef job():\n {code}\n{JOB}"
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-c", whole], capture_output=True, text=True, timeout=240, check=False, env=kept | environment
    )


@pytest.mark.odd
@pytest.mark.ray
@pytest.mark.slow
def test_a_job_works_under_a_long_temporary_folder(tmp_path):
    (tmp_path / LONG).mkdir(parents=True)
    done = _run("import ray; print(ray.get(ray.remote(lambda: 3).remote()))", TMPDIR=str(tmp_path / LONG))
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr


@pytest.mark.odd
@pytest.mark.ray
@pytest.mark.slow
def test_a_start_that_runs_into_its_limit_ends_with_code_2():
    done = _run("pass", RAY_gcs_server_port_wait_time_s="0")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: Ray did not start on this machine")
