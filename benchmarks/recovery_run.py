"""One long-lived run of real agents that `recovery_ours.py` disturbs, and what can be seen of it."""

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from benchmarks.recovery_network import Network
from benchmarks.recovery_watch import EventLogs, StepWatch
from chaos_tests.processes import kill_all, mark_children, workers_of
from elastic_pt.config import Config, parse_config
from elastic_pt.data.prepare import prepare
from elastic_pt.data.sources import standard_library_source
from elastic_pt.errors import ElasticPtError
from elastic_pt.fleet.local import Fleet
from elastic_pt.membership.links import TOKEN_KEY
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import Generation, Member
from elastic_pt.store.open import open_store

CHECKPOINT_STEPS: Final = 5
"""Steps between checkpoints, for us and for the peers."""
POLL_S: Final = 0.02
_VOCABULARY: Final = 320
_CORPUS_CHARACTERS: Final = 300_000
_MEMORY: Final = "/dev/shm"
_STEPS: Final = 1_000_000
_JOIN_WINDOW_S: Final = 0.2
_WHOLE_S: Final = 120.0


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    nodes: int
    repeats: int
    limit_s: float
    """Seconds after which a repetition counts as not recovered."""
    directory: Path
    seed: int
    tell: Callable[[str], None]
    """Says a line to whoever watches."""


def prepare_data(directory: Path) -> str:
    """A few hundred kilobytes of the standard library, tokenized; returns their URL."""
    url = f"file://{directory}"
    source = standard_library_source(_CORPUS_CHARACTERS)
    prepare([source], open_store(url), vocab_size=_VOCABULARY, held_out=0.05)
    return url


def make_config(run_url: str, data_url: str, staging: str, nodes_max: int) -> Config:
    """A tiny model that trains for as long as anybody lets it. What decides about recovery is the default."""
    text = f"""
[run]
url = "{run_url}"
seed = 7
[data]
url = "{data_url}"
sequence_length = 64
[model]
layers = 2
width = 64
heads = 2
kv_heads = 1
[train]
steps = {_STEPS}
global_batch = 8
micro_batch = 1
[elastic]
nodes_max = {nodes_max}
join_window_s = {_JOIN_WINDOW_S}
# Nodes whose workers fail again and again are kept out, and this is what happens here.
flaps_max = {_STEPS}
[checkpoint]
every_steps = {CHECKPOINT_STEPS}
staging = "{staging}"
"""
    return parse_config(text, source="benchmarks/recovery.py")


class OurRun:
    """A run of real agents that never ends by itself; a context manager that leaves no process behind."""

    def __init__(
        self, plan: Plan, directory: Path, data_url: str, nodes_max: int, network: Network | None
    ) -> None:
        directory.mkdir(parents=True)
        self.plan = plan
        self._network = network
        self._stack = ExitStack()
        self._mark = self._stack.enter_context(mark_children())
        self._stack.callback(kill_all, self._mark)
        # Agents that are killed leave their scratch directories to the next one; here there is none.
        staging = self._stack.enter_context(
            tempfile.TemporaryDirectory(prefix="recovery-", dir=_MEMORY)
        )
        url, logs = f"file://{directory / 'run'}", directory / "nodes"
        config = make_config(url, data_url, staging, nodes_max)
        self.fleet = self._stack.enter_context(Fleet(config, logs))
        self.logs = EventLogs(logs)
        self._store = open_store(url)
        self._log = RunLog(self._store, writer="benchmark")
        self._started = 0
        self._slot_of: dict[str, int] = {}

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
        """Start one more agent, under a name that no other had."""
        self._started += 1
        node = f"node-{self._started}"
        if self._network is None:
            self.fleet.start(node)
            return node
        taken = {self._slot_of[each] for each in self.fleet.running()}
        slot = self._slot_of[node] = min(set(self._network.slots) - taken)
        self._network.mend(slot)
        self.fleet.start(
            node, address=self._network.address(slot), prefix=self._network.inside(slot)
        )
        return node

    def cut(self, node: str) -> None:
        """Take a node's link down. Only in a run with a network."""
        assert self._network is not None
        self._network.cut(self._slot_of[node])

    def generation(self) -> Generation:
        """The newest generation."""
        generation = self._log.refresh().generation
        assert generation is not None
        return generation

    def make_whole(self) -> Generation:
        """Replace what is gone and wait until all train and have committed; returns their generation.

        Raises `ElasticPtError` when that has not come to pass within `_WHOLE_S`.
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
                raise ElasticPtError(f"{ended[0]} has ended\n{self.fleet.tail(ended[0])}")
            if time.monotonic() > deadline_s:
                words = "\n".join(f"{node}: {self.fleet.tail(node)}" for node in sorted(nodes))
                raise ElasticPtError(f"not whole again within {_WHOLE_S} s\n{words}")
            time.sleep(POLL_S)

    def watch(self, member: Member, interval_s: float) -> StepWatch:
        """Eyes on one member's steps."""
        enter = (lambda: None) if self._network is None else self._network.enter_hub
        return StepWatch(member, self._store.read(TOKEN_KEY).decode(), enter, interval_s)

    def worker(self, member: Member) -> int:
        """Process id of a member's (only) worker."""
        (pid,) = workers_of(member.pid, self._mark)
        return pid

    def pause(self, watch: StepWatch, steps: int) -> None:
        """Let the world do some steps. Raises `ElasticPtError` if it does not."""
        deadline_s = time.monotonic() + _WHOLE_S
        while watch.step == 0:
            if time.monotonic() > deadline_s:
                raise ElasticPtError(f"no step to be seen within {_WHOLE_S} s")
            time.sleep(POLL_S)
        if watch.until_beyond(watch.step + steps, _WHOLE_S) is None:
            raise ElasticPtError(f"no {steps} steps within {_WHOLE_S} s")
