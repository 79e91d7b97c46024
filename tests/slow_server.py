"""A proxy before a server, whose answers come late: `python slow_server.py PORT SERVER_PORT DELAY_S`."""

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from s3_server import free_port

_PIECE_BYTES = 2**18


@contextmanager
def slow_server(endpoint: str, delay_s: float) -> Iterator[str]:
    """Yields the URL of a proxy before a server, in a process of its own."""
    port = free_port()
    command = [sys.executable, __file__, str(port), endpoint.rsplit(":", 1)[1], str(delay_s)]
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert time.monotonic() < deadline, "the proxy did not start"
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
    """Passes what comes on, each piece `delay_s` later, and then the end."""
    loop = asyncio.get_running_loop()
    while data := await reader.read(_PIECE_BYTES):
        if delay_s:
            loop.call_later(delay_s, writer.write, data)
        else:
            writer.write(data)
    loop.call_later(delay_s, writer.close)


async def _serve(port: int, server_port: int, delay_s: float) -> None:
    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, requests = await asyncio.open_connection("127.0.0.1", server_port)
        await asyncio.gather(
            _pass_on(reader, requests, 0.0), _pass_on(answers, writer, delay_s), return_exceptions=True
        )

    async with await asyncio.start_server(connect, "127.0.0.1", port) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
