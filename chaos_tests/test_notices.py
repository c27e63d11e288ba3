"""Real agents get notices from metadata servers that follow the clouds' protocols: no step is lost.

`chaos_tests/notice_matrix.py` has all leads, phases and sources (`make notices`).
"""

import signal
from pathlib import Path

import pytest

from chaos_tests.conftest import StartScenario
from chaos_tests.noticed import begun

pytestmark = pytest.mark.chaos

WITH_NOTHING_LOST = 0
WITH_A_LOST_NODE = 2
NOT_IN_TIME = 128 + signal.SIGALRM
"""The exit code of an agent that ends without having left in good order."""


def test_a_node_noticed_during_a_checkpoint_loses_no_step(
    start: StartScenario, reference_digest: str, tmp_path: Path
) -> None:
    """F15: a preempted Spot VM leaves, although a checkpoint is being uploaded, and the log has the notice."""
    with begun(start, tmp_path, {"node-0": "gcp", "node-1": "gcp"}) as noticed:
        run = noticed.run
        noticed.until_phase("save", "node-1", nodes=2)
        noticed.notice(30.0, "node-1")
        run.finish()
        newest = run.check_whole(reference_digest).generations[-1]
        assert newest.reason == "node-1 leaves: gcp preempted, 30 s ahead"
        assert noticed.lost_steps("node-1") == [WITH_NOTHING_LOST]


def test_two_of_three_nodes_are_noticed_at_once(
    start: StartScenario, reference_digest: str, tmp_path: Path
) -> None:
    """F15: the members stop once for all of them, rank 0 included, and the third goes on with the next step."""
    kinds = {"node-0": "azure", "node-1": "azure", "node-2": "off"}
    with begun(start, tmp_path, kinds) as noticed:
        run = noticed.run
        run.until_step(3, nodes=3)
        noticed.notice(15.0, "node-0", "node-1")
        run.finish()
        run.check_whole(reference_digest)
        lost = noticed.lost_steps("node-0", "node-1")
        assert set(lost) == {WITH_NOTHING_LOST}


def test_all_nodes_are_noticed_at_once(
    start: StartScenario, reference_digest: str, tmp_path: Path
) -> None:
    """F15: the newest step is in the bucket before the last node leaves, and new nodes go on from it."""
    with begun(start, tmp_path, {"node-0": "file", "node-1": "file"}) as noticed:
        run = noticed.run
        noticed.until_phase("step", "node-0", nodes=2)
        noticed.notice(15.0, "node-0", "node-1")
        run.finish()
        assert run.view().stop is None
        stopped = max(run.events(node, "settled")[-1]["step"] for node in noticed.sources)
        assert run.view().checkpoints[0].step == stopped
        run.fleet.start("node-2", settings=["elastic.nodes_max=1"])
        run.finish()
        newest = run.check_whole(reference_digest).generations[-1]
        assert newest.resume_step == stopped


def test_a_notice_without_a_lead_costs_what_a_lost_node_costs(
    start: StartScenario, reference_digest: str, tmp_path: Path
) -> None:
    """F16: nothing fits in 0 seconds: the node ends at once, and the others go on from the memory of its mirror."""
    kinds = {"node-0": "file", "node-1": "off"}
    with begun(start, tmp_path, kinds, "checkpoint.every_steps=1000") as noticed:
        run = noticed.run
        noticed.until_phase("step", "node-0", nodes=2)
        noticed.notice(0.0, "node-0")
        assert run.fleet.wait(run.patience_s) == {"node-0": NOT_IN_TIME, "node-1": 0}
        (plan,) = run.events("node-0", "leave_planned")
        assert plan["way"] == "at_once"
        newest = run.check_whole(reference_digest).generations[-1]
        assert newest.memory is not None
        (lost,) = noticed.lost_steps("node-0")
        assert lost is not None
        assert lost <= WITH_A_LOST_NODE
