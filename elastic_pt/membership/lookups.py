"""Prevents DNS look-ups between a failure and the next step: with a silent DNS server each would take seconds.

Agents use addresses only. Two parts of torch look names up nevertheless:

    torch elastic    `socket.getfqdn` for the host's name in its events       `avoid_getfqdn`, once a process
    c10d's sockets   the name of each peer, for log messages (getnameinfo)    `without_dns`, around each connect

Any process.
"""

import ctypes
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_RETRIES: Final = 1
"""Index of `retry` in glibc's `struct __res_state`, which begins with two ints: `retrans` and `retry`."""


def avoid_getfqdn() -> None:
    """Make `socket.getfqdn` of this process return its argument, or the host's unqualified name, without a look-up."""
    socket.getfqdn = lambda name="": name or socket.gethostname()


@contextmanager
def without_dns() -> Iterator[None]:
    """Let this thread's name look-ups fail at once where a DNS server would have to be asked; /etc/hosts still works.

    glibc keeps the resolver's state per thread, so other threads are not affected. With another C library, which
    has no such state, nothing changes.
    """
    try:
        library = ctypes.CDLL(None)
        library.__res_init()
        library.__res_state.restype = ctypes.POINTER(ctypes.c_int)
        state = library.__res_state()
    except (OSError, AttributeError):
        yield
        return
    attempts, state[_RETRIES] = state[_RETRIES], 0
    try:
        yield
    finally:
        state[_RETRIES] = attempts
