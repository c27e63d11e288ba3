"""Several nodes on one machine, each in its own network namespace, with links that can be cut. Needs root.

    [hub: bridge 10.77.0.254, fd77::254] ── veth ── [node-0: eth0 10.77.0.1, fd77::1]
                                         ── veth ── [node-1: eth0 10.77.0.2, fd77::2] ...

Chaos tests and benchmarks start an agent in each namespace and cut links between them. Hub and nodes are network
namespaces without a name. The kernel removes a namespace once this process has closed it and no process is in it.
So nothing is left behind, however this process ends, and two such networks on one machine do not collide. The
machine's own network is never changed. To look into a namespace: `nsenter --net=/proc/<pid of an agent>/ns/net`.
"""

import ctypes
import json
import os
import shutil
import subprocess
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Final, Self

from elastic_pt.errors import UnexpectedError

_CLONE_NEWNET: Final = 0x40000000
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_OWN_NAMESPACE: Final = "/proc/thread-self/ns/net"
_COMMANDS: Final = ("ip", "iptables", "ip6tables", "nsenter")
_BRIDGE: Final = "hub"
_HUB_NUMBER: Final = 254
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
        os.close(_new_namespace())
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
        self._down: set[str] = set()
        self._hub = -1

    def __enter__(self) -> Self:
        try:
            self._hub = _new_namespace()
            self._ip(self._hub, "link", "set", "lo", "up")
            self._ip(self._hub, "link", "add", _BRIDGE, "type", "bridge")
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
        while self._namespaces:
            os.close(self._namespaces.popitem()[1])
        if self._hub >= 0:
            os.close(self._hub)
            self._hub = -1

    def address(self, node: str, version: int | None = None) -> str:
        """A node's address of an IP version; by default of the lowest version that the nodes have."""
        return _address(version or self._versions[0], 1 + self.nodes.index(node))

    def address_of_hub(self) -> str:
        """The hub's address of the lowest IP version that the nodes have."""
        return _address(self._versions[0], _HUB_NUMBER)

    def prefix(self, node: str) -> list[str]:
        """Words to put before a command to run it on a node, under the same process id."""
        return _inside(self._namespaces[node])

    @contextmanager
    def on(self, node: str) -> Iterator[None]:
        """Put the calling thread, and only it, on a node."""
        with _entered(self._namespaces[node]):
            yield

    @contextmanager
    def on_hub(self) -> Iterator[None]:
        """Put the calling thread, and only it, on the hub, which reaches every node despite `block`."""
        with _entered(self._hub):
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

    def link_down(self, node: str) -> None:
        """Take a node's link down: all packets to and from it are lost, and no connection is reset."""
        self._ip(self._hub, "link", "set", self._port(node), "down")
        self._down.add(node)

    def link_up(self, node: str) -> None:
        """Bring a node's link up again; returns when it carries packets."""
        self._ip(self._hub, "link", "set", self._port(node), "up")
        self._down.discard(node)
        self._await_links()
        # Otherwise nodes remember for about a second that this neighbour cannot be reached.
        for each in self.nodes:
            self._ip(self._namespaces[each], "neighbour", "flush", "dev", "eth0")

    def heal(self) -> None:
        """Undo every fault."""
        for node in self.nodes:
            for version in self._versions:
                self._tables(node, version, "--flush", "INPUT")
        for node in sorted(self._down):
            self.link_up(node)

    def _add(self, node: str) -> None:
        namespace = self._namespaces[node] = _new_namespace()
        wire = ("type", "veth", "peer", "name", "eth0", "netns", _path(namespace))
        self._ip(self._hub, "link", "add", self._port(node), *wire)
        self._ip(self._hub, "link", "set", self._port(node), "master", _BRIDGE, "up")
        self._ip(namespace, "link", "set", "lo", "up")
        self._ip(namespace, "link", "set", "eth0", "up")
        self._give_addresses(namespace, "eth0", 1 + self.nodes.index(node))

    def _await_links(self) -> None:
        """Return once every link that is up carries packets; the kernel takes a moment for that."""
        deadline_s = time.monotonic() + _LINKS_TIMEOUT_S
        while not all(self._carries(node) for node in self.nodes if node not in self._down):
            if time.monotonic() > deadline_s:
                raise UnexpectedError(f"network links are not up after {_LINKS_TIMEOUT_S:g} s")
            time.sleep(_LINKS_POLL_S)

    def _carries(self, node: str) -> bool:
        show = ("-details", "-json", "link", "show", "dev")
        (port,) = json.loads(self._ip(self._hub, *show, self._port(node)))
        (inside,) = json.loads(self._ip(self._namespaces[node], *show, "eth0"))
        forwards = port["linkinfo"]["info_slave_data"]["state"] == "forwarding"
        return bool(forwards and inside["operstate"] == "UP")

    def _give_addresses(self, namespace: int, interface: str, number: int) -> None:
        for version in self._versions:
            # nodad: an IPv6 address is usable at once, without duplicate address detection.
            length, now = ("/24", ()) if version == 4 else ("/64", ("nodad",))
            address = _address(version, number) + length
            self._ip(namespace, "addr", "add", address, "dev", interface, *now)

    def _port(self, node: str) -> str:
        return f"port{1 + self.nodes.index(node)}"

    def _tables(self, node: str, version: int, *arguments: str) -> None:
        command = "iptables" if version == 4 else "ip6tables"
        _run([*self.prefix(node), command, "--wait", *arguments])

    def _ip(self, namespace: int, *arguments: str) -> str:
        return _run([*_inside(namespace), "ip", *arguments])


def _address(version: int, number: int) -> str:
    return f"10.77.0.{number}" if version == 4 else f"fd77::{number}"


def _new_namespace() -> int:
    """An open file of a new network namespace. In a new thread, because the thread that makes one moves into it."""

    def make() -> int:
        if _LIBC.unshare(_CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "cannot make a network namespace")
        return os.open(_OWN_NAMESPACE, os.O_RDONLY)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(make).result()


@contextmanager
def _entered(namespace: int) -> Iterator[None]:
    before = os.open(_OWN_NAMESPACE, os.O_RDONLY)
    try:
        _enter(namespace)
        try:
            yield
        finally:
            _enter(before)
    finally:
        os.close(before)


def _enter(namespace: int) -> None:
    if _LIBC.setns(namespace, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "cannot enter a network namespace")


def _path(namespace: int) -> str:
    return f"/proc/{os.getpid()}/fd/{namespace}"


def _inside(namespace: int) -> list[str]:
    return ["nsenter", f"--net={_path(namespace)}", "--"]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnexpectedError(
            f"{' '.join(command)} ended with exit code {done.returncode}: {done.stderr.strip()}"
        )
    return done.stdout
