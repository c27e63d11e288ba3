"""Uploads kept states from their buffers, and writes the node's record and notice.

    worker: SnapshotBuffers.write ──► buffer (memory), kept
    agent:  Uploader    ──► describe_shard ─► shard-<rank>.safetensors ─► the worker may overwrite the buffer
                            after the last worker of the node: node-<rank>.json ─► notice-<rank>.json

A node record holds about 80 KB of slices per worker, so only its node and readers handle it. A notice has a few KB.
`publish` makes the manifest from all notices.

The process may die after any of these steps. The files do not count before the COMMIT record is in the log. They are
never changed: records and manifest are created once, in a directory with a nonce that no other generation uses. So a
new attempt needs no clean-up. `retention` removes incomplete uploads later.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from elastic_pt.checkpoint.job_thread import JobThread
from elastic_pt.checkpoint.layout import (
    ShardFile,
    Tensor,
    TrainingState,
    parse_directory,
    shard_key,
)
from elastic_pt.checkpoint.nodes import (
    REASON_LENGTH_MAX,
    NodeNotice,
    NodeRecord,
    NodeRefusal,
    NodeShare,
    fingerprint_of,
    node_key,
    notice_key,
)
from elastic_pt.checkpoint.record import DOCUMENT_BYTES_MAX
from elastic_pt.checkpoint.shard_file import describe_shard
from elastic_pt.checkpoint.snapshot import open_buffer, shard_part
from elastic_pt.errors import AccessDenied, CheckpointError, StoreError
from elastic_pt.failpoints import Failpoint, failpoint
from elastic_pt.store.port import Store

_READ_BYTES: Final = 16 * 2**20


@dataclass(frozen=True)
class KeptShard:
    """A buffer with the state of a step, kept for this upload, and its place in the checkpoint."""

    path: Path
    run_id: str
    directory: str
    rank: int
    ranks: range
    """The ranks of all workers of its node."""
    missing: str = ""
    """Why there is no buffer; empty if there is one."""
    adopted: bool = False
    """Whether it is a copy of another node's. That node may be alive and slow, so a failure refuses nothing."""

    @property
    def step(self) -> int:
        """The step of the state in the file."""
        return parse_directory(self.directory).step


@dataclass(frozen=True)
class UploadedShard:
    """A shard in the store, and the content of its header."""

    kept: KeptShard
    file: ShardFile
    state: TrainingState
    tensors: tuple[Tensor, ...]
    """All tensors of the state, sorted by name."""


def upload_shard(store: Store, shard: KeptShard) -> UploadedShard:
    """Hash the shard file in a kept buffer, upload it, and check its size in the store.

    Raises `CheckpointError` if the buffer does not hold the state of this step from begin to end, and `StoreError` if
    the store fails.
    """
    key = shard_key(shard.directory, shard.rank)
    with open_buffer(shard.path) as buffer:
        buffer.require_step(shard.step, str(shard.path))
        part = shard_part(shard.path, buffer.size)
        file, state, tensors = describe_shard(part, key)
        # Before the upload too: it may take minutes.
        buffer.require_step(shard.step, str(shard.path))
        failpoint(Failpoint.UPLOAD_BEGUN)
        try:
            store.write(key, part)
        except AccessDenied:
            # Google counts an overwrite as a delete. An earlier attempt, or another node, may have written these bytes.
            if not _holds(store, file):
                raise
        failpoint(Failpoint.SHARD_WRITTEN)
        buffer.require_step(shard.step, str(shard.path))
    if state.step != shard.step:
        raise CheckpointError(f"{key}: the state of step {state.step}, expected step {shard.step}")
    size = store.size(key)
    if size != file.size:
        raise CheckpointError(f"{key}: {size} bytes in the store, expected {file.size}")
    return UploadedShard(shard, file, state, tensors)


def _holds(store: Store, file: ShardFile) -> bool:
    """Whether the store has a shard file with this content. Reads all of it if the size is right."""
    if store.size(file.key) != file.size:
        return False
    found = hashlib.sha256()
    for start in range(0, file.size, _READ_BYTES):
        found.update(store.read(file.key, start, start + _READ_BYTES))
    return found.hexdigest() == file.sha256


def publish_node(store: Store, shards: Sequence[UploadedShard]) -> NodeNotice:
    """Create a node's record, then its notice, after all its shards are uploaded (agent process).

    Raises `CheckpointError` unless `shards` are those of all its workers, in order, of equal states, and the rows of
    each tensor join. Raises `AlreadyExists` if another agent has written for the same ranks. May be repeated.
    """
    first = shards[0]
    kept = first.kept
    if [each.kept.rank for each in shards] != list(kept.ranks):
        ranks = f"{kept.ranks.start} to {kept.ranks.stop - 1}"
        raise CheckpointError(f"{first.file.key}: expected all shards of ranks {ranks}")
    for each in shards:
        if (each.state, each.tensors) != (first.state, first.tensors):
            raise CheckpointError(
                f"{each.file.key} and {first.file.key} differ in their training state; expected equal states"
            )
    first_rank = kept.ranks.start
    record = NodeRecord(
        kept.run_id, kept.directory, first_rank, tuple(each.file for each in shards)
    )
    rows = record.rows_of(first.tensors)
    data = record.to_bytes()
    key = node_key(kept.directory, first_rank)
    if len(data) > DOCUMENT_BYTES_MAX:
        raise CheckpointError(f"{key}: {len(data)} bytes, expected at most {DOCUMENT_BYTES_MAX}")
    notice = NodeNotice(
        kept.run_id,
        kept.directory,
        first_rank,
        NodeShare(
            key,
            len(data),
            hashlib.sha256(data).hexdigest(),
            tuple(each.file.size for each in shards),
            rows,
        ),
        first.state,
        fingerprint_of(first.tensors),
        first.tensors if first_rank == 0 else (),
    )
    store.create(key, data)
    failpoint(Failpoint.NODE_RECORDED)
    store.create(notice_key(kept.directory, first_rank), notice.to_bytes())
    failpoint(Failpoint.NODE_NOTICED)
    return notice


def refuse_node(store: Store, shard: KeptShard, why: str) -> None:
    """Write a refusal, which tells the committing node that this node cannot upload its share."""
    first_rank = shard.ranks.start
    # A path in the text may hold bytes that are not UTF-8.
    text = why.encode(errors="replace").decode()[:REASON_LENGTH_MAX]
    refusal = NodeRefusal(shard.run_id, shard.directory, first_rank, text)
    store.create(notice_key(shard.directory, first_rank), refusal.to_bytes())


@dataclass
class _NodeShards:
    """The uploader's progress on one node's share of one checkpoint."""

    directory: str
    ranks: range
    uploaded: dict[int, UploadedShard] = field(default_factory=dict)
    refused: bool = False


class Uploader:
    """Uploads kept shards one after another in its own thread (agent process).

    After the last shard of the node it writes the node's record and notice. After a shard that is missing or
    cannot be uploaded, it writes a refusal and drops the node's other shards of this checkpoint.
    It calls `on_uploaded(shard)` or `on_failed(shard, error)` once per shard, in that thread: it needs the buffer no
    more, so a failed upload also makes room for the next checkpoint.
    """

    def __init__(
        self,
        store: Store,
        *,
        on_uploaded: Callable[[KeptShard], None],
        on_failed: Callable[[KeptShard, Exception], None],
        on_sent: Callable[[int, float], None] = lambda *_: None,
    ) -> None:
        """`on_sent(bytes, seconds)` tells the size of each uploaded shard, and how long that took."""
        self._store = store
        self._on_uploaded = on_uploaded
        self._on_failed = on_failed
        self._on_sent = on_sent
        self._node = _NodeShards("", range(0))
        self._jobs = JobThread("checkpoint-upload", self._upload)

    def submit(self, shard: KeptShard) -> None:
        """Queue a shard. Raises `CheckpointError` if the queue is full or the uploader is closed."""
        self._jobs.submit(shard)

    def discard(self) -> list[KeptShard]:
        """Drop the queued shards (not the one in progress), and return them."""
        return self._jobs.discard()

    def close(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` for the pending shards, then drop the rest. Returns False if not all were done."""
        done = self._jobs.close(timeout_s)
        self.discard()
        return done

    def _upload(self, shard: KeptShard) -> None:
        # `agent.uploads` submits one part at a time, so shards of two parts never mix.
        if (self._node.directory, self._node.ranks) != (shard.directory, shard.ranks):
            self._node = _NodeShards(shard.directory, shard.ranks)
        node, failure = self._node, None
        try:
            if shard.missing and not node.refused:
                node.refused = True
                refuse_node(self._store, shard, shard.missing)
            elif not node.refused:
                began_s = time.monotonic()
                sent = node.uploaded[shard.rank] = upload_shard(self._store, shard)
                self._on_sent(sent.file.size, time.monotonic() - began_s)
                if len(node.uploaded) == len(node.ranks):
                    publish_node(self._store, [each for _, each in sorted(node.uploaded.items())])
        # Any error: report it to the agent and keep the thread alive. Without the thread there are no checkpoints.
        except Exception as error:
            failure = error
            node.refused = True
            if not shard.adopted:
                with suppress(StoreError):
                    refuse_node(self._store, shard, str(error))
        if failure is None:
            self._on_uploaded(shard)
        else:
            self._on_failed(shard, failure)
