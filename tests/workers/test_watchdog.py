"""The watchdog's decisions over simulated time: what is a hang, what is only slow, and which worker is found first."""

import math
import random
import re
from collections.abc import Callable, Iterator

import pytest

from elastic_pt.workers.heartbeat import TICK_INTERVAL_S, Reading, WorkerPhase
from elastic_pt.workers.watchdog import Detector, Hang, WatchdogLimits

LOOK_S = 0.1
LIMITS = WatchdogLimits(hang_timeout_s=2.0, progress_timeout_s=10.0, startup_timeout_s=600.0)


class Worker:
    """A simulated worker, and a detector that observes it."""

    def __init__(self, limits: WatchdogLimits = LIMITS) -> None:
        self.now_s = 1000.0
        self.phase, self.step = WorkerPhase.START, 0
        self._ticks, self._changed_s = 1.0, self.now_s
        self.detector = Detector(limits, self.now_s)

    def enter(self, phase: WorkerPhase) -> None:
        """Enter a phase; the end of COMPUTE ends a step."""
        self.step += self.phase is WorkerPhase.COMPUTE
        self.phase, self._changed_s = phase, self.now_s

    def stay(
        self, seconds: float, state: str = "S", *, ticks: bool = True, look_s: float = LOOK_S
    ) -> Hang | None:
        """Stay in the phase while the agent observes; returns the first hang, found at `now_s`."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            passed_s = min(look_s, end_s - self.now_s)
            self.now_s += passed_s
            self._ticks += ticks * passed_s / TICK_INTERVAL_S
            if hang := self.look(state):
                return hang
        return None

    def look(self, state: str = "S") -> Hang | None:
        """One observation."""
        reading = Reading(round(self._ticks), self.step, self.phase, self._changed_s)
        return self.detector.observe(self.now_s, reading, state)

    def do_step(self, seconds: float, look_s: float = LOOK_S) -> Hang | None:
        """A whole step: waiting for data for a twentieth of the time, then computing."""
        self.enter(WorkerPhase.DATA)
        hang = self.stay(seconds / 20, look_s=look_s)
        self.enter(WorkerPhase.COMPUTE)
        return hang or self.stay(seconds * 19 / 20, look_s=look_s)


def at_work(step_s: float = 0.5, steps: int = 20, limits: WatchdogLimits = LIMITS) -> Worker:
    """A worker that has done some steps and is inside the next one."""
    worker = Worker(limits)
    assert worker.stay(3.0) is None
    for _ in range(steps):
        assert worker.do_step(step_s) is None
    worker.enter(WorkerPhase.DATA)
    worker.enter(WorkerPhase.COMPUTE)
    assert worker.look() is None
    return worker


def uniform(random_: random.Random) -> float:
    """Between a third and three times the typical time."""
    return random_.uniform(1 / 3, 3)


def log_uniform(random_: random.Random) -> float:
    """The same range, most of it short."""
    return 3 ** random_.uniform(-1, 1)


def rarely_slow(random_: random.Random) -> float:
    """Steady, but one step in fifty takes three times as long."""
    return 3.0 if random_.random() < 0.02 else 1.0


@pytest.mark.parametrize("noise", [uniform, log_uniform, rarely_slow])
@pytest.mark.parametrize("step_s", [0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_varying_step_times_are_not_a_hang(
    step_s: float, noise: Callable[[random.Random], float], seed: int
) -> None:
    """Over 10,000 steps with times that vary threefold there is no hang, from steps of 10 ms to steps of 10 s."""
    random_ = random.Random(seed)
    worker = Worker()
    worker.stay(5.0)
    # Observe longer steps less often, to save test time, but within the gap that still counts.
    look_s = min(1.0, max(LOOK_S, step_s / 2))
    for step in range(10_000):
        hang = worker.do_step(step_s * noise(random_), look_s)
        assert hang is None, f"step {step} with seed {seed}: {hang}"


@pytest.mark.parametrize("offset_s", [0.0, 0.03, 0.07])
def test_a_stopped_worker_is_found_in_time(offset_s: float) -> None:
    """A stopped process counts as hung after `hang_timeout_s` and two observations, in any phase."""
    for phase in WorkerPhase:
        worker = at_work()
        worker.enter(phase)
        worker.stay(1.0 + offset_s)
        stopped_s = worker.now_s
        hang = worker.stay(5.0, "T", ticks=False)
        assert hang is not None
        assert hang.standstill
        assert 1.9 <= worker.now_s - stopped_s <= 2.2
        assert re.fullmatch(
            r"wrote no heartbeat for 2\.[01] s at step 2[01] \(stopped\)", str(hang)
        )


@pytest.mark.parametrize(("state", "word"), [("R", "running"), ("D", "uninterruptible sleep")])
def test_a_worker_without_ticks_is_found_in_time(state: str, word: str) -> None:
    """A process that runs or sleeps in the kernel without a tick counts as hung equally fast."""
    worker = at_work()
    stopped_s = worker.now_s
    hang = worker.stay(5.0, state, ticks=False)
    assert hang is not None
    assert re.fullmatch(rf"wrote no heartbeat for 2\.[01] s at step 20 \({word}\)", str(hang))
    assert worker.now_s - stopped_s <= 2.2


def test_a_stopped_worker_is_found_before_workers_that_wait_for_it() -> None:
    """A worker that waits in a collective for a stopped one counts as hung at least four times later."""
    culprit, victim = at_work(), at_work()
    since_s = culprit.now_s
    assert culprit.stay(60.0, "T", ticks=False) is not None
    hang = victim.stay(60.0)
    assert hang is not None
    assert not hang.standstill
    assert re.fullmatch(
        r"made no progress for 10\.[01] s at step 20 \(compute, limit 10\.0 s\)", str(hang)
    )
    assert victim.now_s - since_s > 4 * (culprit.now_s - since_s)


def test_progress_limit_grows_with_the_step_time() -> None:
    """If steps take 20 s, a step counts as hung after six times that, not after `progress_timeout_s`."""
    worker = at_work(step_s=20.0)
    assert worker.stay(115.0) is None
    hang = worker.stay(10.0)
    assert hang is not None
    assert hang.limit_s == pytest.approx(120.0, rel=0.02)


def test_one_long_step_does_not_raise_the_limit_but_two_do() -> None:
    """Two long steps among the last ones raise the limit. Later it falls again."""
    worker = at_work(step_s=1.0)
    worker.enter(WorkerPhase.DATA)
    limits_s = []
    for freaks in (1, 1, 0):
        for _ in range(freaks):
            worker.enter(WorkerPhase.COMPUTE)
            worker.stay(9.0)
            worker.enter(WorkerPhase.DATA)
        for _ in range(64 if freaks == 0 else 3):
            worker.do_step(1.0)
        limits_s.append(worker.detector._progress_limit_s())
    assert limits_s == [10.0, pytest.approx(54.0, rel=0.02), 10.0]


def test_the_start_has_a_separate_limit() -> None:
    """Before the first step only a stopped process is a hang until `startup_timeout_s`, with or without ticks."""
    for ticks, state in ((True, "S"), (False, "R"), (False, "D")):
        worker = Worker()
        worker.stay(1.0)
        assert worker.stay(598.0, state, ticks=ticks) is None
        hang = worker.stay(5.0, state, ticks=ticks)
        assert hang is not None
        assert re.fullmatch(
            r"made no progress for 600\.[01] s at step 0 \(start, limit 600\.0 s\)", str(hang)
        )


def test_few_steps_do_not_set_the_limit() -> None:
    """Long steps after a few short ones, as while a compiler or a cache warms up, are not a hang."""
    worker = at_work(step_s=0.2, steps=5)
    assert worker.stay(300.0) is None


def test_gaps_before_the_first_step_do_not_raise_the_limit() -> None:
    """A gap before the first step, for imports or devices, does not raise the limit after it."""
    worker = Worker()
    worker.stay(1.0)
    worker.stay(30.0, "R", ticks=False)
    for _ in range(3):
        worker.do_step(0.5)
    assert worker.stay(2.2, "R", ticks=False) is not None


def test_a_worker_without_a_heartbeat_is_found() -> None:
    """A worker that never writes a heartbeat counts as hung after `startup_timeout_s`."""
    detector = Detector(LIMITS, 0.0)
    verdicts = [detector.observe(look / 10, None, "S") for look in range(6100)]
    assert next(index for index, verdict in enumerate(verdicts) if verdict) in (6000, 6001, 6002)


def test_a_long_wait_for_data_is_not_a_hang() -> None:
    """A worker that ticks may wait for the bucket for minutes."""
    worker = at_work()
    worker.enter(WorkerPhase.DATA)
    assert worker.stay(300.0) is None


def test_progress_limit_grows_with_the_staging_time() -> None:
    """A worker that waits for another worker's staging has a limit of six times its own staging time."""
    worker = at_work()
    worker.enter(WorkerPhase.STAGE)
    assert worker.stay(12.0) is None
    worker.enter(WorkerPhase.DATA)
    worker.enter(WorkerPhase.COMPUTE)
    assert worker.stay(70.0) is None
    assert worker.stay(5.0) is not None


def test_time_without_observation_does_not_count() -> None:
    """If the agent (or the whole machine) was stopped for a minute, that minute does not count for the worker."""
    worker = at_work()
    for _ in range(50):
        worker.now_s += 60.0
        assert worker.look("T") is None
        assert worker.do_step(0.5) is None


def test_frequent_gaps_raise_the_hang_limit_for_a_while() -> None:
    """Gaps below the limit raise it to three times the gap for a while, but not for a stopped process."""
    worker = at_work()
    worker.stay(1.4, "R", ticks=False)
    worker.stay(0.2)
    paused_s = worker.now_s
    assert worker.stay(4.0, "R", ticks=False) is None
    hang = worker.stay(5.0, "R", ticks=False)
    assert hang is not None
    assert hang.limit_s == pytest.approx(4.5, abs=0.35)
    assert worker.now_s - paused_s < 5.0
    stopped = at_work()
    stopped.stay(1.4, "R", ticks=False)
    stopped.stay(0.2)
    assert stopped.stay(2.2, "T", ticks=False) is not None
    calm = at_work()
    calm.stay(1.4, "R", ticks=False)
    for _ in range(2 * 350):
        calm.do_step(0.5)
    assert calm.stay(2.2, "R", ticks=False) is not None


@pytest.mark.parametrize("state", ["Z", "X", ""])
def test_an_exiting_process_is_not_hung_until_the_progress_timeout(state: str) -> None:
    """A process that is exiting does not count as hung until `progress_timeout_s`."""
    worker = at_work()
    assert worker.stay(9.5, state, ticks=False) is None
    assert worker.stay(1.0, state, ticks=False) is not None


def test_a_stopped_sibling_is_reported_at_once() -> None:
    """If others have lost their connection, a worker that is stopped now is the likely cause."""
    worker = at_work()
    worker.stay(0.5, "T", ticks=False)
    hang = worker.detector.stopped("T")
    assert hang is not None
    assert re.fullmatch(r"wrote no heartbeat for 0\.[56] s at step 20 \(stopped\)", str(hang))
    assert worker.detector.stopped("S") is None


def random_lives(seed: int) -> Iterator[tuple[WorkerPhase, float]]:
    """Phases of a worker with durations below every limit."""
    random_ = random.Random(seed)
    yield WorkerPhase.START, random_.uniform(0, 500)
    yield WorkerPhase.RESTORE, random_.uniform(0, 500)
    for _ in range(200):
        yield WorkerPhase.DATA, random_.choice([0.01, 0.01, 0.1, 100.0])
        yield WorkerPhase.COMPUTE, math.exp(random_.uniform(-5, 2.3))
        if random_.random() < 0.1:
            yield WorkerPhase.STAGE, random_.uniform(0, 60)
    yield WorkerPhase.END, random_.uniform(0, 500)


@pytest.mark.parametrize("seed", range(5))
def test_many_slow_phases_below_their_limits_are_not_a_hang(seed: int) -> None:
    """Slow starts, data waits and stagings, each below its limit, never add up to a hang."""
    worker = Worker()
    for phase, seconds in random_lives(seed):
        worker.enter(phase)
        hang = worker.stay(seconds, look_s=min(1.0, max(LOOK_S, seconds / 20)))
        assert hang is None, f"{phase.name} of {seconds:.2f} s with seed {seed}: {hang}"


def test_a_long_evaluation_is_no_hang_and_no_long_step() -> None:
    """A pass of an evaluation may take as long as a part of the start. The limit of the steps after it stays as it was."""
    worker = at_work(step_s=0.5)
    for _ in range(20):
        worker.enter(WorkerPhase.EVALUATE)
        assert worker.stay(100.0) is None
        worker.enter(WorkerPhase.EVALUATE)
        assert worker.stay(100.0) is None
        assert worker.do_step(0.5) is None
    stuck_s = worker.now_s
    hang = worker.stay(100.0)
    assert hang is not None
    assert hang.phase is WorkerPhase.COMPUTE
    assert worker.now_s - stuck_s <= LIMITS.progress_timeout_s + 1.0
    worker = at_work()
    worker.enter(WorkerPhase.EVALUATE)
    hang = worker.stay(2 * LIMITS.startup_timeout_s)
    assert hang is not None
    assert "evaluate, limit 600.0 s" in str(hang)
