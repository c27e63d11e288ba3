"""Listens to processes that stand at a failpoint, and tells each what to do.

    agent or worker ── ask=<socket of its node> ─► Hooks ─► decide(node, Reached) ─► `go`, or a deed

Each node has a socket of its own, so what is reached is known with its node. Whoever asks stands still until `decide`
returns, or is killed meanwhile. The process of a chaos run.
"""

import json
import socket
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from elastic_pt.failpoints import GO, Failpoint, Reached

_BACKLOG: Final = 64

Decide = Callable[[str, Reached], str]


class Hooks:
    """A context manager. `decide` is called in a thread for each process that asks, several at a time."""

    def __init__(self, decide: Decide, folder: Path) -> None:
        """The sockets are in `folder`. Their paths have at most 107 bytes, so not in a directory that a user names."""
        self._decide = decide
        self._folder = folder
        self._listening: dict[str, socket.socket] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for listening in self._listening.values():
            with suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)
            listening.close()

    def rules(self, node: str, points: Collection[Failpoint]) -> str:
        """The value of `ELASTIC_PT_FAILPOINTS` with which a node's processes ask at each of these points."""
        path = self._folder / node
        if node not in self._listening:
            listening = socket.socket(socket.AF_UNIX)
            listening.bind(str(path))
            listening.listen(_BACKLOG)
            self._listening[node] = listening
            threading.Thread(target=self._listen, args=(node, listening), daemon=True).start()
        return ",".join(f"{point.label}@1+:ask={path}" for point in points)

    def _listen(self, node: str, listening: socket.socket) -> None:
        # Closing the socket ends the thread.
        with suppress(OSError):
            while True:
                asking, _ = listening.accept()
                threading.Thread(target=self._answer, args=(node, asking), daemon=True).start()

    def _answer(self, node: str, asking: socket.socket) -> None:
        # The process may be killed at any moment.
        with asking, suppress(OSError, ValueError):
            reached = Reached(**json.loads(asking.makefile().readline()))
            answer = GO
            try:
                answer = self._decide(node, reached)
            finally:
                asking.sendall(f"{answer}\n".encode())
