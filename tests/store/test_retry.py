"""Retries: the waits are pure, the clock comes in."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from elastic_pt.errors import StoreError
from elastic_pt.store.retry import Retry, TryAgain


class Clock:
    """Time that passes only when somebody sleeps or an attempt takes some."""

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


def test_windows_double_up_to_the_longest() -> None:
    """The wait is the drawn share of a window that doubles and then stays."""
    retry = Retry(1000.0, first_s=0.1, longest_s=1.0, draw=lambda: 0.5)
    waits = [retry.delay_s(n, 0.0) for n in range(1, 7)]
    assert waits == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.5, 0.5])


@given(
    failures=st.integers(1, 10_000),
    elapsed_s=st.floats(0, 200),
    share=st.floats(0, 1, exclude_max=True),
)
def test_no_wait_leads_beyond_the_timeout(failures: int, elapsed_s: float, share: float) -> None:
    """Whatever happened, the next attempt starts before the time is up, or at once."""
    delay_s = Retry(120.0, draw=lambda: share).delay_s(failures, elapsed_s)
    assert 0.0 <= delay_s <= min(10.0, max(0.0, 120.0 - elapsed_s))


def test_the_last_attempt_starts_when_the_time_is_up() -> None:
    """A store that is back at the last moment is still used; after that moment nothing is sent."""
    clock, starts_s = Clock(), []

    def attempt(left_s: float) -> None:
        starts_s.append(clock.now_s)
        raise TryAgain("busy")

    with pytest.raises(StoreError):
        retry_with(clock, timeout_s=3.0, share=0.9).call("reading x", attempt)
    assert starts_s[-1] == pytest.approx(3.0)
    assert starts_s[-2] < 3.0


def test_an_attempt_that_works_in_the_end_gives_its_result() -> None:
    """Trouble that passes before the timeout is not seen by the caller."""
    clock, left = Clock(), iter([True, True, False])

    def attempt(left_s: float) -> str:
        if next(left):
            raise TryAgain("busy")
        return f"{left_s:.2f} s were left"

    assert retry_with(clock).call("reading x", attempt) == "9.85 s were left"
    assert clock.slept_s == pytest.approx([0.05, 0.1])


def test_giving_up_names_request_attempts_limit_and_cause() -> None:
    """Giving up names the request, the attempts, the limit with its config key, and the last trouble."""
    clock = Clock()

    def attempt(left_s: float) -> None:
        raise TryAgain("SlowDown: reduce your request rate")

    with pytest.raises(
        StoreError,
        match=r"reading x: gave up after \d+ attempts in 10\.0 s \(store\.deadline_s = 10\): SlowDown",
    ):
        retry_with(clock).call("reading x", attempt)
    assert clock.now_s == pytest.approx(10.0)


def test_other_errors_are_not_tried_again() -> None:
    """Only an attempt that asks for it is repeated; a bug shows at once."""
    clock, calls = Clock(), []

    def attempt(left_s: float) -> None:
        calls.append(left_s)
        raise TypeError("a bug")

    with pytest.raises(TypeError):
        retry_with(clock).call("reading x", attempt)
    assert len(calls) == 1


def test_waiting_is_told_every_few_seconds() -> None:
    """The first trouble is told at once, with request, cause and limit, and then at most every five seconds."""
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


def test_many_troubled_requests_share_their_warnings() -> None:
    """A store that refuses one request after another fills no log."""
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
