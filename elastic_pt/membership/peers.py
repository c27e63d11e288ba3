"""What agents say to each other, and what one of them may conclude from it. No socket and no clock in here.

Two agents that talk exchange `Message`s; each carries the sender's status, a growing number, and the number
of the newest message that the sender has received from the receiver. A message that comes back as `seen`
was received, so the peer was alive, and both directions of the network worked, after the moment it was
sent: that moment, on this node's own clock, is the proof of life that `Peer.heard_s` keeps. A message that
asks is answered at once.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Final

from pydantic import Field, TypeAdapter

from elastic_pt.membership.status import NodeStatus, Peer, is_news

_PEERS_MAX: Final = 4096
_UNANSWERED_MAX: Final = 256


@dataclass(frozen=True)
class Message:
    """One word from one agent to another."""

    count: Annotated[int, Field(ge=1)]
    """The sender's number of this message; it grows from each message to the next."""
    seen: Annotated[int, Field(ge=0)]
    """The newest number that the sender has received from this receiver; 0 if none."""
    asks: bool
    """Whether the receiver is to answer at once."""
    status: NodeStatus
    refusal: Annotated[str, Field(max_length=1000)] = ""
    """Why the sender's world will never take the receiver in."""


MESSAGE: Final = TypeAdapter(Message)
STATUS: Final = TypeAdapter(NodeStatus)
"""How a status is written on its own, for people and `elastic-pt status`."""


@dataclass
class _Exchange:
    """What went between this node and one other."""

    seen: int = 0
    sent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_UNANSWERED_MAX))
    """Numbers and times of messages that are not known to have arrived, oldest first."""


class PeerTable:
    """What this node has heard, by incarnation. Agent process; safe to share between threads."""

    def __init__(self, clock_s: Callable[[], float]) -> None:
        self._clock_s = clock_s
        self._lock = threading.Lock()
        self._count = 0
        """Of all messages to anybody: who was forgotten and comes back must not meet old numbers again."""
        self._exchanges: dict[str, _Exchange] = {}
        self.peers: dict[str, Peer] = {}

    def watch(self, incarnation: str, *, anew: bool = False) -> None:
        """Start the silence clock of a node that should answer; `anew` starts it again if it has run."""
        with self._lock:
            known = self.peers.get(incarnation)
            if known is None:
                self.peers[incarnation] = Peer(None, self._clock_s(), heard_s=None, refused=False)
            elif anew or known.watched_since_s is None:
                self.peers[incarnation] = replace(known, watched_since_s=self._clock_s())

    def rest(self, incarnation: str) -> None:
        """Stop the silence clock of a node that this one no longer asks; what it says is still noted."""
        self._note(incarnation, watched_since_s=None, refused=False)

    def unwatch(self, incarnation: str) -> None:
        """Forget a node that nobody needs to hear of any more."""
        with self._lock:
            self.peers.pop(incarnation, None)
            self._exchanges.pop(incarnation, None)

    def message_to(
        self, incarnation: str, status: NodeStatus, *, asks: bool, refusal: str = ""
    ) -> Message:
        """The next message to a peer; its moment of sending is remembered."""
        with self._lock:
            self._count += 1
            exchange = _Exchange()
            if incarnation in self.peers:
                exchange = self._exchanges.setdefault(incarnation, exchange)
            exchange.sent.append((self._count, self._clock_s()))
            return Message(self._count, exchange.seen, asks, status, refusal)

    def received(self, message: Message) -> bool:
        """Note what a peer said. True if it said something new about itself, beside its progress."""
        incarnation = message.status.member.incarnation
        with self._lock:
            known = self.peers.get(incarnation)
            if known is None:
                if len(self.peers) >= _PEERS_MAX:
                    return False
                known = Peer(None, None, heard_s=None, refused=False)
            exchange = self._exchanges.setdefault(incarnation, _Exchange())
            # Two connections of one pair may overtake each other: the newest words count.
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
        """Note that connecting to a node's address has worked."""
        self._note(incarnation, reached=True)

    def refused(self, incarnation: str) -> None:
        """Note that nobody answers for this incarnation at its address any more."""
        self._note(incarnation, refused=True)

    def _note(self, incarnation: str, **changes: object) -> None:
        with self._lock:
            known = self.peers.get(incarnation)
            if known is not None:
                self.peers[incarnation] = replace(known, **changes)  # type: ignore[arg-type]
