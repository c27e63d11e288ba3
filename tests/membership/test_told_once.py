"""What a person is told at night is told by exactly one node."""

from pathlib import Path

from structlog.testing import capture_logs

from elastic_pt.agent.checkpointing import quarantine
from elastic_pt.membership.decision.decide import Wait
from elastic_pt.membership.decision.shortage import TOLD_AFTER_S, Shortage
from elastic_pt.membership.decision.status import Idle
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import Checkpoint, Commit, Quarantine
from elastic_pt.store.open import open_store
from tests.membership.fleet import Fleet
from tests.membership.world import LIMITS, changed, failed, generation

SHORT = Wait("paused: 1 of at least 2 nodes", watching=True, idle=Idle.BELOW_MINIMUM)


def test_a_shortage_is_told_once_after_some_minutes() -> None:
    """A shortage that ends soon is not told; one that lasts is told once; the next one again."""
    shortage = Shortage()
    assert shortage.due_s(SHORT, 0.0) is None
    assert shortage.due_s(Wait("training"), TOLD_AFTER_S - 1) is None
    assert shortage.due_s(SHORT, TOLD_AFTER_S) is None
    assert shortage.due_s(SHORT, 2 * TOLD_AFTER_S) == TOLD_AFTER_S
    assert shortage.due_s(SHORT, 9 * TOLD_AFTER_S) is None
    assert shortage.due_s(Wait("training"), 10 * TOLD_AFTER_S) is None
    assert shortage.due_s(SHORT, 10 * TOLD_AFTER_S) is None
    assert shortage.due_s(SHORT, 11 * TOLD_AFTER_S) == TOLD_AFTER_S


def test_one_of_the_remaining_nodes_tells_that_the_run_is_paused(fleet: Fleet) -> None:
    """Of two members that are left and may not go on, only the first tells it, with the reason."""
    fleet.limits = changed(LIMITS, nodes_min=3)
    fleet.form("a", "b", "c")
    fleet.dead.add("c")
    with capture_logs() as logs:
        fleet.pass_time(TOLD_AFTER_S / 2)
        assert not [each for each in logs if each["event"] == "below_minimum"]
        fleet.pass_time(2 * TOLD_AFTER_S)
    (told,) = [each for each in logs if each["event"] == "below_minimum"]
    assert told["reason"] == "paused: 2 of at least 3 nodes; lost c"
    assert told["seconds"] >= TOLD_AFTER_S


def test_the_end_of_a_run_is_told_by_its_writer(fleet: Fleet) -> None:
    """All nodes want to end the run for the same failure; one event tells it, with the record's step."""
    with capture_logs() as logs:
        fleet.form("a", "b")
        for number in range(1, 4):
            if fleet.log.stop is not None:
                break
            for name in "ab":
                fleet.spend(number, name, failure=failed(name, signature="ValueError@loop.py:9"))
            fleet.pass_time(60.0)
    assert fleet.log.stop is not None
    (told,) = [each for each in logs if each["event"] == "stop"]
    assert (told["reason"], told["step"]) == (fleet.log.stop.reason, fleet.log.stop.step)


def test_a_checkpoint_is_quarantined_once(tmp_path: Path) -> None:
    """Two nodes find the same checkpoint unusable: there is one record, and one node tells it."""
    store = open_store(f"file://{tmp_path}")
    logs_of_nodes = [RunLog(store, writer=name) for name in "ab"]
    checkpoint = Checkpoint(7, 1, "ckpt/0000000007-g1-abcd", 1, "0" * 64, 1.0)
    logs_of_nodes[0].append(lambda _: generation("a", "b"), generation=0)
    logs_of_nodes[0].append(lambda _: Commit((checkpoint,), "history/x"), generation=1)
    with capture_logs() as logs:
        for each in logs_of_nodes:
            each.refresh()
        for each in logs_of_nodes:
            quarantine(each, 1, checkpoint.directory, "a wrong CRC")
    told = [each["event"] for each in logs]
    assert told == ["checkpoint_quarantined", "quarantine_fenced"]
    bodies = [record.body for record in logs_of_nodes[0].records()]
    assert len([body for body in bodies if isinstance(body, Quarantine)]) == 1
