"""What messages prove: a peer was alive, and both directions worked, when the message was sent."""

import threading
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from elastic_pt.membership import peers
from elastic_pt.membership.peers import MESSAGE, Message, PeerTable
from tests.membership.world import lives, status

A, B = lives("a", "b")


@dataclass
class Clock:
    """A clock that a test moves."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Side:
    """One of two agents that exchange messages."""

    node: str
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.table = PeerTable(self.clock)
        self.other = B if self.node == "a" else A
        self.table.watch(self.other)

    def says(self, step: int = 0) -> Message:
        """The next message to the other side."""
        return self.table.message_to(self.other, status(self.node, step=step), asks=False)

    @property
    def heard_s(self) -> float | None:
        """The newest proof of life of the other side."""
        return self.table.peers[self.other].heard_s


def test_proof_of_life_dates_from_sending() -> None:
    """An answer proves that the peer was alive when its newest received message was sent, not when the answer came."""
    clock = Clock()
    a, b = Side("a", clock), Side("b", clock)
    messages = []
    for clock.now_s in (10.0, 11.0, 12.0):
        messages.append(a.says())
    b.table.received(messages[0])
    b.table.received(messages[1])
    clock.now_s = 20.0
    answer = b.says()
    clock.now_s = 30.0
    a.table.received(answer)
    assert a.heard_s == 11.0
    assert b.heard_s is None


def test_late_message_does_not_reduce_the_proof() -> None:
    """If messages arrive out of order, the newest one that was received is the proof."""
    clock = Clock()
    a, b = Side("a", clock), Side("b", clock)
    messages = []
    for clock.now_s in (10.0, 11.0):
        messages.append(a.says())
    b.table.received(messages[1])
    b.table.received(messages[0])
    a.table.received(b.says())
    assert a.heard_s == 11.0


def test_one_way_link_gives_no_proof_of_life() -> None:
    """While one direction of a link loses everything, neither side counts the other as heard."""
    clock = Clock()
    a, b = Side("a", clock), Side("b", clock)
    b.table.received(a.says())
    a.table.received(b.says())
    b.table.received(a.says())
    before = a.heard_s, b.heard_s
    for clock.now_s in range(1, 100):
        a.table.received(b.says())
        a.says()
    assert (a.heard_s, b.heard_s) == before == (0.0, 0.0)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["send", "receive", "forget"]), st.sampled_from("ab"), st.integers(0, 5)
    ),
    max_size=60,
)


@settings(max_examples=500, deadline=None)
@given(EVENTS)
def test_only_acknowledged_messages_are_proof(events: list[tuple[str, str, int]]) -> None:
    """For lost, late or duplicated messages and forgotten peers, no proof is later than a received message."""
    clock = Clock()
    sides = {node: Side(node, clock) for node in "ab"}
    received: dict[str, float] = {"a": -1.0, "b": -1.0}
    """By side: when the newest message that it has received was sent."""
    under_way: dict[str, list[tuple[Message, float]]] = {"a": [], "b": []}
    """By receiver: the messages sent, and what the sender had received at that time."""
    proved: dict[str, float | None] = {"a": None, "b": None}
    newest: dict[str, int] = {"a": -1, "b": -1}
    forgot_s = {"a": -1.0, "b": -1.0}
    for number, (event, me, which) in enumerate(events):
        clock.now_s = float(number)
        side, other = sides[me], "b" if me == "a" else "a"
        if event == "send":
            under_way[other].append((side.says(step=number), received[me]))
        elif event == "forget":
            side.table.unwatch(side.other)
            side.table.watch(side.other)
            proved[me], newest[me], forgot_s[me] = None, -1, clock.now_s
            received[me] = -1.0
        elif under_way[me]:
            message, proof_s = under_way[me][which % len(under_way[me])]
            side.table.received(message)
            received[me] = max(received[me], float(message.status.step))
            newest[me] = max(newest[me], message.status.step)
            if proof_s > max(forgot_s[me], proved[me] if proved[me] is not None else -1.0):
                proved[me] = proof_s
            said = side.table.peers[side.other].status
            assert said is not None
            assert said.step == newest[me]
        assert side.heard_s == proved[me]


def test_only_a_changed_status_is_news() -> None:
    """`received` is true when the peer's status has changed. An older message changes nothing."""
    a, b = Side("a"), Side("b")
    first, second = b.says(step=1), b.says(step=2)
    assert a.table.received(second)
    assert not a.table.received(first)
    assert not a.table.received(b.says(step=2))
    assert not a.table.received(b.says(step=3)), "progress is not a reason for a turn"
    leaves = b.says(step=3)
    assert a.table.received(replace(leaves, status=replace(leaves.status, leaving=True)))


def test_refusal_ends_when_the_peer_is_heard() -> None:
    """A refusal counts until the peer answers. Refusing or reaching does not make a peer known."""
    a, b = Side("a"), Side("b")
    a.table.refused(B)
    assert a.table.peers[B].refused
    a.table.received(b.says())
    assert not a.table.peers[B].refused
    assert not a.table.peers[B].reached
    a.table.reached(B)
    assert a.table.peers[B].reached
    a.table.refused("stranger")
    a.table.reached("stranger")
    assert list(a.table.peers) == [B]


def test_the_silence_clock_starts_again_only_anew() -> None:
    """Watching a peer again does not restart its clock, unless it was not asked in between."""
    side = Side("a")
    side.clock.now_s = 5.0
    side.table.watch(B)
    assert side.table.peers[B].watched_since_s == 0.0
    side.table.watch(B, anew=True)
    assert side.table.peers[B].watched_since_s == 5.0


def test_number_of_peers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit no new peer is stored. Messages of known peers still count."""
    monkeypatch.setattr(peers, "_PEERS_MAX", 3)
    table = PeerTable(Clock())
    for count in (1, 2):
        for number in range(10):
            says = status(f"n{number}", step=count)
            table.received(Message(count, 0, True, says))
            table.message_to(says.member.incarnation, status("a"), asks=False)
    assert list(table.peers) == list(table._exchanges) == list(lives("n0", "n1", "n2"))
    assert all(peer.status is not None and peer.status.step == 2 for peer in table.peers.values())


def test_unanswered_messages_are_bounded() -> None:
    """Only the newest messages without an answer are kept, and an answer to the last one still counts."""
    clock = Clock()
    a, b = Side("a", clock), Side("b", clock)
    for clock.now_s in range(5000):
        last = a.says()
    assert len(a.table._exchanges[B].sent) < 1000
    b.table.received(last)
    a.table.received(b.says())
    assert a.heard_s == 4999


@pytest.mark.parametrize(
    ("field_name", "value"),
    [("count", 0), ("seen", -1), ("refusal", "x" * 1001), ("status", None), ("asks", "perhaps")],
)
def test_a_message_has_bounds(field_name: str, value: object) -> None:
    """A malformed message is refused as a whole before use."""
    said = MESSAGE.dump_python(Side("a").says(), mode="json")
    assert MESSAGE.validate_python(said).count == 1
    with pytest.raises(ValidationError, match=field_name):
        MESSAGE.validate_python(said | {field_name: value})


def test_table_is_safe_between_threads() -> None:
    """A message that one thread stores while another one watches is not lost."""
    a, b = Side("a"), Side("b")
    hearing = threading.Thread(target=lambda: a.table.received(b.says(step=1)))

    def clock_s() -> float:
        # `watch` reads the clock between reading the peer and writing it back.
        if threading.current_thread() is not hearing:
            hearing.start()
            hearing.join(0.2)
        return 1.0

    a.table._clock_s = clock_s
    a.table.watch(B, anew=True)
    hearing.join()
    said = a.table.peers[B].status
    assert said is not None
    assert said.step == 1
    assert a.table.peers[B].watched_since_s == 1.0
