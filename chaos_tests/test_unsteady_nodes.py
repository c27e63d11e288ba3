"""Nodes that hang, fail repeatedly, or are started twice: the run continues, and always as one lineage."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from chaos_tests.conftest import StartScenario
from chaos_tests.scenario import CHECKPOINT_STEPS, PATIENCE_S
from elastic_pt.chaos.processes import workers_of
from elastic_pt.report.status import State, open_run, read_status
from elastic_pt.runlog.records import CauseKind
from elastic_pt.telemetry.goodput import Bucket

pytestmark = pytest.mark.chaos

KILL_STEP = CHECKPOINT_STEPS + 3


def test_a_hung_worker_is_killed_and_replaced(start: StartScenario, reference_digest: str) -> None:
    """F12: a stopped worker is killed soon; its stacks are kept, and it is blamed, not the workers that waited for it."""
    run = start(nodes=2)
    run.until_step(KILL_STEP, nodes=2)
    os.kill(workers_of(run.fleet.pid("node-1"), run.mark)[0], signal.SIGSTOP)
    run.finish()
    newest = run.check_whole(reference_digest).generations[-1]
    (cause,) = newest.causes
    assert (cause.kind, cause.node) == (CauseKind.FAILED, "node-1")
    assert "wrote no heartbeat" in cause.detail
    (failure,) = run.events("node-1", "worker_failed")
    assert failure["kind"] == "hang"
    # SIGSTOP can come between two calls of `run_step`.
    assert "train/loop.py" in failure["stacks"]


def test_a_stopped_agent_is_lost_and_rejoins(start: StartScenario, reference_digest: str) -> None:
    """F13: the others see a stopped agent as lost; when it continues it appends nothing and asks to join."""
    run = start("elastic.join_window_s=0.2", nodes=3)
    run.until_step(KILL_STEP, nodes=3)
    first = run.generation()
    zombie = first.members[0].node
    os.kill(run.fleet.pid(zombie), signal.SIGSTOP)
    run.until("the others go on", lambda: run.generation().number > first.number)
    second = run.generation()
    os.kill(run.fleet.pid(zombie), signal.SIGCONT)
    run.finish()
    assert second.reason == f"lost {zombie}"
    assert zombie not in [member.node for member in second.members]
    assert zombie in [member.node for member in run.generation().members]
    run.check_whole(reference_digest)


def test_a_node_that_fails_repeatedly_is_quarantined(
    start: StartScenario, reference_digest: str
) -> None:
    """F20: after the third failure within ten minutes a node is quarantined; the others finish without it."""
    run = start(nodes=2)
    for number in range(3):
        run.until_step(KILL_STEP + 6 * number, nodes=2)
        generation = run.generation().number
        os.kill(workers_of(run.fleet.pid("node-1"), run.mark)[0], signal.SIGKILL)
        run.until("the next generation", lambda: run.generation().number > generation)  # noqa: B023
    run.finish()
    whole = run.check_whole(reference_digest)
    assert [len(each.members) for each in whole.generations] == [2, 2, 2, 1]
    (quarantine,) = whole.quarantines
    assert quarantine.node == "node-1"
    assert "3 failures" in quarantine.why
    assert CauseKind.BARRED in [cause.kind for cause in whole.generations[-1].causes]


def test_below_nodes_min_the_run_pauses_and_resumes(
    start: StartScenario, reference_digest: str
) -> None:
    """F22: with too few nodes the run pauses: the state is kept, `status` gives the reason, and a new node resumes it."""
    run = start("elastic.nodes_min=2", nodes=2)
    run.until_step(KILL_STEP, nodes=2)
    run.fleet.kill("node-1")
    opened = open_run(run.config.run.url)
    run.until("status says paused", lambda: read_status(opened).state is State.PAUSED)
    assert "1 of at least 2 nodes" in read_status(opened).reason
    run.fleet.start("node-2")
    run.finish()
    newest = run.check_whole(reference_digest).generations[-1]
    assert newest.reason == "lost node-1; node-2 joins"
    found = run.check_goodput()
    (failure,) = found.failures
    # One node was left. Its own account divides the time in the same way; it also has the waits before the first generation.
    (left,) = [each for each in found.agents if each.node == "node-0"]
    phases = (Bucket.AGREE, Bucket.PAUSED_BELOW_MINIMUM)
    assert sum(failure.cost_s[phase] for phase in phases) == pytest.approx(newest.agree_s)
    for phase in phases:
        assert failure.cost_s[phase] <= left.seconds[phase] + 0.5


def test_the_same_failure_everywhere_stops_the_run(start: StartScenario, tmp_path: Path) -> None:
    """F2: an exception that repeats on every node and every attempt stops the run soon, with its cause.

    The bucket alone has the traceback and the end of each agent.
    """
    data = Path(make_damaged_data(start, tmp_path))
    run = start(f"data.url=file://{data}", nodes=2)
    codes = run.fleet.wait(PATIENCE_S)
    assert set(codes.values()) == {7}
    stop = run.view().stop
    assert stop is not None
    assert "the same failure" in stop.reason
    assert "DataError" in stop.reason
    assert len([each for each in run.records() if each.kind == "GENERATION"]) <= 4
    keys = [key for key in run.store.keys("events/") if key.endswith(".jsonl")]
    events = [json.loads(line) for key in keys for line in run.store.read(key).splitlines()]
    told = [each for each in events if each["event"] == "worker_failed"]
    assert any("Traceback" in each["traceback"] for each in told)
    assert {each["run"] for each in events} == {run.config.run.url}
    assert {each["node"] for each in events} == set(codes)


def make_damaged_data(start: StartScenario, directory: Path) -> str:
    """A copy of the prepared data whose tokens cannot be read."""
    source = start().config.data.url.removeprefix("file://")
    copy = shutil.copytree(source, directory / "damaged")
    for shard in copy.rglob("*"):
        if shard.is_file() and shard.suffix not in (".json", ".toml"):
            shard.write_bytes(shard.read_bytes()[:-1000])
    return str(copy)


def test_starting_a_run_twice_gives_one_lineage(
    start: StartScenario, reference_digest: str
) -> None:
    """F25: nodes of a second start join the running world or wait; there is one lineage and one result."""
    run = start("elastic.nodes_max=2", nodes=0)
    for node in ("first-a", "first-b", "second-a", "second-b"):
        run.fleet.start(node)
    run.finish()
    whole = run.check_whole(reference_digest)
    assert all(len(each.members) <= 2 for each in whole.generations)
