"""How a worker's rows get into a buffer: at once, or on a CUDA stream while the next step computes (worker process).

    start ─► the next step computes forward and backward ─► wait ─► the optimizer changes the rows

`CudaCopier` has not run on a GPU yet.
"""

import mmap
from collections.abc import Sequence
from typing import Protocol

import torch

from elastic_pt.errors import CheckpointError


class Copier(Protocol):
    """Copies rows to host memory. The rows must not change between `start` and the end of `wait`."""

    @property
    def in_background(self) -> bool:
        """Whether `start` returns before the copy is done."""

    def register(self, buffer: mmap.mmap) -> None:
        """Prepare a buffer as a target. Raises `CheckpointError` if that is impossible."""

    def unregister(self, buffer: mmap.mmap) -> None:
        """Undo `register`, also one that has failed or was not called."""

    def start(self, targets: Sequence[torch.Tensor], rows: Sequence[torch.Tensor]) -> None:
        """Begin to copy the rows as they are after all work that this thread has queued on the device."""

    def wait(self) -> None:
        """Return when the last copy is done. Any thread may call it."""


class HostCopier:
    """Rows in host memory: one copy, done when `start` returns."""

    in_background = False

    def register(self, buffer: mmap.mmap) -> None:
        """Nothing to prepare."""

    def unregister(self, buffer: mmap.mmap) -> None:
        """Nothing to undo."""

    def start(self, targets: Sequence[torch.Tensor], rows: Sequence[torch.Tensor]) -> None:
        """Copy them."""
        with torch.no_grad():
            for target, each in zip(targets, rows, strict=True):
                target.copy_(each)

    def wait(self) -> None:
        """Nothing to wait for."""


class CudaCopier(HostCopier):
    """Rows in a GPU's memory: a copy on a stream of its own, into page-locked memory."""

    in_background = True

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._registered: set[int] = set()
        """Addresses of the buffers with locked pages."""

    def register(self, buffer: mmap.mmap) -> None:
        """Lock its pages, so that the device can write into them while the host computes."""
        # A thread begins with device 0, and would occupy memory there.
        torch.cuda.set_device(self._stream.device)
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        status = runtime.cudaHostRegister(_address(buffer), len(buffer), 0)
        if int(status):
            raise CheckpointError(
                f"cudaHostRegister of {len(buffer)} bytes: status {status}; expected 0"
            )
        self._registered.add(_address(buffer))

    def unregister(self, buffer: mmap.mmap) -> None:
        """Unlock its pages, if they are locked: memory that is unmapped must not be."""
        if _address(buffer) in self._registered:
            self._registered.discard(_address(buffer))
            torch.cuda.cudart().cudaHostUnregister(_address(buffer))  # type: ignore[no-untyped-call]

    def start(self, targets: Sequence[torch.Tensor], rows: Sequence[torch.Tensor]) -> None:
        """Copy them after the work that is queued on the current stream: the optimizer's step."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.no_grad(), torch.cuda.stream(self._stream):
            for target, each in zip(targets, rows, strict=True):
                target.copy_(each, non_blocking=True)
        self._done.record(self._stream)

    def wait(self) -> None:
        """Wait for the event after the copy, without the interpreter's lock."""
        torch.cuda.set_device(self._stream.device)
        self._done.synchronize()


def _address(buffer: mmap.mmap) -> int:
    return torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()


def copier_for(device: torch.device) -> Copier:
    """The copier of rows on this device."""
    return CudaCopier(device) if device.type == "cuda" else HostCopier()
