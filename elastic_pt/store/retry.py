"""Retries of requests to the bucket. No other module retries them. `tenacity` runs the loop.

The wait between attempts is a random share of a window that doubles (full jitter), so that the nodes of a
fleet do not all retry at the same time. A timeout limits the retries, not a number of attempts: an outage of
a minute costs a minute. The last attempt starts when the timeout ends. While it retries, it logs a warning
every few seconds, with the request and the cause.

The waits are computed here, because those of `tenacity` use the clock and the random numbers of the process.
Simulations and tests pass their own. Also, the last wait must end exactly at the timeout.
"""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NoReturn, TypeVar

import structlog
from tenacity import RetryCallState, Retrying, retry_if_exception_type

from elastic_pt.errors import StoreError

Result = TypeVar("Result")

_WARNING_INTERVAL_S: Final = 5.0

log = structlog.get_logger("elastic_pt.store")


class TryAgain(Exception):
    """Raised by an attempt that may succeed later; the text says what went wrong."""


@dataclass
class _LastWarning:
    """Time of the last warning. No lock: a fork could inherit a held one, and an extra warning does no harm."""

    at_s: float = -math.inf


@dataclass(frozen=True)
class Retry:
    """Retries requests for `timeout_s`: full jitter over windows from `first_s`, doubled up to `longest_s`.

    The clock, the sleep and the draw are arguments, so that tests need not wait. All calls together log at
    most one warning (event `store_retry`) every five seconds.
    """

    timeout_s: float
    first_s: float = 0.1
    longest_s: float = 10.0
    clock_s: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    draw: Callable[[], float] = field(default=random.random)
    """A random number in [0, 1)."""
    _last_warning: _LastWarning = field(default_factory=_LastWarning, init=False, compare=False)

    def delay_s(self, failures: int, elapsed_s: float) -> float:
        """Seconds to wait after the given number of failures (1 or more); never beyond `timeout_s`."""
        window_s = min(self.longest_s, self.first_s * 2.0 ** min(failures - 1, 60))
        return min(max(0.0, self.timeout_s - elapsed_s), self.draw() * window_s)

    def call(self, what: str, attempt: Callable[[float], Result]) -> Result:
        """The result of the first attempt that does not raise `TryAgain`.

        `attempt` gets the seconds that are left (at least `first_s`). After the timeout, raises `StoreError` with
        `what`, the limit and the last error.
        """
        started_s = self.clock_s()

        def elapsed_s() -> float:
            return self.clock_s() - started_s

        def give_up(state: RetryCallState) -> NoReturn:
            trouble = _trouble(state)
            raise StoreError(
                f"{what}: gave up after {state.attempt_number} attempts in {elapsed_s():.1f} s "
                f"(store.deadline_s = {self.timeout_s:g}): {trouble}"
            ) from trouble

        retrying = Retrying(
            retry=retry_if_exception_type(TryAgain),
            stop=lambda state: elapsed_s() >= self.timeout_s,
            wait=lambda state: self.delay_s(state.attempt_number, elapsed_s()),
            before_sleep=lambda state: self._warn(what, _trouble(state), elapsed_s()),
            sleep=self.sleep,
            retry_error_callback=give_up,
        )
        return retrying(lambda: attempt(max(self.timeout_s - elapsed_s(), self.first_s)))

    def _warn(self, what: str, trouble: BaseException, elapsed_s: float) -> None:
        now_s = self.clock_s()
        if now_s - self._last_warning.at_s < _WARNING_INTERVAL_S:
            return
        self._last_warning.at_s = now_s
        log.warning(
            "store_retry",
            request=what,
            trouble=str(trouble),
            elapsed_s=round(elapsed_s, 1),
            timeout_s=self.timeout_s,
        )


def _trouble(state: RetryCallState) -> BaseException:
    """What the last attempt raised."""
    trouble = None if state.outcome is None else state.outcome.exception()
    assert trouble is not None
    return trouble
