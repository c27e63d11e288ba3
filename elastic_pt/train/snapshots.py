"""Decides when a worker copies its state into memory. All workers agree on it (worker process).

    offer ──► the step's all-reduce ──► Agreed ──► due ──► take ──► the agent: CRCs, mirrors ──► offer of a later step
                                           └──► a checkpoint is due ──► keep ──► the agent: the same, and the upload

A worker has three buffers. One holds the newest state that is complete on all nodes and their mirrors, and is never
overwritten, so one complete step always exists. One may be kept: the state of a checkpoint, until the agent releases
it. One is free. Each worker gets the newest complete step of its node from its agent, and sends it with the all-reduce
of each step. So all workers have the same values and take the same snapshots.

On a GPU the copy runs on a stream of its own while the next step computes. `offer` waits for its end, because the
optimizer's step comes next, and nothing else changes the state.

A worker without room for three buffers has one, for checkpoints alone. Then no worker takes other snapshots.

How often: every `checkpoint.snapshot_every_steps` steps. 0 means adaptive (`adaptive_cadence`), by the first worker's
measurements. If the copies on mirrors are not complete when the next snapshot is due, that snapshot waits: on a slow
link the steps in which a snapshot became complete are the cadence.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from elastic_pt.checkpoint.copier import Copier, HostCopier
from elastic_pt.checkpoint.layout import TrainingState
from elastic_pt.checkpoint.snapshot import BUFFERS, Buffer, SnapshotBuffers
from elastic_pt.errors import CheckpointError
from elastic_pt.train.state import TrainState
from elastic_pt.train.step import Agreed, Offer

COST_MAX: Final = 0.01
"""Maximum share of the step time for copies, averaged over the steps between two snapshots."""
SHORT_STEP_S: Final = 0.1
SHORT_INTERVAL_S: Final = 0.4
"""Minimum time between two snapshots if steps are shorter than `SHORT_STEP_S`: each snapshot costs the agents time."""
_EVERY_MAX: Final = 10_000
_SMOOTHING: Final = 0.2
_COPIES_KEPT: Final = 3
_ALLOCATE_AGAIN_S: Final = 10.0


class Agent(Protocol):
    """The part of the agent's channel that snapshots need (`workers.channel.WorkerSide`)."""

    @property
    def complete_step(self) -> int:
        """The newest step of this generation that is complete on this node and its mirrors; 0 if there is none."""

    def released(self, step: int) -> bool:
        """Whether the agent is done with the checkpoint of `step`."""

    @property
    def unmirrored_step(self) -> int:
        """The newest complete step that a mirror of the node had no room for; 0 if there is none."""

    def send(self, kind: str, **content: object) -> None:
        """Send a message to the agent."""


class Cadence(NamedTuple):
    """How often a worker takes snapshots."""

    every_steps: int
    reason: str
    """What sets it: `copy cost`, `short steps`, `mirrors`, `configured`, or `no limit` (every step)."""


def adaptive_cadence(step_s: float, copy_s: float, complete_steps: int = 1) -> Cadence:
    """The cadence, from the seconds that a step and a copy take, and the steps until a snapshot is complete.

    Every step, if a copy takes at most `COST_MAX` of a step, and mirrors have it after one. For short steps at least
    `SHORT_INTERVAL_S` apart.
    """
    if step_s <= 0.0:
        return Cadence(1, "no limit")
    interval_s = SHORT_INTERVAL_S if step_s < SHORT_STEP_S else 0.0
    found = max(
        Cadence(1, "no limit"),
        Cadence(math.ceil(copy_s / COST_MAX / step_s), "copy cost"),
        Cadence(math.ceil(interval_s / step_s), "short steps"),
        Cadence(complete_steps, "mirrors"),
        key=lambda each: each.every_steps,
    )
    return found._replace(every_steps=min(_EVERY_MAX, found.every_steps))


class MemorySnapshots:
    """One worker's states in memory, in one generation. Worker process; one thread calls the public methods."""

    def __init__(
        self,
        every_steps: int,
        generation: int,
        scratch: Path,
        agent: Agent,
        state: TrainState,
        describe: Callable[[TrainState], TrainingState],
        copier: Copier | None = None,
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
            HostCopier() if copier is None else copier,
        )
        self._background = copier is not None and copier.in_background
        self._copies = ThreadPoolExecutor(1, "snapshot-copy")
        self._copying: Future[None] | None = None
        """Finishes the last copy."""
        self._allocating = threading.Lock()
        self._checkpoints: set[int] = set()
        """Steps that were kept for a checkpoint. The agent has released some of them."""
        self._refused = ""
        """Why there is no memory for buffers; empty after the agent was told."""
        self._newest = 0
        """The step of the newest snapshot of this generation."""
        self._began_at = state.steps_done
        self._taken_s: float | None = None
        """When the newest snapshot was taken; None once it is complete."""
        self._complete_s = 0.0
        """What the last snapshot took until it was complete everywhere."""
        self._complete_steps: deque[int] = deque(maxlen=_COPIES_KEPT)
        """The same in steps, for the last snapshots. The shortest counts, as for `_copies_s`."""
        self._cadence = (
            Cadence(every_steps, "configured") if every_steps else Cadence(1, "no limit")
        )
        self._offered = self._cadence
        """The cadence in the last offer. If this is the first worker, all workers follow it."""
        self._step_s = 0.0
        self._copies_s: deque[float] = deque(maxlen=_COPIES_KEPT)
        """What the last copies took. The shortest counts: one that was stopped or swapped says nothing."""
        threading.Thread(target=self._allocate_all, name="snapshot-memory", daemon=True).start()

    def offer(self) -> Offer:
        """This worker's values for the agreement in the next step. After it the optimizer may change the state."""
        self.settle()
        if self._refused:
            self._agent.send("no_snapshots", why=self._refused)
            self._refused = ""
        self._offered = self._cadence
        if not self._buffers.ready:
            return Offer(None, self._offered.every_steps)
        complete = self._agent.complete_step
        return Offer(
            complete,
            self._offered.every_steps,
            mirrors_have_room=self._agent.unmirrored_step < max(1, complete),
        )

    def settle(self) -> None:
        """Wait until the last copy is done, and the agent is told of it."""
        if self._copying is not None:
            self._copying.result()
            self._copying = None

    def measure(self, step_s: float) -> None:
        """Note the seconds of the last step, without its snapshot. Chooses the cadence that this worker offers."""
        if not self._step_s:
            self._step_s = step_s
        self._step_s += _SMOOTHING * (step_s - self._step_s)
        if self._configured:
            return
        copy_s = min(self._copies_s, default=0.0)
        cadence = adaptive_cadence(self._step_s, copy_s, min(self._complete_steps, default=1))
        # Ignore small differences, so that the cadence changes rarely.
        if not 0.8 <= cadence.every_steps / self._cadence.every_steps <= 1.25:
            self._cadence = cadence

    def complete_everywhere(self, agreed: Agreed) -> bool:
        """Whether the newest snapshot is complete everywhere, or none are taken. The result is the same on all workers.

        Before that only a stop writes another state: it overwrites one that a mirror may be copying.
        """
        return agreed.complete_step is None or agreed.complete_step >= self._newest

    def due(self, step: int, agreed: Agreed) -> bool:
        """Whether all workers take a snapshot of the state after `step` steps. The result is the same on all workers."""
        if agreed.complete_step is None or not self.complete_everywhere(agreed):
            return False
        if self._taken_s is not None:
            self._complete_s = time.monotonic() - self._taken_s
            self._complete_steps.append(step - self._newest)
            self._taken_s = None
        return step - max(self._newest, self._began_at) >= agreed.snapshot_every

    def keep(self, state: TrainState, agreed: Agreed | None, request: int) -> None:
        """Copy the state into a free buffer, which is kept for a checkpoint until the agent releases this step.

        `agreed` is None if no step was done in this generation. Waits for buffers that are being allocated. Raises
        `NoRoom` if there is none, or none is free.
        """
        if not self._buffers.steps:
            self._allocate(1)
        self.take(state, agreed, checkpoint=True, request=request)
        self._checkpoints.add(state.steps_done)

    def take(self, state: TrainState, agreed: Agreed | None, **checkpoint: int) -> None:
        """Copy the state into a free buffer. If a snapshot is `due` there is one: all workers have agreed on that."""
        self.settle()
        complete_step = None if agreed is None else agreed.complete_step
        kept = {step for step in self._checkpoints if not self._agent.released(step)}
        started_s = time.monotonic()
        buffer = self._buffers.start(
            self._describe(state), kept=kept, complete_step=complete_step or 0
        )
        if not self._background:
            self._buffers.finish(buffer, state.steps_done)
        self._copies_s.append(time.monotonic() - started_s)
        if complete_step is not None:
            # Else some worker has no buffers: its node may never hold this step, and no snapshot may wait for that.
            self._newest, self._taken_s = state.steps_done, time.monotonic()
        message: dict[str, object] = {
            "generation": self._generation,
            "rank": state.rank,
            "step": state.steps_done,
            "buffer": buffer.number,
            "seconds": self._copies_s[-1],
            "every_steps": self._offered.every_steps if agreed is None else agreed.snapshot_every,
            "every_reason": "first worker" if state.rank else self._offered.reason,
            "step_seconds": self._step_s,
            "complete_seconds": self._complete_s,
            "complete_step": complete_step or 0,
            "mirrors_have_room": agreed is not None and agreed.mirrors_have_room,
            "checkpoint": False,
            **checkpoint,
        }
        if not self._background:
            self._agent.send("snapshot", **message)
            return
        self._copying = self._copies.submit(self._finish, buffer, state.steps_done, message)

    def _finish(self, buffer: Buffer, step: int, message: dict[str, object]) -> None:
        """Finish a copy that goes on while the next step computes. Thread of its own; `settle` raises its errors."""
        self._buffers.finish(buffer, step)
        self._agent.send("snapshot", **message)

    def _allocate(self, count: int) -> None:
        """Allocate buffers until there are `count`. Raises the errors of `SnapshotBuffers.allocate`."""
        # Held only while memory is reserved and touched, which takes as long as one write of it.
        with self._allocating:
            if len(self._buffers.steps) < count:
                self._buffers.allocate(count)

    def _allocate_all(self) -> None:
        """Allocate the buffers, and try again while there is no room. Thread of its own; ends with the process.

        Training continues without snapshots: the bucket has the checkpoints. The main thread tells the agent why.
        """
        told = ""
        while not self._buffers.ready:
            try:
                self._allocate(BUFFERS)
            except (CheckpointError, OSError) as error:
                if str(error) != told:
                    self._refused = told = str(error)
                with suppress(CheckpointError, OSError):
                    self._allocate(1)
                time.sleep(_ALLOCATE_AGAIN_S)
