"""`sync` runs beside a training run, and both are killed: TensorBoard has each committed step once."""

import json
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from chaos_tests.conftest import StartScenario
from chaos_tests.scenario import CHECKPOINT_STEPS, STEPS, Scenario
from elastic_pt.report.history import read_steps
from elastic_pt.report.status import open_run

pytestmark = pytest.mark.chaos


def sync(run: Scenario) -> "subprocess.Popen[bytes]":
    """Start `elastic-pt sync --follow`."""
    sinks = (f"tensorboard:{run.directory / 'tb'}", f"jsonl:{run.directory / 'steps.jsonl'}")
    options = [option for sink in sinks for option in ("--to", sink)]
    command = [sys.executable, "-m", "elastic_pt", "sync", run.config.run.url, "--follow", *options]
    return subprocess.Popen(command)


def test_sync_survives_kills_of_nodes_and_its_own(
    start: StartScenario, reference_digest: str
) -> None:
    """Two nodes are killed and `sync` too: each step is once in its sinks, with the loss of the committed history."""
    run = start(nodes=3)
    path = run.directory / "steps.jsonl"
    run.until_step(CHECKPOINT_STEPS + 1, nodes=3)
    following = sync(run)
    run.fleet.kill(run.generation().members[1].node)
    run.until_step(2 * CHECKPOINT_STEPS + 3, nodes=2)
    run.fleet.kill(run.generation().members[0].node)
    run.until("steps are copied", lambda: path.exists() and path.read_bytes().count(b"\n") > 0)
    following.kill()
    following.wait()
    following = sync(run)
    run.finish()
    assert following.wait(run.patience_s) == 0
    run.check_whole(reference_digest)
    copied = open_run(run.config.run.url)
    history = list(read_steps(copied.store, copied.log.records()))
    found = EventAccumulator(str(run.directory / "tb"), size_guidance={"scalars": 0})
    found.Reload()
    losses = found.Scalars("loss")
    assert [each.step for each in losses] == list(range(1, STEPS + 1))
    assert [each.value for each in losses] == pytest.approx([line["loss"] for line in history])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(each["step"], each["loss"]) for each in lines] == [
        (each["step"], each["loss"]) for each in history
    ]
