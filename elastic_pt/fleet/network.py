"""Several nodes on one machine, each in its own network namespace, with links that can be cut and disturbed. Needs root.

    [hub: bridge 10.77.0.254, fd77::254] ── veth ── [node-0: eth0 10.77.0.1, fd77::1]
                                         ── veth ── [node-1: eth0 10.77.0.2, fd77::2] ...

Chaos tests and benchmarks start an agent in each namespace and cut links between them. Hub and nodes are network
namespaces without a name. The kernel removes a namespace once this process has closed it and no process is in it.
So nothing is left behind, however this process ends, and two such networks on one machine do not collide. The
machine's own network is never changed. To look into a namespace: `nsenter --net=/proc/<pid of an agent>/ns/net`.
"""

import json
import os
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Final, Self

from elastic_pt.errors import UnexpectedError
from elastic_pt.fleet.forwarder import Disturbance
from elastic_pt.fleet.namespace import entered, inside, new_namespace, path_of, run
from elastic_pt.fleet.wire import Wire

_COMMANDS: Final = ("ip", "tc", "iptables", "ip6tables", "nsenter")
_BRIDGE: Final = "hub"
_HUB_NUMBER: Final = 254
_HUB_MAC: Final = "02:00:00:00:00:fe"
"""Of its own: otherwise a bridge takes over the address of one of its ports, and changes it with them."""
_RESET: Final = ("--protocol", "tcp", "--tcp-flags", "RST", "NONE")
"""All segments that are not the answer to another such rule."""
_QUEUE: Final = "200ms"
_BURST_BYTES_MIN: Final = 8192
_LINKS_TIMEOUT_S: Final = 10.0
_LINKS_POLL_S: Final = 0.005


def missing_for_networks() -> str:
    """Why this process cannot make networks, as a clause ("which need root"); empty if it can."""
    if os.geteuid() != 0:
        return "which need root"
    absent = [command for command in _COMMANDS if shutil.which(command) is None]
    if absent:
        return f"since {', '.join(absent)} are not installed"
    try:
        os.close(new_namespace())
    except OSError as error:
        return f"since this machine allows none: {error.strerror}"
    return ""


class Network:
    """One namespace per node around a hub; a context manager. Faults add up until `heal` or `link_up`. Needs root."""

    def __init__(self, nodes: Sequence[str], *, versions: Collection[int] = (4, 6)) -> None:
        """`versions`: the versions of IP that the nodes have addresses of."""
        self.nodes = tuple(nodes)
        self._versions = sorted(versions)
        self._namespaces: dict[str, int] = {}
        self._down: dict[str, int] = {}
        """Nodes whose link is down: how many packets each of them had failed to send before."""
        self._limited: set[str] = set()
        self._wires: dict[str, Wire] = {}
        self._hub = -1

    def __enter__(self) -> Self:
        try:
            self._hub = new_namespace()
            self._ip(self._hub, "link", "set", "lo", "up")
            self._ip(self._hub, "link", "add", _BRIDGE, "address", _HUB_MAC, "type", "bridge")
            self._ip(self._hub, "link", "set", _BRIDGE, "up")
            self._give_addresses(self._hub, _BRIDGE, _HUB_NUMBER)
            for node in self.nodes:
                self._add(node)
            self._await_links()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all namespaces; the kernel removes each, with its links, when no process is in it any more."""
        while self._wires:
            self._wires.popitem()[1].close()
        while self._namespaces:
            os.close(self._namespaces.popitem()[1])
        if self._hub >= 0:
            os.close(self._hub)
            self._hub = -1

    def address(self, node: str, version: int | None = None) -> str:
        """A node's address of an IP version; by default of the lowest version that the nodes have."""
        return _address(version or self._versions[0], self._number(node))

    def address_of_hub(self) -> str:
        """The hub's address of the lowest IP version that the nodes have."""
        return _address(self._versions[0], _HUB_NUMBER)

    def prefix(self, node: str) -> list[str]:
        """Words to put before a command to run it on a node, under the same process id."""
        return inside(self._namespaces[node])

    @contextmanager
    def on(self, node: str) -> Iterator[None]:
        """Put the calling thread, and only it, on a node."""
        with entered(self._namespaces[node]):
            yield

    @contextmanager
    def on_hub(self) -> Iterator[None]:
        """Put the calling thread, and only it, on the hub, which reaches every node despite `block`."""
        with entered(self._hub):
            yield

    def block(self, node: str, *, from_: str) -> None:
        """Drop all packets that arrive at `node` from another node; the other direction stays open."""
        for version in self._versions:
            source = self.address(from_, version)
            self._tables(node, version, "--append", "INPUT", "--source", source, "--jump", "DROP")

    def partition(self, one: str, other: str) -> None:
        """Cut the path between two nodes, both ways."""
        self.block(one, from_=other)
        self.block(other, from_=one)

    def split(self, left: Collection[str], right: Collection[str]) -> None:
        """Cut every path between two groups of nodes, both ways."""
        for one in left:
            for other in right:
                self.partition(one, other)

    def reset(self, one: str, other: str) -> None:
        """Reset every connection between two nodes, new ones too, at both ends and as soon as a segment is on its way."""
        for here, there in ((one, other), (other, one)):
            for version in self._versions:
                source = ("--source", self.address(there, version))
                reject = ("--jump", "REJECT", "--reject-with", "tcp-reset")
                self._tables(here, version, "--append", "INPUT", *source, *_RESET, *reject)

    def limit(self, node: str, bytes_per_s: int) -> None:
        """Limit what a node sends, and what it receives, to that rate each; it replaces an earlier limit."""
        burst = max(_BURST_BYTES_MIN, bytes_per_s // 50)
        bucket = ("tbf", "rate", f"{8 * bytes_per_s}bit", "burst", f"{burst}b", "latency", _QUEUE)
        for namespace, interface in self._ends(node):
            self._tc(namespace, "replace", "dev", interface, "root", *bucket)
        self._limited.add(node)

    def disturb(self, node: str, disturbance: Disturbance, *, seed: int = 0) -> None:
        """Let a process disturb all frames to and from a node; it replaces an earlier disturbance of this node.

        Frames that are on their way while the process is put in the path are lost. The kernel ends it with this thread.
        """
        self._remove_wire(node)
        port, inner, outer = self._port(node), self._inner(node), f"outer{self._number(node)}"
        self._ip(self._hub, "link", "add", inner, "type", "veth", "peer", "name", outer)
        for each in (port, outer):
            # The hub must not answer for its own address on them.
            self._ip(self._hub, "link", "set", each, "nomaster", "arp", "off")
        self._ip(self._hub, "link", "set", outer, "up")
        self._ip(self._hub, "link", "set", inner, "master", _BRIDGE, "up")
        self._wires[node] = Wire(inside(self._hub), (port, outer), disturbance, seed)
        self._await_links()

    def disturbed(self, node: str) -> dict[str, int]:
        """What `disturb` has done to a node's frames so far: how many were `lost`, `duplicated`, `flipped`, of `frames`."""
        return self._wires[node].counts()

    def rejected(self, node: str, *, from_: str) -> int:
        """How many packets from another node were dropped (`block`) or answered by a reset (`reset`) so far at `node`."""
        show = ("--list", "INPUT", "--numeric", "--verbose", "--exact")
        found = 0
        for version in self._versions:
            listing = self._tables(node, version, *show)
            # Two lines of headings; then one line for each rule, which begins with the number of packets.
            rules = [line.split() for line in listing.splitlines()[2:]]
            found += sum(int(rule[0]) for rule in rules if self.address(from_, version) in rule)
        return found

    def throttled(self, node: str) -> int:
        """How many times `limit` has made a packet to or from a node wait so far."""
        show = ("-statistics", "-json", "qdisc", "show", "dev")
        shown = [
            json.loads(run([*inside(namespace), "tc", *show, interface]))
            for namespace, interface in self._ends(node)
        ]
        return sum(int(each["overlimits"]) for queues in shown for each in queues)

    def unsent(self, node: str) -> int:
        """How many packets a node could not send since its link is down."""
        return self._dropped(node) - self._down[node]

    def link_down(self, node: str) -> None:
        """Take a node's link down: all packets to and from it are lost, and no connection is reset."""
        self._down.setdefault(node, self._dropped(node))
        self._ip(self._hub, "link", "set", self._port(node), "down")

    def link_up(self, node: str) -> None:
        """Bring a node's link up again; returns when it carries packets."""
        self._ip(self._hub, "link", "set", self._port(node), "up")
        self._down.pop(node, None)
        self._await_links()
        # Otherwise nodes remember for about a second that this neighbour cannot be reached.
        for each in self.nodes:
            self._ip(self._namespaces[each], "neighbour", "flush", "dev", "eth0")

    def heal(self) -> None:
        """Undo every fault."""
        for node in self.nodes:
            for version in self._versions:
                self._tables(node, version, "--flush", "INPUT")
            self._remove_wire(node)
        for node in sorted(self._limited):
            for namespace, interface in self._ends(node):
                self._tc(namespace, "delete", "dev", interface, "root")
        self._limited.clear()
        for node in sorted(self._down):
            self.link_up(node)
        self._await_links()

    def _add(self, node: str) -> None:
        namespace = self._namespaces[node] = new_namespace()
        wire = ("type", "veth", "peer", "name", "eth0", "netns", path_of(namespace))
        self._ip(self._hub, "link", "add", self._port(node), *wire)
        self._ip(self._hub, "link", "set", self._port(node), "master", _BRIDGE, "up")
        self._ip(namespace, "link", "set", "lo", "up")
        self._ip(namespace, "link", "set", "eth0", "up")
        self._give_addresses(namespace, "eth0", self._number(node))

    def _remove_wire(self, node: str) -> None:
        if node not in self._wires:
            return
        self._wires.pop(node).close()
        self._ip(self._hub, "link", "delete", self._inner(node))
        self._ip(self._hub, "link", "set", self._port(node), "master", _BRIDGE, "arp", "on")

    def _await_links(self) -> None:
        """Return once every link that is up carries packets; the kernel takes a moment for that."""
        deadline_s = time.monotonic() + _LINKS_TIMEOUT_S
        while not all(self._carries(node) for node in self.nodes if node not in self._down):
            if time.monotonic() > deadline_s:
                raise UnexpectedError(f"network links are not up after {_LINKS_TIMEOUT_S:g} s")
            time.sleep(_LINKS_POLL_S)

    def _carries(self, node: str) -> bool:
        show = ("-details", "-json", "link", "show", "dev")
        bridged = self._inner(node) if node in self._wires else self._port(node)
        (port,) = json.loads(self._ip(self._hub, *show, bridged))
        (inside,) = json.loads(self._ip(self._namespaces[node], *show, "eth0"))
        forwards = port["linkinfo"]["info_slave_data"]["state"] == "forwarding"
        return bool(forwards and inside["operstate"] == "UP")

    def _dropped(self, node: str) -> int:
        show = ("-statistics", "-json", "link", "show", "dev", "eth0")
        (link,) = json.loads(self._ip(self._namespaces[node], *show))
        return int(link["stats64"]["tx"]["dropped"])

    def _give_addresses(self, namespace: int, interface: str, number: int) -> None:
        for version in self._versions:
            # nodad: an IPv6 address is usable at once, without duplicate address detection.
            length, now = ("/24", ()) if version == 4 else ("/64", ("nodad",))
            address = _address(version, number) + length
            self._ip(namespace, "addr", "add", address, "dev", interface, *now)

    def _number(self, node: str) -> int:
        return 1 + self.nodes.index(node)

    def _port(self, node: str) -> str:
        return f"port{self._number(node)}"

    def _inner(self, node: str) -> str:
        return f"inner{self._number(node)}"

    def _ends(self, node: str) -> tuple[tuple[int, str], tuple[int, str]]:
        return (self._hub, self._port(node)), (self._namespaces[node], "eth0")

    def _tc(self, namespace: int, verb: str, *arguments: str) -> None:
        run([*inside(namespace), "tc", "qdisc", verb, *arguments])

    def _tables(self, node: str, version: int, *arguments: str) -> str:
        command = "iptables" if version == 4 else "ip6tables"
        return run([*self.prefix(node), command, "--wait", *arguments])

    def _ip(self, namespace: int, *arguments: str) -> str:
        return run([*inside(namespace), "ip", *arguments])


def _address(version: int, number: int) -> str:
    return f"10.77.0.{number}" if version == 4 else f"fd77::{number}"
