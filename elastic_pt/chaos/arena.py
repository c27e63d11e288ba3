"""The place of one chaos run: nodes on networks of their own, a bucket, and a way to disturb each of them.

    [node-0: own network] ─┐                       ┌─ proxy ─── S3 server
    [node-1: own network] ─┼─ bridge (cut, slow) ──┤
    [node-2: own network] ─┘                       └─ this process: failpoints, observation

All methods are called by one thread, that of the run: the kernel ends an agent when the thread that started it ends.
What a machine cannot do (no root: no networks; no Ceph: no bucket) is known before, see `Place`.
"""

import os
import resource
import shutil
import signal
import socket
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import elastic_pt
from elastic_pt.chaos.bucket import Bucket
from elastic_pt.chaos.disk import Disk, prefix_for_disk
from elastic_pt.chaos.hooks import Decide, Hooks
from elastic_pt.chaos.leftovers import Places, left_by
from elastic_pt.chaos.processes import (
    fork_server_of,
    kill_all,
    mark_children,
    marked,
    workers_of,
)
from elastic_pt.chaos.s3_faults import Rule, S3Fault
from elastic_pt.chaos.s3_proxy import FaultProxy
from elastic_pt.chaos.scrape import Scraper
from elastic_pt.chaos.watched import WatchedRun
from elastic_pt.config import Config
from elastic_pt.failpoints import VARIABLE, Failpoint
from elastic_pt.fleet.local import LOOPBACK, Fleet
from elastic_pt.fleet.network import Network
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store

NOTICE_FILE: Final = "notice"
_NAME_CHARACTERS: Final = 12


@dataclass
class Life:
    """One agent, as it was seen from outside."""

    node: str
    """Its name in the run."""
    pid: int
    started_at_s: float
    """Unix time just before it was started."""
    began_by_s: float
    """Unix time by which its process had begun. A busy machine takes seconds for that."""
    ended_at_s: float | None = None
    """Unix time at which it was seen to have ended; None while it runs."""
    exit_code: int | None = None
    """None while it runs, and if it was killed from outside."""


@dataclass
class _NetworkFault:
    """A fault of the network that lasts."""

    do: Callable[[Network], None]
    count: Callable[[Network], int]
    met: int = 0
    """What it had counted when it was done anew."""


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
        seed: int = 0,
        disks: bool = False,
        bucket: Bucket | None = None,
    ) -> None:
        """`nodes`: all that may ever start. Processes ask `decide` what to do at each of the `points`.

        `seed` decides which requests to the bucket are struck. `disks`: whether each node has a small staging disk of its
        own. `bucket`: where the run is, if it is in one; the nodes reach it through a proxy.
        """
        self.config = config
        self.directory = directory = directory.absolute()
        self.nodes = tuple(nodes)
        self.run = WatchedRun(config, directory)
        self.network: Network | None = None
        self._points = tuple(points)
        self._decide = decide
        self._has_network = network
        self._seed = seed
        self._stack = ExitStack()
        self.lives: list[Life] = []
        """All agents that were started, in order."""
        self._alive: dict[str, Life] = {}
        self._started: set[str] = set()
        self._has_disks = disks
        self._bucket = bucket
        self._proxy: FaultProxy | None = None
        self._rules: dict[int, Rule] = {}
        self._disks: dict[str, Disk] = {}
        self._data_away: dict[str, bytes] = {}
        self._network_faults: dict[int, _NetworkFault] = {}
        self.data: Store = open_store(config.data.url)
        """The prepared data that this run alone reads."""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.mark = stack.enter_context(mark_children())
            self._places = Places(self.mark[:_NAME_CHARACTERS], self.config, self.directory)
            stack.callback(self._places.close)
            stack.callback(kill_all, self.mark)
            self._hooks = stack.enter_context(Hooks(self._decide, self._places.sockets))
            if self._has_network:
                self.network = stack.enter_context(Network(self.nodes, versions=(4,)))
                self.run.ask_from = self.network.on_hub
            if self._bucket is not None:
                self._proxy = stack.enter_context(self._make_proxy(self._bucket))
            self.counters = stack.enter_context(Scraper(self._watched(), self._on)).counters
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

    def _watched(self) -> WatchedRun:
        """The run, as another thread watches it."""
        run = WatchedRun(self.config, self.directory)
        run.ask_from = self.run.ask_from
        return run

    def _on(self, node: str) -> AbstractContextManager[None]:
        return nullcontext() if self.network is None else self.network.on(node)

    # Nodes

    def start(self, node: str, *settings: str, other_code: bool = False) -> None:
        """Start a node, or start it anew. `other_code`: its source code has one more comment than that of the others."""
        self._notices(node).unlink(missing_ok=True)
        self._disks.pop(node, None)
        self._launch(node, node, settings, other_code=other_code)

    def unstarted(self, count: int) -> tuple[str, ...]:
        """The first nodes that have never been started."""
        return tuple(each for each in self.nodes if each not in self._started)[:count]

    def start_twin(self, node: str) -> None:
        """Start another agent under a node's name, on the same machine."""
        twin = f"{node}-twin"
        self._launch(twin, node, (), other_code=False)

    def _launch(self, key: str, node: str, settings: Sequence[str], *, other_code: bool) -> None:
        prefix = [] if self.network is None else self.network.prefix(node)
        places, variables = self._places.settings(key)
        prefix = [*prefix, *self._places.prefix(key)]
        if self._has_disks:
            prefix = [*prefix, *prefix_for_disk(self._places.staging(key))]
        variables[VARIABLE] = self._hooks.rules(node, self._points)
        if self._bucket is not None and self._proxy is not None:
            variables |= self._bucket.environment({}, endpoint=self._proxy.endpoint)
        if other_code:
            variables["PYTHONPATH"] = str(changed_code(self.directory / "other-code"))
        self._started.add(key)
        started_at_s = time.time()
        pid = self._fleet.start(
            key,
            name=node,
            address=LOOPBACK if self.network is None else self.network.address(node),
            prefix=[*prefix, "env", *(f"{name}={value}" for name, value in variables.items())],
            settings=[f"elastic.notices=file:{self._notices(node)}", *places, *settings],
            current=self._places.current(key),
        )
        self._alive[key] = Life(node, pid, started_at_s, time.time())
        self.lives.append(self._alive[key])

    def _notices(self, node: str) -> Path:
        return self.directory / f"{node}.{NOTICE_FILE}"

    def running(self) -> list[str]:
        """Nodes whose agent has not ended."""
        return self._fleet.running()

    def gone(self) -> set[str]:
        """Nodes that were started and do not run."""
        return self._started - set(self._fleet.running())

    def exit_codes(self) -> dict[str, int | None]:
        """Exit code of each node that was started and not killed; None while it runs."""
        return self._fleet.exit_codes()

    def is_agent(self, pid: int) -> bool:
        """Whether a process is the agent of a node that runs."""
        return pid in {self._fleet.pid(node) for node in self._fleet.running()}

    def look(self) -> None:
        """Note which agents have ended. Call it several times a second."""
        for key, code in self._fleet.exit_codes().items():
            if code is not None:
                self._ended(key, code)

    def _ended(self, key: str, code: int | None) -> None:
        if (life := self._alive.pop(key, None)) is not None:
            life.ended_at_s, life.exit_code = time.time(), code

    def leftovers(self, clean: Collection[str]) -> tuple[str, ...]:
        """What the run has left on this machine; `clean` are the nodes whose agent has ended by itself."""
        return left_by(self.mark, self._places, clean)

    def kill(self, node: str) -> None:
        """The loss of a machine: SIGKILL to all its processes at once."""
        if node in self._fleet.running():
            self._fleet.kill(node)
            self._ended(node, None)

    def send(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to one process of the run, if it is still there; 0 is none."""
        if pid in marked(self.mark):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def signal_agent(self, node: str, number: signal.Signals) -> None:
        """Send a signal to a node's agent alone, if it runs."""
        if node in self._fleet.running():
            os.kill(self._fleet.pid(node), number)

    def signal_node(self, node: str, number: signal.Signals) -> None:
        """Send a signal to all processes of a node that runs, as a machine that freezes and goes on."""
        if node in self._fleet.running():
            os.killpg(self._fleet.pid(node), number)

    def workers(self, node: str) -> list[int]:
        """Process ids of a node's workers; none if it does not run."""
        if node not in self._fleet.running():
            return []
        return workers_of(self._fleet.pid(node), self.mark)

    def fork_server(self, node: str) -> int:
        """Process id of what forks a node's workers; 0 if there is none."""
        if node not in self._fleet.running():
            return 0
        return fork_server_of(self._fleet.pid(node), self.mark)

    def limit_files(self, node: str) -> None:
        """An agent that runs may open no further file."""
        if node in self._fleet.running():
            pid = self._fleet.pid(node)
            highest = max(int(each.name) for each in Path(f"/proc/{pid}/fd").iterdir())
            _, most = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + 1, most))

    def lift_limit(self, node: str) -> None:
        """It may open as many as before the limit."""
        if node in self._fleet.running():
            pid = self._fleet.pid(node)
            _, most = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, most))

    def notify(self, node: str, lead_s: float) -> None:
        """A notice of preemption for a node, as its platform would give it."""
        path = self._notices(node)
        part = path.with_suffix(".part")
        part.write_text(f"kind: preempt\nlead_s: {lead_s}\n")
        part.rename(path)

    def withdraw(self, node: str) -> None:
        """The notice does not count any more."""
        self._notices(node).unlink(missing_ok=True)

    def disk(self, node: str) -> Disk:
        """The staging disk of a node that runs, or ran when this was first asked."""
        if node not in self._disks:
            self._disks[node] = Disk(self._places.staging(node), self._fleet.pid(node))
        return self._disks[node]

    # The network

    def disturb_network(
        self, number: int, do: Callable[[Network], None], count: Callable[[Network], int]
    ) -> None:
        """Let a fault strike the network between the nodes. `number` names it for `heal_network`.

        `count` tells how many packets it has met since it was done last.
        """
        assert self.network is not None
        do(self.network)
        self._network_faults[number] = _NetworkFault(do, count)

    def packets_met(self, number: int) -> int:
        """How many packets that fault has met."""
        assert self.network is not None
        fault = self._network_faults[number]
        return fault.met + fault.count(self.network)

    def heal_network(self, number: int) -> None:
        """End that fault; those that still last are there again within milliseconds."""
        assert self.network is not None
        del self._network_faults[number]
        for each in self._network_faults.values():
            # The network counts anew after it has healed.
            each.met += each.count(self.network)
        self.network.heal()
        for each in self._network_faults.values():
            each.do(self.network)

    # The bucket

    def _make_proxy(self, bucket: Bucket) -> FaultProxy:
        if self.network is None:
            return FaultProxy(bucket.endpoint, seed=self._seed)
        with self.network.on_hub():
            listener = socket.create_server((self.network.address_of_hub(), 0))
        return FaultProxy(bucket.endpoint, listener=listener, seed=self._seed)

    def strike_bucket(
        self, number: int, fault: S3Fault, *, methods: Collection[str], key: str, share: float
    ) -> None:
        """From now on let a fault strike requests of the nodes to the bucket. `number` names it for `mend_bucket`."""
        assert self._proxy is not None
        self._rules[number] = self._proxy.strike(fault, methods=methods, key=key, share=share)

    def requests_struck(self, number: int) -> int:
        """How many requests that fault has struck."""
        return self._rules[number].struck

    def mend_bucket(self, number: int) -> None:
        """End that fault."""
        self._rules[number].mend()

    # What is stored

    def change(self, key: str, change: Callable[[bytearray], None]) -> None:
        """Change an object of the run."""
        _change(self.run.store, key, change)

    def change_data(self, key: str, change: Callable[[bytearray], None]) -> None:
        """Change an object of the prepared data."""
        _change(self.data, key, change)

    def take_data_away(self) -> None:
        """Delete the prepared data, and remember it."""
        self._data_away = {key: self.data.read(key) for key in self.data.keys("")}
        for key in self._data_away:
            self.data.delete(key)

    def put_data_back(self) -> None:
        """The data is there again, as it was."""
        for key, content in self._data_away.items():
            self.data.write(key, content)


def changed_code(directory: Path) -> Path:
    """A copy of this package with one more comment, made on first use. Returns the directory that it is in."""
    if not directory.exists():
        package = Path(elastic_pt.__file__).parent
        shutil.copytree(package, directory / package.name, ignore=shutil.ignore_patterns("*.pyc"))
        with (directory / package.name / "errors.py").open("a") as file:
            file.write("# Another version.\n")
    return directory


def _change(store: Store, key: str, change: Callable[[bytearray], None]) -> None:
    content = bytearray(store.read(key))
    change(content)
    store.write(key, bytes(content))
