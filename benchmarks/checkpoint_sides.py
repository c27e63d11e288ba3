"""What `checkpoint.py` compares: our checkpoint, `dcp.async_save`, and one plain copy, each with the same calls.

    begin ──► training goes on ──► busy() until the bytes are in the bucket ──► clear

The training thread waits for `begin`. Our upload runs in `AgentProcess`, a process of its own like the agent. DCP's runs
in a thread of the training process, as is its default.
"""

import multiprocessing
import os
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, Protocol

import fsspec
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from benchmarks.cuda.alone import random_tokens, synchronize
from elastic_pt.checkpoint.layout import TrainingState, checkpoint_directory
from elastic_pt.checkpoint.snapshot import Buffer, describe_snapshot
from elastic_pt.checkpoint.upload import KeptShard, Uploader
from elastic_pt.store.open import open_store
from elastic_pt.train.snapshots import MemorySnapshots
from elastic_pt.train.state import TrainState
from elastic_pt.train.step import Agreed, Control, Offer, no_snapshots, run_step

_START_S: Final = 60.0
_END_S: Final = 10.0


class Side(Protocol):
    """One way to save the state."""

    def begin(self) -> None:
        """Save the state; the training thread waits for this."""

    def busy(self) -> bool:
        """Whether an upload is going on. Raises its error."""

    def clear(self) -> None:
        """Remove what was uploaded. Nothing is going on."""


def describe(state: TrainState) -> TrainingState:
    """The part of a state that is not a tensor."""
    zeros = "0" * 64
    return TrainingState(state.steps_done, state.steps_done, 0, zeros, zeros, zeros)


def rows_of(state: TrainState) -> dict[str, tuple[torch.Tensor, tuple[int, ...], int]]:
    """The tensors of a state, in the form for `SnapshotBuffers`."""
    return {name: (each.rows, each.global_shape, each.first_row) for name, each in state.slices()}


class Trainer:
    """Trains a state with random tokens, and offers its snapshots as a worker does."""

    def __init__(self, state: TrainState, vocabulary: int) -> None:
        self.state = state
        self.snapshots: MemorySnapshots | None = None
        self.agreed: Agreed | None = None
        """The agreement of the last step."""
        self.waited_s = 0.0
        """How long the last step waited for the end of a copy, before the optimizer changed the state."""
        self._tokens = random_tokens(state.config, vocabulary, state.device)

    def step(self) -> float:
        """Do a step. Returns its seconds."""
        synchronize(self.state.device)
        started_s = time.perf_counter()
        self.agreed = run_step(self.state, self._tokens, Control(False, False), self._offer).agreed
        synchronize(self.state.device)
        return time.perf_counter() - started_s

    def _offer(self) -> Offer:
        """The worker's offer. Before it, wait for the end of a copy that runs beside the step."""
        if self.snapshots is None:
            return no_snapshots()
        started_s = time.perf_counter()
        self.snapshots.settle()
        self.waited_s = time.perf_counter() - started_s
        return self.snapshots.offer()

    def seconds(self, count: int) -> list[float]:
        """The seconds of some steps."""
        return [self.step() for _ in range(count)]


class PlainCopy:
    """One copy of all tensors into memory that was used before."""

    def __init__(self, state: TrainState) -> None:
        self._rows = [each.rows for _, each in state.slices()]
        pinned = state.device.type == "cuda"
        self._copies = [
            torch.zeros(rows.shape, dtype=rows.dtype, pin_memory=pinned) for rows in self._rows
        ]

    def begin(self) -> None:
        """Copy."""
        for copy, rows in zip(self._copies, self._rows, strict=True):
            copy.copy_(rows)

    def undo(self) -> None:
        """Copy back."""
        for copy, rows in zip(self._copies, self._rows, strict=True):
            rows.copy_(copy)

    def busy(self) -> bool:
        """Never: nothing is uploaded."""
        return False

    def clear(self) -> None:
        """Nothing to remove."""


class Ours:
    """A state that a worker keeps in a mapped buffer, and that another process uploads."""

    def __init__(self, trainer: Trainer, snapshots: MemorySnapshots, agent: "AgentProcess") -> None:
        self._trainer = trainer
        self._snapshots = snapshots
        self._agent = agent
        self._step = 0

    def begin(self) -> None:
        """Copy the state into a buffer that is kept, and tell the agent."""
        self._step = self._trainer.state.steps_done
        self._snapshots.keep(self._trainer.state, self._trainer.agreed, -1)

    def busy(self) -> bool:
        """Until the agent process has released the buffer."""
        return not self._agent.released(self._step)

    def clear(self) -> None:
        """Remove the checkpoint."""
        remove(f"{self._agent.url}/{_directory(self._step)}")


class DcpAsync:
    """`torch.distributed.checkpoint.async_save` through fsspec, with staging memory that is kept."""

    def __init__(self, state: TrainState, url: str) -> None:
        self._tensors = {name: each.rows for name, each in state.slices()}
        self._url = url
        self._path = ""
        self._count = 0
        cuda = state.device.type == "cuda"
        # Without asynchronous staging: the weights may change as soon as `begin` returns.
        self._stager = DefaultStager(StagingOptions(cuda, False, False, cuda))
        # On the default group async_save hung: training uses that one at the same time.
        self._group = dist.new_group(backend="gloo")
        self._saving: Any = None

    def begin(self) -> None:
        """Stage, and start the upload."""
        self._count += 1
        self._path = f"{self._url}/dcp-{self._count}"
        self._saving = dcp.async_save(  # type: ignore[attr-defined]
            {"state": self._tensors},
            # `sync_files` would end in a sync of the whole machine.
            storage_writer=FsspecWriter(self._path, sync_files=False),
            process_group=self._group,
            async_stager=self._stager,
        )

    def busy(self) -> bool:
        """Until the future is done."""
        if not self._saving.done():
            return True
        self._saving.result()
        return False

    def clear(self) -> None:
        """Remove the checkpoint."""
        remove(self._path)


class AgentProcess:
    """The agent's part in snapshots and checkpoints, in a process of its own. Used like `workers.channel.WorkerSide`."""

    def __init__(self, scratch: Path, url: str) -> None:
        self.url = url
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, scratch, url), daemon=True)
        self._process.start()
        theirs.close()
        self._sending = threading.Lock()
        self._complete = 0
        self._released: set[int] = set()
        self._receive(timeout_s=_START_S)

    @property
    def complete_step(self) -> int:
        """The newest step of a snapshot that the agent has hashed."""
        self._receive()
        return self._complete

    @property
    def unmirrored_step(self) -> int:
        """Always 0: no mirror lacks room, because there are none."""
        return 0

    def released(self, step: int) -> bool:
        """Whether the checkpoint of a step is uploaded. Raises `RuntimeError` if the agent failed."""
        self._receive()
        return step in self._released

    def send(self, kind: str, **content: object) -> None:
        """Send a message of the worker. Any thread may call it."""
        with self._sending:
            self._pipe.send((kind, content))

    def close(self) -> None:
        """End the process."""
        with suppress(OSError):
            self.send("end")
        self._process.join(_END_S)
        if self._process.is_alive():
            self._process.kill()

    def _receive(self, timeout_s: float = 0.0) -> None:
        """Read the agent's messages. With a timeout wait for the first one."""
        while self._pipe.poll(timeout_s):
            timeout_s = 0.0
            kind, value = self._pipe.recv()
            if kind == "failed":
                raise RuntimeError(f"the agent process: {value}")
            if kind == "complete":
                self._complete = value
            if kind == "released":
                self._released.add(value)


def _serve(pipe: Connection, scratch: Path, url: str) -> None:
    """Agent process: hash each snapshot, and upload those of checkpoints, as an agent's threads do."""
    lock = threading.Lock()

    def tell(kind: str, value: object) -> None:
        with lock:
            pipe.send((kind, value))

    uploader = Uploader(
        open_store(url),
        on_uploaded=lambda shard: tell("released", shard.step),
        on_failed=lambda _, error: tell("failed", repr(error)),
    )
    tell("ready", os.getpid())
    while True:
        try:
            kind, content = pipe.recv()
        except EOFError:
            return
        if kind == "end":
            return
        if kind != "snapshot":
            tell("failed", f"{kind}: {content}")
            return
        buffer = Buffer(content["generation"], content["rank"], content["buffer"])
        if content["checkpoint"]:
            directory = _directory(content["step"])
            path = buffer.path(scratch)
            uploader.submit(KeptShard(path, "benchmark", directory, buffer.rank, range(1)))
        snapshot = describe_snapshot(buffer, scratch)
        tell("complete", snapshot.step if snapshot is not None else 0)


def _directory(step: int) -> str:
    return checkpoint_directory(step, 1, "bench")


def place_other_threads(cores: set[int]) -> None:
    """Let all threads of this process but the current one run on these cores.

    A thread inherits the cores of the thread that started it, so DCP's upload would share the training thread's core.
    """
    own = threading.get_native_id()
    for thread in os.listdir("/proc/self/task"):
        if int(thread) != own:
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread), cores)


def remove(url: str) -> None:
    """Remove a directory of the bucket."""
    filesystem, path = fsspec.core.url_to_fs(url)
    filesystem.rm(path, recursive=True)
