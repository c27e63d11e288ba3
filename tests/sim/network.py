"""Machines, and the connections between their processes.

A connection keeps order and loses nothing, as TCP does: what a lost packet or a torn link costs is time,
for itself and everything behind it. Connections between the same two processes may overtake each other.
What happens when one end goes away depends on how:

    its process ends, its machine stays      the other end sees the connection close; new ones are refused
    its machine or its link goes             silence; new ones are not answered
    its process stands still                 bytes wait at the door; new ones are accepted, and not answered
"""

import ipaddress
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from tests.sim.scheduler import Process, Scheduler

_RETRANSMISSION_S: Final = 0.2
_RETRANSMISSION_MAX_S: Final = 4.0
_CONNECT_AGAIN_S: Final = (0.0, 1.0, 3.0, 7.0)
"""When a connection request without an answer is sent again."""


@dataclass(frozen=True)
class Latency:
    """How long one way takes: uniform between bounds, and now and then much longer."""

    low_s: float = 0.0002
    high_s: float = 0.002
    tail_share: float = 0.01
    tail_s: float = 0.05
    loss_share: float = 0.001
    """Packets that are lost and sent again."""

    def draw(self, source: random.Random) -> float:
        """Seconds for one packet."""
        chance = source.random()
        delay_s = self.low_s + (self.high_s - self.low_s) * source.random()
        if chance < self.tail_share:
            delay_s += self.tail_s * source.random()
            if chance < self.loss_share:
                delay_s += _RETRANSMISSION_S
        return delay_s


class Machine:
    """One host: up or not, with processes that listen."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.address = str(ipaddress.IPv6Address((0xFD << 120) | int.from_bytes(name.encode())))
        self.up = True
        self.listeners: dict[int, Any] = {}
        """The listeners, by port: anything with `accept(connection)` and `process`."""
        self.next_port = 20000

    def free_port(self) -> int:
        """A port that has not been used lately."""
        self.next_port += 1
        return self.next_port


class End:
    """One end of a connection; its owner sets the two callbacks."""

    def __init__(self, connection: "Connection", process: Process, machine: Machine) -> None:
        self.connection = connection
        self.process = process
        self.machine = machine
        self.other: End
        self.closed = False
        self.on_message: Callable[[Any], None] = lambda _: None
        self.on_close: Callable[[], None] = lambda: None
        self._last_s = 0.0
        self._stuck: deque[tuple[Callable[[], None], float]] = deque()

    def send(self, message: Any) -> None:
        """Send to the other end."""
        if not self.closed:
            self._pass(lambda: self.other.take(message))

    def close(self) -> None:
        """Hang up; the other end learns of it behind all that was sent."""
        if not self.closed:
            self.closed = True
            self._pass(self.other.hung_up)
            self.connection.network.forget(self.connection)

    def take(self, message: Any) -> None:
        """A message has arrived at this machine."""
        if not self.closed:
            self.process.soon(lambda: None if self.closed else self.on_message(message))

    def hung_up(self) -> None:
        """The other end's hanging up has arrived at this machine."""
        if not self.closed:
            self.closed = True
            self.process.soon(self.on_close)

    # ---- on the way -------------------------------------------------------------------------------

    def _pass(self, arrive: Callable[[], None]) -> None:
        network = self.connection.network
        if self._stuck or network.is_cut(self.machine, self.other.machine):
            self._stick(arrive)
            return
        scheduler = network.scheduler
        # Order is kept within a connection: nothing arrives before what was sent earlier.
        self._last_s = max(
            self._last_s, scheduler.now_s + network.delay_s(self.machine, self.other.machine)
        )
        scheduler.at(self._last_s, lambda: self._arrive(arrive))

    def _arrive(self, arrive: Callable[[], None]) -> None:
        if self._stuck or self.connection.network.is_cut(self.machine, self.other.machine):
            self._stick(arrive)
        elif self.machine.up and self.other.machine.up:
            arrive()

    def _stick(self, arrive: Callable[[], None]) -> None:
        network = self.connection.network
        if not self.machine.up or not self.other.machine.up:
            return
        if not self._stuck:
            network.stuck.append(self)
        self._stuck.append((arrive, network.scheduler.now_s))

    def retransmit(self) -> bool:
        """The link may work again: if so, send what is stuck when its timer rings next. True if nothing is left."""
        network = self.connection.network
        if network.is_cut(self.machine, self.other.machine):
            return False
        stuck, self._stuck = self._stuck, deque()
        scheduler = network.scheduler
        # The timer doubles, so the next try comes within the time it has been stuck already.
        stuck_s = scheduler.now_s - stuck[0][1] if stuck else 0.0
        wait_s = min(_RETRANSMISSION_MAX_S, max(_RETRANSMISSION_S, stuck_s))
        self._last_s = max(self._last_s, scheduler.now_s + wait_s * scheduler.random.random())
        for arrive, _ in stuck:
            scheduler.at(self._last_s, lambda arrive=arrive: self._arrive(arrive))
        return True


class Connection:
    """A pair of ends."""

    def __init__(
        self,
        network: "Network",
        dialling: tuple[Process, Machine],
        dialled: tuple[Process, Machine],
    ) -> None:
        self.network = network
        self.near = End(self, *dialling)
        self.far = End(self, *dialled)
        self.near.other, self.far.other = self.far, self.near


class Network:
    """All machines, what lies between them, and which links are torn or clogged."""

    def __init__(self, scheduler: Scheduler, latency: Latency) -> None:
        self.scheduler = scheduler
        self.latency = latency
        self.machines: dict[str, Machine] = {}
        self.cuts: dict[tuple[str, str], int] = {}
        """How many faults stop packets from one machine to another."""
        self.clogs: dict[tuple[str, str], float] = {}
        """Extra seconds per packet from one machine to another."""
        self.stuck: list[End] = []
        self.connections: dict[Connection, None] = {}
        self.messages = 0

    def machine_at(self, address: str) -> Machine | None:
        """The machine with an address."""
        return next((each for each in self.machines.values() if each.address == address), None)

    def is_cut(self, source: Machine, target: Machine) -> bool:
        """Whether packets from one machine do not get to the other one."""
        if not source.up or not target.up:
            return True
        return bool(self.cuts) and (source.name, target.name) in self.cuts

    def is_torn(self, one: Machine, other: Machine) -> bool:
        """Whether packets do not pass in both directions."""
        return self.is_cut(one, other) or self.is_cut(other, one)

    def delay_s(self, source: Machine, target: Machine) -> float:
        """Seconds for one packet."""
        self.messages += 1
        delay_s = self.latency.draw(self.scheduler.random)
        if self.clogs:
            delay_s += self.clogs.get((source.name, target.name), 0.0)
        return delay_s

    def cut(self, source: str, target: str) -> None:
        """Stop packets in one direction."""
        self.cuts[source, target] = self.cuts.get((source, target), 0) + 1

    def mend(self, source: str, target: str) -> None:
        """Take one cut back."""
        left = self.cuts.get((source, target), 0) - 1
        if left > 0:
            self.cuts[source, target] = left
            return
        self.cuts.pop((source, target), None)
        self._retransmit()

    def switch_off(self, machine: Machine) -> None:
        """A machine loses power or its only link. The others receive nothing from its processes any more."""
        machine.up = False
        machine.listeners.clear()

    def switch_on(self, machine: Machine) -> None:
        """A machine is back, with none of its processes. Peers that still send to them learn that now."""
        machine.up = True
        for connection in list(self.connections):
            for end in (connection.near, connection.far):
                if end.machine is machine and not end.other.closed:
                    end.closed = True
                    self._reset(end.other)
                    self.forget(connection)
        self._retransmit()

    def process_ended(self, process: Process, machine: Machine) -> None:
        """Its machine closes its connections."""
        for port in [port for port, each in machine.listeners.items() if each.process is process]:
            del machine.listeners[port]
        for connection in list(self.connections):
            for end in (connection.near, connection.far):
                if end.process is process:
                    end.close()

    def forget(self, connection: Connection) -> None:
        """One end is closed: nothing that happens to the connection matters to it any more."""
        if connection.near.closed and connection.far.closed:
            self.connections.pop(connection, None)

    def connect(
        self,
        process: Process,
        machine: Machine,
        address: str,
        port: int,
        *,
        timeout_s: float,
        on_open: Callable[[End], None],
        on_refused: Callable[[], None],
        on_failed: Callable[[], None],
    ) -> None:
        """Ask for a connection. No callback comes without an answer within `timeout_s`; the caller watches that.

        `on_failed`: the machine took the connection, and closed it before the process answered.
        """
        target = self.machine_at(address)
        scheduler = self.scheduler

        def ask(attempt: int) -> None:
            if target is not None and not self.is_torn(machine, target):
                scheduler.after(self.delay_s(machine, target), lambda: arrive(attempt))
            else:
                ask_again(attempt)

        def ask_again(attempt: int) -> None:
            times = _CONNECT_AGAIN_S[attempt : attempt + 2]
            if len(times) == 2 and times[1] < timeout_s:
                scheduler.after(times[1] - times[0], lambda: ask(attempt + 1))

        def arrive(attempt: int) -> None:
            if target is None or self.is_torn(machine, target):
                ask_again(attempt)
                return
            listener = target.listeners.get(port)
            if listener is None:
                scheduler.after(self.delay_s(target, machine), on_refused, process)
                return
            connection = Connection(self, (process, machine), (listener.process, target))
            self.connections[connection] = None

            def accept() -> None:
                listener.accept(connection.far)
                connection.far.send(None)  # the answer that opens it

            connection.near.on_message = lambda _: on_open(connection.near)
            connection.near.on_close = on_failed
            # The machine accepts, the process answers: not while it stands still.
            listener.process.soon(accept)

        ask(0)

    def _reset(self, end: End) -> None:
        if not end.closed and end.machine.up:
            self.scheduler.after(self.latency.draw(self.scheduler.random), end.hung_up)

    def _retransmit(self) -> None:
        stuck, self.stuck = self.stuck, []
        for end in stuck:
            if not end.retransmit():
                self.stuck.append(end)
