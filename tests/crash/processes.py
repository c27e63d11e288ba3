"""Real processes that run a part of a scenario and may die in it: forks of a process without threads."""

import ctypes
import os
import select
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NoReturn

import structlog

TIMEOUT_S: Final = 60.0
READY: Final = "ready"
"""The line after which a child may be killed at a random time."""
_FAILED: Final = "FAILED"
_PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None)

Say = Callable[[str], None]
"""Sends a line to the parent process. The line arrives even if the process is killed just after."""


def silence() -> None:
    """Drop the events of this process and its children."""
    structlog.configure(processors=[_drop])


def _drop(*_: object) -> NoReturn:
    raise structlog.DropEvent


@dataclass(frozen=True)
class Ended:
    """How a child ended."""

    lines: list[str]
    killed: bool
    """Whether SIGKILL ended it; else it came to its end."""
    seconds: float


class Child:
    """A forked process that runs `work(say)`."""

    def __init__(self, work: Callable[[Say], None]) -> None:
        self._started_s = time.monotonic()
        self._text = b""
        self.output, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.output)
            _run(work, write)
        os.close(write)

    def kill(self) -> None:
        """SIGKILL now."""
        os.kill(self.pid, signal.SIGKILL)

    def line(self, timeout_s: float = TIMEOUT_S) -> str | None:
        """Its next line; None after it has ended. Raises `AssertionError` if it failed or says nothing in time."""
        give_up_at_s = time.monotonic() + timeout_s
        while b"\n" not in self._text:
            left_s = max(0.0, give_up_at_s - time.monotonic())
            if not select.select([self.output], [], [], left_s)[0]:
                raise AssertionError(f"process {self.pid} said nothing in {timeout_s} s")
            chunk = os.read(self.output, 1 << 16)
            if not chunk:
                return None
            self._text += chunk
        line, _, self._text = self._text.partition(b"\n")
        assert line != _FAILED.encode(), self._trace()
        return line.decode()

    def wait(self, kill_after_s: float | None = None) -> Ended:
        """Wait for its end; kill it `kill_after_s` after it is ready. Raises `AssertionError` if it failed or hangs."""
        lines: list[str] = []
        line: str | None = ""
        try:
            while (line := self.line()) is not None:
                lines.append(line)
                if line == READY and kill_after_s is not None:
                    kill_at_s = time.monotonic() + kill_after_s
                    while (left_s := kill_at_s - time.monotonic()) > 0 and self._says_more(left_s):
                        pass
                    self.kill()
        finally:
            if line is not None:
                self.kill()
            os.close(self.output)
            _, status = os.waitpid(self.pid, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed or status == 0, f"status {status}: {lines}"
        return Ended(lines, killed, time.monotonic() - self._started_s)

    def _says_more(self, timeout_s: float) -> bool:
        """Collect output for at most this time; False if the process has ended."""
        if select.select([self.output], [], [], timeout_s)[0]:
            chunk = os.read(self.output, 1 << 16)
            self._text += chunk
            return bool(chunk)
        return True

    def _trace(self) -> str:
        while chunk := os.read(self.output, 1 << 16):
            self._text += chunk
        return self._text.decode()


def _run(work: Callable[[Say], None], write: int) -> NoReturn:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    code = 1
    try:
        work(lambda line: _send(write, line + "\n"))
        code = 0
    except BaseException:
        _send(write, f"{_FAILED}\n{traceback.format_exc()}")
    finally:
        os._exit(code)


def _send(write: int, text: str) -> None:
    os.write(write, text.encode())
