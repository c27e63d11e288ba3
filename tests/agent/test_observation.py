"""Messages of workers become numbers, from several threads at once."""

import sys
import threading
import time
from collections.abc import Iterable, Mapping

import pytest
from prometheus_client.metrics_core import Metric

from elastic_pt.agent.observation import Observation
from elastic_pt.membership.decision.status import Idle
from elastic_pt.runlog.records import Cause, CauseKind, Generation, Member
from elastic_pt.telemetry.account import ProcessTime
from elastic_pt.telemetry.catalogue import Metrics
from elastic_pt.telemetry.goodput import Bucket


def test_concurrent_messages_count_each_second_once() -> None:
    """The clock is read inside the lock, so every second counts once, in any order of threads."""
    switch_s = sys.getswitchinterval()
    failures: list[BaseException] = []

    def slow_clock() -> float:
        now_s = time.monotonic()
        # Gives another thread time to run in between.
        time.sleep(0)
        return now_s

    observation = Observation(Metrics(), clock_s=slow_clock, process=ProcessTime(slow_clock))

    def speak(name: str) -> None:
        try:
            for _ in range(300):
                observation.activity(name)
                observation.enter(Bucket.DRAINING)
                observation.waits()
                observation.idle(Idle.PAUSED if name == "train" else Idle.AGREES)
        except BaseException as error:
            failures.append(error)

    sys.setswitchinterval(1e-6)
    try:
        threads = [
            threading.Thread(target=speak, args=(name,))
            for name in ("start", "restore", "train", "start")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch_s)
    assert failures == []


class Clock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def generation(number: int, *causes: Cause, frontier: int = 0) -> Generation:
    """A GENERATION of one node, from the start."""
    member = Member("a", "a1", "127.0.0.1", 1, 1, 1)
    return Generation(
        number, (member,), (4,), "127.0.0.1", 1, None, "a test", causes, frontier_step=frontier
    )


def step(number: int, **waits_s: float) -> dict[str, object]:
    """A worker's report of a step."""
    return {
        "kind": "step",
        "step": number,
        "rank": 0,
        "world_size": 1,
        "loss": 2.0,
        "gradient_norm": 1.0,
        "learning_rate": 0.1,
        "rows": [number - 1, number],
        "tokens": 64,
        "seconds": 1.0,
        "data_wait_s": 0.0,
        "skipped": "",
        **waits_s,
    }


def spent_since(observation: Observation, before: Mapping[Bucket, float]) -> dict[Bucket, float]:
    """The seconds of each bucket since an account, without those that have none."""
    now = observation.account().seconds
    return {
        bucket: pytest.approx(seconds - before[bucket])
        for bucket, seconds in now.items()
        if seconds - before[bucket] > 1e-6
    }


def test_a_broken_generation_is_accounted_from_step_to_step() -> None:
    """From the last step on: broken off, detected, agreed, paused while too few, started, done again."""
    clock = Clock()
    observation = Observation(Metrics(), clock_s=clock, process=ProcessTime(clock))
    before = observation.account().seconds

    def later(seconds: float) -> float:
        clock.now_s += seconds
        return clock.now_s

    observation.starts(generation(1), clock.now_s)
    observation.activity("start")
    later(2.0)
    observation.activity("restore")
    later(1.0)
    observation.activity("train")
    later(4.0)
    observation.step_done(step(1, data_wait_s=0.5, checkpoint_stall_s=0.25, evaluation_s=0.125))
    later(1.0)
    observation.step_done(step(2, straggler_wait_s=0.125))
    later(3.0)
    observation.broke(clock.now_s - 1.0)
    observation.waits()
    observation.idle(Idle.BELOW_MINIMUM)
    later(60.0)
    # The main thread tells of the same break again, after it has awaited the others.
    observation.broke(clock.now_s)
    observation.idle(Idle.AGREES)
    known_s = later(5.0)
    later(0.5)
    lost = Cause(CauseKind.LOST, "b", detect_s=1.5)
    observation.starts(generation(2, lost, frontier=2), known_s)
    observation.idle(Idle.SPARE)  # A turn of the membership that comes too late.
    later(1.5)
    observation.activity("train")
    later(2.0)
    observation.step_done(step(1))
    assert spent_since(observation, before) == {
        Bucket.START: 2.0 + 2.0,
        Bucket.RESTORE: 1.0,
        Bucket.PRODUCTIVE: 3.0 + 1.0,
        Bucket.DATA_WAIT: 0.5,
        Bucket.CHECKPOINT_STALL: 0.25,
        Bucket.STRAGGLER_WAIT: 0.125,
        Bucket.EVALUATION: 0.125,
        Bucket.DETECT: 1.5,
        Bucket.RECOMPUTE: 0.5 + 2.0,
        Bucket.PAUSED_BELOW_MINIMUM: 60.0,
        Bucket.AGREE: 1.0 + 5.0,
    }


def test_suspended_machine_adds_up() -> None:
    """While a machine is suspended only the clock since its boot goes on. That time counts, in one bucket."""
    membership, boot = Clock(), Clock()
    observation = Observation(Metrics(), clock_s=membership, process=ProcessTime(boot))
    before = observation.account().seconds

    def pass_s(seconds: float, suspended_s: float = 0.0) -> None:
        membership.now_s += seconds
        boot.now_s += seconds + suspended_s

    observation.waits()
    observation.idle(Idle.AGREES)
    pass_s(10.0, suspended_s=3600.0)
    known_s = membership.now_s
    pass_s(0.5)
    observation.starts(generation(1), known_s)
    pass_s(2.0)
    observation.broke(membership.now_s - 1.5)
    account = observation.account()
    assert spent_since(observation, before) == {
        Bucket.AGREE: 3610.0 + 1.5,
        Bucket.START: 0.5 + 0.5,
    }
    assert sum(account.seconds.values()) == pytest.approx(account.written_at - account.started_at)


def test_a_scrape_shows_one_moment() -> None:
    """What happens while a scrape is read belongs to the next one: the states of a scrape add up."""
    clock = Clock()
    observation = Observation(Metrics(), clock_s=clock, process=ProcessTime(clock))
    began_s = clock.now_s

    def total_s(families: Iterable[Metric]) -> float:
        return sum(
            sample.value
            for family in families
            if family.name == "elastic_pt_time_seconds"
            for sample in family.samples
        )

    before_s = total_s(observation.metrics.registry.collect())
    families = iter(observation.metrics.registry.collect())
    first = next(families)
    clock.now_s += 100.0
    observation.enter(Bucket.DRAINING)
    observation.account()
    assert total_s([first, *families]) == before_s
    found = observation.metrics.registry.get_sample_value
    assert found("elastic_pt_time_seconds_total", {"state": "start"}) == pytest.approx(
        before_s + clock.now_s - began_s
    )
    # The age rises within a step too.
    observation.activity("train")
    clock.now_s += 50.0
    assert found("elastic_pt_node_seconds_total") == pytest.approx(before_s + clock.now_s - began_s)
    assert total_s(observation.metrics.registry.collect()) == pytest.approx(before_s + 100.0)
