"""Network namespaces without a name: made, entered and used through an open file. Needs root."""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final

from elastic_pt.errors import UnexpectedError

_CLONE_NEWNET: Final = 0x40000000
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_OWN_NAMESPACE: Final = "/proc/thread-self/ns/net"


def new_namespace() -> int:
    """An open file of a new network namespace. In a new thread, because the thread that makes one moves into it."""

    def make() -> int:
        if _LIBC.unshare(_CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "cannot make a network namespace")
        return os.open(_OWN_NAMESPACE, os.O_RDONLY)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(make).result()


@contextmanager
def entered(namespace: int) -> Iterator[None]:
    """Put the calling thread, and only it, into a namespace."""
    before = os.open(_OWN_NAMESPACE, os.O_RDONLY)
    try:
        _enter(namespace)
        try:
            yield
        finally:
            _enter(before)
    finally:
        os.close(before)


def _enter(namespace: int) -> None:
    if _LIBC.setns(namespace, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "cannot enter a network namespace")


def path_of(namespace: int) -> str:
    """Its path for children of this process."""
    return f"/proc/{os.getpid()}/fd/{namespace}"


def inside(namespace: int) -> list[str]:
    """Words to put before a command to run it in a namespace, under the same process id."""
    return ["nsenter", f"--net={path_of(namespace)}", "--"]


def run(command: list[str]) -> str:
    """What the command prints. Raises `UnexpectedError` if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnexpectedError(
            f"{' '.join(command)} ended with exit code {done.returncode}: {done.stderr.strip()}"
        )
    return done.stdout
