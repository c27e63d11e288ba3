"""Workers and nodes are killed, rank 0's included; the run continues and ends with the digest of the undisturbed run."""

import os
import signal
import time

import pytest

from chaos_tests.conftest import StartScenario
from chaos_tests.scenario import CHECKPOINT_STEPS, STEPS
from elastic_pt.chaos.processes import marked, workers_of
from elastic_pt.membership.decision.progress import step_in_pulse
from elastic_pt.membership.pulse import KEY
from elastic_pt.telemetry.goodput import Bucket

pytestmark = pytest.mark.chaos

KILL_STEP = CHECKPOINT_STEPS + 3
ORPHAN_S = 2.0


def below(agent: int, mark: str) -> set[int]:
    """All processes below an agent."""
    parents = marked(mark)
    found: set[int] = set()
    while more := {
        pid for pid, parent in parents.items() if parent in found | {agent} and pid not in found
    }:
        found |= more
    return found


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


def test_workers_die_with_their_agent(start: StartScenario, reference_digest: str) -> None:
    """F3: when an agent is killed its workers end within two seconds, even hung ones; the others see the node as lost."""
    run = start(nodes=2)
    run.until_step(KILL_STEP, nodes=2)
    agent = run.fleet.pid("node-1")
    family = below(agent, run.mark)
    # A stopped process can notice nothing by itself: only the kernel can end it now.
    os.kill(workers_of(agent, run.mark)[0], signal.SIGSTOP)
    os.kill(agent, signal.SIGKILL)
    killed_s = time.monotonic()
    run.until("the agent's processes are gone", lambda: not family & marked(run.mark).keys())
    assert time.monotonic() - killed_s < ORPHAN_S
    run.fleet.kill("node-1")
    run.finish()
    assert run.check_whole(reference_digest).generations[-1].reason == "lost node-1"


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
