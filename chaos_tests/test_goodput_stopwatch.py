"""`goodput` against a stopwatch around the processes: a node is lost, the run is paused, a node joins."""

import time

import pytest

from chaos_tests.conftest import StartScenario
from chaos_tests.scenario import Scenario
from elastic_pt.runlog.control import ask
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import Request, Verb
from elastic_pt.telemetry.goodput import Bucket

pytestmark = pytest.mark.chaos

KILL_STEP = 9
TOLERANCE = 0.02
EXIT_S = 0.3
"""An agent's last account comes 0.1 to 0.2 s before its process ends."""


def test_node_seconds_agree_with_a_stopwatch(start: StartScenario, reference_digest: str) -> None:
    """I8: every second of each process counts, the lost node's too, and a failure and a pause are in their buckets."""
    run = start("elastic.nodes_max=2", "elastic.join_window_s=1.0", "telemetry.price_per_hour=7.2")
    began_s: dict[str, float] = {}
    ended_s: dict[str, float] = {}

    def start_node(node: str) -> None:
        began_s[node] = time.monotonic()
        run.fleet.start(node)

    for node in ("node-0", "node-1"):
        start_node(node)
    run.until_step(KILL_STEP, nodes=2)
    run.fleet.kill("node-1")
    ended_s["node-1"] = time.monotonic()
    run.until_step(KILL_STEP + 3, nodes=1)
    steer(run, Verb.PAUSE)
    run.until("the pause", lambda: any(each.done for each in run.view().requests))
    paused_s = time.monotonic()
    start_node("node-2")
    run.until("node-2 waits", lambda: "wait" in run.decisions("node-2"))
    steer(run, Verb.RESUME)
    pause_s = time.monotonic() - paused_s

    def all_ended() -> bool:
        running = run.fleet.running()
        for node in began_s.keys() - ended_s.keys() - set(running):
            ended_s[node] = time.monotonic()
        return not running

    run.until("all nodes have ended", all_ended)
    run.finish()
    run.check_whole(reference_digest)
    found = run.check_goodput()
    stopwatch_s = sum(ended_s[node] - began_s[node] for node in began_s)
    missing_s = stopwatch_s - found.node_seconds
    assert -0.1 <= missing_s <= TOLERANCE * stopwatch_s + EXIT_S * len(began_s)
    assert found.cost == pytest.approx(found.node_seconds * 0.002)
    waited_s = {agent.node: agent.seconds[Bucket.PAUSED_ON_REQUEST] for agent in found.agents}
    # A paused run reads its log once a second.
    assert pause_s - 0.5 <= waited_s["node-0"] <= pause_s + 2.0
    assert (waited_s["node-1"], waited_s["node-2"] > 0.0) == (0.0, True)
    assert found.buckets[Bucket.PAUSED_BELOW_MINIMUM] == 0.0
    assert found.buckets[Bucket.DETECT] + found.buckets[Bucket.RECOMPUTE] > 0.0
    (failure,) = found.failures
    assert failure.causes == ("lost node-1",)
    # One node was left, and its own account has the same times as the log.
    assert failure.cost_s["detect"] == pytest.approx(found.buckets[Bucket.DETECT], abs=0.3)


def steer(run: Scenario, verb: Verb) -> None:
    """An operator asks for something."""
    log, wish = RunLog(run.store, writer="operator"), Request(verb, "ann@desk", "a test")
    number = log.refresh().generation_number
    log.append(lambda view: ask(view, wish), generation=number)
