"""The place of one chaos run: nodes on networks of their own, a bucket, and a way to disturb each of them.

    [node-0: own network] ─┐                       ┌─ proxy ─── S3 server
    [node-1: own network] ─┼─ bridge (cut, slow) ──┤
    [node-2: own network] ─┘                       └─ this process: failpoints, observation

All methods are called by one thread, that of the run: the kernel ends an agent when the thread that started it ends.
What a machine cannot do (no root: no networks; no Ceph: no bucket) is known before, see `Place`.
"""

import os
import signal
from collections.abc import Collection, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from elastic_pt.chaos.hooks import Decide, Hooks
from elastic_pt.chaos.processes import kill_all, mark_children, marked, workers_of
from elastic_pt.chaos.watched import WatchedRun
from elastic_pt.config import Config
from elastic_pt.failpoints import VARIABLE, Failpoint
from elastic_pt.fleet.local import LOOPBACK, Fleet
from elastic_pt.fleet.network import Network

NOTICE_FILE: Final = "notice"


class Arena:
    """A context manager; at its end no process of the run is left, whatever happened."""

    def __init__(
        self,
        config: Config,
        directory: Path,
        nodes: Sequence[str],
        *,
        points: Collection[Failpoint],
        decide: Decide,
        network: bool,
    ) -> None:
        """`nodes`: all that may ever start. Processes ask `decide` what to do at each of the `points`."""
        self.config = config
        self.directory = directory
        self.nodes = tuple(nodes)
        self.run = WatchedRun(config, directory)
        self.network: Network | None = None
        self._points = tuple(points)
        self._decide = decide
        self._has_network = network
        self._stack = ExitStack()
        self._started: set[str] = set()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.mark = stack.enter_context(mark_children())
            stack.callback(kill_all, self.mark)
            self._hooks = stack.enter_context(Hooks(self._decide))
            if self._has_network:
                self.network = stack.enter_context(Network(self.nodes, versions=(4,)))
                self.run.ask_from = self.network.on_hub
            self._fleet = stack.enter_context(Fleet(self.config, self.directory))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    # Nodes

    def start(self, node: str, *settings: str) -> None:
        """Start a node, or start it anew."""
        notices = self.directory / f"{node}.{NOTICE_FILE}"
        notices.unlink(missing_ok=True)
        entered = () if self.network is None else self.network.prefix(node)
        address = LOOPBACK if self.network is None else self.network.address(node)
        rules = self._hooks.rules(node, self._points)
        self._started.add(node)
        self._fleet.start(
            node,
            address=address,
            prefix=[*entered, "env", f"{VARIABLE}={rules}"],
            settings=[f"elastic.notices=file:{notices}", *settings],
        )

    def start_another(self) -> None:
        """Start the first node that has never been started."""
        started = self._started
        self.start(next(each for each in self.nodes if each not in started))

    def running(self) -> list[str]:
        """Nodes whose agent has not ended."""
        return self._fleet.running()

    def gone(self) -> set[str]:
        """Nodes that were started and do not run."""
        return self._started - set(self._fleet.running())

    def exit_codes(self) -> dict[str, int | None]:
        """Exit code of each node that was started and not killed; None while it runs."""
        return self._fleet.exit_codes()

    def kill(self, node: str) -> None:
        """The loss of a machine: SIGKILL to all its processes at once."""
        if node in self._fleet.running():
            self._fleet.kill(node)

    def send(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to one process of the run, if it is still there; 0 is none."""
        if pid in marked(self.mark):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def signal_agent(self, node: str, number: signal.Signals) -> None:
        """Send a signal to a node's agent alone."""
        with suppress(ProcessLookupError):
            os.kill(self._fleet.pid(node), number)

    def signal_node(self, node: str, number: signal.Signals) -> None:
        """Send a signal to all processes of a node, as a machine that freezes and goes on."""
        with suppress(ProcessLookupError):
            os.killpg(self._fleet.pid(node), number)

    def workers(self, node: str) -> list[int]:
        """Process ids of a node's workers."""
        return workers_of(self._fleet.pid(node), self.mark)

    def notify(self, node: str, lead_s: float) -> None:
        """A notice of preemption for a node, as its platform would give it."""
        path = self.directory / f"{node}.{NOTICE_FILE}"
        part = path.with_suffix(".part")
        part.write_text(f"kind: preempt\nlead_s: {lead_s}\n")
        part.rename(path)

    def withdraw(self, node: str) -> None:
        """The notice does not count any more."""
        (self.directory / f"{node}.{NOTICE_FILE}").unlink(missing_ok=True)
