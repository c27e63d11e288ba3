"""The WireGuard network of deploy/wireguard on a network of namespaces: each node's mesh process, as on a machine of its own."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from elastic_pt.fleet.network import Network
from elastic_pt.workers.forking import die_with_parent

MESH: Final = Path(__file__).parents[1] / "deploy" / "wireguard" / "mesh.py"
PORT: Final = 51820
_INTERVAL_S: Final = 0.2


@dataclass
class Mesh:
    """The nodes that have joined it."""

    network: Network
    run_url: str
    home: Path
    _loops: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _made: set[str] = field(default_factory=set)

    def join(self, node: str) -> str:
        """As docs/security.md says: once, then for good. Returns the node's address in it."""
        address = self.make(node)
        with (self.home / f"{node}.mesh.log").open("ab") as log:
            self._loops[node] = subprocess.Popen(
                [*self.command(node), "--interval-s", str(_INTERVAL_S)],
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,
            )
        return address

    def make(self, node: str) -> str:
        """Once only: key, interface, object, and the peers of this moment."""
        self._made.add(node)
        command = [*self.command(node), "--once"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def command(self, node: str) -> list[str]:
        """The mesh's command on a node."""
        endpoint = f"{self.network.address(node)}:{PORT}"
        command = [*self.network.prefix(node), sys.executable, str(MESH), self.run_url]
        command += ["--endpoint", endpoint, "--interface", self.interface(node)]
        return [*command, "--key-file", str(self.home / f"{node}.key")]

    def interface(self, node: str) -> str:
        """A name of its own on this machine: WireGuard in user space has a socket in the file system for each."""
        return f"w{os.getpid()}-{node[-1]}"

    def peers(self, node: str) -> dict[str, str]:
        """Endpoints of the peers that have answered a node, by their address in the mesh."""
        command = [*self.network.prefix(node), "wg", "show", self.interface(node), "dump"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows = [line.split("\t") for line in shown.splitlines()[1:]]
        return {row[3].removesuffix("/128"): row[2] for row in rows if row[4] != "0"}

    def lose(self, node: str) -> None:
        """The machine is gone, with its mesh process and its WireGuard."""
        self._made.remove(node)
        if loop := self._loops.pop(node, None):
            loop.kill()
            loop.wait()
        for command in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                words = command.read_bytes().decode(errors="replace").split("\0")
                if words[:2] == ["wireguard-go", self.interface(node)]:
                    os.kill(int(command.parent.name), signal.SIGKILL)
        Path(f"/run/wireguard/{self.interface(node)}.sock").unlink(missing_ok=True)

    def close(self) -> None:
        """All of them."""
        for node in list(self._made):
            self.lose(node)
