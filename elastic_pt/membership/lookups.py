"""No name look-ups on the way from a failure to the next step: a DNS server that is silent would cost seconds each.

Peers know each other by address. Two parts of torch ask DNS all the same:

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
    """From now on `socket.getfqdn` of this process gives the name it is asked for, or the host's, unqualified."""
    socket.getfqdn = lambda name="": name or socket.gethostname()


@contextmanager
def without_dns() -> Iterator[None]:
    """Have this thread's name look-ups fail at once where a DNS server would have to be asked; /etc/hosts counts.

    glibc keeps the resolver's state by thread, so others are not concerned. With another C library, where it
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
