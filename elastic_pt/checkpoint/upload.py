"""Uploads staged shard files, and writes the node's record and notice.

    worker: write_shard ──► staging directory (memory)
    agent:  Uploader    ──► describe_shard ─► shard-<rank>.safetensors ─► local file removed
                            after the last worker of the node: node-<rank>.json ─► notice-<rank>.json

A node record holds about 80 KB of slices per worker, so only its node and readers handle it. A notice has a few KB.
`publish` makes the manifest from all notices.

The process may die after any of these steps. The files do not count before the COMMIT record is in the log. They are
never changed: records and manifest are created once, in a directory with a nonce that no other generation uses. So a
new attempt needs no clean-up. `retention` removes incomplete uploads later.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

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
from elastic_pt.errors import CheckpointError, StoreError
from elastic_pt.failpoints import Failpoint, failpoint
from elastic_pt.store.port import Store


@dataclass(frozen=True)
class StagedShard:
    """A file that `write_shard` finished, and its place in the checkpoint."""

    path: Path
    run_id: str
    directory: str
    rank: int
    ranks: range
    """The ranks of all workers of its node."""
    missing: str = ""
    """Why the file is missing; empty if it exists."""

    @property
    def step(self) -> int:
        """The step of the state in the file."""
        return parse_directory(self.directory).step


@dataclass(frozen=True)
class UploadedShard:
    """A shard in the store, and the content of its header."""

    staged: StagedShard
    file: ShardFile
    state: TrainingState
    tensors: tuple[Tensor, ...]
    """All tensors of the state, sorted by name."""


def upload_shard(store: Store, shard: StagedShard) -> UploadedShard:
    """Hash one staged file, upload it, and check its size in the store. Does not change the local file.

    Raises `CheckpointError` for a wrong file, and `StoreError` if the store fails.
    """
    key = shard_key(shard.directory, shard.rank)
    file, state, tensors = describe_shard(shard.path, key)
    store.write(key, shard.path)
    failpoint(Failpoint.SHARD_WRITTEN)
    size = store.size(key)
    if size != file.size:
        raise CheckpointError(f"{key}: {size} bytes in the store, expected {file.size}")
    return UploadedShard(shard, file, state, tensors)


def publish_node(store: Store, shards: Sequence[UploadedShard]) -> NodeNotice:
    """Create a node's record, then its notice, after all its shards are uploaded (agent process).

    Raises `CheckpointError` unless `shards` are those of all its workers, in order, of equal states, and the rows of
    each tensor join. Raises `AlreadyExists` if another agent has written for the same ranks. May be repeated.
    """
    first = shards[0]
    staged = first.staged
    if [each.staged.rank for each in shards] != list(staged.ranks):
        ranks = f"{staged.ranks.start} to {staged.ranks.stop - 1}"
        raise CheckpointError(f"{first.file.key}: expected all shards of ranks {ranks}")
    for each in shards:
        if (each.state, each.tensors) != (first.state, first.tensors):
            raise CheckpointError(
                f"{each.file.key} and {first.file.key} differ in their training state; expected equal states"
            )
    first_rank = staged.ranks.start
    record = NodeRecord(
        staged.run_id, staged.directory, first_rank, tuple(each.file for each in shards)
    )
    rows = record.rows_of(first.tensors)
    data = record.to_bytes()
    key = node_key(staged.directory, first_rank)
    if len(data) > DOCUMENT_BYTES_MAX:
        raise CheckpointError(f"{key}: {len(data)} bytes, expected at most {DOCUMENT_BYTES_MAX}")
    notice = NodeNotice(
        staged.run_id,
        staged.directory,
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
    store.create(notice_key(staged.directory, first_rank), notice.to_bytes())
    failpoint(Failpoint.NODE_NOTICED)
    return notice


def refuse_node(store: Store, shard: StagedShard, why: str) -> None:
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
    """Uploads staged shards one after another in its own thread (agent process).

    After the last shard of the node it writes the node's record and notice. After a shard that is missing or
    cannot be uploaded, it writes a refusal and drops the node's other shards of this checkpoint.
    It calls `on_uploaded(shard)` or `on_failed(shard, error)` once per shard, in that thread, after it has removed the
    local file. So a failed upload also makes room for the next checkpoint.
    """

    def __init__(
        self,
        store: Store,
        *,
        on_uploaded: Callable[[StagedShard], None],
        on_failed: Callable[[StagedShard, Exception], None],
    ) -> None:
        self._store = store
        self._on_uploaded = on_uploaded
        self._on_failed = on_failed
        self._node = _NodeShards("", range(0))
        self._jobs = JobThread("checkpoint-upload", self._upload)

    def submit(self, shard: StagedShard) -> None:
        """Queue a shard. Raises `CheckpointError` if the queue is full or the uploader is closed."""
        self._jobs.submit(shard)

    def pending(self) -> set[Path]:
        """The local files that are not uploaded yet, with the one in progress."""
        return {shard.path for shard in self._jobs.pending()}

    def discard(self) -> int:
        """Drop the queued shards (not the one in progress) and their local files. Returns the number dropped."""
        dropped = self._jobs.discard()
        for shard in dropped:
            _remove_staged(shard)
        return len(dropped)

    def close(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` for the pending shards, then drop the rest. Returns False if not all were done."""
        done = self._jobs.close(timeout_s)
        self.discard()
        return done

    def _upload(self, shard: StagedShard) -> None:
        # Workers stage a checkpoint only after the previous one was released, so shards of two checkpoints never mix.
        if (self._node.directory, self._node.ranks) != (shard.directory, shard.ranks):
            self._node = _NodeShards(shard.directory, shard.ranks)
        node, failure = self._node, None
        try:
            if shard.missing and not node.refused:
                node.refused = True
                refuse_node(self._store, shard, shard.missing)
            elif not node.refused:
                node.uploaded[shard.rank] = upload_shard(self._store, shard)
                if len(node.uploaded) == len(node.ranks):
                    publish_node(self._store, [each for _, each in sorted(node.uploaded.items())])
        # Any error: report it to the agent and keep the thread alive. Without the thread there are no checkpoints.
        except Exception as error:
            failure = error
            node.refused = True
            with suppress(StoreError):
                refuse_node(self._store, shard, str(error))
        _remove_staged(shard)
        if failure is None:
            self._on_uploaded(shard)
        else:
            self._on_failed(shard, failure)


def _remove_staged(shard: StagedShard) -> None:
    if not shard.missing:
        with suppress(OSError):
            shard.path.unlink()
