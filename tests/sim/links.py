"""`membership/links.py` over the simulated network: connect, ask, answer, notice that a peer is gone."""

from collections.abc import Callable, Sequence
from typing import Final

from elastic_pt.membership.participant import Participant
from elastic_pt.membership.peers import Message
from elastic_pt.runlog.records import Member
from tests.sim.network import End, Machine, Network
from tests.sim.scheduler import Process

_REFUSALS_UNTIL_GONE: Final = 2
_REFUSED_AGAIN_S: Final = 0.02


class Link:
    """One open connection. Messages are made when they are sent; several words in a row become one."""

    def __init__(
        self, links: "SimulatedLinks", end: End, incarnation: str, *, dialled: bool
    ) -> None:
        self._links = links
        self._end = end
        self._dialled = dialled
        self.incarnation = incarnation
        self._asks = False
        self._awake = False
        self._ask_at_s = 0.0
        if dialled:
            self._ask_at_s = links.process.clock_s()
            self._keep_asking()

    def say(self, *, asks: bool) -> None:
        """Send a message as soon as possible."""
        self._asks = self._asks or asks
        if not self._awake:
            self._awake = True
            self._links.process.soon(self._send)

    def _send(self) -> None:
        self._awake = False
        if self._end.closed:
            return
        asks, self._asks = self._asks, False
        if self._dialled:
            self._ask_at_s = self._links.process.clock_s() + self._links.participant.interval_s()
        self._links.sent += 1
        message = self._links.participant.message_to(self.incarnation, asks=asks)
        if self._links.send_s:
            self._links.process.after(
                self._links.busy(self._links.send_s), lambda: self._end.send(message)
            )
        else:
            self._end.send(message)

    def _keep_asking(self) -> None:
        """Ask whenever nothing has been said for an interval."""
        if self._end.closed:
            return
        left_s = self._ask_at_s - self._links.process.clock_s()
        if left_s <= 1e-9:
            self.say(asks=True)
            left_s = self._links.participant.interval_s()
        self._links.process.after(left_s, self._keep_asking)


class Dial:
    """Keeps one connection to a node until it is cancelled."""

    def __init__(self, links: "SimulatedLinks", member: Member) -> None:
        self._links = links
        self._member = member
        self._attempt = 0
        self._refusals = 0
        self._end: End | None = None
        self._link: Link | None = None
        self._heard_s = 0.0
        self._silence_s = 0.0
        self.cancelled = False
        links.process.soon(self._connect)

    def cancel(self) -> None:
        """Hang up for good."""
        self.cancelled = True
        self._attempt += 1
        self._hang_up()

    def _connect(self) -> None:
        if self.cancelled:
            return
        links = self._links
        self._attempt += 1
        attempt = self._attempt
        self._silence_s = links.participant.known.silence_s()

        def opened(end: End) -> None:
            if self._attempt == attempt:
                self._opened(end, attempt)
            else:
                end.close()

        def refused() -> None:
            if self._attempt == attempt:
                self._refusals += 1
                self._again()

        def failed() -> None:
            if self._attempt == attempt:
                self._again()

        links.network.connect(
            links.process,
            links.machine,
            self._member.address,
            self._member.port,
            timeout_s=self._silence_s,
            on_open=opened,
            on_refused=refused,
            on_failed=failed,
        )
        links.process.after(self._silence_s, lambda: self._timed_out(attempt))

    def _timed_out(self, attempt: int) -> None:
        if self._attempt == attempt and self._end is None:
            self._again()

    def _opened(self, end: End, attempt: int) -> None:
        links = self._links
        self._end = end
        self._heard_s = links.process.clock_s()
        self._link = link = Link(links, end, self._member.incarnation, dialled=True)
        links.open[link] = None
        end.on_message = lambda message: self._take(message, attempt)
        end.on_close = lambda: self._closed(attempt)
        self._watch(attempt)

    def _watch(self, attempt: int) -> None:
        """A connection over a network that was torn may stay stuck long after it has healed."""
        if self._attempt != attempt or self._end is None:
            return
        left_s = self._heard_s + self._silence_s - self._links.process.clock_s()
        if left_s <= 1e-9:
            self._again()
        else:
            self._links.process.after(left_s, lambda: self._watch(attempt))

    def _take(self, message: Message, attempt: int) -> None:
        if self._attempt != attempt or self._link is None:
            return
        self._heard_s = self._links.process.clock_s()
        if message.status.member.incarnation != self._member.incarnation:
            self._refusals = _REFUSALS_UNTIL_GONE
            self._again()
            return
        self._links.participant.table.reached(self._member.incarnation)
        self._links.take(self._link, message)

    def _closed(self, attempt: int) -> None:
        if self._attempt == attempt:
            self._refusals = 0
            self._again()

    def _again(self) -> None:
        """This attempt is over: note what it says, and dial again."""
        links = self._links
        self._attempt += 1
        self._hang_up()
        if self._refusals >= _REFUSALS_UNTIL_GONE:
            links.participant.table.refused(self._member.incarnation)
            links.on_news()
        links.process.after(
            _REFUSED_AGAIN_S
            if self._refusals < _REFUSALS_UNTIL_GONE
            else links.participant.interval_s(),
            self._connect,
        )

    def _hang_up(self) -> None:
        if self._link is not None:
            self._links.open.pop(self._link, None)
            self._link = None
        if self._end is not None:
            self._end.close()
            self._end = None


class SimulatedLinks:
    """All connections of one agent."""

    def __init__(
        self,
        process: Process,
        machine: Machine,
        network: Network,
        participant: Participant,
        on_news: Callable[[], None],
        on_received: Callable[[Message], None],
    ) -> None:
        self.process = process
        self.machine = machine
        self.network = network
        self.participant = participant
        self.on_news = on_news
        self._on_received = on_received
        self.open: dict[Link, None] = {}
        self.sent = 0
        self.receive_s = self.send_s = 0.0
        """Processor time that a message costs."""
        self._busy_until_s = 0.0
        self._dials: dict[str, Dial] = {}

    def aim(self, targets: Sequence[Member]) -> None:
        """Keep a connection to each of these nodes, and to no other."""
        wanted = {each.incarnation: each for each in targets}
        for incarnation, member in wanted.items():
            if incarnation not in self._dials:
                self._dials[incarnation] = Dial(self, member)
        for incarnation in [each for each in self._dials if each not in wanted]:
            self._dials.pop(incarnation).cancel()

    def say(self, *, asks: bool) -> None:
        """Send the own status to every connected peer at once; with `asks` they answer at once."""
        for link in list(self.open):
            link.say(asks=asks)

    def accept(self, end: End) -> None:
        """Another agent connects."""
        links: list[Link] = []

        def heard(message: Message) -> None:
            incarnation = message.status.member.incarnation
            if not links:
                links.append(Link(self, end, incarnation, dialled=False))
                self.open[links[0]] = None
            links[0].incarnation = incarnation
            self.take(links[0], message)

        def closed() -> None:
            for link in links:
                self.open.pop(link, None)
                self.participant.contacts.hung_up(link.incarnation)
                self.on_news()

        end.on_message = heard
        end.on_close = closed

    def take(self, link: Link, message: Message) -> None:
        """A message has arrived; its receiver handles one after the other."""
        if self.receive_s:
            self.process.after(self.busy(self.receive_s), lambda: self._handle(link, message))
        else:
            self._handle(link, message)

    def busy(self, cost_s: float) -> float:
        """Have the processor do something that takes `cost_s`; seconds from now until it is done."""
        now_s = self.process.clock_s()
        self._busy_until_s = max(self._busy_until_s, now_s) + cost_s
        return self._busy_until_s - now_s

    def _handle(self, link: Link, message: Message) -> None:
        news = self.participant.received(message)
        self._on_received(message)
        if message.asks:
            link.say(asks=False)
        if news:
            self.on_news()
