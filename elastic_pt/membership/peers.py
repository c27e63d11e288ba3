"""The messages of agents, and what an agent may conclude from them. No socket and no clock.

Agents exchange `Message`s. Each carries the sender's status, a growing number, and the number of the newest
message that the sender has received from the receiver (`seen`). If a peer reports a number of this node as
`seen`, then the peer was alive and both directions of the network worked after that message was sent. The moment
of sending, on this node's own clock, is the proof of life that `Peer.heard_s` keeps. A message that `asks` is
answered at once.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Final

from pydantic import Field, TypeAdapter

from elastic_pt.membership.decision.status import NodeStatus, Peer, is_news
from elastic_pt.runlog.records import Number, Text

_PEERS_MAX: Final = 4096
_UNANSWERED_MAX: Final = 256


@dataclass(frozen=True)
class Message:
    """One message from one agent to another."""

    count: Annotated[int, Field(ge=1, le=1 << 53)]
    """The sender's number of this message; larger than that of every earlier one."""
    seen: Number
    """The newest number that the sender has received from this receiver; 0 if none."""
    asks: bool
    """Whether the receiver should answer at once."""
    status: NodeStatus
    refusal: Annotated[Text, Field(max_length=1000)] = ""
    """Why the sender's generation refuses the receiver permanently; empty if the receiver may join."""


MESSAGE: Final = TypeAdapter(Message)
STATUS: Final = TypeAdapter(NodeStatus)
"""A status as JSON without a message, for people and `elastic-pt status`."""


@dataclass
class _Exchange:
    """The messages between this node and one other."""

    seen: int = 0
    sent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_UNANSWERED_MAX))
    """Numbers and sending times of messages that are not known to have arrived, oldest first."""


class PeerTable:
    """This node's facts about its peers, by incarnation. Agent process; thread-safe."""

    def __init__(self, clock_s: Callable[[], float]) -> None:
        self._clock_s = clock_s
        self._lock = threading.Lock()
        self._count = 0
        """One counter for all peers: a peer that was forgotten and returns must not see an old number again."""
        self._exchanges: dict[str, _Exchange] = {}
        self.peers: dict[str, Peer] = {}

    def watch(self, incarnation: str, *, anew: bool = False) -> None:
        """Expect answers of a node from now on; `anew` starts its silence clock again if it is running."""
        with self._lock:
            known = self.peers.get(incarnation)
            if known is None:
                self.peers[incarnation] = Peer(None, self._clock_s(), heard_s=None, refused=False)
            elif anew or known.watched_since_s is None:
                self.peers[incarnation] = replace(known, watched_since_s=self._clock_s())

    def rest(self, incarnation: str) -> None:
        """Expect no answers of a node that this one no longer asks. Its messages are still stored."""
        self._note(incarnation, watched_since_s=None, refused=False)

    def unwatch(self, incarnation: str) -> None:
        """Forget a node."""
        with self._lock:
            self.peers.pop(incarnation, None)
            self._exchanges.pop(incarnation, None)

    def message_to(
        self, incarnation: str, status: NodeStatus, *, asks: bool, refusal: str = ""
    ) -> Message:
        """The next message to a peer; the moment of sending is stored."""
        with self._lock:
            self._count += 1
            exchange = _Exchange()
            if incarnation in self.peers:
                exchange = self._exchanges.setdefault(incarnation, exchange)
            exchange.sent.append((self._count, self._clock_s()))
            return Message(self._count, exchange.seen, asks, status, refusal)

    def received(self, message: Message) -> bool:
        """Store a message. True if the peer's status has changed in more than its progress."""
        incarnation = message.status.member.incarnation
        with self._lock:
            known = self.peers.get(incarnation)
            if known is None:
                if len(self.peers) >= _PEERS_MAX:
                    return False
                known = Peer(None, None, heard_s=None, refused=False)
            exchange = self._exchanges.setdefault(incarnation, _Exchange())
            # Messages over two connections of one pair may arrive out of order: the highest number counts.
            newest = message.count > exchange.seen
            exchange.seen = max(exchange.seen, message.count)
            heard_s = known.heard_s
            while exchange.sent and exchange.sent[0][0] <= message.seen:
                heard_s = exchange.sent.popleft()[1]
            self.peers[incarnation] = replace(
                known,
                status=message.status if newest else known.status,
                heard_s=heard_s,
                refused=False,
                spoke_s=self._clock_s(),
            )
            return newest and (known.status is None or is_news(message.status, known.status))

    def reached(self, incarnation: str) -> None:
        """A connection to the node's address was established."""
        self._note(incarnation, reached=True)

    def refused(self, incarnation: str) -> None:
        """The node's address refuses connections, or another incarnation answers there."""
        self._note(incarnation, refused=True)

    def _note(self, incarnation: str, **changes: object) -> None:
        with self._lock:
            known = self.peers.get(incarnation)
            if known is not None:
                self.peers[incarnation] = replace(known, **changes)  # type: ignore[arg-type]
