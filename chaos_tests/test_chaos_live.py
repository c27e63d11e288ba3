"""`elastic-pt chaos live` on a run with real agents: paused, drained and killed members, and what it refuses."""

import json
import signal

import pytest

from chaos_tests.conftest import StartScenario
from chaos_tests.scenario import CHECKPOINT_STEPS, Scenario
from elastic_pt.cli import run_command_line
from elastic_pt.runlog.records import CauseKind

pytestmark = pytest.mark.chaos

STEPS = 1_000_000


def disturb(
    run: Scenario, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, list[dict[str, object]]]:
    """Run the command; its exit code, and what it printed."""
    code = run_command_line(["chaos", "live", run.config.run.url, "--yes", "--json", *words])
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_each_kind_strikes_a_member_and_the_run_goes_on(
    start: StartScenario, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pause, a drain and a kill of three nodes: each is recorded with its cause, and only the named node ends."""
    run = start("elastic.chaos=true", f"train.steps={STEPS}", nodes=3)
    run.until_step(CHECKPOINT_STEPS, nodes=3)
    code, (paused,) = disturb(run, capsys, "--kinds", "pause", "--pause-seconds", "0.5")
    assert (code, paused["nodes"], len(paused["members"])) == (0, [], 3)
    assert set(run.fleet.exit_codes().values()) == {None}
    code, (drained,) = disturb(run, capsys, "--kinds", "drain", "--seed", "3")
    assert code == 0
    (left,) = drained["nodes"]
    assert left not in drained["members"]
    run.until("the drained node has ended", lambda: run.fleet.exit_codes()[left] == 0)
    code, (killed,) = disturb(run, capsys, "--kinds", "kill", "--seed", "3")
    assert code == 0
    (lost,) = killed["nodes"]
    assert run.fleet.exit_codes()[lost] == -signal.SIGKILL
    assert len(killed["members"]) == 1
    assert killed["lost_steps"] <= 2
    assert [(each.kind, each.node) for each in run.generation().causes] == [(CauseKind.LOST, lost)]
    (event,) = run.events(lost, "chaos_kill")
    assert "@" in event["by"]
    # One node is left, and `elastic.nodes_min` is 1.
    assert disturb(run, capsys, "--kinds", "drain")[0] == 2


def test_a_run_that_does_not_allow_it_is_not_killed(
    start: StartScenario, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without `elastic.chaos` no order is written, and the message names the key."""
    run = start(f"train.steps={STEPS}", nodes=2)
    run.until_step(1, nodes=2)
    run.until("the first step is on record", lambda: run.view().recovery is not None)
    code = run_command_line(["chaos", "live", run.config.run.url, "--yes", "--kinds", "kill"])
    assert code == 2
    assert "elastic.chaos = false" in capsys.readouterr().err
    assert set(run.fleet.exit_codes().values()) == {None}
