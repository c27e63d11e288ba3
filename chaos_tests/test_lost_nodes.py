"""Workers and nodes are killed, rank 0's included; the run continues and ends with the digest of the undisturbed run."""

import os
import signal
import time

import pytest

from chaos_tests.conftest import StartScenario
from chaos_tests.scenario import CHECKPOINT_STEPS, STEPS, first_member
from elastic_pt.chaos.processes import descendants_of, marked, workers_of
from elastic_pt.membership.decision.progress import step_in_pulse
from elastic_pt.membership.pulse import KEY
from elastic_pt.telemetry.goodput import Bucket

pytestmark = pytest.mark.chaos

KILL_STEP = CHECKPOINT_STEPS + 3
ORPHAN_S = 2.0


def test_a_killed_worker_is_replaced(start: StartScenario, reference_digest: str) -> None:
    """F1: after one worker is killed the same nodes resume from the newest state and log the reason."""
    run = start(nodes=2)
    run.until_step(KILL_STEP, nodes=2)
    worker = workers_of(run.fleet.pid("node-1"), run.mark)[0]
    os.kill(worker, signal.SIGKILL)
    run.finish()
    whole = run.check_whole(reference_digest)
    before, after = whole.generations[-2:]
    assert after.members == before.members
    assert "node-1" in after.reason
    assert "SIGKILL" in after.reason


def test_a_killed_node_shrinks_the_world(start: StartScenario, reference_digest: str) -> None:
    """F4: the remaining nodes resume from the newest state; the log names the lost one."""
    run = start(nodes=3)
    run.until_step(KILL_STEP, nodes=3)
    victim = run.generation().members[1].node
    run.fleet.kill(victim)
    run.finish()
    newest = run.check_whole(reference_digest).generations[-1]
    assert newest.reason == f"lost {victim}"
    assert len(newest.members) == 2
    assert newest.resume is not None


def test_a_killed_leader_node_shrinks_the_world(
    start: StartScenario, reference_digest: str
) -> None:
    """F6: the node that proposes, commits and serves the generation's store can be lost like any other."""
    run = start(nodes=3)
    run.until_step(KILL_STEP, nodes=3)
    victim = first_member(run.generation())
    run.fleet.kill(victim)
    run.finish()
    newest = run.check_whole(reference_digest).generations[-1]
    assert newest.reason == f"lost {victim}"
    assert victim not in [member.node for member in newest.members]


def test_workers_die_with_their_agent(start: StartScenario, reference_digest: str) -> None:
    """F3: when an agent is killed its workers end within two seconds, even hung ones; the others see the node as lost."""
    run = start(nodes=2)
    run.until_step(KILL_STEP, nodes=2)
    agent = run.fleet.pid("node-1")
    family = descendants_of(agent, run.mark)
    # A stopped process can notice nothing by itself: only the kernel can end it now.
    os.kill(workers_of(agent, run.mark)[0], signal.SIGSTOP)
    os.kill(agent, signal.SIGKILL)
    killed_s = time.monotonic()
    run.until("the agent's processes are gone", lambda: not family & marked(run.mark).keys())
    assert time.monotonic() - killed_s < ORPHAN_S
    run.fleet.kill("node-1")
    run.finish()
    assert run.check_whole(reference_digest).generations[-1].reason == "lost node-1"


def test_a_killed_node_with_two_workers(start: StartScenario, reference_digest: str) -> None:
    """A node is lost with all its workers, and the bits depend on neither the nodes nor the workers."""
    run = start("elastic.workers_per_node=2", nodes=2)
    run.until_step(KILL_STEP, nodes=2)
    assert run.generation().world_size == 4
    assert len(workers_of(run.fleet.pid("node-0"), run.mark)) == 2
    run.fleet.kill("node-0")
    run.finish()
    assert run.check_whole(reference_digest).generations[-1].world_size == 2


def test_a_killed_leader_costs_two_steps_at_most(
    start: StartScenario, reference_digest: str
) -> None:
    """I5: with a snapshot of each step, the others resume from memory, long before the next checkpoint."""
    run = start("checkpoint.snapshot_every_steps=1", "checkpoint.every_steps=1000", nodes=3)
    run.until_step(KILL_STEP, nodes=3)
    run.fleet.kill(first_member(run.generation()))
    run.finish()
    newest = run.check_whole(reference_digest).generations[-1]
    assert newest.memory is not None
    assert newest.memory.step >= newest.frontier_step - 2 >= KILL_STEP - 3


def test_steps_of_a_lost_fleet_are_recompute(start: StartScenario, reference_digest: str) -> None:
    """If all nodes are lost before a commit, the new ones know from the pulse which steps they do again."""
    quick = ("elastic.heartbeat_timeout_s=1.0", "elastic.takeover_s=2.0")
    run = start(f"checkpoint.every_steps={STEPS}", *quick, nodes=1)
    run.until_step(1, nodes=1)
    run.until(
        "a pulse with steps",
        lambda: (step_in_pulse(run.store.read(KEY), 1) or 0) >= KILL_STEP,
    )
    run.fleet.kill("node-0")
    run.fleet.start("node-1")
    run.finish()
    newest = run.check_whole(reference_digest).generations[-1]
    assert (newest.number, newest.resume_step) == (2, 0)
    assert newest.lost_steps == newest.frontier_step >= KILL_STEP
    found = run.check_goodput()
    (failure,) = found.failures
    new = next(each for each in found.agents if each.node == "node-1")
    assert failure.cost_s["recompute"] > 0.0
    assert new.seconds[Bucket.RECOMPUTE] > 0.0
