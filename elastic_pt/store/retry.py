"""The one place where a request to the bucket is tried again.

Between attempts it waits for a random share of a window that doubles (full jitter), so that a fleet
which was refused together does not come back together. What bounds it is a deadline, not a number of
attempts: a store that is away for a minute costs a minute. The last attempt starts at the deadline.
Meanwhile a warning says every few seconds what is waited for, and why.
"""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

import structlog

from elastic_pt.errors import StoreError

Result = TypeVar("Result")

_WARNING_INTERVAL_S: Final = 5.0

log = structlog.get_logger("elastic_pt.store")


class TryAgain(Exception):
    """Raised by an attempt that may succeed later; the text says what went wrong."""


@dataclass(frozen=True)
class Backoff:
    """When to try again: full jitter over windows of `first_s`, doubled up to `longest_s`."""

    deadline_s: float
    first_s: float = 0.1
    longest_s: float = 10.0

    def delay_s(self, failures: int, elapsed_s: float, share: float) -> float | None:
        """Seconds to wait after the given number of failures (1 or more), or None to give up.

        `share` in [0, 1) is the random draw. The wait never goes beyond the deadline.
        """
        left_s = self.deadline_s - elapsed_s
        if left_s <= 0:
            return None
        window_s = min(self.longest_s, self.first_s * 2.0 ** min(failures - 1, 60))
        return min(left_s, share * window_s)


@dataclass
class _LastWarning:
    """When a warning was written last. No lock, which a fork could inherit held: a line too many does no harm."""

    at_s: float = -math.inf


@dataclass(frozen=True)
class Retry:
    """Carries a `Backoff` out. The clock, the sleep and the draw come in, so that tests need no time.

    All calls together warn (event `store_retry`) at most every five seconds.
    """

    backoff: Backoff
    clock_s: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    draw: Callable[[], float] = field(default=random.random)
    _last_warning: _LastWarning = field(default_factory=_LastWarning, init=False, compare=False)

    def call(self, what: str, attempt: Callable[[float], Result]) -> Result:
        """The result of the first attempt that does not raise `TryAgain`.

        Each attempt is told the seconds left until the deadline (at least `backoff.first_s`).
        Raises `StoreError` naming `what`, the deadline and the last trouble when time is up.
        """
        started_s = self.clock_s()
        failures = 0
        while True:
            elapsed_s = self.clock_s() - started_s
            left_s = max(self.backoff.deadline_s - elapsed_s, self.backoff.first_s)
            try:
                return attempt(left_s)
            except TryAgain as trouble:
                failures += 1
                elapsed_s = self.clock_s() - started_s
                delay_s = self.backoff.delay_s(failures, elapsed_s, self.draw())
                if delay_s is None:
                    raise StoreError(
                        f"{what}: gave up after {failures} attempts in {elapsed_s:.1f} s "
                        f"(store.deadline_s = {self.backoff.deadline_s:g}): {trouble}"
                    ) from trouble
                self._warn(what, trouble, elapsed_s)
            self.sleep(delay_s)

    def _warn(self, what: str, trouble: TryAgain, elapsed_s: float) -> None:
        now_s = self.clock_s()
        if now_s - self._last_warning.at_s < _WARNING_INTERVAL_S:
            return
        self._last_warning.at_s = now_s
        log.warning(
            "store_retry",
            request=what,
            trouble=str(trouble),
            elapsed_s=round(elapsed_s, 1),
            deadline_s=self.backoff.deadline_s,
        )
