"""When a worker copies its state into memory, and how all workers agree on it (worker process).

    offer ──► the step's all-reduce ──► Agreed ──► due ──► take ──► the agent: CRCs, mirrors ──► offer of a later step

A worker has two buffers. It writes over the older one only when the newer one is complete on all nodes and their
mirrors, so one step always exists as a whole. What is complete on its own node each worker hears from its agent and
offers in the all-reduce that every step has anyway. All workers then know the same, and take the same snapshots.

How often: every `checkpoint.snapshot_every_steps` steps. 0 means adaptive (`adaptive_cadence`), by the first worker's
measurements. If a copy takes longer to reach a mirror than the next snapshot takes to be due, that one waits.
"""

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from elastic_pt.checkpoint.layout import TrainingState
from elastic_pt.checkpoint.shard_file import StagingFull
from elastic_pt.checkpoint.snapshot import SnapshotBuffers
from elastic_pt.train.state import TrainState
from elastic_pt.train.step import Agreed, Offer

COST_MAX: Final = 0.01
"""The share of a step that copying may take, averaged over the steps between two snapshots."""
SHORT_STEP_S: Final = 0.1
SHORT_INTERVAL_S: Final = 0.4
"""Between two snapshots of steps shorter than `SHORT_STEP_S`: CRCs and mirrors cost the agents time for each of them."""
_EVERY_MAX: Final = 10_000
_SMOOTHING: Final = 0.2


class Agent(Protocol):
    """What snapshots need of the node's agent (`workers.channel.WorkerSide`)."""

    @property
    def complete_step(self) -> int:
        """The newest step of this generation that this node holds whole, and its mirrors too; 0 if there is none."""

    def send(self, kind: str, **content: object) -> None:
        """Tell the agent something."""


def adaptive_cadence(step_s: float, copy_s: float) -> int:
    """Steps between two snapshots, from the seconds that a step and a copy take.

    Every step, if its copy takes no more than `COST_MAX` of it; for short steps at least `SHORT_INTERVAL_S` apart.
    """
    if step_s <= 0.0:
        return 1
    interval_s = SHORT_INTERVAL_S if step_s < SHORT_STEP_S else 0.0
    return min(_EVERY_MAX, max(1, math.ceil(max(copy_s / COST_MAX, interval_s) / step_s)))


class MemorySnapshots:
    """One worker's snapshots in one generation. Worker process; `offer`, `due` and `take` from one thread."""

    def __init__(
        self,
        every_steps: int,
        generation: int,
        scratch: Path,
        agent: Agent,
        state: TrainState,
        describe: Callable[[TrainState], TrainingState],
    ) -> None:
        """`every_steps` is the configured cadence, 0 for the adaptive one. Begins to allocate memory in a thread."""
        self._configured = every_steps
        self._generation = generation
        self._agent = agent
        self._describe = describe
        self._buffers = SnapshotBuffers(
            scratch,
            generation,
            state.rank,
            {name: (each.rows, each.global_shape, each.first_row) for name, each in state.slices()},
        )
        self._refused = ""
        """Why there is no memory for buffers, until the agent has been told."""
        self._newest = 0
        """The step of the newest snapshot of this generation."""
        self._began_at = state.steps_done
        self._every = every_steps or 1
        self._step_s = self._copy_s = 0.0
        threading.Thread(target=self._allocate, name="snapshot-memory", daemon=True).start()

    def offer(self) -> Offer:
        """What this worker brings into the agreement of the next step."""
        if self._refused:
            self._agent.send("no_snapshots", why=self._refused)
            self._refused = ""
        complete = self._agent.complete_step if self._buffers.ready else None
        return Offer(complete, self._every)

    def measure(self, step_s: float) -> None:
        """The last step took so long, without its snapshot. Chooses the cadence that this worker offers."""
        if not self._step_s:
            self._step_s = step_s
        self._step_s += _SMOOTHING * (step_s - self._step_s)
        if self._configured:
            return
        every = adaptive_cadence(self._step_s, self._copy_s)
        # A cadence that changed with every little difference would say nothing.
        if not 0.8 <= every / self._every <= 1.25:
            self._every = every

    def due(self, step: int, agreed: Agreed) -> bool:
        """Whether all workers take a snapshot of the state after `step` steps; the same on each of them."""
        if agreed.complete_step is None or agreed.complete_step < self._newest:
            return False
        return step - max(self._newest, self._began_at) >= agreed.snapshot_every

    def take(self, state: TrainState, agreed: Agreed) -> None:
        """Copy the state into the older buffer."""
        started_s = time.monotonic()
        buffer = self._buffers.write(self._describe(state))
        self._copy_s = time.monotonic() - started_s
        self._newest = state.steps_done
        self._agent.send(
            "snapshot",
            generation=self._generation,
            rank=state.rank,
            step=state.steps_done,
            buffer=buffer.number,
            seconds=self._copy_s,
            every_steps=agreed.snapshot_every,
            step_seconds=self._step_s,
            complete_step=agreed.complete_step,
        )

    def _allocate(self) -> None:
        try:
            self._buffers.allocate()
        except StagingFull as error:
            # Training goes on without snapshots: the bucket has the checkpoints. The main thread tells the agent.
            self._refused = str(error)
