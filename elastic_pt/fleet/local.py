"""Several nodes on one machine: each is a real agent in a process group of its own.

`elastic-pt local`, the demo and the chaos tests all start and kill nodes through `Fleet`. Killing a node
means SIGKILL to its whole process group (agent, fork server and workers) at once. The other nodes see the same as
when a machine is lost.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from elastic_pt.config import Config
from elastic_pt.errors import UnexpectedError
from elastic_pt.workers.forking import die_with_parent

LOOPBACK = "127.0.0.1"
_POLL_S = 0.05


class Fleet:
    """Agents of one run on this machine; a context manager that leaves no process behind.

    Each agent's output goes to `<directory>/<node>.log`. Call it from one thread: the kernel ends an agent
    when the thread that started it ends.
    """

    def __init__(self, config: Config, directory: Path) -> None:
        self.config = config
        self._directory = directory
        self._agents: dict[str, subprocess.Popen[bytes]] = {}
        directory.mkdir(parents=True, exist_ok=True)
        self._config_path = directory / "config.toml"
        self._config_path.write_text(config.to_toml(comments=True), encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def start(
        self,
        node: str,
        *,
        name: str = "",
        address: str = LOOPBACK,
        prefix: Sequence[str] = (),
        settings: Sequence[str] = (),
        current: Path | None = None,
    ) -> int:
        """Start a node's agent, which its peers find at `address`; returns its process id.

        `name` is the node's name in the run, if it is not `node`: two agents may have the same one by mistake.
        `prefix` goes before the command, for example to enter a namespace (`nsenter ...`); it must become the agent
        under the same process id. `settings` override keys of the configuration (`section.key=value`) for this node.
        `current` is the agent's current directory, if not that of this process.
        """
        config = str(self._config_path.absolute())
        command = [*prefix, sys.executable, "-P", "-m", "elastic_pt", "run", config]
        command += ["--node", name or node, "--address", address]
        command += [word for each in settings for word in ("--set", each)]
        return self.launch(node, command, current=current)

    def launch(self, node: str, command: Sequence[str], *, current: Path | None = None) -> int:
        """Start a node with another command than that of our agent; returns its process id."""
        with (self._directory / f"{node}.log").open("ab") as output:
            agent = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=current,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self._agents[node] = agent
        return agent.pid

    def kill(self, node: str) -> None:
        """Simulate the loss of a node: SIGKILL to all its processes at once."""
        agent = self._agents.pop(node)
        os.killpg(agent.pid, signal.SIGKILL)
        agent.wait()

    def pid(self, node: str) -> int:
        """Process id of a node's agent."""
        return self._agents[node].pid

    def running(self) -> list[str]:
        """Nodes whose agent has not ended."""
        return [node for node, agent in self._agents.items() if agent.poll() is None]

    def exit_codes(self) -> dict[str, int | None]:
        """Exit code of each node that was started and not killed; None while it runs."""
        return {node: agent.poll() for node, agent in self._agents.items()}

    def wait(self, timeout_s: float) -> dict[str, int | None]:
        """Wait until all agents have ended. Raises `UnexpectedError` with the last lines of a log on timeout."""
        deadline_s = time.monotonic() + timeout_s
        while self.running():
            if time.monotonic() > deadline_s:
                node = self.running()[0]
                raise UnexpectedError(
                    f"{node} has not ended after {timeout_s} s; the end of its log: {self.tail(node)}"
                )
            time.sleep(_POLL_S)
        return self.exit_codes()

    def tail(self, node: str, lines: int = 5) -> str:
        """The last lines a node wrote."""
        return "\n".join(
            (self._directory / f"{node}.log").read_text(errors="replace").splitlines()[-lines:]
        )

    def close(self) -> None:
        """Kill all processes that still run, and wait for them."""
        for agent in self._agents.values():
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
            agent.wait()
        self._agents.clear()
