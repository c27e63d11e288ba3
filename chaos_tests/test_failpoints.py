"""Agents are killed exactly between two durable steps; the others continue and end with the digest of the undisturbed run."""

import signal

import pytest

from chaos_tests.conftest import StartScenario
from chaos_tests.scenario import Scenario
from elastic_pt.failpoints import VARIABLE

pytestmark = pytest.mark.chaos

NODES = 3


def start_armed(start: StartScenario, rules: dict[str, str], *overrides: str) -> Scenario:
    """Three nodes, each with its own failpoints."""
    run = start(f"elastic.nodes_max={NODES}", *overrides)
    for number in range(NODES):
        node = f"node-{number}"
        run.fleet.start(node, prefix=("env", f"{VARIABLE}={rules.get(node, '')}"))
    return run


def await_kill(run: Scenario, *nodes: str) -> str:
    """Wait until one of these nodes has been killed by its own failpoint. Returns it; it counts as lost from then on."""

    def killed() -> list[str]:
        codes = run.fleet.exit_codes()
        return [node for node in nodes if codes[node] == -signal.SIGKILL]

    run.until("an agent is killed at its failpoint", lambda: bool(killed()))
    (victim,) = killed()
    del run.fleet._agents[victim]
    assert [event["action"] for event in run.events(victim, "failpoint")] == ["kill"]
    return victim


def test_agent_killed_just_after_its_commit(start: StartScenario, reference_digest: str) -> None:
    """F33: the COMMIT counts, although its writer never knew: the others resume from it or from a later state, and nothing
    forks."""
    rule = "commit.appended@2:kill"
    run = start_armed(start, {"node-0": rule}, "checkpoint.snapshot_every_steps=1000")
    victim = await_kill(run, "node-0")
    run.finish()
    whole = run.check_whole(reference_digest)
    newest = whole.generations[-1]
    assert newest.reason == f"lost {victim}"
    assert newest.resume is not None
    # The commit that the victim appended last.
    assert newest.resume.step == 12


def test_agent_killed_while_it_mirrors(start: StartScenario, reference_digest: str) -> None:
    """F33: a copy that is in the buffer and not verified counts for nobody; the others have a whole state of the last two
    steps in memory."""
    run = start_armed(
        start,
        {"node-1": "mirror.copied@9:kill"},
        "checkpoint.snapshot_every_steps=1",
        "checkpoint.every_steps=1000",
    )
    victim = await_kill(run, "node-1")
    run.finish()
    newest = run.check_whole(reference_digest).generations[-1]
    assert newest.reason == f"lost {victim}"
    assert newest.memory is not None
    assert newest.memory.step >= newest.frontier_step - 2 > 0
