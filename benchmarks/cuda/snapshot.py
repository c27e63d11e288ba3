"""Part `snapshot`: how long a checkpoint stops training, its parts, and the time of upload and restore.

stall     what training waits for a snapshot: the call that begins the copy into a mapped, page-locked buffer, and how
          much longer the next step takes, in which the copy ends before the optimizer changes the state
copy      the same copy, with nothing beside it
parts     device to host (pinned as in a run; pageable for comparison), host to staging, device to device
upload    hash and copy to a store on the local disk; the agent does it while training continues
restore   `load_rows` from that store into the device, with a cold and a warm page cache
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch

from benchmarks.cuda.alone import (
    process_group,
    random_tokens,
    step,
    synchronize,
    training_state,
)
from benchmarks.cuda.report import Report
from benchmarks.cuda.sizes import SIZES
from elastic_pt.checkpoint.copier import copier_for
from elastic_pt.checkpoint.index import read_index
from elastic_pt.checkpoint.layout import TrainingState, checkpoint_directory
from elastic_pt.checkpoint.publish import publish_manifest
from elastic_pt.checkpoint.restore import load_rows
from elastic_pt.checkpoint.snapshot import Buffer, SnapshotBuffers
from elastic_pt.checkpoint.upload import KeptShard, publish_node, upload_shard
from elastic_pt.store.open import open_store
from elastic_pt.train.state import TrainState
from elastic_pt.train.step import Control, Offer, run_step

_REPEATS: Final = 3
_RUN_ID: Final = "benchmark"
_MEMORY: Final = "/dev/shm"


def run(options: argparse.Namespace, report: Report) -> None:
    """Do all measurements on one state."""
    size, device = SIZES[options.size], torch.device(options.device)
    with (
        process_group(device) as mesh,
        training_state(size.snapshot, size.vocabulary, mesh, device) as state,
        tempfile.TemporaryDirectory(prefix="snapshot-", dir=options.work) as disk,
    ):
        tokens = random_tokens(state.config, size.vocabulary, device)
        step(state, tokens)
        step_s = statistics.median(_seconds(lambda: step(state, tokens), device))
        tensors = [each.rows for _, each in state.slices()]
        state_bytes = sum(rows.nbytes for rows in tensors)
        report.row("state", f"{state_bytes / 1e9:.3f} GB, {step_s * 1e3:.1f} ms/step")
        with _staging_directory(state_bytes, Path(disk)) as staging:
            with report.attempt("copies"):
                _copies(tensors, staging, device, report)
            path = _stall(state, tokens, staging, step_s, report)
            with report.attempt("upload and restore"):
                _upload_and_restore(path, state, state_bytes, Path(disk), report)


def _stall(
    state: TrainState, tokens: torch.Tensor, staging: Path, step_s: float, report: Report
) -> Path:
    """Copy the state as a run does: begin, do the next step meanwhile, finish before its update. Then copy alone."""
    rows = {name: (each.rows, each.global_shape, each.first_row) for name, each in state.slices()}
    state_bytes = sum(each.rows.nbytes for _, each in state.slices())
    buffers = SnapshotBuffers(staging, 1, state.rank, rows, copier_for(state.device))
    buffers.allocate(1)
    calls, steps, waits = [], [], []
    for _ in range(_REPEATS):
        synchronize(state.device)
        began_s = time.perf_counter()
        buffer = buffers.start(_described(state))
        called_s = time.perf_counter()

        def finish(buffer: Buffer = buffer, step: int = max(1, state.steps_done)) -> Offer:
            started_s = time.perf_counter()
            buffers.finish(buffer, step)
            waits.append(time.perf_counter() - started_s)
            return Offer()

        run_step(state, tokens, Control(False, False), finish)
        synchronize(state.device)
        calls.append(called_s - began_s)
        steps.append(time.perf_counter() - called_s)
    call_s, slower_ratio = statistics.median(calls), statistics.median(steps) / step_s
    report.row(
        "stall",
        f"{call_s:.4f} s for the call, the next step takes {slower_ratio:.3f} x and waits "
        f"{statistics.median(waits):.4f} s; staging in {staging.parent}",
        stall_s=call_s,
        slower_steps_ratio=slower_ratio,
        calls_s=calls,
        steps_s=steps,
        waits_s=waits,
        state_bytes=state_bytes,
        step_s=step_s,
    )
    seconds = _seconds(lambda: buffers.write(_described(state)), state.device)
    copy_s = statistics.median(seconds)
    report.row(
        "copy",
        f"{copy_s:.3f} s ({state_bytes / copy_s / 1e9:.2f} GB/s), {copy_s / step_s:.2f} steps",
        copy_s=copy_s,
        samples_s=seconds,
    )
    return buffers.write(_described(state)).path(staging)


def _described(state: TrainState) -> TrainingState:
    return TrainingState(max(1, state.steps_done), 0, 0, "0" * 64, "0" * 64, "0" * 64)


def _copies(
    tensors: list[torch.Tensor], staging: Path, device: torch.device, report: Report
) -> None:
    """Measure the copy rates, which limit any method of taking a snapshot."""
    state_bytes = sum(rows.nbytes for rows in tensors)

    def row(case: str, seconds: list[float]) -> None:
        best_s = statistics.median(seconds)
        rate = state_bytes / best_s
        report.row(case, f"{best_s:.3f} s, {rate / 1e9:.2f} GB/s", seconds=best_s, rate=rate)

    row("device to host, pageable", _seconds(lambda: [rows.cpu() for rows in tensors], device))
    row("device to device", _seconds(lambda: [rows.clone() for rows in tensors], device))
    host = [
        torch.empty(rows.shape, dtype=rows.dtype, pin_memory=device.type == "cuda")
        for rows in tensors
    ]

    def copy_to_host() -> None:
        for there, rows in zip(host, tensors, strict=True):
            there.copy_(rows, non_blocking=True)

    row("device to host, pinned", _seconds(copy_to_host, device))

    def write() -> None:
        with (staging / "written").open("wb", buffering=0) as file:
            for each in host:
                view = each.view(-1).view(torch.uint8).numpy().data
                while view:
                    view = view[file.write(view) :]

    row("host to staging, new file", _seconds(write, device))
    (staging / "written").unlink()


def _upload_and_restore(
    path: Path, state: TrainState, state_bytes: int, disk: Path, report: Report
) -> None:
    """Upload and restore with the functions of agent and worker."""
    store = open_store(f"file://{disk}/store")
    directory = checkpoint_directory(state.steps_done, 1, "abcd")
    started_s = time.perf_counter()
    uploaded = upload_shard(store, KeptShard(path, _RUN_ID, directory, 0, range(1)))
    reference = publish_manifest(store, [publish_node(store, [uploaded])])
    seconds = time.perf_counter() - started_s
    rate = state_bytes / seconds
    report.row("upload to local disk", f"{seconds:.2f} s, {rate / 1e9:.2f} GB/s", rate=rate)

    slices = dict(state.slices())
    into = {name: each.rows for name, each in slices.items()}
    wanted = {name: (0, each.rows.shape[0]) for name, each in slices.items()}
    before = {name: rows.cpu() for name, rows in into.items()}

    def load() -> None:
        load_rows(store, read_index(store, reference, _RUN_ID, wanted), wanted, into)

    for cache in ("cold", "warm"):
        for rows in into.values():
            rows.zero_()
        if cache == "cold":
            _forget(disk)
        (seconds,) = _seconds(load, state.device, repeats=1)
        rate = state_bytes / seconds
        same = all(torch.equal(rows.cpu(), before[name]) for name, rows in into.items())
        report.row(
            f"restore, {cache} page cache",
            f"{seconds:.2f} s, {rate / 1e9:.2f} GB/s, {'equal bits' if same else 'DIFFERENT BITS'}",
            failed=not same,
            rate=rate,
        )


def _forget(directory: Path) -> None:
    """Ask the kernel to drop the files of a directory from its page cache."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _seconds(
    work: Callable[[], object], device: torch.device, repeats: int = _REPEATS
) -> list[float]:
    """Seconds of each repetition, with the device's work."""
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        started_s = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - started_s)
    return seconds


@contextmanager
def _staging_directory(state_bytes: int, disk: Path) -> Iterator[Path]:
    """A staging directory: in memory as in a run, if there is room for two copies; else on disk."""
    roomy = shutil.disk_usage(_MEMORY).free > 2 * state_bytes
    with tempfile.TemporaryDirectory(prefix="staging-", dir=_MEMORY if roomy else disk) as staging:
        yield Path(staging)
