"""Decides when a worker copies its state into memory. All workers agree on it (worker process).

    offer ──► the step's all-reduce ──► Agreed ──► due ──► take ──► the agent: CRCs, mirrors ──► offer of a later step

A worker has two buffers. It overwrites the older one only when the newer one is complete on all nodes and their
mirrors, so one complete step always exists. Each worker gets the newest complete step of its node from its agent, and
sends it with the all-reduce of each step. So all workers have the same values and take the same snapshots.

How often: every `checkpoint.snapshot_every_steps` steps. 0 means adaptive (`adaptive_cadence`), by the first worker's
measurements. If the copies on mirrors are not complete when the next snapshot is due, that snapshot waits. When all
workers stop because the members change, they take one of their last step (`take_last`).
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final, Protocol

import torch
import torch.distributed as dist

from elastic_pt.checkpoint.layout import TrainingState
from elastic_pt.checkpoint.snapshot import SnapshotBuffers
from elastic_pt.errors import CheckpointError
from elastic_pt.train.state import TrainState
from elastic_pt.train.step import Agreed, Offer

COST_MAX: Final = 0.01
"""Maximum share of the step time for copies, averaged over the steps between two snapshots."""
SHORT_STEP_S: Final = 0.1
SHORT_INTERVAL_S: Final = 0.4
"""Minimum time between two snapshots if steps are shorter than `SHORT_STEP_S`: each snapshot costs the agents time."""
LAST_WAIT_S: Final = 2.0
"""Maximum time that workers which stop wait for the mirrors of their newest snapshot."""
_EVERY_MAX: Final = 10_000
_SMOOTHING: Final = 0.2
_COPIES_KEPT: Final = 3
_ALLOCATE_AGAIN_S: Final = 10.0
_POLL_S: Final = 0.005


class Agent(Protocol):
    """The part of the agent's channel that snapshots need (`workers.channel.WorkerSide`)."""

    @property
    def complete_step(self) -> int:
        """The newest step of this generation that is complete on this node and its mirrors; 0 if there is none."""

    def send(self, kind: str, **content: object) -> None:
        """Send a message to the agent."""


def adaptive_cadence(step_s: float, copy_s: float) -> int:
    """Steps between two snapshots, from the seconds that a step and a copy take.

    Every step, if a copy takes at most `COST_MAX` of a step. For short steps at least `SHORT_INTERVAL_S` apart.
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
        """`every_steps` is the configured cadence, 0 for adaptive. Starts a thread that allocates memory."""
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
        """Why there is no memory for buffers; empty after the agent was told."""
        self._newest = 0
        """The step of the newest snapshot of this generation."""
        self._began_at = state.steps_done
        self._every = every_steps or 1
        self._step_s = 0.0
        self._copies_s: deque[float] = deque(maxlen=_COPIES_KEPT)
        """What the last copies took. The shortest counts: one that was stopped or swapped says nothing."""
        threading.Thread(target=self._allocate, name="snapshot-memory", daemon=True).start()

    def offer(self) -> Offer:
        """This worker's values for the agreement in the next step."""
        if self._refused:
            self._agent.send("no_snapshots", why=self._refused)
            self._refused = ""
        complete = self._agent.complete_step if self._buffers.ready else None
        return Offer(complete, self._every)

    def measure(self, step_s: float) -> None:
        """Note the seconds of the last step, without its snapshot. Chooses the cadence that this worker offers."""
        if not self._step_s:
            self._step_s = step_s
        self._step_s += _SMOOTHING * (step_s - self._step_s)
        if self._configured:
            return
        every = adaptive_cadence(self._step_s, min(self._copies_s, default=0.0))
        # Ignore small differences, so that the cadence changes rarely.
        if not 0.8 <= every / self._every <= 1.25:
            self._every = every

    def due(self, step: int, agreed: Agreed) -> bool:
        """Whether all workers take a snapshot of the state after `step` steps. The result is the same on all workers."""
        if agreed.complete_step is None or agreed.complete_step < self._newest:
            return False
        return step - max(self._newest, self._began_at) >= agreed.snapshot_every

    def take(self, state: TrainState, agreed: Agreed) -> None:
        """Copy the state into the older buffer."""
        started_s = time.monotonic()
        buffer = self._buffers.write(self._describe(state))
        self._copies_s.append(time.monotonic() - started_s)
        self._newest = state.steps_done
        self._agent.send(
            "snapshot",
            generation=self._generation,
            rank=state.rank,
            step=state.steps_done,
            buffer=buffer.number,
            seconds=self._copies_s[-1],
            every_steps=agreed.snapshot_every,
            step_seconds=self._step_s,
            complete_step=agreed.complete_step,
        )

    def take_last(self, state: TrainState, agreed: Agreed) -> None:
        """Copy the state with which all workers stop, so that the next generation can resume from memory. Communicates.

        If the newest snapshot is not complete everywhere, all workers wait for that together, at most `LAST_WAIT_S`.
        After that there is no copy, and the agents wait for the checkpoint.
        """
        if agreed.complete_step is None or self._newest == state.steps_done:
            return
        if agreed.complete_step < self._newest:
            if not self._await_complete(state.device):
                return
            agreed = replace(agreed, complete_step=self._newest)
        self.take(state, agreed)

    def _await_complete(self, device: torch.device) -> bool:
        """Whether the newest snapshot is complete on all nodes and their mirrors. The result is the same on all workers."""
        give_up_at_s = time.monotonic() + LAST_WAIT_S
        while self._agent.complete_step < self._newest and time.monotonic() < give_up_at_s:
            time.sleep(_POLL_S)
        complete = torch.tensor([self._agent.complete_step], dtype=torch.int64, device=device)
        dist.all_reduce(complete, dist.ReduceOp.MIN)
        return int(complete.item()) >= self._newest

    def _allocate(self) -> None:
        """Allocate the buffers, and try again while there is no room. Thread of its own; ends with the process.

        Training continues without snapshots: the bucket has the checkpoints. The main thread tells the agent why.
        """
        told = ""
        while True:
            try:
                self._buffers.allocate()
                return
            except (CheckpointError, OSError) as error:
                if str(error) != told:
                    self._refused = told = str(error)
            time.sleep(_ALLOCATE_AGAIN_S)
