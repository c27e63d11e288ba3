"""From a staged shard file to a manifest that can be committed.

    worker: write_shard ──► staging directory (memory)
    agent:  Uploader    ──► describe ─► shard-<rank>.safetensors ─► part-<rank>.json ─► local file removed
    committing agent:       collect (all parts) ─► publish_manifest ─► reference ─► COMMIT, by the caller

Every arrow may be the last thing a process does. Until the COMMIT record is in the log nothing counts, and
nothing that was written is ever changed: part and manifest are created once, in a directory whose nonce no
other world uses. So there is nothing to clean up before trying again, and `retention` removes the rest later.
"""

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from elastic_pt.checkpoint.layout import (
    CheckpointReference,
    Manifest,
    Part,
    failed_key,
    parse_directory,
    part_key,
    shard_key,
)
from elastic_pt.checkpoint.record import DOCUMENT_BYTES_MAX
from elastic_pt.checkpoint.restore import read_manifest
from elastic_pt.checkpoint.shard_file import describe_shard
from elastic_pt.errors import CheckpointError, NotFound, StoreError
from elastic_pt.store.port import Store

_THREADS: Final = 32
"""Requests of the committing agent that are under way at once."""


@dataclass(frozen=True)
class StagedShard:
    """A file that `write_shard` finished, and where it belongs."""

    path: Path
    run_id: str
    directory: str
    rank: int
    missing: str = ""
    """Why there is no such file; empty if there is one."""

    @property
    def step(self) -> int:
        """The step whose state the file holds."""
        return parse_directory(self.directory).step


def upload_shard(store: Store, shard: StagedShard) -> Part:
    """Hash one staged file, upload it, then create its part record. Does not touch the local file.

    Raises `CheckpointError` if the file is not what it should be, `StoreError` if the store fails.
    """
    key = shard_key(shard.directory, shard.rank)
    file, state = describe_shard(shard.path, key)
    part = Part(shard.run_id, shard.directory, shard.rank, file, state)
    store.write(key, shard.path)
    _check_uploaded(store, part)
    store.create(part_key(shard.directory, shard.rank), part.to_bytes())
    return part


class Uploader:
    """Uploads staged shards one after another in a thread of its own (agent process).

    `on_uploaded(step)` or `on_failed(step, error)` is called once per shard, in that thread, after the
    local file is gone: a shard that could not be uploaded before the store's deadline makes room for
    the next checkpoint. Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        store: Store,
        *,
        on_uploaded: Callable[[int], None],
        on_failed: Callable[[int, Exception], None],
        queue_limit: int = 64,
    ) -> None:
        self._store = store
        self._on_uploaded = on_uploaded
        self._on_failed = on_failed
        self._queue_limit = queue_limit
        self._changed = threading.Condition()
        self._waiting: deque[StagedShard] = deque()
        self._busy = False
        self._current: Path | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="checkpoint-upload", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Uploader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, shard: StagedShard) -> None:
        """Queue a shard. Raises `CheckpointError` when the queue is full or the uploader is closed."""
        with self._changed:
            if self._closed or not self._thread.is_alive():
                raise CheckpointError(f"{shard.path}: the uploader has ended")
            if len(self._waiting) >= self._queue_limit:
                raise CheckpointError(
                    f"{shard.path}: {self._queue_limit} shards are waiting already"
                )
            self._waiting.append(shard)
            self._changed.notify_all()

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is pending; False if that took longer than `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout_s)

    def pending(self) -> set[Path]:
        """The local files that are still to be uploaded, the one under way included."""
        with self._changed:
            current = set() if self._current is None else {self._current}
            return {shard.path for shard in self._waiting} | current

    def discard(self) -> int:
        """Drop what is queued (not what is under way) and its local files; the number of shards dropped."""
        with self._changed:
            dropped = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for shard in dropped:
            if not shard.missing:
                shard.path.unlink(missing_ok=True)
        return len(dropped)

    def close(self, timeout_s: float = 0.0) -> bool:
        """Wait up to `timeout_s` for what is pending, drop the rest, and stop the thread.

        False if an upload is still under way; its thread is a daemon and ends with the process.
        """
        drained = self.drain(timeout_s)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.discard()
        if drained:
            self._thread.join()
        return drained

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                shard = self._waiting.popleft()
                self._busy = True
                self._current = shard.path
            try:
                self._upload(shard)
            finally:
                with self._changed:
                    self._busy = False
                    self._current = None
                    self._changed.notify_all()

    def _upload(self, shard: StagedShard) -> None:
        failure: Exception | None = None
        try:
            if shard.missing:
                note = failed_key(shard.directory, shard.rank)
                self._store.write(note, shard.missing.encode())
            else:
                upload_shard(self._store, shard)
        # Whatever it is, the agent must hear of it: a thread that dies unheard would stop all checkpoints.
        except Exception as error:
            failure = error
            with suppress(StoreError):
                self._store.write(failed_key(shard.directory, shard.rank), str(error).encode())
        if not shard.missing:
            with suppress(OSError):
                shard.path.unlink()
        if failure is None:
            self._on_uploaded(shard.step)
        else:
            self._on_failed(shard.step, failure)


def collect(
    store: Store,
    directory: str,
    ranks: Iterable[int],
    *,
    deadline_s: float,
    now: Callable[[], float],
    wait: Callable[[float], object],
    should_stop: Callable[[], bool],
    poll_interval_s: float = 0.2,
) -> list[Part] | None:
    """Wait for the part of every rank and return them in the order of `ranks` (committing agent).

    Asks for keys by name, `_THREADS` at a time in the order of the ranks, since all are needed; never lists. `now()` is a monotonic
    clock in seconds and `wait(seconds)` waits. None as soon as `should_stop()`. Raises `CheckpointError`
    when a rank's upload has failed, when `deadline_s` seconds have passed, or when a part is not what it should be.
    """
    give_up_at_s = now() + deadline_s
    order = list(ranks)
    found: dict[int, Part] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        while missing := [rank for rank in order if rank not in found][:_THREADS]:
            if should_stop():
                return None
            looks = list(pool.map(lambda rank: _look(store, directory, rank), missing))
            found |= {part.rank: part for part in looks if part is not None}
            if None not in looks:
                continue
            if now() >= give_up_at_s:
                key = part_key(directory, missing[looks.index(None)])
                raise CheckpointError(f"{key}: not there after {deadline_s} s")
            wait(poll_interval_s)
    return [found[rank] for rank in order]


def publish_manifest(store: Store, parts: Sequence[Part]) -> CheckpointReference:
    """Make one manifest of all parts, create it once, read it back (committing agent).

    Raises `CheckpointError` unless all parts are of one run and directory and hold the same
    `TrainingState`, every shard file is there with the right size, and the slices tile every tensor;
    `AlreadyExists` if another manifest is there. The checkpoint counts once the caller has put the returned reference
    into a COMMIT record. Publishing the same parts twice gives the same reference.
    """
    if not parts:
        raise CheckpointError("a checkpoint without parts cannot be published")
    first = parts[0]
    for part in parts:
        if (part.run_id, part.directory) != (first.run_id, first.directory):
            raise CheckpointError(f"{part.file.key} and {first.file.key} are not of one checkpoint")
        if part.state != first.state:
            raise CheckpointError(
                f"{part.file.key} and {first.file.key} differ in their training state"
            )
    files = tuple(sorted((part.file for part in parts), key=lambda file: file.key))
    name = parse_directory(first.directory)
    manifest = Manifest(first.run_id, first.directory, files, first.state)
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(lambda part: _check_uploaded(store, part), parts):
            pass
    data = manifest.to_bytes()
    if len(data) > DOCUMENT_BYTES_MAX:
        raise CheckpointError(
            f"{first.directory}: a manifest of {len(data)} bytes; {DOCUMENT_BYTES_MAX} are the limit"
        )
    sha256 = hashlib.sha256(data).hexdigest()
    reference = CheckpointReference(name.step, name.generation, first.directory, len(data), sha256)
    store.create(reference.manifest_key, data)
    if read_manifest(store, reference, first.run_id) != manifest:
        raise CheckpointError(f"{reference.manifest_key}: reads back as another manifest")
    return reference


def _look(store: Store, directory: str, rank: int) -> Part | None:
    """The part of a rank; None if it may still come."""
    part = _read_part(store, directory, rank)
    if part is None and store.size(failed_key(directory, rank)) is not None:
        raise CheckpointError(f"{shard_key(directory, rank)}: its node could not upload it")
    return part


def _read_part(store: Store, directory: str, rank: int) -> Part | None:
    key = part_key(directory, rank)
    try:
        part = Part.from_bytes(store.read(key, 0, DOCUMENT_BYTES_MAX))
    except NotFound:
        return None
    except CheckpointError as error:
        raise CheckpointError(f"{key}: {error}") from error
    if (part.directory, part.rank) != (directory, rank):
        raise CheckpointError(f"{key}: is the part of rank {part.rank} of {part.directory}")
    return part


def _check_uploaded(store: Store, part: Part) -> None:
    size = store.size(part.file.key)
    if size != part.file.size:
        raise CheckpointError(
            f"{part.file.key}: {size} bytes in the store instead of {part.file.size}"
        )
