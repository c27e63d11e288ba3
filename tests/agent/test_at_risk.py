"""A notice that a machine may be taken away makes the run commit a checkpoint: through its log, at most one at a time."""

import threading
import time
from pathlib import Path

import pytest
import structlog

from elastic_pt.agent.at_risk import UNSAVED_MIN_S, CheckpointRequests, no_need
from elastic_pt.notices.notice import Notice, NoticeKind
from elastic_pt.runlog.control import ask
from elastic_pt.runlog.log import RunLog, RunView
from elastic_pt.runlog.records import Checkpoint, Commit, Request, Verb
from elastic_pt.store.open import open_store
from tests.membership.world import generation

WAIT_S = 20.0
ADVICE = Notice("aws-rebalance", "e", NoticeKind.REBALANCE, "rebalance", 0.0, 0.0)
STEP_S = 0.5
ENOUGH = int(UNSAVED_MIN_S / STEP_S)


def new_log(folder: Path, node: str) -> RunLog:
    """A node's log of the run in a folder."""
    return RunLog(open_store(f"file://{folder}"), writer=node)


def begun(folder: Path) -> RunLog:
    """The log of a run with one generation."""
    log = new_log(folder, "a")
    log.append(lambda _: generation("a", "b"), generation=1)
    return log


def commit(log: RunLog, step: int) -> RunView:
    """A checkpoint of a step is committed; it meets all requests so far."""
    checkpoint = Checkpoint(step, 1, f"ckpt/{step}", 1, "0" * 64, None)
    return log.append(
        lambda view: Commit((checkpoint,), "history/x", request=view.length), generation=1
    )


def until_idle(at_risk: CheckpointRequests) -> None:
    """Wait until the thread that asks has ended."""
    deadline_s = time.monotonic() + WAIT_S
    while at_risk._asking.locked():
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.01)


def test_many_notices_at_once_make_one_request(tmp_path: Path) -> None:
    """Of nodes that get a notice at the same time, one asks; the request has its own record, its node and the reason."""
    begun(tmp_path)
    names = [f"node-{number}" for number in range(6)]
    nodes = [
        CheckpointRequests(new_log(tmp_path, name), name, lambda: (ENOUGH, STEP_S))
        for name in names
    ]
    for each in nodes:
        each.heed(ADVICE)
        each.heed(ADVICE)
    for each in nodes:
        until_idle(each)
    view = new_log(tmp_path, "x").refresh()
    (request,) = view.requests
    assert (request.verb, request.index, request.why) == (
        Verb.CHECKPOINT,
        1,
        "aws-rebalance rebalance",
    )
    assert request.by in {f"node {name}" for name in names}
    assert view.length == 2


def test_the_next_request_waits_for_training_worth_a_checkpoint(tmp_path: Path) -> None:
    """After the commit, another notice asks again only when ten seconds of training are not committed."""
    log = begun(tmp_path)
    progress = [(ENOUGH, STEP_S)]
    at_risk = CheckpointRequests(log, "a", lambda: progress[-1])
    at_risk.heed(ADVICE)
    until_idle(at_risk)
    assert len(log.view.requests) == 1
    assert commit(log, ENOUGH).requests == ()
    for step, asked in [(2 * ENOUGH - 1, 0), (2 * ENOUGH, 1)]:
        progress.append((step, STEP_S))
        at_risk.heed(ADVICE)
        until_idle(at_risk)
        assert len(log.view.requests) == asked


@pytest.mark.parametrize("verb", [Verb.CHECKPOINT, Verb.PAUSE, Verb.STOP])
def test_an_operators_request_is_not_replaced(tmp_path: Path, verb: Verb) -> None:
    """While an operator's checkpoint, pause or stop is asked for, a node asks for nothing."""
    log = begun(tmp_path)
    view = log.append(lambda view: ask(view, Request(verb, by="operator")), generation=1)
    assert "by operator" in no_need(view, ENOUGH, STEP_S)
    at_risk = CheckpointRequests(log, "a", lambda: (ENOUGH, STEP_S))
    at_risk.heed(ADVICE)
    until_idle(at_risk)
    assert log.refresh() == view


def test_a_node_without_a_step_asks_for_nothing(tmp_path: Path) -> None:
    """Before the first step there is nothing to save."""
    view = begun(tmp_path).view
    assert no_need(view, 0, None) == "0.0 s of training are not committed"


def test_a_bucket_that_fails_is_reported(tmp_path: Path) -> None:
    """The notice is then only an event, and the next one tries again."""
    log = begun(tmp_path)
    at_risk = CheckpointRequests(log, "a", lambda: (ENOUGH, STEP_S))
    (tmp_path / "log").rename(tmp_path / "away")
    (tmp_path / "log").touch()
    with structlog.testing.capture_logs() as events:
        at_risk.heed(ADVICE)
        until_idle(at_risk)
    assert [each["event"] for each in events][-1:] == ["checkpoint_not_asked"]
    (tmp_path / "log").unlink()
    (tmp_path / "away").rename(tmp_path / "log")
    at_risk.heed(ADVICE)
    until_idle(at_risk)
    assert len(log.view.requests) == 1
