"""A network for a fleet on one machine: each node in a network namespace of its own, links that go down.

    [hub: bridge 10.77.0.254] ─ veth ─ [node 1: eth0 10.77.0.1]
                              ─ veth ─ [node 2: eth0 10.77.0.2] ...

The namespaces have no name: each lives as long as the process that holds it, which dies with this one.
So nothing is left behind, however the benchmark ends, and nothing of the machine's own network is touched.
Needs root, `ip`, `unshare` and `nsenter`.
"""

import ctypes
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from elastic_pt.errors import ElasticPtError
from elastic_pt.workers.forking import die_with_parent

_CLONE_NEWNET: Final = 0x40000000
_SUBNET: Final = "10.77.0"
_BRIDGE: Final = "hub"
_START_TIMEOUT_S: Final = 5.0


def missing_for_networks() -> str:
    """Why this process cannot make networks; empty when it can."""
    if os.geteuid() != 0:
        return "left out: network namespaces need root"
    absent = [name for name in ("ip", "unshare", "nsenter") if shutil.which(name) is None]
    return f"left out: {', '.join(absent)} not found" if absent else ""


class Network:
    """Namespaces for `slots` nodes around a hub; a context manager that leaves none behind. Main thread."""

    def __init__(self, slots: int) -> None:
        self._holders: list[subprocess.Popen[bytes]] = []
        self._slots = slots

    def __enter__(self) -> Self:
        try:
            hub = self._hold()
            self._ip(hub, "link", "add", _BRIDGE, "type", "bridge")
            self._ip(hub, "addr", "add", f"{_SUBNET}.254/24", "dev", _BRIDGE)
            self._ip(hub, "link", "set", _BRIDGE, "up")
            for slot in range(1, self._slots + 1):
                node = self._hold()
                name = f"port{slot}"
                peer = ("peer", "name", "eth0", "netns", str(node.pid))
                self._ip(hub, "link", "add", name, "type", "veth", *peer)
                self._ip(hub, "link", "set", name, "master", _BRIDGE, "up")
                self._ip(node, "addr", "add", f"{self.address(slot)}/24", "dev", "eth0")
                self._ip(node, "link", "set", "eth0", "up")
                self._ip(node, "link", "set", "lo", "up")
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

    @property
    def slots(self) -> range:
        """The nodes' places, from 1."""
        return range(1, self._slots + 1)

    def address(self, slot: int) -> str:
        """Address of a node."""
        return f"{_SUBNET}.{slot}"

    def inside(self, slot: int) -> list[str]:
        """What to put before a command so that it runs in a node's namespace, under the same process id."""
        return ["nsenter", f"--net={self._path(self._holders[slot])}", "--"]

    def enter_hub(self) -> None:
        """Take the calling thread, and only it, to the hub."""
        with self._path(self._holders[0]).open() as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")

    def cut(self, slot: int) -> None:
        """Take a node's link down: what it sends is lost, and so is what is sent to it; nothing is reset."""
        self._ip(self._holders[0], "link", "set", f"port{slot}", "down")

    def mend(self, slot: int) -> None:
        """Bring a node's link up again."""
        self._ip(self._holders[0], "link", "set", f"port{slot}", "up")

    def close(self) -> None:
        """End the holders; their namespaces, and the links in them, end with the last process inside."""
        for holder in self._holders:
            holder.kill()
            holder.wait()
        self._holders.clear()

    def _hold(self) -> subprocess.Popen[bytes]:
        holder = subprocess.Popen(
            ["unshare", "--net", "sleep", "infinity"],
            stdin=subprocess.DEVNULL,
            preexec_fn=die_with_parent,
        )
        self._holders.append(holder)
        ours = os.readlink("/proc/self/ns/net")
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while os.readlink(self._path(holder)) == ours:
            if holder.poll() is not None or time.monotonic() > deadline_s:
                raise ElasticPtError("no network namespace can be made here")
            time.sleep(0.001)
        return holder

    def _path(self, holder: subprocess.Popen[bytes]) -> Path:
        return Path(f"/proc/{holder.pid}/ns/net")

    def _ip(self, holder: subprocess.Popen[bytes], *arguments: str) -> None:
        command = ["nsenter", f"--net={self._path(holder)}", "--", "ip", *arguments]
        subprocess.run(command, check=True, capture_output=True)
