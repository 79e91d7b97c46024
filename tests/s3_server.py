"""A SeaweedFS process on loopback as S3 server, with what it needs to start."""

import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path


class S3Server:
    """An S3 server that may be killed and started again: what it holds lies on disk."""

    def __init__(self, endpoint: str, folder: Path) -> None:
        self._endpoint, self._folder = endpoint, folder
        self._command = _seaweed(folder, int(endpoint.rsplit(":", 1)[1]))

    def start(self) -> None:
        """Starts it and waits until it answers."""
        log = self._folder / "log"
        with open(log, "a") as file:
            self._process = subprocess.Popen(self._command, stdout=file, stderr=file, cwd=self._folder)
        _wait_until_healthy(self._endpoint, self._process, log)

    def kill(self) -> None:
        """Kills it."""
        self._process.kill()
        self._process.wait()


def _seaweed(folder: Path, s3_port: int) -> list[str]:
    binary = Path(sys.executable).parent / "weed"
    ports = {name: free_port() for name in ("master", "volume", "filer", "admin")}
    return [
        str(binary),
        "mini",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        *(f"-{name}.port={port}" for name, port in ports.items()),
        f"-s3.port={s3_port}",
        # Each bucket takes a volume; by itself the server allows as many as there are free GiB on the disk.
        "-volume.max=100000",
        "-webdav=false",
        "-admin.ui=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.telemetry=false",
    ]


def _wait_until_healthy(endpoint: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{endpoint}/healthz", timeout=2) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise RuntimeError(f"the S3 server did not start:\n{log.read_text()[-2000:]}")


def free_port() -> int:
    """Returns a port that is free together with the one 10000 above it, which SeaweedFS takes for gRPC."""
    for _ in range(100):
        port = 20000 + secrets.randbelow(12000)
        try:
            with socket.socket() as first, socket.socket() as second:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 10000))
                return port
        except OSError:
            continue
    raise RuntimeError("found no free port")
