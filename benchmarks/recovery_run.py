"""One long run of real agents, which `recovery_ours.py` disturbs and observes."""

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from benchmarks.recovery_watch import EventLogs, StepWatch
from benchmarks.synthetic import write_random_tokens
from elastic_pt.chaos.processes import kill_all, mark_children, workers_of
from elastic_pt.config import Config, parse_config
from elastic_pt.errors import ElasticPtError
from elastic_pt.fleet.local import Fleet
from elastic_pt.fleet.network import Network
from elastic_pt.report.status import open_run
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import Generation, Member
from elastic_pt.store.open import open_store

CHECKPOINT_STEPS: Final = 10
"""Steps between checkpoints, for our agents and for torchrun."""
POLL_S: Final = 0.02
_VOCABULARY: Final = 320
_TOKENS: Final = 100_000
_MEMORY: Final = "/dev/shm"
_STEPS: Final = 1_000_000
_JOIN_WINDOW_S: Final = 0.2
_WHOLE_S: Final = 120.0


@dataclass(frozen=True)
class Plan:
    """The parameters of the measurement."""

    nodes: int
    repeats: int
    limit_s: float
    """Seconds after which a repetition counts as not recovered."""
    directory: Path
    seed: int
    tell: Callable[[str], None]
    """Prints a line of progress."""
    overrides: tuple[str, ...] = ()
    """Changes of the run's configuration, in the form of `--set`."""


def plan_of(kind: str, plan: Plan) -> Plan:
    """The plan with enough nodes for this kind: two nodes that do not mirror each other are on a ring of four."""
    return replace(plan, nodes=max(4, plan.nodes)) if kind == "two_nodes" else plan


def prepare_data(directory: Path) -> str:
    """Write a few hundred kilobytes of random tokens. Returns their URL."""
    return write_random_tokens(directory, _VOCABULARY, _TOKENS)


def make_config(
    run_url: str, data_url: str, staging: str, nodes_max: int, overrides: Sequence[str] = ()
) -> Config:
    """A small model that trains without end. On three nodes of two cores a step takes at least 0.1 s.

    All settings that affect recovery are the defaults, except a snapshot after every step.
    """
    text = f"""
[run]
url = "{run_url}"
seed = 7
[data]
url = "{data_url}"
sequence_length = 128
[model]
layers = 4
width = 128
heads = 4
kv_heads = 2
[train]
steps = {_STEPS}
global_batch = 8
micro_batch = 1
[elastic]
nodes_max = {nodes_max}
join_window_s = {_JOIN_WINDOW_S}
# Nodes whose workers fail repeatedly are quarantined, and these do fail repeatedly.
flaps_max = {_STEPS}
[checkpoint]
every_steps = {CHECKPOINT_STEPS}
snapshot_every_steps = 1
staging = "{staging}"
"""
    return parse_config(text, source="benchmarks/recovery.py", overrides=overrides)


def network_of(count: int) -> Network:
    """A network with places for `count` nodes at a time, on IPv4."""
    return Network([f"place-{number}" for number in range(count)], versions=(4,))


class OurRun:
    """A run of real agents without an end. A context manager that ends all processes."""

    def __init__(
        self, plan: Plan, directory: Path, data_url: str, nodes_max: int, network: Network | None
    ) -> None:
        directory.mkdir(parents=True)
        self.plan = plan
        self._network = network
        self._stack = ExitStack()
        self._mark = self._stack.enter_context(mark_children())
        self._stack.callback(kill_all, self._mark)
        # A later agent removes the scratch directory of a killed one. Here no later agent runs, so remove them at exit.
        staging = self._stack.enter_context(
            tempfile.TemporaryDirectory(prefix="recovery-", dir=_MEMORY)
        )
        url, logs = f"file://{directory / 'run'}", directory / "nodes"
        config = make_config(url, data_url, staging, nodes_max, plan.overrides)
        self.fleet = self._stack.enter_context(Fleet(config, logs))
        self.logs = EventLogs(logs)
        self._store = open_store(url)
        self._log = RunLog(self._store, writer="benchmark")
        self._started = 0
        self._place_of: dict[str, str] = {}
        """The network's place of each agent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def start_node(self) -> str:
        """Start one more agent with a new name. Returns the name."""
        self._started += 1
        node = f"node-{self._started}"
        if self._network is None:
            self.fleet.start(node)
            return node
        taken = {self._place_of[each] for each in self.fleet.running()}
        place = next(each for each in self._network.nodes if each not in taken)
        self._place_of[node] = place
        self._network.link_up(place)
        self.fleet.start(
            node, address=self._network.address(place), prefix=self._network.prefix(place)
        )
        return node

    def cut(self, node: str) -> None:
        """Take a node's link down. Needs a run with a network."""
        assert self._network is not None
        self._network.link_down(self._place_of[node])

    def generation(self) -> Generation:
        """The newest generation."""
        generation = self._log.refresh().generation
        assert generation is not None
        return generation

    def make_whole(self) -> Generation:
        """Replace lost nodes and wait until all nodes train and have committed a checkpoint. Returns their generation.

        Raises `ElasticPtError` after `_WHOLE_S`.
        """
        while len(self.fleet.running()) < self.plan.nodes:
            self.start_node()
        nodes = set(self.fleet.running())
        deadline_s = time.monotonic() + _WHOLE_S
        while True:
            view = self._log.refresh()
            generation = view.generation
            if generation is not None and {each.node for each in generation.members} == nodes:
                newest = view.checkpoints[0] if view.checkpoints else None
                if newest is not None and newest.generation == generation.number:
                    return generation
            if ended := sorted(nodes - set(self.fleet.running())):
                raise ElasticPtError(
                    f"{ended[0]} has ended; expected it to train\n{self.fleet.tail(ended[0])}"
                )
            if time.monotonic() > deadline_s:
                words = "\n".join(f"{node}: {self.fleet.tail(node)}" for node in sorted(nodes))
                raise ElasticPtError(f"expected all nodes to train within {_WHOLE_S} s\n{words}")
            time.sleep(POLL_S)

    def watch(self, member: Member, interval_s: float) -> StepWatch:
        """An observer of one member's steps."""
        within = nullcontext if self._network is None else self._network.on_hub
        return StepWatch(member, open_run(self._store.url).access(), within, interval_s)

    def worker(self, member: Member) -> int:
        """Process id of a member's only worker."""
        (pid,) = workers_of(member.pid, self._mark)
        return pid

    def pause(self, watch: StepWatch, steps: int) -> None:
        """Wait until the run has done `steps` more steps. Raises `ElasticPtError` after `_WHOLE_S`."""
        deadline_s = time.monotonic() + _WHOLE_S
        while watch.step == 0:
            if time.monotonic() > deadline_s:
                raise ElasticPtError(f"expected a step within {_WHOLE_S} s")
            time.sleep(POLL_S)
        if watch.until_beyond(watch.step + steps, _WHOLE_S) is None:
            raise ElasticPtError(f"expected {steps} steps within {_WHOLE_S} s")
