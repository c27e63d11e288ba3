"""The pure parts of `benchmarks/goodput.py`: schedules, thinned traces, the capacity oracle, the rest, the targets."""

import itertools
import math
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.goodput import compare, cores_of, schedule_of
from benchmarks.goodput_drive import Course
from benchmarks.goodput_plan import (
    FEWEST,
    FLOOR_S,
    GAP_S,
    Event,
    Schedule,
    faults,
    oracle_steps,
    read_aws,
    read_gcp,
    sizes_of,
    stretch_of,
    thinned,
)
from benchmarks.goodput_report import SLOWER, TARGETS, rest_of, targets_of, with_slower_steps
from benchmarks.recovery_watch import StepPoint
from elastic_pt.errors import ElasticPtError
from elastic_pt.report.goodput import AgentTime, Goodput
from elastic_pt.telemetry.goodput import Bucket

ROOT = Path(__file__).parents[2]
RATES = {1: 1.0, 2: 1.8, 3: 2.4}


def reading(*agents: AgentTime) -> Goodput:
    return Goodput(
        node_seconds=0.0, buckets={}, goodput=None, failures=(), cost=None, agents=agents
    )


def agent(node: str, started_at_s: float, ended_at_s: float, **seconds: float) -> AgentTime:
    spent_s = {bucket: seconds.get(str(bucket), 0.0) for bucket in Bucket}
    return AgentTime(node, f"{node}-incarnation", started_at_s, ended_at_s, True, spent_s, 0.0)


@pytest.mark.parametrize("mean_s", [29.0, 60.0])
def test_faults_have_the_wanted_mean_and_floor(mean_s: float) -> None:
    """Gaps are at least the floor, their mean is the wanted one, and no fault is at the very end."""
    schedule = faults("x", mean_s=mean_s, seconds=100_000.0, nodes=3, seed=5)
    moments = [0.0, *(event.at_s for event in schedule.events)]
    gaps = [later - earlier for earlier, later in itertools.pairwise(moments)]
    assert min(gaps) >= FLOOR_S
    assert statistics.fmean(gaps) == pytest.approx(mean_s, rel=0.05)
    assert moments[-1] <= schedule.seconds - FLOOR_S
    assert {int(3 * event.draw) for event in schedule.events} == {0, 1, 2}


def test_a_seed_replays_its_faults() -> None:
    """The same seed gives the same moments and victims; another seed, or another run, gives others."""
    first, again = (faults("x", mean_s=29.0, seconds=600.0, nodes=3, seed=5) for _ in range(2))
    assert first == again
    assert faults("x", mean_s=29.0, seconds=600.0, nodes=3, seed=6).events != first.events
    assert faults("y", mean_s=29.0, seconds=600.0, nodes=3, seed=5).events != first.events


def test_traces_are_read_as_changes() -> None:
    """AWS: events by node. GCP: samples of a count, of which only changes count."""
    assert read_aws("0,add,node1\n2000,remove,node1\n") == [(0.0, False), (2.0, True)]
    samples = "2021-12-11, 23:59:30, 55\n2021-12-12, 00:00:30, 50\n2021-12-12, 00:01:30, 50\n2021-12-12, 00:02:30, 51\n"
    assert read_gcp(samples) == [(60.0, True), (180.0, False)]


def test_a_trace_is_thinned_by_its_rule() -> None:
    """One node a change, 20 s apart, the removal of two at the same moment, never below two or above the most."""
    changes = [(0.0, False), (0.0, True), (19.0, True), (20.0, True), (60.0, True), (90.0, False)]
    assert thinned(changes, nodes=4, nodes_max=6) == [(0.0, True), (20.0, True), (90.0, False)]
    assert thinned([(0.0, False), (30.0, True)], nodes=6, nodes_max=6) == [(30.0, True)]


def test_the_busiest_stretch_is_taken() -> None:
    """The stretch with the most changes after thinning; it keeps the times between them."""
    changes = [(0.0, True), (500.0, True), (530.0, False), (1000.0, True), (1030.0, False)]
    found = stretch_of("x", changes, seconds=60.0, nodes=4, nodes_max=6, seed=0)
    assert [(event.at_s, event.lost) for event in found.events] == [(10.0, True), (40.0, False)]
    assert all(event.at_s <= found.seconds - 10.0 for event in found.events)


@pytest.mark.parametrize("name", ["trace_aws", "trace_gcp"])
@pytest.mark.parametrize("minutes", [1.0, 3.0, 10.0])
def test_the_shipped_traces_give_schedules(name: str, minutes: float) -> None:
    """At most six nodes, at least two, and events at least 20 s apart."""
    schedule = schedule_of(name, 60 * minutes, seed=1)
    assert schedule.events
    moments = [event.at_s for event in schedule.events]
    assert all(later - earlier >= GAP_S for earlier, later in itertools.pairwise(moments))
    assert max(sizes_of([schedule])) <= schedule.nodes_max == 6
    assert min(sizes_of([schedule])) >= FEWEST


def test_the_traces_have_their_licence() -> None:
    """The traces are others' work: licence and origin are beside them."""
    traces = ROOT / "benchmarks" / "spot_traces"
    assert "MIT" in (traces / "LICENSE").read_text()
    assert "github.com/uclasystem/bamboo" in (traces / "README.md").read_text()


def test_all_nodes_and_a_warming_one_fit_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imports of a newcomer take no time from the others."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    schedule = faults("x", mean_s=29.0, seconds=60.0, nodes=3, seed=5)
    assert 1.8 < 4 * cores_of(schedule) < 2.0


def test_the_oracle_of_an_undisturbed_run_is_its_rate() -> None:
    """Without changes the oracle does the undisturbed rate all the time."""
    assert oracle_steps([(5.0, 3)], RATES, nodes_max=3, begin_s=10.0, end_s=20.0) == 24.0


def test_the_oracle_follows_the_living_nodes() -> None:
    """A change costs the oracle nothing, but a node that is gone does nothing; later changes do not count."""
    living = [(5.0, 3), (12.0, -1), (15.0, 1), (25.0, -1)]
    expected = 2 * 2.4 + 3 * 1.8 + 5 * 2.4
    found = oracle_steps(living, RATES, nodes_max=3, begin_s=10.0, end_s=20.0)
    assert found == pytest.approx(expected)


def test_a_spare_is_capacity_when_a_node_is_lost() -> None:
    """More than the most nodes do not train; with a warm spare the loss of a node costs the oracle nothing."""
    living = [(5.0, 3), (6.0, 1), (12.0, -1)]
    found = oracle_steps(living, RATES, nodes_max=3, begin_s=10.0, end_s=20.0)
    assert found == pytest.approx(24.0)


def test_the_oracle_of_no_node_does_nothing() -> None:
    """Time without any node is nobody's loss; a size without a rate is in proportion to the nearest."""
    living = [(0.0, 1), (5.0, -1), (8.0, 4)]
    found = oracle_steps(living, RATES, nodes_max=6, begin_s=0.0, end_s=10.0)
    assert found == pytest.approx(5.0 + 2 * 2.4 * 4 / 3)


def test_a_rate_is_measured_for_each_size_that_may_occur() -> None:
    """Of a trace each number of nodes; with replacements also one node less, while the next spare warms up."""
    lost, joined = Event(1.0, True), Event(2.0, False)
    trace = Schedule("x", 60.0, 4, 6, (lost, lost, joined), replaced=False)
    assert sizes_of([trace]) == {4, 3, 2}
    faulty = Schedule("y", 60.0, 3, 3, (lost,), replaced=True)
    assert sizes_of([faulty]) == {2, 3}
    assert sizes_of([faulty, trace]) == {2, 3, 4}


def test_the_rates_are_those_of_the_machine_at_that_time() -> None:
    """If the machine is slower during a run than during the calibration, so is the oracle."""

    course = Course(StepPoint(10.0, 100), StepPoint(20.0, 120), speeds=[0.8, 1.0])
    schedule = Schedule("x", 10.0, 3, 3, (), replaced=True)
    assert course.steps == 20
    system: Any = SimpleNamespace(living=[(0.0, 3)])
    assert course.oracle_steps(system, schedule, RATES) == pytest.approx(0.9 * 24.0)


def test_the_rest_leaves_warming_out() -> None:
    """Counts only the time between two readings, and of a newcomer only the time after it counts as living."""
    before = reading(agent("a", 0.0, 100.0, productive=90.0, start=10.0))
    after = reading(
        agent("a", 0.0, 200.0, productive=180.0, start=12.0, detect=8.0),
        agent("b", 120.0, 200.0, start=31.0, idle_spare=29.0, productive=20.0),
    )
    rest = rest_of(before, after, {"b": 150.0})
    # a: 90 productive, 2 start, 8 detect. b: 20 productive, and 1 of 31 start.
    assert sum(rest.values()) == pytest.approx(1.0)
    assert rest[Bucket.PRODUCTIVE] == pytest.approx(110 / 121)
    assert rest[Bucket.START] == pytest.approx(3 / 121)
    assert rest[Bucket.DETECT] == pytest.approx(8 / 121)
    assert Bucket.IDLE_SPARE not in rest


def test_the_rest_of_goodput_adds_up() -> None:
    """What is lost in no bucket is in slower steps, so that the parts add up to what is missing."""
    found = with_slower_steps({"productive": 0.95, "detect": 0.03, "start": 0.02}, 0.93)
    assert found == {"detect": 0.03, "start": 0.02, SLOWER: pytest.approx(0.02)}
    assert math.isclose(sum(found.values()), 1 - 0.93)


def test_targets_are_judged() -> None:
    """A run that failed misses its target; one that was not measured has none."""
    report = {"every_29s": {"goodput": 0.97}, "trace_aws": {"failure": "no step\nlog"}}
    verdicts = targets_of(report)
    assert list(verdicts.values()) == [True, False]
    assert "no step" in list(verdicts)[1]
    assert targets_of({"every_60s": {"goodput": 0.9799}}) == {
        "every_60s: at least 98.0% of the capacity oracle, 97.99%": False
    }


def test_final_states_are_compared_at_their_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another digest is a failure. A run without an end, or without a reference, was not compared: that is no success."""

    def reference(directory: Path, data_url: str, steps: int) -> str:
        if steps == 30:
            raise ElasticPtError("no reference")
        return f"digest of {steps}"

    monkeypatch.setattr("benchmarks.goodput.reference_digest", reference)
    end = {"digest_equal": None}
    report: dict[str, Any] = {
        "every_29s": end | {"digest_step": 10, "digest": "digest of 10"},
        "every_60s": end | {"digest_step": 20, "digest": "digest of 21"},
        "trace_aws": end | {"digest_step": 30, "digest": "digest of 30"},
        "trace_gcp": {"failure": "no step"},
    }
    compare(report, tmp_path, "")
    assert [report[name].get("digest_equal") for name in TARGETS] == [True, False, None, None]
    assert report["trace_aws"]["reference"] == {"failure": "no reference"}
