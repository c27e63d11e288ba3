"""All leads, phases and sources of notices, with real agents (`make notices`; `make test` runs `test_notices.py` alone).

The judge is the same everywhere: the digest of the undisturbed run, and the steps that each change of members cost.
"""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from chaos_tests.conftest import StartScenario
from chaos_tests.noticed import Aws, Noticed, begun
from chaos_tests.scenario import CHECKPOINT_STEPS
from chaos_tests.test_notices import NOT_IN_TIME, WITH_A_LOST_NODE, WITH_NOTHING_LOST
from elastic_pt.agent.at_risk import UNSAVED_MIN_S
from elastic_pt.runlog.records import Commit, Control

pytestmark = pytest.mark.chaos

LEADS_S = [120.0, 30.0, 15.0, 5.0, 0.0]
# Compilation (`train.compile`, off here) is part of the first step.
PHASES = ["import", "start", "first step", "restore", "step", "save"]


def finish(
    noticed: Noticed,
    node: str,
    lead_s: float,
    reference_digest: str,
    at_once: int = WITH_A_LOST_NODE,
    *,
    member: bool = True,
) -> None:
    """Wait for the end of the run; `node` has left, or ended with the alarm if nothing fitted in its lead.

    `at_once` is the largest number of steps that the latter may cost. Without `member` the node may never have been one.
    """
    run = noticed.run
    codes = run.fleet.wait(run.patience_s)
    code = codes.pop(node)
    assert code in ((0,) if lead_s > 0.0 else (0, NOT_IN_TIME)), run.log_tails()
    assert set(codes.values()) == {0}, f"{codes}\n{run.log_tails()}"
    run.check_whole(reference_digest)
    bound = WITH_NOTHING_LOST if code == 0 else at_once
    found = noticed.lost_steps(node)
    assert found or not member
    assert all(lost is not None and lost <= bound for lost in found)


@pytest.mark.parametrize("lead_s", LEADS_S)
@pytest.mark.parametrize("kind", ["aws", "gcp", "azure", "file"])
def test_leads(
    start: StartScenario, reference_digest: str, tmp_path: Path, kind: str, lead_s: float
) -> None:
    """With any lead but 0 no step is lost."""
    if kind == "gcp" and lead_s != 30.0:
        pytest.skip("Google Cloud names no time: a Spot VM has 30 s")
    with begun(start, tmp_path, {"node-0": kind, "node-1": "off"}) as noticed:
        noticed.run.until_step(3, nodes=2)
        noticed.notice(lead_s, "node-0")
        finish(noticed, "node-0", lead_s, reference_digest)
        assert len(noticed.lost_steps("node-0")) == 1


@pytest.mark.parametrize("lead_s", [30.0, 0.0])
@pytest.mark.parametrize("phase", PHASES)
def test_phases(
    start: StartScenario, reference_digest: str, tmp_path: Path, phase: str, lead_s: float
) -> None:
    """In each phase of a node's life no step is lost, with a lead of 30 s; without a lead, no more than with a lost node."""
    kinds = {"node-0": "off", "node-1": "gcp" if lead_s else "file"}
    if phase == "restore":
        kinds["node-2"] = "off"
    settings = ["elastic.join_window_s=1"] if phase == "import" else []
    with begun(start, tmp_path, kinds, *settings) as noticed:
        noticed.until_phase(phase, "node-1", nodes=len(kinds))
        noticed.notice(lead_s, "node-1")
        # Of three nodes two are lost within a second, one of them the mirror of the other: only the bucket has all rows.
        lost = CHECKPOINT_STEPS + WITH_A_LOST_NODE if phase == "restore" else WITH_A_LOST_NODE
        finish(noticed, "node-1", lead_s, reference_digest, lost, member=phase != "import")


@pytest.mark.parametrize("victims", [("node-0", "node-1"), ("node-1", "node-3")])
def test_two_of_four(
    start: StartScenario, reference_digest: str, tmp_path: Path, victims: tuple[str, str]
) -> None:
    """Two nodes at once lose no step, neighbours in the ring of mirrors or not."""
    with begun(start, tmp_path, {f"node-{number}": "gcp" for number in range(4)}) as noticed:
        run = noticed.run
        run.until_step(3, nodes=4)
        noticed.notice(30.0, *victims)
        run.finish()
        run.check_whole(reference_digest)
        assert set(noticed.lost_steps(*victims)) == {WITH_NOTHING_LOST}


@pytest.mark.parametrize("lead_s", [30.0, 5.0])
def test_all_of_four(
    start: StartScenario, reference_digest: str, tmp_path: Path, lead_s: float
) -> None:
    """All leave: the newest step is in the bucket, and a new node goes on from it."""
    names = [f"node-{number}" for number in range(4)]
    with begun(start, tmp_path, dict.fromkeys(names, "file")) as noticed:
        run = noticed.run
        run.until_step(3, nodes=4)
        noticed.notice(lead_s, *names)
        run.finish()
        stopped = max(each["step"] for node in names for each in run.events(node, "settled"))
        assert run.view().checkpoints[0].step == stopped
        run.fleet.start("node-4", settings=["elastic.nodes_max=1"])
        run.finish()
        assert run.check_whole(reference_digest).generations[-1].resume_step == stopped


@pytest.mark.parametrize("phase", ["step", "save"])
def test_a_noticed_node_dies_before_its_deadline(
    start: StartScenario, reference_digest: str, tmp_path: Path, phase: str
) -> None:
    """The machine ends right after the notice: this costs what a lost node costs, and the log has the notice."""
    with begun(start, tmp_path, {"node-0": "gcp", "node-1": "off", "node-2": "off"}) as noticed:
        run = noticed.run
        noticed.until_phase(phase, "node-0", nodes=3)
        noticed.notice(30.0, "node-0")
        noticed.until_noticed("node-0")
        run.fleet.kill("node-0")
        run.finish()
        run.check_whole(reference_digest)
        (lost,) = noticed.lost_steps("node-0")
        assert lost is not None
        assert lost <= WITH_A_LOST_NODE


def test_a_withdrawn_notice(start: StartScenario, reference_digest: str, tmp_path: Path) -> None:
    """The node stays, or is a member again, and no step is lost."""
    with begun(start, tmp_path, {"node-0": "gcp", "node-1": "off"}) as noticed:
        run = noticed.run
        noticed.until_phase("step", "node-0", nodes=2)
        noticed.notice(30.0, "node-0")
        noticed.until_noticed("node-0")
        noticed.sources["node-0"].withdraw()
        run.finish()
        run.check_whole(reference_digest)
        assert set(noticed.lost_steps("node-0")) <= {WITH_NOTHING_LOST}


def test_a_signal_after_a_notice(
    start: StartScenario, reference_digest: str, tmp_path: Path
) -> None:
    """A platform gives a notice and sends SIGTERM soon after it: no step is lost."""
    with begun(start, tmp_path, {"node-0": "gcp", "node-1": "off"}) as noticed:
        run = noticed.run
        noticed.until_phase("save", "node-0", nodes=2)
        noticed.notice(30.0, "node-0")
        noticed.until_noticed("node-0")
        os.kill(run.fleet.pid("node-0"), signal.SIGTERM)
        finish(noticed, "node-0", 30.0, reference_digest)


def test_a_rebalance_recommendation(start: StartScenario, tmp_path: Path) -> None:
    """All nodes get one at once: the run commits one checkpoint, names the node that asked, and trains on."""
    settings = ["train.steps=1000000", "checkpoint.every_steps=1000000"]
    with begun(start, tmp_path, {"node-0": "aws", "node-1": "aws"}, *settings) as noticed:
        run = noticed.run
        run.until_step(1, nodes=2)
        until_s = time.monotonic() + 2 * UNSAVED_MIN_S
        run.until("training worth a checkpoint", lambda: time.monotonic() > until_s)
        for each in noticed.sources.values():
            assert isinstance(each, Aws)
            each.advise()
        run.until("a commit", lambda: run.view().commit is not None)
        run.until_step(run.view().checkpoints[0].step + 3, nodes=2)
        for node in noticed.sources:
            run.until(f"{node} is at risk", partial(noticed.event, node, "machine_at_risk"))
        bodies = [record.body for record in run.records()]
        (asked,) = (each.request for each in bodies if isinstance(each, Control))
        assert asked.by in {f"node {node}" for node in noticed.sources}
        assert asked.why == "aws-rebalance rebalance"
        (commit,) = (each for each in bodies if isinstance(each, Commit))
        assert commit.request == asked.index
