"""Each second of a node's time is counted once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_pt.telemetry.catalogue import Metrics
from elastic_pt.telemetry.goodput import Activity, GoodputLedger

EVENT = st.tuples(
    st.floats(0, 100),
    st.one_of(st.sampled_from(list(Activity)), st.integers(0, 50)),
)


@given(st.lists(EVENT, max_size=60))
def test_activities_add_up_to_the_total_time(events: list[tuple[float, Activity | int]]) -> None:
    """For any events in any order, the activities add up to the time that passed."""
    now_s = 7.0
    ledger, metrics = GoodputLedger(now_s), Metrics()
    for pause_s, event in events:
        now_s += pause_s
        if isinstance(event, int):
            ledger.step_done(event, now_s)
        else:
            ledger.enter(event, now_s)
        metrics.account(ledger.snapshot(now_s))
    assert sum(ledger.snapshot(now_s).values()) == pytest.approx(now_s - 7.0)
    exported = sum(
        sample.value
        for family in metrics.time_seconds.collect()
        for sample in family.samples
        if sample.name.endswith("_total")
    )
    assert exported == pytest.approx(now_s - 7.0)


def test_repeated_steps_count_as_recompute() -> None:
    """After a restart from a checkpoint, steps up to the old frontier count as recompute, and later ones as productive."""
    ledger = GoodputLedger(0.0)
    for step, now_s in [(1, 1.0), (2, 2.0)]:
        ledger.step_done(step, now_s)
    ledger.enter(Activity.FORM, 2.0)
    ledger.enter(Activity.START, 2.5)
    for step, now_s in [(2, 3.5), (3, 5.5)]:
        ledger.step_done(step, now_s)
    seconds = ledger.snapshot(5.5)
    assert (seconds[Activity.FORM], seconds[Activity.START]) == (0.5, 0.0)
    assert (seconds[Activity.RECOMPUTE], seconds[Activity.PRODUCTIVE]) == (1.0, 4.0)
