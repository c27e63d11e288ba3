"""A notice, with real agents: one node leaves, the other one continues."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import CONFIG, Trained, elastic_pt

from elastic_pt.cli.reading import status_lines
from elastic_pt.config import load_config
from elastic_pt.fleet.local import Fleet
from elastic_pt.membership.decision.at_risk import AtRisk
from elastic_pt.membership.decision.status import NodeStatus
from elastic_pt.report.status import RunStatus, State, _member_report
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import CauseKind, Generation, Member
from elastic_pt.store.open import open_store

WAIT_S = 120.0


def test_a_node_leaves_after_a_notice_and_the_other_continues(
    prepared: Trained, tmp_path: Path
) -> None:
    """F15: with a lead of two minutes no step is lost, and the log names the notice. SIGUSR1 to all processes of a node has the same effect."""
    url, path = tmp_path / "run", tmp_path / "run.toml"
    text = CONFIG.format(run=url, data=prepared.data).replace("steps = 240", "steps = 1000000")
    path.write_text(text)
    log = RunLog(open_store(f"file://{url}"), writer="test")

    def generations() -> list[Generation]:
        return [each.body for each in log.records() if isinstance(each.body, Generation)]

    def until(condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline_s, {name: fleet.tail(name) for name in "ab"}
            time.sleep(0.1)

    config = load_config(path, [f"elastic.notices=file:{tmp_path}/notice"])
    with Fleet(config, tmp_path / "agents") as fleet:
        for name in "ab":
            fleet.start(name)
        until(lambda: url.exists() and bool(generations()) and len(generations()[-1].members) == 2)
        number = generations()[-1].number
        until(lambda: bool(list(url.glob(f"ckpt/*-g{number}-*/manifest.json"))))
        new = tmp_path / "new"
        new.write_text("node: a\nlead_s: 120\n")
        new.rename(tmp_path / "notice")
        until(lambda: fleet.exit_codes()["a"] is not None)
        assert fleet.exit_codes()["a"] == 0, fleet.tail("a")
        until(lambda: bool(list(url.glob(f"ckpt/*-g{number + 1}-*/manifest.json"))))
        os.killpg(fleet.pid("b"), signal.SIGUSR1)
        until(lambda: fleet.exit_codes()["b"] is not None)
        assert fleet.exit_codes()["b"] == 0, fleet.tail("b")
        # Its workers got the signal too, and ignored it.
        assert "worker_failed" not in fleet.tail("b", lines=1000)
    newest = generations()[-1]
    assert newest.number == number + 1
    assert [each.node for each in newest.members] == ["b"]
    assert [(each.kind, each.node) for each in newest.causes] == [(CauseKind.LEFT, "a")]
    assert newest.causes[0].detail == "file preempt, 120 s ahead"
    assert newest.resume_step == newest.frontier_step
    explained = elastic_pt("log", url, "--explain").out
    assert "node a left after step" in explained
    assert ": file preempt, 120 s ahead;" in explained
    assert "no step done again" in explained


@pytest.mark.parametrize(
    ("leaving", "reason", "told"),
    [
        (False, "", ""),
        (True, "", "asked to"),
        (True, "aws terminate, 118 s ahead", "aws terminate, 118 s ahead"),
    ],
)
def test_status_reports_why_a_node_is_about_to_leave(leaving: bool, reason: str, told: str) -> None:
    """The text for people and the field `leaving` name the reason; the field of a node that stays is empty."""
    member = Member("a", "a1", "127.0.0.1", 1, 2, 1)
    answer = replace(NodeStatus.first(member, {}), leaving=leaving, leave_reason=reason)
    report = _member_report(member, 4, answer)
    assert report.leaving == told
    status = RunStatus(
        "url",
        State.RUNNING,
        "",
        1,
        1,
        0,
        None,
        None,
        (report,),
        (),
        None,
        (),
        AtRisk(0, 0, 0),
        None,
    )
    (line,) = [each for each in status_lines(status) if each.startswith("member")]
    assert (f", leaves: {told}," in line) == leaving
