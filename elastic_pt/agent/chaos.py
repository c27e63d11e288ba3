"""Lets `elastic-pt chaos live` kill this node, where `elastic.chaos` allows it.

    chaos live ─► kill_key(incarnation) in the bucket ─► ChaosOrders ─► SIGKILL to this agent, as if the machine were lost

The bucket is the only place that every operator reaches. The key names one process, so a later agent of the same node
never finds an old order.
"""

import os
import signal
import threading
from typing import Final

import structlog

from elastic_pt.errors import StoreError, one_line
from elastic_pt.store.port import Store

_INTERVAL_S: Final = 1.0
_TEXT_BYTES_MAX: Final = 1000
_KILLED: Final = 128 + signal.SIGKILL

log = structlog.get_logger("elastic_pt.agent.chaos")


def kill_key(incarnation: str) -> str:
    """The object that orders this agent's end; its content says by whom it was asked for."""
    return f"chaos/kill-{incarnation}"


class ChaosOrders:
    """Reads the bucket once a second, in a thread of the agent."""

    def __init__(self, store: Store, incarnation: str) -> None:
        self._store = store
        self._key = kill_key(incarnation)
        self._closed = threading.Event()

    def start(self) -> None:
        """Begin to read."""
        threading.Thread(target=self._obey, name="chaos", daemon=True).start()

    def close(self) -> None:
        """Obey no order from now on."""
        self._closed.set()

    def _obey(self) -> None:
        while not self._closed.wait(_INTERVAL_S):
            try:
                by = one_line(
                    self._store.read(self._key, 0, _TEXT_BYTES_MAX).decode(errors="replace")
                )
            except StoreError:
                # There is none, or it is read later.
                continue
            log.warning("chaos_kill", by=by)
            # The kernel ends the workers with their agent.
            os.kill(os.getpid(), signal.SIGKILL)
            # The first process of a container cannot kill itself by a signal.
            os._exit(_KILLED)
