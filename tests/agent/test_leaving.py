"""When an agent asks to leave, how long it may take, and when it cancels that. The node is real, but not started."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from torch.distributed.elastic.multiprocessing.api import SignalException

from elastic_pt.agent.estimates import Times
from elastic_pt.agent.leaving import Leaving
from elastic_pt.config import ElasticSection
from elastic_pt.membership.decision.status import Limits, NodeStatus
from elastic_pt.membership.node import Node, new_member, new_node
from elastic_pt.membership.resources import Resources
from elastic_pt.notices.notice import CheckpointNow, Leave, Notice, NoticeKind, Stay
from elastic_pt.runlog.log import RunLog
from elastic_pt.store.open import open_store
from tests.access import TLS

LEAVE_TIMEOUT_S = 25.0


@pytest.fixture(autouse=True)
def own_alarm() -> Iterator[None]:
    """Saves and restores the alarm of this process. No test lasts until an alarm."""
    before_s, _ = signal.setitimer(signal.ITIMER_REAL, 0.0)
    handler = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    began_s = time.monotonic()
    yield
    signal.signal(signal.SIGALRM, handler)
    left_s = max(0.001, before_s - (time.monotonic() - began_s)) if before_s else 0.0
    signal.setitimer(signal.ITIMER_REAL, left_s)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """A node that is not started."""
    store = open_store(f"file://{tmp_path}")
    return new_node(
        NodeStatus.first(new_member("a", "127.0.0.1", 1), {}),
        Limits(ElasticSection(), slots=8),
        Resources(
            log=RunLog(store, writer="a"),
            hints=store,
            clock_s=time.monotonic,
            bind_store=lambda: pytest.fail("no world is formed here"),
            choose_resume=lambda _: None,
            on_drain=lambda _: None,
        ),
        TLS,
    )


@pytest.fixture
def at_risk() -> list[Notice]:
    """The notices for which a checkpoint was wanted."""
    return []


@pytest.fixture
def leaving(node: Node, at_risk: list[Notice]) -> Leaving:
    """The object under test, for that node. Nothing has been measured, and the node is alone."""
    return Leaving(node, LEAVE_TIMEOUT_S, Times, at_risk.append)


def notice(lead_s: float, kind: NoticeKind = NoticeKind.PREEMPT) -> Notice:
    """A notice that has just been received."""
    return Notice("aws", "e", kind, "terminate", lead_s, time.monotonic() + lead_s)


def alarm_s() -> float:
    """Seconds until the alarm; 0 without one."""
    return signal.getitimer(signal.ITIMER_REAL)[0]


@pytest.mark.parametrize(
    ("lead_s", "within_s"), [(120.0, 25.0), (30.0, 25.0), (15.0, 15.0), (5.0, 5.0), (0.0, 1.0)]
)
def test_a_notice_limits_the_time_to_leave(
    node: Node, leaving: Leaving, lead_s: float, within_s: float
) -> None:
    """F16: a node may take `elastic.leave_timeout_s`, and not longer than the lead. Its status has the reason."""
    leaving.heed(Leave(notice(lead_s)))
    assert node.leaving
    assert node._participant.me.now.leave_reason == f"aws terminate, {lead_s:.0f} s ahead"
    assert within_s - 1.0 < alarm_s() <= within_s


def test_a_withdrawn_notice_lets_the_node_stay(node: Node, leaving: Leaving) -> None:
    """F17: the node cancels its leave, and no alarm ends it. A later notice is a new one."""
    leaving.heed(Leave(notice(30.0)))
    leaving.heed(Stay())
    assert not node.leaving
    assert node._participant.me.now.leave_reason == ""
    assert alarm_s() == 0.0
    # The alarm may arrive after the withdrawal.
    leaving.signalled(signal.SIGALRM, None)
    leaving.heed(Leave(notice(5.0)))
    assert node.leaving
    assert 4.0 < alarm_s() <= 5.0


@pytest.mark.parametrize("lead_s", [120.0, 5.0, 0.0])
def test_a_node_that_cannot_save_its_state_in_time_ends_at_once(
    node: Node, at_risk: list[Notice], monkeypatch: pytest.MonkeyPatch, lead_s: float
) -> None:
    """F16: if a step and a copy do not fit in the lead, the node tells the others why and ends; the event has the estimates."""
    monkeypatch.setattr(Node, "alone", False)
    slow = Leaving(node, LEAVE_TIMEOUT_S, lambda: Times(10.0, 8.0, 60.0), at_risk.append)
    with structlog.testing.capture_logs() as events:
        slow.heed(Leave(notice(lead_s)))
    assert node.leaving
    assert alarm_s() <= 0.1
    (event,) = (each for each in events if each["event"] == "leave_planned")
    assert (event["way"], event["lead_s"], event["step_s"], event["snapshot_s"]) == (
        "at_once",
        lead_s,
        10.0,
        8.0,
    )
    assert "needs about 28.0 s" in event["reason"]
    slow.heed(Stay())
    assert alarm_s() == 0.0


def test_advice_asks_for_a_checkpoint_and_does_not_make_a_node_leave(
    node: Node, leaving: Leaving, at_risk: list[Notice]
) -> None:
    """A node at risk continues and wants a checkpoint; if a notice to leave becomes advice, the node stays."""
    advice = CheckpointNow(notice(0.0, NoticeKind.REBALANCE))
    leaving.heed(advice)
    assert not node.leaving
    assert at_risk == [advice.notice]
    leaving.heed(Leave(notice(30.0)))
    leaving.heed(advice)
    assert not node.leaving
    assert alarm_s() == 0.0


def test_a_withdrawn_notice_does_not_cancel_a_signal(node: Node, leaving: Leaving) -> None:
    """After a signal a withdrawn notice does not let the node stay; the deadline is then that of the signal."""
    leaving.heed(Leave(notice(5.0)))
    leaving.signalled(signal.SIGTERM, None)
    assert alarm_s() <= 5.0
    leaving.heed(Stay())
    assert node.leaving
    assert 5.0 < alarm_s() <= LEAVE_TIMEOUT_S


def test_the_first_signal_after_a_notice_does_not_end_the_agent(
    node: Node, leaving: Leaving
) -> None:
    """A platform gives a notice and then sends SIGTERM: the node continues to leave. A second SIGTERM ends it at once."""
    leaving.heed(Leave(notice(30.0)))
    leaving.signalled(signal.SIGTERM, None)
    with pytest.raises(SignalException):
        leaving.signalled(signal.SIGTERM, None)


def test_sigusr1_asks_to_leave_and_never_ends_the_agent(node: Node, leaving: Leaving) -> None:
    """Slurm sends SIGUSR1 before the time limit and SIGTERM at it: only a second SIGTERM or SIGINT ends the agent."""
    for _ in range(2):
        leaving.signalled(signal.SIGUSR1, None)
    assert node.leaving
    assert node.leave_reason == "SIGUSR1"
    leaving.signalled(signal.SIGTERM, None)
    with pytest.raises(SignalException):
        leaving.signalled(signal.SIGINT, None)


def test_the_alarm_ends_an_agent_that_has_not_left_in_time(leaving: Leaving) -> None:
    """F16: the agent ends at the deadline, so that the other nodes detect it at once."""
    leaving.heed(Leave(notice(0.0)))
    with pytest.raises(SignalException):
        leaving.signalled(signal.SIGALRM, None)
