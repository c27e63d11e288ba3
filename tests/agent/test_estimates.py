"""What fits in the time before a node must leave, from kept averages. Pure, with a clock that the test sets."""

from dataclasses import replace

import pytest

from elastic_pt.agent.estimates import Estimates, Times, Way, plan_leave

FAST = Times(step_s=0.5, snapshot_s=1.0, upload_s=10.0)
NO_MIRROR = Times(step_s=0.5, upload_s=10.0)
FIRST_STEP = Times(step_s=0.5)


@pytest.mark.parametrize(
    ("lead_s", "times", "way"),
    [
        (120.0, FAST, Way.MEMORY),
        (2.0, FAST, Way.MEMORY),
        (1.9, FAST, Way.AT_ONCE),
        (0.0, FAST, Way.AT_ONCE),
        (14.0, NO_MIRROR, Way.BUCKET),
        (13.9, NO_MIRROR, Way.AT_ONCE),
        (5.0, Times(step_s=0.5, snapshot_s=60.0, upload_s=2.0), Way.BUCKET),
        (5.0, Times(step_s=4.0, snapshot_s=0.1, upload_s=0.1), Way.AT_ONCE),
        (1.0, FIRST_STEP, Way.BUCKET),
        (0.9, FIRST_STEP, Way.AT_ONCE),
        (1.0, Times(), Way.BUCKET),
        (0.0, Times(), Way.AT_ONCE),
    ],
)
def test_what_does_not_fit_in_the_lead_is_not_tried(lead_s: float, times: Times, way: Way) -> None:
    """F16: two steps and a copy, or two steps and 1.3 times an upload, must fit; else the node leaves at once."""
    assert plan_leave(lead_s, times, alone=False).way is way


def test_memory_is_no_way_if_all_mirrors_leave() -> None:
    """No member that stays will have the state of this node: it must be committed."""
    assert plan_leave(120.0, FAST, alone=False, mirrors_leave=True).way is Way.BUCKET
    assert plan_leave(5.0, FAST, alone=False, mirrors_leave=True).way is Way.AT_ONCE


@pytest.mark.parametrize("lead_s", [120.0, 5.0, 0.0])
def test_a_lone_node_tries_to_commit_until_its_deadline(lead_s: float) -> None:
    """Nobody waits for the only member, and leaving at once would save nothing: it tries whatever the estimates say."""
    assert plan_leave(lead_s, FAST, alone=True).way is Way.BUCKET


def test_the_rest_of_an_evaluation_must_fit_too() -> None:
    """F16: an evaluation is not broken off for a leave, so two steps, it, and a copy must fit."""
    times = replace(FAST, evaluations_s=4.0)
    assert plan_leave(6.0, times, alone=False).way is Way.MEMORY
    assert plan_leave(5.9, times, alone=False).way is Way.AT_ONCE


def test_only_what_is_left_of_evaluations_counts() -> None:
    """Of the one after the step that has begun, what is still to come; of the one after the step that all agree on, all of it."""
    now_s = [0.0]
    estimates = Estimates(lambda: now_s[0])

    def left_s(moment_s: float, *evaluated: int) -> float | None:
        now_s[0] = moment_s
        return estimates.times_to_leave(lambda step: step in evaluated).evaluations_s

    assert left_s(0.0, 1, 2) is None
    estimates.step_done(8, 1.0)
    assert left_s(0.0, 9, 10) is None
    estimates.step_done(9, 1.0, 20.0)
    assert left_s(0.0, 9, 12) == 0.0
    assert left_s(0.5, 10) == 20.0
    assert left_s(6.0, 10) == 15.0
    assert left_s(99.0, 10) == 0.0
    assert left_s(99.0, 11) == 20.0
    assert left_s(6.0, 10, 11) == 35.0


def test_the_reason_has_both_times() -> None:
    """The operator sees what was needed and what was left."""
    assert plan_leave(1.0, FAST, alone=False).reason == "needs about 2.0 s, but 1.0 s are left"
    assert plan_leave(30.0, FAST, alone=False).reason == "needs about 2.0 of 30.0 s"


def test_averages_count_from_the_end_of_the_step() -> None:
    """A snapshot and an upload take from the end of their step until they are done; newer values have a fifth of the weight."""
    now_s = [100.0]
    estimates = Estimates(lambda: now_s[0])
    assert estimates.times == Times()
    estimates.step_done(1, 1.0)
    now_s[0] = 102.0
    estimates.step_done(2, 2.0)
    estimates.held(1)
    now_s[0] = 105.0
    estimates.uploaded(1)
    estimates.held(2)
    estimates.uploaded(77)
    times = estimates.times
    assert (times.step_s, times.snapshot_s, times.upload_s) == pytest.approx((1.2, 2.2, 5.0))


def test_a_step_that_is_done_again_counts_from_its_new_end() -> None:
    """After a lost node some steps are done again; their first end is too long ago."""
    now_s = [0.0]
    estimates = Estimates(lambda: now_s[0])
    estimates.step_done(5, 1.0)
    now_s[0] = 50.0
    estimates.step_done(5, 1.0)
    now_s[0] = 51.0
    estimates.held(5)
    assert estimates.times.snapshot_s == 1.0
