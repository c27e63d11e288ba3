"""One run of real agents for `goodput.py`: nodes with shares of the processor, a warm pool, and the run's progress.

GoodputRun.start ─► goodput_node.py ─► agent     GoodputRun.tell lets a node of the pool join
log ─► members ─► GET /v1/status ─► Progress     the newest step that the run has ever done, and when
"""

import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from benchmarks.goodput_node import WARM
from benchmarks.processor_shares import ProcessorShares
from benchmarks.recovery_run import make_config
from benchmarks.recovery_watch import EventLogs, StepPoint, agent_of, step_of
from elastic_pt.chaos.processes import kill_all, mark_children
from elastic_pt.checkpoint.digest import digest
from elastic_pt.checkpoint.index import read_manifest
from elastic_pt.checkpoint.peer import Peer
from elastic_pt.errors import ElasticPtError
from elastic_pt.fleet.local import Fleet
from elastic_pt.report.goodput import Goodput, goodput_of, read_accounts
from elastic_pt.report.status import open_run
from elastic_pt.runlog.control import ask
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import Record, Request, Verb
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store
from elastic_pt.workers.forking import SERVER_MODULES, WARM_MODULES

END_S: Final = 120.0
_POLL_S: Final = 0.02
_MEMORY: Final = "/dev/shm"
SEQUENCE_LENGTH: Final = 512
_SETTINGS: Final = (
    # The model of `torchrun_peer.py`, on rows long enough that computing takes longer than sending.
    "model.layers=2",
    "model.width=64",
    "model.heads=2",
    "model.kv_heads=1",
    f"data.sequence_length={SEQUENCE_LENGTH}",
    # The default: by their cost.
    "checkpoint.snapshot_every_steps=0",
    # No decay at the end: the weights after N steps do not depend on `train.steps`, so the reference can end there.
    "train.decay_share=0.0",
)
_NODE: Final = Path(__file__).with_name("goodput_node.py")
_MODULES: Final = (*WARM_MODULES, *SERVER_MODULES)


def warm_prefix(place: str, go: Path | None, modules: Sequence[str]) -> list[str]:
    """Words to put before a `python -m` command, so that it becomes a node of the warm pool (`goodput_node.py`)."""
    python = [sys.executable, "-P", str(_NODE)]
    return [*python, place, "" if go is None else str(go), ",".join(modules)]


class Progress:
    """The newest step of a run, from whichever member answers. A context manager with a thread of its own."""

    def __init__(self, store: Store) -> None:
        self.newest = StepPoint(0.0, 0)
        """The newest step that was ever done, and when it was first seen; step 0 before the first one."""
        self._store = store
        self._log = RunLog(store, writer="progress")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        turn = 0
        agent: Peer | None = None
        while not self._stop.wait(_POLL_S):
            if agent is None:
                generation = self._log.refresh().generation
                if generation is None:
                    continue
                # Another one each time: the one that was asked last did not answer.
                asked = generation.members[turn % len(generation.members)]
                turn += 1
                agent = agent_of(asked, open_run(self._store.url).access())
            step = step_of(agent)
            if step is None:
                agent.close()
                agent = None
            elif step > self.newest.step:
                self.newest = StepPoint(time.time(), step)
        if agent is not None:
            agent.close()


class GoodputRun:
    """Agents of one run. A context manager that ends all processes. Main thread."""

    def __init__(
        self,
        directory: Path,
        data_url: str,
        cores: float | None,
        nodes_max: int,
        overrides: Sequence[str] = (),
    ) -> None:
        """Each node may use `cores` cores; None sets no quotas."""
        directory.mkdir(parents=True)
        self._directory = directory
        self._stack = ExitStack()
        # First, so that it removes its groups when all processes are gone.
        self._shares = self._stack.enter_context(ProcessorShares(cores))
        mark = self._stack.enter_context(mark_children())
        self._stack.callback(kill_all, mark)
        staging = self._stack.enter_context(
            tempfile.TemporaryDirectory(prefix="goodput-", dir=_MEMORY)
        )
        url, logs = f"file://{directory / 'run'}", directory / "nodes"
        config = make_config(url, data_url, staging, nodes_max, [*_SETTINGS, *overrides])
        self._fleet = self._stack.enter_context(Fleet(config, logs))
        self._events = EventLogs(logs)
        self._store = open_store(url)
        self._log = RunLog(self._store, writer="benchmark")
        self._nodes = 0
        self.progress = self._stack.enter_context(Progress(self._store))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def start(self, *, hold: bool = False) -> str:
        """Start one more node with a new name, which it returns. With `hold` it joins only when it is told to."""
        self._nodes += 1
        # Names in order of their start: the spare that has waited longest comes first.
        node = f"node-{self._nodes:03d}"
        go = self._go(node) if hold else None
        self._fleet.start(node, prefix=warm_prefix(self._shares.place(node), go, _MODULES))
        return node

    def tell(self, node: str) -> None:
        """Let a node that was started with `hold` join."""
        self._go(node).touch()

    def kill(self, node: str) -> None:
        """SIGKILL to all processes of a node."""
        self._fleet.kill(node)

    def running(self) -> list[str]:
        """Nodes whose process runs."""
        return self._fleet.running()

    def ended(self) -> list[str]:
        """Nodes that were not killed and have ended."""
        return [node for node, code in self._fleet.exit_codes().items() if code is not None]

    def tails(self) -> str:
        """The last lines of each node that was not killed."""
        return "\n".join(f"{node}: {self._fleet.tail(node)}" for node in self._fleet.exit_codes())

    def members(self) -> list[str]:
        """The members of the newest generation that run, by name."""
        generation = self._log.refresh().generation
        members = set() if generation is None else {each.node for each in generation.members}
        return sorted(members & set(self.running()))

    def moment(self, node: str, event: str) -> float | None:
        """When a node logged its first event of this name, as Unix time; None if it has not yet."""
        found = (e for e in self._events.refresh() if (e.node, e.name) == (node, event))
        return next((each.time_s for each in found), None)

    def import_seconds(self) -> list[float]:
        """The seconds that each node's imports took, of those that have imported."""
        return [each.content["import_s"] for each in self._events.refresh() if each.name == WARM]

    def until(self, what: str, condition: Callable[[], bool], limit_s: float = END_S) -> None:
        """Wait for a condition. Raises `ElasticPtError` after `limit_s`."""
        deadline_s = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > deadline_s:
                raise ElasticPtError(f"expected within {limit_s:g} s: {what}\n{self.tails()}")
            time.sleep(_POLL_S)

    def records(self) -> list[Record]:
        """All records of the log."""
        return list(self._log.records())

    def spent(self) -> Goodput:
        """What the node-seconds were spent on up to now."""
        return goodput_of(read_accounts(self._store), self.records(), time.time())

    def stop(self) -> None:
        """Have the run commit its newest step and end, like `elastic-pt stop`."""
        request = Request(Verb.STOP, by="benchmark", why="measured")
        number = self._log.refresh().generation_number
        self._log.append(lambda view: ask(view, request), generation=number)
        self.until_ended(END_S)

    def until_ended(self, limit_s: float) -> None:
        """Wait for the end of the run. Raises `ElasticPtError` after `limit_s`."""
        self.until("the end of the run", lambda: self._log.refresh().stop is not None, limit_s)

    def final(self) -> tuple[int, str]:
        """Step and digest of the newest commit."""
        view = self._log.refresh()
        newest = view.checkpoints[0]
        return newest.step, digest(self._store, read_manifest(self._store, newest, view.run_id))

    def _go(self, node: str) -> Path:
        return self._directory / f"{node}.go"
