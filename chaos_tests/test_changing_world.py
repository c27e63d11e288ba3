"""All nodes are lost, nodes join, checkpoints are damaged: the run continues with the nodes that are there."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from chaos_tests.conftest import Interrupted, StartScenario
from chaos_tests.scenario import CHECKPOINT_STEPS, Scenario
from elastic_pt.chaos.directory import run_digest
from elastic_pt.chaos.processes import workers_of
from elastic_pt.data.manifest import read_manifest
from elastic_pt.runlog.identity import IDENTITY_KEY, identity_of
from elastic_pt.store.open import open_store

pytestmark = pytest.mark.chaos


def copy_of(interrupted: Interrupted, directory: Path) -> Path:
    """A copy of the run directory, for one test to go on with."""
    return shutil.copytree(interrupted.directory, directory / "run")


def newest_shard(run: Scenario) -> Path:
    """The first file of the newest committed checkpoint that holds rows."""
    newest = run.view().checkpoints[0]
    directory = Path(run.config.run.url.removeprefix("file://")) / newest.directory
    return sorted(directory.glob("*.safetensors"))[0]


def test_a_node_joins_a_running_run(start: StartScenario, reference_digest: str) -> None:
    """F21: a new node is admitted at a step boundary; no step is lost or done twice."""
    run = start(
        "elastic.nodes_max=2", "elastic.join_window_s=0.5", "elastic.hang_timeout_s=60", nodes=1
    )
    run.until_step(CHECKPOINT_STEPS + 3, nodes=1)
    worker = workers_of(run.fleet.pid("node-0"), run.mark)[0]
    # Steps are much shorter than an agent's start: the worker stands still until the newcomer is noticed.
    os.kill(worker, signal.SIGSTOP)
    run.fleet.start("node-1")
    run.until("node-0 wants to drain", lambda: "drain" in run.decisions("node-0"))
    step = run.step()
    os.kill(worker, signal.SIGCONT)
    run.finish()
    first, second = run.check_whole(reference_digest).generations
    assert second.reason == "node-1 joins"
    assert second.members[: len(first.members)] == first.members
    assert second.resume_step == second.frontier_step >= step
    assert not run.events("node-0", "worker_failed")
    assert run.events("node-0", "settled")[0]["step"] == second.resume_step


@pytest.mark.parametrize("damage", ["bit flip", "truncation"])
def test_a_damaged_checkpoint_is_quarantined_and_the_previous_one_used(
    damage: str,
    start: StartScenario,
    interrupted: Interrupted,
    tmp_path: Path,
    reference_digest: str,
) -> None:
    """F35, F36: a committed file that changed is never loaded; the log names it and the reason."""
    run = start(run_url=f"file://{copy_of(interrupted, tmp_path)}")
    newest, before, *_ = run.view().checkpoints
    shard = newest_shard(run)
    data = bytearray(shard.read_bytes())
    if damage == "bit flip":
        data[len(data) // 2] ^= 0x10
    else:
        del data[len(data) // 2 :]
    shard.write_bytes(data)
    run.fleet.start("new-a")
    run.finish()
    whole = run.check_whole(reference_digest)
    assert [each.directory for each in whole.quarantines] == [newest.directory]
    assert shard.name in whole.quarantines[0].why
    assert whole.generations[-1].resume == before


def test_a_run_keeps_the_data_order_that_it_began_with(
    start: StartScenario, reference_digest: str
) -> None:
    """Workers read in the recorded order: a run that an earlier version began has version 1, a new one has another."""
    run = start()
    data = read_manifest(open_store(run.config.data.url))
    recorded = json.dumps(identity_of(run.config, data, {}))
    assert "data.order" not in recorded
    run.store.create(IDENTITY_KEY, recorded.encode())
    run.fleet.start("alone")
    run.finish()
    assert run_digest(run.store, run.view()) != reference_digest
