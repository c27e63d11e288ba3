"""When an agent asks to leave, how long it may take, and when it takes that back. The node is real, and not started."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException

from elastic_pt.agent.leaving import Leaving
from elastic_pt.config import ElasticSection
from elastic_pt.membership.decision.status import Limits, NodeStatus
from elastic_pt.membership.node import Node, new_member, new_node
from elastic_pt.membership.resources import Resources
from elastic_pt.notices.notice import CheckpointNow, Leave, Notice, NoticeKind, Stay
from elastic_pt.runlog.log import RunLog
from elastic_pt.store.open import open_store

LEAVE_TIMEOUT_S = 25.0


@pytest.fixture(autouse=True)
def own_alarm() -> Iterator[None]:
    """The alarm of this process belongs to the test. No test lasts until it comes."""
    before_s, _ = signal.setitimer(signal.ITIMER_REAL, 0.0)
    handler = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    began_s = time.monotonic()
    yield
    signal.signal(signal.SIGALRM, handler)
    left_s = max(0.001, before_s - (time.monotonic() - began_s)) if before_s else 0.0
    signal.setitimer(signal.ITIMER_REAL, left_s)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """A node that nobody asks anything."""
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
        store,
    )


@pytest.fixture
def leaving(node: Node) -> Leaving:
    """What its agent does about it."""
    return Leaving(node, LEAVE_TIMEOUT_S)


def notice(lead_s: float, kind: NoticeKind = NoticeKind.PREEMPT) -> Notice:
    """A notice that has just been received."""
    return Notice("aws", "e", kind, "terminate", lead_s, time.monotonic() + lead_s)


def alarm_s() -> float:
    """Seconds until the alarm; 0 without one."""
    return signal.getitimer(signal.ITIMER_REAL)[0]


@pytest.mark.parametrize(
    ("lead_s", "within_s"), [(120.0, 25.0), (30.0, 25.0), (15.0, 15.0), (5.0, 5.0), (0.0, 1.0)]
)
def test_a_notice_bounds_the_time_to_leave(
    node: Node, leaving: Leaving, lead_s: float, within_s: float
) -> None:
    """F16: A node may take `elastic.leave_timeout_s`, and not longer than its machine is there. The others hear why."""
    leaving.heed(Leave(notice(lead_s)))
    assert node.leaving
    assert node._participant.me.now.leave_reason == f"aws terminate, {lead_s:.0f} s ahead"
    assert within_s - 1.0 < alarm_s() <= within_s


def test_a_withdrawn_notice_lets_the_node_stay(node: Node, leaving: Leaving) -> None:
    """F17: The node takes its wish back, and no alarm ends it. A later notice counts anew."""
    leaving.heed(Leave(notice(30.0)))
    leaving.heed(Stay())
    assert not node.leaving
    assert node._participant.me.now.leave_reason == ""
    assert alarm_s() == 0.0
    # The alarm may have been on its way.
    leaving.signalled(signal.SIGALRM, None)
    leaving.heed(Leave(notice(5.0)))
    assert node.leaving
    assert 4.0 < alarm_s() <= 5.0


def test_advice_does_not_make_a_node_leave(node: Node, leaving: Leaving) -> None:
    """A node at risk trains on; if a notice to leave becomes advice, the node stays."""
    advice = CheckpointNow(notice(0.0, NoticeKind.REBALANCE))
    leaving.heed(advice)
    assert not node.leaving
    leaving.heed(Leave(notice(30.0)))
    leaving.heed(advice)
    assert not node.leaving
    assert alarm_s() == 0.0


def test_a_signal_asks_for_good(node: Node, leaving: Leaving) -> None:
    """Who withdraws a notice does not take back what a signal has asked for; its time counts from then on."""
    leaving.heed(Leave(notice(5.0)))
    leaving.signalled(signal.SIGTERM, None)
    assert alarm_s() <= 5.0
    leaving.heed(Stay())
    assert node.leaving
    assert 5.0 < alarm_s() <= LEAVE_TIMEOUT_S


def test_the_signal_that_follows_a_notice_ends_nothing(node: Node, leaving: Leaving) -> None:
    """A platform gives notice and then sends SIGTERM: the node goes on leaving. A second SIGTERM ends it at once."""
    leaving.heed(Leave(notice(30.0)))
    leaving.signalled(signal.SIGTERM, None)
    with pytest.raises(SignalException):
        leaving.signalled(signal.SIGTERM, None)


def test_slurms_warning_asks_to_leave_and_never_ends_the_agent(
    node: Node, leaving: Leaving
) -> None:
    """SIGUSR1 comes before the time limit, SIGTERM at it: only a second one of those that end a process does."""
    for _ in range(2):
        leaving.signalled(signal.SIGUSR1, None)
    assert node.leaving
    assert node.leave_reason == "SIGUSR1"
    leaving.signalled(signal.SIGTERM, None)
    with pytest.raises(SignalException):
        leaving.signalled(signal.SIGINT, None)


def test_the_alarm_ends_an_agent_that_has_not_left_in_time(leaving: Leaving) -> None:
    """F16: At the deadline the agent ends, so that the others see at once that it is gone."""
    leaving.heed(Leave(notice(0.0)))
    with pytest.raises(SignalException):
        leaving.signalled(signal.SIGALRM, None)
