"""Nodes join and leave while nothing can be uploaded: training goes on from the memory of the nodes that stay."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from chaos_tests.conftest import StartScenario
from chaos_tests.scenario import CHECKPOINT_STEPS, Scenario
from elastic_pt.chaos.ceph import ACCESS_KEY, SECRET_KEY, Ceph
from elastic_pt.chaos.processes import workers_of
from elastic_pt.chaos.s3_faults import Delay
from elastic_pt.chaos.s3_proxy import FaultProxy
from elastic_pt.runlog.records import Generation
from tests.services.fixtures import point_aws_at

pytestmark = [pytest.mark.chaos, pytest.mark.ceph]


@contextmanager
def slow_bucket(ceph: Ceph, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy through which this process's children, from now on, reach the bucket.

    Not moto: when two nodes create one key at once there, both may win now and then.
    """
    with FaultProxy(ceph.endpoint) as proxy:
        point_aws_at(proxy.endpoint, ACCESS_KEY, SECRET_KEY, monkeypatch)
        yield proxy


def resumed(run: Scenario, nodes: int) -> Generation:
    """The newest generation, once its `nodes` nodes have done a step."""
    run.until(
        f"{nodes} nodes train on",
        lambda: (
            len(run.generation().members) == nodes and run.step() > run.generation().resume_step
        ),
    )
    return run.generation()


def require_from_memory(generation: Generation) -> None:
    """It resumed where the one before it stopped, at a step that is not in the bucket."""
    assert generation.memory is not None, generation.reason
    assert generation.memory.step == generation.frontier_step
    committed_step = 0 if generation.resume is None else generation.resume.step
    assert committed_step < generation.memory.step


def test_join_and_leave_wait_for_no_upload(
    start: StartScenario,
    ceph: Ceph,
    ceph_url: str,
    monkeypatch: pytest.MonkeyPatch,
    reference_digest: str,
) -> None:
    """A node joins, then another leaves, while no upload ends: no step is lost, and training goes on at once."""
    with slow_bucket(ceph, monkeypatch) as proxy:
        run = start(
            "elastic.nodes_max=2",
            "elastic.join_window_s=0.5",
            "elastic.hang_timeout_s=60",
            run_url=f"{ceph_url}/run",
        )
        run.fleet.start("node-0")
        run.until_step(CHECKPOINT_STEPS + 3, nodes=1)
        worker = workers_of(run.fleet.pid("node-0"), run.mark)[0]
        # Steps are much shorter than an agent's start: the worker stands still until the newcomer is noticed.
        os.kill(worker, signal.SIGSTOP)
        run.fleet.start("node-1")
        run.until("node-0 wants to drain", lambda: "drain" in run.decisions("node-0"))
        proxy.strike(Delay(), methods=["PUT", "POST"], key="*shard-*")
        os.kill(worker, signal.SIGCONT)
        require_from_memory(resumed(run, nodes=2))
        os.kill(run.fleet.pid("node-0"), signal.SIGTERM)
        require_from_memory(resumed(run, nodes=1))
        run.until("node-0 left", lambda: bool(run.events("node-0", "agent_left")))
        proxy.mend()
        run.finish()
        run.check_whole(reference_digest)
    tiers = [event["tier"] for event in run.events("node-0", "settled")]
    assert tiers == ["memory", "memory"]


@pytest.mark.parametrize("second", [3, 2], ids=["apart", "neighbours"])
def test_two_nodes_leave_at_once(
    second: int,
    start: StartScenario,
    ceph: Ceph,
    ceph_url: str,
    monkeypatch: pytest.MonkeyPatch,
    reference_digest: str,
) -> None:
    """Two of four nodes leave while no upload ends. If one of them is the other's only mirror, both wait for the bucket.

    No step is lost in either case.
    """
    with slow_bucket(ceph, monkeypatch) as proxy:
        run = start("elastic.nodes_max=4", "elastic.hang_timeout_s=60", run_url=f"{ceph_url}/run")
        for number in range(4):
            run.fleet.start(f"node-{number}")
        run.until_step(CHECKPOINT_STEPS + 3, nodes=4)
        members = run.generation().members
        leavers = [members[1].node, members[second].node]
        worker = workers_of(run.fleet.pid(members[0].node), run.mark)[0]
        # Steps are short: the worker stands still until both leaves are known.
        os.kill(worker, signal.SIGSTOP)
        proxy.strike(Delay(), methods=["PUT", "POST"], key="*shard-*")
        for node in leavers:
            os.kill(run.fleet.pid(node), signal.SIGTERM)
        run.until(
            "both want to leave",
            lambda: {each.member.node for each in run.statuses() if each.leaving} == set(leavers),
        )
        os.kill(worker, signal.SIGCONT)
        if second == 2:
            run.until(
                "all settle", lambda: all(each.phase == "settling" for each in run.statuses())
            )
            proxy.mend()
        newest = resumed(run, nodes=2)
        proxy.mend()
        run.finish()
        run.check_whole(reference_digest)
    assert newest.resume_step == newest.frontier_step
    assert {cause.node for cause in newest.causes} == set(leavers)
    if second == 3:
        require_from_memory(newest)
    tier = "memory" if second == 3 else "bucket"
    assert [run.events(node, "settled")[-1]["tier"] for node in leavers] == [tier, tier]
