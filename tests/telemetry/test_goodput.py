"""Each second of a node's time is counted once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_pt.telemetry.catalogue import Metrics
from elastic_pt.telemetry.goodput import Bucket, NodeLedger

SECONDS = st.floats(0, 100)
BEGAN_S = 7.0
EVENT = st.one_of(
    st.tuples(st.just("enter"), st.sampled_from(list(Bucket))),
    st.tuples(st.just("train"), st.integers(0, 50)),
    st.tuples(
        st.just("step_done"),
        st.integers(1, 50),
        st.dictionaries(st.sampled_from(list(Bucket)), st.floats(-10, 200), max_size=4),
    ),
    st.tuples(st.just("broke"), st.floats(-50, 0)),
    st.tuples(st.just("formed"), st.integers(0, 50), st.floats(-1, 200)),
    st.tuples(st.just("counted")),
)


@given(st.lists(st.tuples(SECONDS, EVENT), max_size=60))
def test_buckets_add_up_to_the_time_since_the_start(
    events: list[tuple[float, tuple[object, ...]]],
) -> None:
    """For any events in any order, also late ones, the buckets add up to the time since the process began."""
    now_s = BEGAN_S
    ledger, metrics = NodeLedger(BEGAN_S), Metrics()
    counted_s = 0.0
    for pause_s, (name, *arguments) in events:
        now_s += pause_s
        match name:
            case "formed":
                ledger.formed(*arguments)  # type: ignore[arg-type]
            case "broke":
                ledger.broke(now_s + arguments[0])  # type: ignore[operator]
            case _:
                getattr(ledger, str(name))(*arguments, now_s)
        total = ledger.total(now_s)
        assert sum(total.values()) == pytest.approx(now_s - BEGAN_S, abs=1e-9)
        assert all(seconds >= 0.0 for seconds in total.values())
        counted = ledger.counted(now_s)
        metrics.account(counted, now_s - BEGAN_S)  # Raises if a counter would fall.
        assert all(counted[bucket] <= total[bucket] for bucket in Bucket)
        assert sum(counted.values()) >= counted_s
        counted_s = sum(counted.values())
    exported = sum(
        sample.value
        for family in metrics.time_seconds.collect()
        for sample in family.samples
        if sample.name.endswith("_total")
    )
    assert exported == pytest.approx(counted_s, abs=1e-9)


def trained() -> NodeLedger:
    """A ledger of a node that began at 0 s, trained from 2 s on, and did steps 1 and 2 in a second each."""
    ledger = NodeLedger(0.0)
    ledger.train(0, 2.0)
    ledger.step_done(1, {}, 3.0)
    ledger.step_done(2, {}, 4.0)
    return ledger


def spent(ledger: NodeLedger, now_s: float) -> dict[Bucket, float]:
    """The buckets that are not empty."""
    return {bucket: seconds for bucket, seconds in ledger.total(now_s).items() if seconds}


def test_time_before_the_first_event_is_the_start() -> None:
    """The imports before the agent exists count as `start`: the ledger begins with the process."""
    assert spent(NodeLedger(-5.0), 2.0) == {Bucket.START: 7.0}


def test_step_is_divided_into_its_waits_and_the_rest() -> None:
    """Each wait counts in its own bucket, the rest as the step; waits never exceed the time that passed."""
    ledger = trained()
    waits = {
        Bucket.DATA_WAIT: 0.5,
        Bucket.CHECKPOINT_STALL: 1.0,
        Bucket.STRAGGLER_WAIT: 0.25,
        Bucket.EVALUATION: 0.25,
    }
    ledger.step_done(3, waits, 8.0)
    ledger.step_done(4, {Bucket.DATA_WAIT: 99.0}, 9.0)
    assert spent(ledger, 9.0) == {
        Bucket.START: 2.0,
        Bucket.PRODUCTIVE: 4.0,
        **waits,
        Bucket.DATA_WAIT: 1.5,
    }


def test_a_wait_for_a_slower_worker_is_taken_from_the_step_that_waited() -> None:
    """The first step of a generation may wait long for a worker that starts late, and the next one is short."""
    ledger = NodeLedger(0.0)
    ledger.formed(frontier_step=1, detect_s=0.0)
    ledger.train(0, 2.0)
    ledger.step_done(1, {}, 14.0)
    ledger.step_done(2, {Bucket.STRAGGLER_WAIT: 10.0}, 15.0)
    assert spent(ledger, 15.0) == {
        Bucket.START: 2.0,
        Bucket.STRAGGLER_WAIT: 10.0,
        Bucket.RECOMPUTE: 2.0,
        Bucket.PRODUCTIVE: 1.0,
    }


def test_steps_up_to_the_frontier_count_as_recompute() -> None:
    """A step counts as productive on no node if any node had done it before, also on a newcomer."""
    ledger = NodeLedger(0.0)
    ledger.formed(frontier_step=3, detect_s=0.0)
    ledger.train(2, 1.0)
    assert ledger.bucket is Bucket.RECOMPUTE
    ledger.step_done(3, {}, 2.0)
    assert ledger.bucket is Bucket.PRODUCTIVE
    ledger.step_done(4, {}, 4.0)
    assert spent(ledger, 4.0) == {Bucket.START: 1.0, Bucket.RECOMPUTE: 1.0, Bucket.PRODUCTIVE: 2.0}


@pytest.mark.parametrize(
    ("detect_s", "detected_s", "broken_off_s"), [(1.0, 1.0, 2.0), (9.0, 3.0, 0.0), (0.0, 0.0, 3.0)]
)
def test_broken_off_step_is_divided_at_the_last_sign_of_life(
    detect_s: float, detected_s: float, broken_off_s: float
) -> None:
    """From the last report to the last sign of life a step was broken off, then nobody knew, then the nodes agreed."""
    ledger = trained()
    ledger.broke(7.0)
    assert ledger.total(9.0)[Bucket.AGREE] == 2.0
    ledger.formed(frontier_step=2, detect_s=detect_s)
    ledger.enter(Bucket.START, 9.0)
    found = ledger.total(10.0)
    assert (found[Bucket.DETECT], found[Bucket.RECOMPUTE]) == (detected_s, broken_off_s)
    assert (found[Bucket.AGREE], found[Bucket.START]) == (2.0, 3.0)


def test_time_after_the_last_step_counts_as_what_follows_it() -> None:
    """Workers that stop as planned save their state after the last report: none of that is a step."""
    ledger = trained()
    ledger.enter(Bucket.DRAINING, 6.0)
    assert spent(ledger, 7.0) == {Bucket.START: 2.0, Bucket.PRODUCTIVE: 2.0, Bucket.DRAINING: 3.0}


def test_late_report_of_stopped_workers_moves_no_time() -> None:
    """A report that arrives after the workers have stopped moves the frontier, and no second."""
    ledger = trained()
    ledger.broke(5.0)
    ledger.step_done(3, {Bucket.DATA_WAIT: 0.5}, 6.0)
    ledger.train(2, 6.0)
    ledger.step_done(3, {}, 7.0)
    found = ledger.total(7.0)
    assert (found[Bucket.AGREE], found[Bucket.DATA_WAIT]) == (1.0, 0.0)
    # The step that was broken off, and the one that was done again.
    assert found[Bucket.RECOMPUTE] == 2.0


def test_pause_moves_the_ledger_while_nothing_happens() -> None:
    """A waiting node's time is certain at once; a step's time only with the report of the next one."""
    ledger = trained()
    assert ledger.counted(9.0)[Bucket.PRODUCTIVE] == 1.0
    ledger.broke(9.0)
    assert ledger.counted(9.0)[Bucket.PRODUCTIVE] == 2.0
    ledger.enter(Bucket.PAUSED_BELOW_MINIMUM, 10.0)
    assert ledger.counted(70.0)[Bucket.PAUSED_BELOW_MINIMUM] == 60.0
