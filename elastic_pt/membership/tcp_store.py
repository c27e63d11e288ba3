"""The TCPStore of one generation: its proposer binds it before the GENERATION is appended, the others connect.

It speaks plain text and asks nobody who they are, so it listens at the node's own address only: torch itself would listen
at all. Runs in the agent process, without DNS look-ups.
"""

import datetime
import os
import socket
import threading
from collections.abc import Callable
from typing import Final

from torch.distributed import DistNetworkError, DistStoreError, TCPStore  # type: ignore[attr-defined]

from elastic_pt.errors import StoreError
from elastic_pt.membership.address import without_dns
from elastic_pt.runlog.records import Generation

TIMEOUT: Final = datetime.timedelta(seconds=20)
_BACKLOG: Final = 1024
"""Workers of one generation connect at the same time."""


def bind_store(address: str) -> TCPStore:
    """A new store that listens on a free port of `address`. Raises `StoreError` if it cannot."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.create_server((address, 0), family=family, backlog=_BACKLOG) as bound:
            port = int(bound.getsockname()[1])
            with without_dns():
                # The store takes over its own copy of the descriptor, and closes it.
                return TCPStore(
                    address,
                    port,
                    is_master=True,
                    wait_for_workers=False,
                    timeout=TIMEOUT,
                    master_listen_fd=os.dup(bound.fileno()),
                )
    except (DistNetworkError, DistStoreError, OSError) as error:
        raise StoreError(f"cannot listen at {address}: {str(error).splitlines()[0]}") from error


def connect_store(
    generation: Generation, changed: threading.Condition, given_up: Callable[[], bool]
) -> TCPStore:
    """Connect to a generation's store; wait on `changed` until it is connected or `given_up()`.

    Raises `DistNetworkError` or `DistStoreError` if it cannot connect.
    """
    outcome: list[TCPStore | RuntimeError] = []

    def connect() -> None:
        address, port = generation.store_address, generation.store_port
        try:
            with without_dns():
                outcome.append(TCPStore(address, port, is_master=False, timeout=TIMEOUT))
        except (DistNetworkError, DistStoreError) as error:
            outcome.append(error)
        with changed:
            changed.notify_all()

    # In a thread: the client never times out on a host that accepts and then stalls. The other members may have
    # continued without that host.
    threading.Thread(target=connect, name="store", daemon=True).start()
    with changed:
        changed.wait_for(lambda: bool(outcome) or given_up(), TIMEOUT.total_seconds())
    found = outcome[0] if outcome else DistNetworkError("it does not answer")
    if isinstance(found, RuntimeError):
        raise found
    return found
