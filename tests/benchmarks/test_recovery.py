"""The pure parts of `benchmarks/recovery.py`: percentiles, phases, the JSON's shape, which step counts."""

import json
import math

import pytest

from benchmarks.recovery_ours import unrelated
from benchmarks.recovery_report import (
    PHASES,
    ROWS,
    Row,
    Sample,
    judge,
    summarize,
    targets_of,
    unavailable,
    words,
    worst,
)
from benchmarks.recovery_watch import (
    Event,
    StepPoint,
    first_step_of,
    last_step_s,
    normal_step_s,
    noticed_s,
    parse_event,
    phases_of,
)
from benchmarks.summary import percentile
from elastic_pt.errors import ElasticPtError
from elastic_pt.membership.decision.mirrors import mirrored_by
from elastic_pt.runlog.records import Generation, Member

WORKER = next(row for row in ROWS if row.kind == "worker")
DETECTION = next(row for row in ROWS if row.beside == "detection_s")


def generation(number: int, time_s: float, *members: str) -> Event:
    return Event(time_s, members[0], "generation", {"number": number, "members": list(members)})


def first_step(number: int, time_s: float, node: str, step: int = 7) -> Event:
    content = {
        "generation": number,
        "step": step,
        "group_s": 0.2,
        "restore_s": 0.05,
        "step_s": 0.15,
    }
    return Event(time_s, node, "first_step", content)


@pytest.mark.parametrize(
    ("count", "share", "expected"), [(1, 0.99, 1), (4, 0.5, 2), (30, 0.5, 15), (200, 0.99, 198)]
)
def test_percentiles_are_nearest_rank(count: int, share: float, expected: int) -> None:
    """A percentile is a measured value: the smallest that the given share of the samples does not exceed."""
    assert percentile([float(value) for value in range(count, 0, -1)], share) == expected


def test_p99_of_few_samples_is_the_worst() -> None:
    """With 30 repetitions p99 hides none of them."""
    assert percentile([0.1] * 29 + [9.0], 0.99) == 9.0


def test_a_repetition_without_recovery_counts_as_infinitely_long() -> None:
    """A repetition without recovery makes p99 null, is counted with its reason, and is never dropped."""
    samples = [Sample(1.0), Sample(2.0), Sample(None, failure="> 60 s")]
    summary = summarize(samples)
    assert (summary["p50"], summary["p99"], summary["repeats"]) == (2.0, None, 3)
    assert summary["reason"] == "1 x > 60 s"
    assert summary["samples"][2]["seconds"] is None
    assert judge(summary, Row("node", "", p50=2.0)) is True
    assert judge(summary, Row("node", "", p50=2.0, p99=100.0)) is False
    assert words(summary, WORKER) == "2.00 / none (1 x > 60 s)"


def test_the_worst_repetition_is_shown() -> None:
    """A missed p99 is explained by the slowest repetition; one without recovery counts as the slowest."""
    samples = [
        Sample(9.0, {"detect": 9.0}, victim="rank 1"),
        Sample(0.1, {"detect": 0.1}, victim="rank 2"),
    ]
    assert worst(summarize(samples)) == "rank 1  detect 9.000"
    lost = Sample(None, victim="rank 0", failure="> 60 s")
    assert worst(summarize([*samples, lost])) == "rank 0 > 60 s"


def test_the_json_of_a_kind() -> None:
    """Every kind has percentiles, repetitions, median phases in order and its samples, as plain JSON."""
    samples = [
        Sample(
            0.1 * rank, dict.fromkeys(PHASES, 0.1 * rank / 6), {"detection_s": 0.01 * rank}, "rank"
        )
        for rank in (1, 2, 3)
    ]
    summary = json.loads(json.dumps(summarize(samples), allow_nan=False))
    assert {"p50", "p99", "repeats", "phases", "samples"} <= set(summary)
    assert list(summary["phases"]) == list(PHASES)
    assert math.isclose(sum(summary["phases"].values()), summary["p50"])
    assert summary["detection_s"] == {"p50": 0.02, "p99": 0.03, "max": 0.03}
    assert judge(summary, WORKER) is True
    assert judge(summary, DETECTION) is True


def test_a_kind_that_was_not_measured_gives_its_reason() -> None:
    """A kind that could not be measured has the same keys, no numbers, a reason, and neither passes nor fails."""
    summary = unavailable("left out: network namespaces need root")
    assert {"p50", "p99", "repeats", "phases", "samples"} <= set(summary)
    assert summary["p50"] is None
    assert judge(summary, WORKER) is None
    assert "root" in words(summary, WORKER)


def test_a_target_without_samples_is_missed() -> None:
    """A target without any sample is missed, not skipped."""
    assert judge(summarize([Sample(1.0)]), DETECTION) is False


@pytest.mark.parametrize(
    ("notice_s", "detect_s"), [(100.1, 0.1), (None, 0.0), (99.0, 0.0), (101.0, 0.3)]
)
def test_phases_add_up(notice_s: float | None, detect_s: float) -> None:
    """The phases add up to the whole time, whenever the disturbance was detected."""
    phases = phases_of(100.0, notice_s, 100.3, first_step(2, 101.0, "a"))
    assert list(phases) == list(PHASES)
    assert math.isclose(sum(phases.values()), 1.0)
    assert math.isclose(phases["detect"], detect_s, abs_tol=1e-9)
    assert math.isclose(phases["fork"], 0.7 - 0.2 - 0.05 - 0.15)


def test_a_stall_begins_with_the_last_step() -> None:
    """Phases before the old generation's last step are not part of a stall."""
    phases = phases_of(100.5, 100.1, 100.3, first_step(2, 101.0, "a"))
    assert math.isclose(sum(phases.values()), 0.5)
    assert (phases["detect"], phases["agree"]) == (0.0, 0.0)


def test_the_first_step_counts_once_all_survivors_have_it() -> None:
    """A generation recovers when the last survivor reports its first step; the old generation's never counts."""
    events = [
        generation(1, 49.0, "a", "b"),
        first_step(1, 50.0, "a"),
        first_step(1, 50.0, "b"),
        generation(2, 100.3, "a", "b"),
        first_step(2, 101.0, "a"),
    ]
    assert first_step_of(events, ["a", "b"], after=1) is None
    found = first_step_of([*events, first_step(2, 101.2, "b")], ["a", "b"], after=1)
    assert found is not None
    assert (found.generation, found.generation_s, found.last.time_s) == (2, 100.3, 101.2)


def test_a_generation_that_breaks_before_its_first_step_does_not_count() -> None:
    """When a generation fails before its first step, the next one is the recovery."""
    events = [
        generation(2, 100.3, "a", "b", "c"),
        first_step(2, 100.9, "a"),
        generation(3, 101.0, "a", "b"),
        first_step(3, 101.5, "a"),
        first_step(3, 101.6, "b"),
    ]
    found = first_step_of(events, ["a", "b"], after=1)
    assert found is not None
    assert (found.generation, found.last.node) == (3, "b")


def test_a_joiner_must_be_in_the_generation() -> None:
    """A join is measured by the first generation that has the joiner as a member."""
    events = [
        generation(2, 100.3, "a"),
        first_step(2, 100.9, "a"),
        generation(3, 101.0, "a", "new"),
        first_step(3, 101.5, "a"),
    ]
    found = first_step_of(events, ["a"], after=1, including="new")
    assert found is not None
    assert found.generation == 3


def test_detection_is_a_survivors_first_event_after_the_disturbance() -> None:
    """Decisions without a finding, events of other nodes and earlier events do not count as detection."""
    training = {"reason": "training"}
    events = [
        Event(99.0, "a", "decision", {"reason": "lost c"}),
        Event(100.1, "b", "decision", training),
        Event(100.2, "c", "worker_failed", {}),
        Event(100.4, "b", "decision", {"reason": "lost c"}),
        Event(100.5, "a", "worker_failed", {}),
    ]
    assert noticed_s(events, ["a", "b"], 100.0) == 100.4
    assert noticed_s(events, ["a", "b"], 100.6) is None


def test_events_are_read_from_json_lines() -> None:
    """An agent's log holds events and other output; times are Unix times to the microsecond."""
    line = b'{"event": "first_step", "timestamp": "1970-01-01T00:00:02.000250Z", "step": 3}'
    event = parse_event(line, "a")
    assert event is not None
    assert (event.name, event.node, event.content["step"]) == ("first_step", "a", 3)
    assert math.isclose(event.time_s, 2.00025)
    assert parse_event(b"Traceback (most recent call last):", "a") is None


def test_normal_steps_and_the_last_one() -> None:
    """A normal step is the median gap before the disturbance; the last step is the newest before a moment."""
    points = [StepPoint(time_s, step) for step, time_s in enumerate((1.0, 1.1, 1.2, 1.7, 1.8, 9.0))]
    assert math.isclose(normal_step_s(points, 2.0), 0.1)
    assert normal_step_s(points[:1], 2.0) == 0.0
    assert last_step_s(points, 9.0) == 1.8
    assert last_step_s(points, 0.5) is None


def test_lost_steps_are_judged_by_median_and_maximum() -> None:
    """After each kind of SIGKILL at most one step is lost at the median and two at most; a node is back in 0.4 s."""
    for kind in ("worker", "node", "two_nodes"):
        lost = next(row for row in ROWS if (row.kind, row.beside) == (kind, "lost_steps"))
        good = [Sample(0.3, {}, {"lost_steps": float(steps)}) for steps in (0, 1, 2)]
        bad = Sample(0.3, {}, {"lost_steps": 3.0})
        assert judge(summarize(good), lost) is True
        assert judge(summarize([*good, *good, bad]), lost) is False
        assert judge(summarize(good[2:]), lost) is False
        assert words(summarize(good), lost) == "1 / 2"
    slow = summarize([Sample(0.41, {}, {"lost_steps": 0.0})])
    assert list(targets_of({"node": slow}).values()) == [False, True]


def test_two_nodes_that_are_lost_together_do_not_mirror_each_other() -> None:
    """On a ring of four it is the opposite node; on a ring of three there is none."""
    members = tuple(Member(f"node-{n}", f"{n}", "127.0.0.1", 1, 1, 1) for n in range(4))

    def ring(count: int) -> Generation:
        mirrors = mirrored_by([""] * count, 1, across_zones=False)
        return Generation(1, members[:count], (), "", 1, None, "", mirrors=mirrors)

    assert [unrelated(ring(4), rank) for rank in range(4)] == [2, 3, 0, 1]
    with pytest.raises(ElasticPtError, match="expected two members"):
        unrelated(ring(3), 0)
