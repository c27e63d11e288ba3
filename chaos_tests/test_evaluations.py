"""A node is lost, or leaves, in the middle of an evaluation: no evaluation is missing or double, and each has the undisturbed value."""

import json
import os
import signal
from pathlib import Path
from typing import Final

import pytest

from chaos_tests.conftest import StartScenario
from chaos_tests.scenario import STEPS, Scenario
from elastic_pt.failpoints import VARIABLE
from elastic_pt.report.history import read_steps
from elastic_pt.report.status import open_run

pytestmark = pytest.mark.chaos

EVERY: Final = 10
PASSES: Final = 4
ROWS: Final = 3 * PASSES
"""In a world of three, with one row in a slot: so many passes."""
OVERRIDES: Final = (f"evaluation.every_steps={EVERY}", f"evaluation.rows={ROWS}")
PASS_S: Final = 1.0
DUE: Final = [*range(EVERY, STEPS, EVERY), STEPS]


def evaluations(run: Scenario) -> dict[int, tuple[float, str]]:
    """The committed held-out losses by step; fails if a step has two lines."""
    found = open_run(run.config.run.url)
    lines = list(read_steps(found.store, found.log.records()))
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return {
        line["step"]: (line["held_out_loss"], json.dumps(line["held_out_sources"]))
        for line in lines
        if "held_out_loss" in line
    }


def test_a_node_lost_in_an_evaluation(
    start: StartScenario, reference_digest: str, tmp_path: Path
) -> None:
    """A node is killed in the third pass of its second evaluation. The others do that step and its evaluation again;
    the history has each due evaluation once, with the bits of a run on one node."""
    armed = f"{VARIABLE}=pass.evaluated@{PASSES + 3}:delay=60"
    run = start(*OVERRIDES, "elastic.nodes_max=3")
    run.fleet.start("node-0")
    run.fleet.start("node-1", prefix=("env", armed))
    run.fleet.start("node-2")
    run.until("node-1 is in an evaluation", lambda: bool(run.events("node-1", "failpoint")))
    run.fleet.kill("node-1")
    run.finish()
    newest = run.check_whole(reference_digest).generations[-1]
    assert newest.reason == "lost node-1"
    assert newest.resume_step < 2 * EVERY
    alone = start(*OVERRIDES, run_url=f"file://{tmp_path / 'alone'}", nodes=1)
    alone.finish()
    found = evaluations(run)
    assert list(found) == DUE
    assert found == evaluations(alone)


def test_a_leave_waits_for_an_evaluation_or_does_not_begin(
    start: StartScenario, reference_digest: str, tmp_path: Path
) -> None:
    """F16: after SIGTERM in its first evaluation, node-2 leaves when that is done, and no step is lost. A notice in the second
    one leaves node-1 less time than that takes: it ends at once. The history has each due evaluation once."""
    slow = f"{VARIABLE}=pass.evaluated@1+:delay={PASS_S}"
    notice = tmp_path / "notice"
    run = start(*OVERRIDES, "elastic.nodes_max=3", "checkpoint.snapshot_every_steps=1")

    def until_evaluation(number: int) -> None:
        passes = 1 + PASSES * (number - 1)
        run.until(f"evaluation {number}", lambda: len(run.events("node-1", "failpoint")) >= passes)

    run.fleet.start("node-0")
    settings = [f'elastic.notices=["file:{notice}"]']
    run.fleet.start("node-1", settings=settings, prefix=("env", slow))
    run.fleet.start("node-2")
    until_evaluation(1)
    os.kill(run.fleet.pid("node-2"), signal.SIGTERM)
    until_evaluation(2)
    left = run.generation()
    part = notice.with_suffix(".part")
    part.write_text(f"kind: preempt\nlead_s: {PASS_S}\n")
    part.rename(notice)
    codes = run.fleet.wait(run.patience_s)
    assert codes == {"node-0": 0, "node-1": 128 + signal.SIGALRM, "node-2": 0}
    assert (left.reason, left.resume_step) == ("node-2 leaves", EVERY + 1)
    (plan,) = run.events("node-1", "leave_planned")
    assert plan["way"] == "at_once"
    assert plan["evaluations_s"] > PASS_S
    newest = run.check_whole(reference_digest).generations[-1]
    assert newest.causes[0].node == "node-1"
    assert newest.resume_step < 2 * EVERY
    assert list(evaluations(run)) == DUE
