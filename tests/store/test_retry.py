"""Retries: the waits are a pure function, and the clock is an argument."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from elastic_pt.errors import StoreError
from elastic_pt.store.retry import Retry, TryAgain


class Clock:
    """A clock that advances only in `sleep`."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.slept_s: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, delay_s: float) -> None:
        self.slept_s.append(delay_s)
        self.now_s += delay_s


def retry_with(clock: Clock, timeout_s: float = 10.0, share: float = 0.5) -> Retry:
    return Retry(timeout_s, clock_s=clock, sleep=clock.sleep, draw=lambda: share)


def test_retry_window_doubles_up_to_the_longest() -> None:
    """The wait is the drawn share of a window, which doubles up to its maximum."""
    retry = Retry(1000.0, first_s=0.1, longest_s=1.0, draw=lambda: 0.5)
    waits = [retry.delay_s(n, 0.0) for n in range(1, 7)]
    assert waits == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.5, 0.5])


@given(
    failures=st.integers(1, 10_000),
    elapsed_s=st.floats(0, 200),
    share=st.floats(0, 1, exclude_max=True),
)
def test_no_wait_exceeds_the_timeout(failures: int, elapsed_s: float, share: float) -> None:
    """After any failure, the next attempt starts before the timeout, or at once."""
    delay_s = Retry(120.0, draw=lambda: share).delay_s(failures, elapsed_s)
    assert 0.0 <= delay_s <= min(10.0, max(0.0, 120.0 - elapsed_s))


def test_last_attempt_starts_at_the_timeout() -> None:
    """A store that recovers just before the timeout is still used; after the timeout nothing is sent."""
    clock, starts_s = Clock(), []

    def attempt(left_s: float) -> None:
        starts_s.append(clock.now_s)
        raise TryAgain("busy")

    with pytest.raises(StoreError):
        retry_with(clock, timeout_s=3.0, share=0.9).call("reading x", attempt)
    assert starts_s[-1] == pytest.approx(3.0)
    assert starts_s[-2] < 3.0


def test_successful_attempt_gives_its_result() -> None:
    """The caller does not see failures that end before the timeout."""
    clock, left = Clock(), iter([True, True, False])

    def attempt(left_s: float) -> str:
        if next(left):
            raise TryAgain("busy")
        return f"{left_s:.2f} s were left"

    assert retry_with(clock).call("reading x", attempt) == "9.85 s were left"
    assert clock.slept_s == pytest.approx([0.05, 0.1])


def test_final_error_names_request_attempts_limit_and_cause() -> None:
    """The error names the request, the attempts, the limit with its config key, and the last failure."""
    clock = Clock()

    def attempt(left_s: float) -> None:
        raise TryAgain("SlowDown: reduce your request rate")

    with pytest.raises(
        StoreError,
        match=r"reading x: gave up after \d+ attempts in 10\.0 s \(store\.deadline_s = 10\): SlowDown",
    ):
        retry_with(clock).call("reading x", attempt)
    assert clock.now_s == pytest.approx(10.0)


def test_other_errors_are_not_retried() -> None:
    """Only `TryAgain` causes a retry; a bug is raised at once."""
    clock, calls = Clock(), []

    def attempt(left_s: float) -> None:
        calls.append(left_s)
        raise TypeError("a bug")

    with pytest.raises(TypeError):
        retry_with(clock).call("reading x", attempt)
    assert len(calls) == 1


def test_retries_log_a_warning_every_few_seconds() -> None:
    """The first failure is logged at once, with request, cause and limit; later ones at most every five seconds."""
    clock = Clock()
    retry = retry_with(clock, timeout_s=30.0, share=0.1)

    def attempt(left_s: float) -> None:
        raise TryAgain("ConnectionRefusedError: no")

    with capture_logs() as events, pytest.raises(StoreError):
        retry.call("reading x", attempt)
    assert events[0] == {
        "event": "store_retry",
        "log_level": "warning",
        "request": "reading x",
        "trouble": "ConnectionRefusedError: no",
        "elapsed_s": 0.0,
        "timeout_s": 30.0,
    }
    times_s = [event["elapsed_s"] for event in events]
    assert len(times_s) >= 4
    assert all(5.0 <= b - a <= 7.0 for a, b in itertools.pairwise(times_s))


def test_many_failing_requests_share_their_warnings() -> None:
    """A store that refuses one request after another does not fill the log."""
    clock = Clock()
    retry = retry_with(clock, timeout_s=1.0)

    def attempt(left_s: float) -> None:
        raise TryAgain("SlowDown")

    with capture_logs() as events:
        for number in range(20):
            with pytest.raises(StoreError):
                retry.call(f"reading {number}", attempt)
    assert clock.now_s == pytest.approx(20.0)
    assert len(events) == 4
