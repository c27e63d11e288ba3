"""Servers of other projects as child processes: a free port, wait until it answers, stop without orphans."""

import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from elastic_pt.errors import UnexpectedError
from elastic_pt.workers.forking import die_with_parent


def free_port() -> int:
    """A TCP port on loopback that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def start(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """The server as a child, its output in `log`. The kernel kills it when the calling thread ends."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=die_with_parent,
        )


def wait_until(what: str, ready: Callable[[], bool], timeout_s: float, log: Path) -> None:
    """Return once `ready()`; `UnexpectedError` with the end of the log after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline_s:
            tail = log.read_text(errors="replace")[-2000:] if log.exists() else ""
            raise UnexpectedError(f"{what} did not answer within {timeout_s:g} s\n{tail}")
        time.sleep(0.05)


def listens(port: int) -> bool:
    """True if something accepts connections on that loopback port."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return True
    except OSError:
        return False


def stop(server: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Ask the server to end, and make it after `timeout_s`; returns when it is gone."""
    server.terminate()
    try:
        server.wait(timeout_s)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
