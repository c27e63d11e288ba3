"""Faults at the end of a run: it ends exactly once, with the same result."""

import os
import signal
from pathlib import Path

import pytest

from chaos_tests.conftest import StartScenario
from chaos_tests.scenario import PATIENCE_S
from elastic_pt.chaos.processes import workers_of
from elastic_pt.runlog.log import record_key
from elastic_pt.runlog.records import Stop

pytestmark = pytest.mark.chaos


def test_a_later_node_writes_a_missing_stop_record(
    start: StartScenario, reference_digest: str, tmp_path: Path
) -> None:
    """If the committing node dies between the last COMMIT and STOP, the next node that starts writes STOP."""
    run = start(nodes=1)
    run.finish()
    (last,) = [record for record in run.records() if isinstance(record.body, Stop)]
    (tmp_path / "run" / record_key(last.index)).unlink()
    again = start(run_url=run.config.run.url)
    again.fleet.start("latecomer")
    again.finish()
    assert len(again.check_whole(reference_digest).generations) == 2


def test_a_node_started_after_stop_ends_at_once(
    start: StartScenario, reference_digest: str
) -> None:
    """A node that starts after STOP ends at once with exit code 0 and adds nothing to the log."""
    run = start(nodes=1)
    run.finish()
    length = run.view().length
    run.fleet.start("latecomer")
    run.finish()
    assert run.view().length == length
    run.check_whole(reference_digest)
    assert "Traceback" not in run.log_tails()


def test_sigterm_ends_at_a_step_and_the_node_leaves(
    start: StartScenario, reference_digest: str
) -> None:
    """On SIGTERM the world stops at a step; the others resume there, and no step is done twice."""
    run = start(nodes=2)
    run.until_step(8, nodes=2)
    os.kill(run.fleet.pid("node-0"), signal.SIGTERM)
    assert run.fleet.wait(PATIENCE_S) == {"node-0": 0, "node-1": 0}
    newest = run.check_whole(reference_digest).generations[-1]
    assert newest.reason == "node-0 leaves"
    assert newest.resume_step == newest.frontier_step
    assert run.events("node-0", "agent_left")
    assert "Traceback" not in run.fleet.tail("node-0", lines=50)


def test_a_second_sigterm_ends_the_agent_at_once(
    start: StartScenario, reference_digest: str
) -> None:
    """A second SIGTERM ends an agent with exit code 143 without its last checkpoint; the other node continues."""
    # No step will ever end, so there is no step at which to leave in good order.
    run = start("elastic.hang_timeout_s=60", nodes=2)
    run.until_step(8, nodes=2)
    worker = workers_of(run.fleet.pid("node-1"), run.mark)[0]
    os.kill(worker, signal.SIGSTOP)
    os.kill(run.fleet.pid("node-1"), signal.SIGTERM)
    run.until("node-0 wants to drain", lambda: "drain" in run.decisions("node-0"))
    os.kill(run.fleet.pid("node-1"), signal.SIGTERM)
    assert run.fleet.wait(PATIENCE_S) == {"node-0": 0, "node-1": 143}
    assert run.check_whole(reference_digest).generations[-1].reason == "lost node-1"
    assert "Traceback" not in run.fleet.tail("node-1", lines=50)


def test_a_spare_node_ends_with_the_others(start: StartScenario) -> None:
    """A node beyond the V slots waits as a spare, and ends with exit code 0 when the run does."""
    run = start("train.global_batch=4", "train.micro_batch=2", "train.steps=12", nodes=3)
    run.finish()
    assert run.view().stop is not None
    assert [len(run.generation().members), run.generation().slots] == [2, (1, 1)]


def test_several_damaged_checkpoints_are_skipped(
    start: StartScenario, reference_digest: str, tmp_path: Path
) -> None:
    """With a bit flipped in each of the four newest checkpoints, the run resumes from the fifth."""
    run = start("checkpoint.keep=6", "checkpoint.every_steps=3", nodes=1)
    run.until("six checkpoints", lambda: len(run.view().checkpoints) >= 6)
    run.fleet.kill("node-0")
    newest = run.view().checkpoints[:4]
    for checkpoint in newest:
        (shard,) = (tmp_path / "run" / checkpoint.directory).glob("*.safetensors")
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    run.fleet.start("node-1")
    run.finish()
    whole = run.check_whole(reference_digest)
    assert [each.directory for each in whole.quarantines] == [each.directory for each in newest]
