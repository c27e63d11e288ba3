"""What `checkpoint.py` compares: our checkpoint, `dcp.async_save`, and one plain copy, each with the same calls.

    begin ──► training goes on ──► busy() until the bytes are in the bucket ──► clear

The training thread waits for `begin`. Our upload runs in `AgentProcess`, a process of its own like the agent. DCP's runs
in a thread of the training process, as is its default.
"""

import multiprocessing
import os
import threading
from collections.abc import Mapping
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

from elastic_pt.checkpoint.layout import TrainingState, checkpoint_directory, shard_key
from elastic_pt.checkpoint.snapshot import Buffer, SnapshotBuffers, describe_snapshot
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store
from elastic_pt.train.state import TrainState

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
    """A snapshot into a mapped buffer, which another process uploads."""

    def __init__(self, state: TrainState, agent: "AgentProcess", scratch: Path, url: str) -> None:
        self._state = state
        self._agent = agent
        self._url = url
        self._buffers = SnapshotBuffers(scratch, 1, 0, rows_of(state))
        self._buffers.allocate()
        self._directory = ""

    def begin(self) -> None:
        """Copy the state, and ask for the upload."""
        buffer = self._buffers.write(describe(self._state))
        self._directory = checkpoint_directory(self._state.steps_done, 1, "bench")
        self._agent.upload(buffer, self._directory)

    def busy(self) -> bool:
        """Until the agent process has uploaded the shard."""
        return self._agent.uploading()

    def clear(self) -> None:
        """Remove the shard."""
        remove(f"{self._url}/{self._directory}")


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
        self._saving = dcp.async_save(
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
    """The agent's part in snapshots and checkpoints, in a process of its own."""

    def __init__(self, scratch: Path, url: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, scratch, url), daemon=True)
        self._process.start()
        theirs.close()
        self._uploads = 0
        self._complete = 0
        self.receive(timeout_s=60.0)

    @property
    def complete_step(self) -> int:
        """The newest step of a snapshot that the agent has hashed."""
        self.receive()
        return self._complete

    def send(self, kind: str, **content: object) -> None:
        """Send a message of the worker, such as `snapshot`."""
        self._pipe.send((kind, content))

    def upload(self, buffer: Buffer, directory: str) -> None:
        """Ask for the upload of a buffer."""
        self._uploads += 1
        self.send("upload", buffer=buffer, directory=directory)

    def uploading(self) -> bool:
        """Whether an upload is not done. Raises `RuntimeError` if one failed."""
        self.receive()
        return self._uploads > 0

    def receive(self, timeout_s: float = 0.0) -> None:
        """Read the agent's messages. With a timeout wait for the first one."""
        while self._pipe.poll(timeout_s):
            timeout_s = 0.0
            kind, value = self._pipe.recv()
            if kind == "failed":
                raise RuntimeError(f"the agent process: {value}")
            if kind == "complete":
                self._complete = value
            if kind == "uploaded":
                self._uploads -= 1

    def close(self) -> None:
        """End the process."""
        with suppress(OSError):
            self._pipe.send(("end", {}))
        self._process.join(_END_S)
        if self._process.is_alive():
            self._process.kill()


def _serve(pipe: Connection, scratch: Path, url: str) -> None:
    """Agent process: hash snapshots and upload checkpoints, in the order of the messages."""
    store = open_store(url)
    pipe.send(("ready", os.getpid()))
    while True:
        try:
            kind, content = pipe.recv()
        except EOFError:
            return
        if kind == "end":
            return
        try:
            if kind == "snapshot":
                buffer = Buffer(content["generation"], content["rank"], content["buffer"])
                snapshot = describe_snapshot(buffer, scratch)
                pipe.send(("complete", snapshot.step if snapshot is not None else 0))
            if kind == "upload":
                upload_buffer(store, content["buffer"], scratch, content["directory"])
                pipe.send(("uploaded", content["directory"]))
        # Any error: the benchmark shows it and ends.
        except Exception as error:
            pipe.send(("failed", repr(error)))


def upload_buffer(store: Store, buffer: Buffer, scratch: Path, directory: str) -> None:
    """Hash a buffer and upload it as a shard, as an agent does."""
    snapshot = describe_snapshot(buffer, scratch)
    assert snapshot is not None
    store.write(shard_key(directory, buffer.rank), buffer.path(scratch))


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


Sides = Mapping[str, Side]
