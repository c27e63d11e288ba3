"""How a worker loads and saves the state of training (worker process).

    load   fill this worker's rows from the state that its generation resumes from: in the memory of its members,
           in the bucket, or made from the seed
    save   copy this worker's rows into a buffer that is kept (`snapshots`); the agent uploads and commits them.
           Without room: try again for a while, then give this checkpoint up

There is no `close`: the buffers outlive this process. `agent.checkpointing` is the agent's side of the same operations.
The package `checkpoint` defines the files.

Between the two processes, over `workers.channel`:

    worker ─► agent   snapshot   with `checkpoint`: a buffer holds the state, and is kept
                      no_room    there is no room for it; this worker tries again
                      skipped    there was no room: no node waits for this checkpoint any more
                      unusable   the checkpoint to resume from does not verify: the agent quarantines it
    agent ─► worker   released   the agent is done with the checkpoint of a step: its buffer is free
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from torch import Tensor

from elastic_pt.checkpoint.index import read_index
from elastic_pt.checkpoint.layout import RowRange, TrainingState
from elastic_pt.checkpoint.memory import FailedCopy, MemoryState, Places
from elastic_pt.checkpoint.restore import load_rows
from elastic_pt.checkpoint.shard_file import NoRoom
from elastic_pt.config import Config
from elastic_pt.data.manifest import Manifest
from elastic_pt.errors import CheckpointError, ConfigError
from elastic_pt.model.initialize import shard_rows
from elastic_pt.runlog.records import Checkpoint
from elastic_pt.store.open import open_store
from elastic_pt.train.snapshots import MemorySnapshots
from elastic_pt.train.state import TrainState
from elastic_pt.train.step import Agreed
from elastic_pt.workers.assignment import Assignment
from elastic_pt.workers.heartbeat import WorkerPhase

_PAUSE_MIN_S: Final = 0.1
_PAUSE_MAX_S: Final = 5.0


class Agent(Protocol):
    """The part of the agent's channel that a worker needs here (`workers.channel.WorkerSide`)."""

    @property
    def drain_requested(self) -> bool:
        """Whether the agent wants all workers to stop at a step boundary."""

    @property
    def checkpoint_request(self) -> int:
        """The newest request for a checkpoint; -1 if there was none."""

    def released(self, step: int) -> bool:
        """Whether the agent is done with the checkpoint of `step`."""

    def send(self, kind: str, **content: object) -> None:
        """Send a message to the agent."""


@dataclass(frozen=True)
class Provenance:
    """The origin of a checkpoint: its run, configuration, data and tokenizer."""

    data_fingerprint: str
    tokenizer_sha256: str
    config_fingerprint: str


def unwatched(phase: WorkerPhase, step: int) -> None:
    """Used where there is no watchdog."""


class Checkpoints:
    """The operations of the module. One per worker; not thread-safe."""

    def __init__(
        self,
        config: Config,
        data: Manifest,
        assignment: Assignment,
        agent: Agent,
        enter: Callable[[WorkerPhase, int], None] = unwatched,
    ) -> None:
        """`enter(phase, steps done)` informs the watchdog."""
        self._config = config
        self._assignment = assignment
        self._agent = agent
        self._enter = enter
        self._provenance = Provenance(data.fingerprint, data.tokenizer_sha256, config.fingerprint())
        self._saved_step: int | None = None

    def load(self, state: TrainState) -> None:
        """Fill this worker's rows; does not communicate with other workers.

        Raises `CheckpointError` for a checkpoint that does not verify: the agent gets a message and quarantines it,
        and the next generation resumes from the previous one. Raises `ConfigError` for one of another run.
        """
        memory, resume = self._assignment.memory, self._assignment.resume
        if memory is not None:
            self._load_from_memory(state, memory)
        elif resume is not None:
            self._load_from_bucket(state, resume)
        else:
            state.initialize()

    def _load_from_memory(self, state: TrainState, places: Places) -> None:
        wanted, into = _rows_of(state)
        wanted = {name: rows for name, rows in wanted.items() if rows[0] < rows[1]}
        failed: list[FailedCopy] = []
        try:
            ranks = _holders(state, wanted, len(places.shards))
            with MemoryState(places, ranks, failed.append) as memory:
                self._require_same_run(memory.index.state, f"snapshot of step {places.step}")
                load_rows(memory, memory.index, wanted, into, memory.other_copy)
        except CheckpointError as error:
            self._agent.send(
                "unusable",
                generation=places.generation,
                step=places.step,
                why=str(error),
                whole=not failed,
            )
            raise
        finally:
            for each in failed:
                self._agent.send(
                    "copy_failed",
                    generation=places.generation,
                    step=places.step,
                    **dataclasses.asdict(each),
                )
        _go_on_from(state, memory.index.state)

    def _load_from_bucket(self, state: TrainState, resume: Checkpoint) -> None:
        store = open_store(self._config.run.url, timeout_s=self._config.store.deadline_s)
        wanted, into = _rows_of(state)
        try:
            index = read_index(store, resume, self._assignment.run_id, wanted)
            self._require_same_run(index.state, resume.directory)
            load_rows(store, index, wanted, into)
        except CheckpointError as error:
            self._agent.send("unusable", directory=resume.directory, why=str(error))
            raise
        _go_on_from(state, index.state)

    def _require_same_run(self, found: TrainingState, what: str) -> None:
        """Raise `ConfigError` for a state that was made with another configuration, data or tokenizer."""
        provenance = Provenance(
            found.data_fingerprint, found.tokenizer_sha256, found.config_fingerprint
        )
        if provenance != self._provenance:
            raise ConfigError(
                f"{what}: made with another configuration, data or tokenizer: "
                f"{provenance}, expected {self._provenance}"
            )

    def describe(self, state: TrainState) -> TrainingState:
        """The part of a state in a checkpoint or snapshot that is not a tensor."""
        return TrainingState(
            step=state.steps_done,
            optimizer_step=state.optimizer.step_count,
            skipped_in_a_row=state.skipped_in_a_row,
            data_fingerprint=self._provenance.data_fingerprint,
            tokenizer_sha256=self._provenance.tokenizer_sha256,
            config_fingerprint=self._provenance.config_fingerprint,
        )

    def save(
        self,
        state: TrainState,
        snapshots: MemorySnapshots,
        agreed: Agreed | None,
        *,
        request: int = -1,
        timeout_s: float = 0.0,
    ) -> None:
        """Copy this worker's rows of the whole state into a kept buffer. The agent uploads them from there.

        `agreed` is what all workers agreed on in the last step, None if this generation has done no step. `request` is
        the newest request for a checkpoint that this one meets. Tries for `timeout_s` while there is no room, or no
        buffer is free; then tells the agent that this checkpoint is skipped.
        """
        self._saved_step = state.steps_done
        give_up_at_s = time.monotonic() + timeout_s
        pause_s = _PAUSE_MIN_S
        while True:
            self._enter(WorkerPhase.STAGE, state.steps_done)
            try:
                snapshots.keep(state, agreed, request)
                return
            except NoRoom as error:
                why = str(error)
            if time.monotonic() + pause_s > give_up_at_s:
                self._tell("skipped", state, why=why)
                return
            self._tell("no_room", state, why=why)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _PAUSE_MAX_S)

    @property
    def committed_step(self) -> int:
        """The step of the newest checkpoint when this generation began; 0 if there was none."""
        return 0 if self._assignment.resume is None else self._assignment.resume.step

    @property
    def pending(self) -> bool:
        """Whether the agent still works on the checkpoint that was saved last."""
        return self._saved_step is not None and not self._agent.released(self._saved_step)

    def _tell(self, kind: str, state: TrainState, **content: object) -> None:
        self._agent.send(
            kind,
            step=state.steps_done,
            rank=state.rank,
            generation=self._assignment.generation,
            **content,
        )


def _rows_of(state: TrainState) -> tuple[dict[str, RowRange], dict[str, Tensor]]:
    """The rows of each tensor that this worker holds, and their live memory."""
    slices = dict(state.slices())
    wanted = {
        name: (each.first_row, each.first_row + each.rows.shape[0]) for name, each in slices.items()
    }
    return wanted, {name: each.rows for name, each in slices.items()}


def _holders(state: TrainState, wanted: Mapping[str, RowRange], world_size: int) -> list[int]:
    """The ranks that hold these rows, of `world_size` workers."""
    ranks: set[int] = set()
    shapes = {name: each.global_shape for name, each in state.slices()}
    for name, (first, end) in wanted.items():
        share = shard_rows(shapes[name][0], 0, world_size).stop
        ranks.update(range(first // share, -(-end // share)))
    return sorted(ranks)


def _go_on_from(state: TrainState, found: TrainingState) -> None:
    state.steps_done = found.step
    state.optimizer.step_count = found.optimizer_step
    state.skipped_in_a_row = found.skipped_in_a_row
