"""From a staged shard file to a node's record and notice in the bucket.

    worker: write_shard ──► staging directory (memory)
    agent:  Uploader    ──► describe_shard ─► shard-<rank>.safetensors ─► local file removed
                            after the last worker of the node: node-<rank>.json ─► notice-<rank>.json

A node record holds about 80 KB of slices per worker, so only its node and readers handle it. The notice is
a few KB; `publish` makes the manifest of all notices.

The process may die after any of these steps. Until the COMMIT record is in the log nothing counts, and
nothing that was written is ever changed: records and manifest are created once, in a directory whose nonce no
other world uses. So a new attempt needs no clean-up, and `retention` removes the rest later.
"""

import hashlib
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
from elastic_pt.errors import CheckpointError, StoreError
from elastic_pt.store.port import Store

_THREADS: Final = 64
"""Requests of the committing agent that are under way at once."""
_POLL_MAX_S: Final = 0.5
_POLL_SHARE: Final = 0.1
"""A notice is asked for again after this share of the time waited: it comes later by no more than that."""


@dataclass(frozen=True)
class StagedShard:
    """A file that `write_shard` finished, and where it belongs."""

    path: Path
    run_id: str
    directory: str
    rank: int
    ranks: range
    """Those of all workers of its node."""
    missing: str = ""
    """Why there is no such file; empty if there is one."""

    @property
    def step(self) -> int:
        """The step whose state the file holds."""
        return parse_directory(self.directory).step


@dataclass(frozen=True)
class UploadedShard:
    """A shard that is in the store, and what its header said."""

    staged: StagedShard
    file: ShardFile
    state: TrainingState
    tensors: tuple[Tensor, ...]
    """All tensors of the state, sorted by name."""


def upload_shard(store: Store, shard: StagedShard) -> UploadedShard:
    """Hash one staged file, upload it, and look at its size there. Does not touch the local file.

    Raises `CheckpointError` if the file is not what it should be, `StoreError` if the store fails.
    """
    key = shard_key(shard.directory, shard.rank)
    file, state, tensors = describe_shard(shard.path, key)
    store.write(key, shard.path)
    size = store.size(key)
    if size != file.size:
        raise CheckpointError(f"{key}: {size} bytes in the store, expected {file.size}")
    return UploadedShard(shard, file, state, tensors)


def publish_node(store: Store, shards: Sequence[UploadedShard]) -> NodeNotice:
    """Create the record of a node all of whose shards are uploaded, then its notice (agent process).

    Raises `CheckpointError` unless they are those of all its workers, in order, of the same state, and the rows
    of each tensor join; `AlreadyExists` if another agent has written for the same ranks. Doing it twice is fine.
    """
    first = shards[0]
    staged = first.staged
    if [each.staged.rank for each in shards] != list(staged.ranks):
        ranks = f"{staged.ranks.start} to {staged.ranks.stop - 1}"
        raise CheckpointError(f"{first.file.key}: not all shards of ranks {ranks}")
    for each in shards:
        if (each.state, each.tensors) != (first.state, first.tensors):
            raise CheckpointError(
                f"{each.file.key} and {first.file.key} differ in their training state"
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
    store.create(notice_key(staged.directory, first_rank), notice.to_bytes())
    return notice


def refuse_node(store: Store, shard: StagedShard, why: str) -> None:
    """Tell the committing node that this node's share of a checkpoint will not come."""
    first_rank = shard.ranks.start
    # A path in the text may hold bytes that are not UTF-8.
    text = why.encode(errors="replace").decode()[:REASON_LENGTH_MAX]
    refusal = NodeRefusal(shard.run_id, shard.directory, first_rank, text)
    store.create(notice_key(shard.directory, first_rank), refusal.to_bytes())


@dataclass
class _NodeShards:
    """What the uploader has done of one node's share of one checkpoint."""

    directory: str
    ranks: range
    uploaded: dict[int, UploadedShard] = field(default_factory=dict)
    refused: bool = False


class Uploader:
    """Uploads staged shards one after another in a thread of its own (agent process).

    After the last shard of its node it writes the node's record and notice. After one that is missing or
    cannot be uploaded it writes a refusal and drops the rest of the node's shards.
    `on_uploaded(shard)` or `on_failed(shard, error)` is called once per shard, in that thread, after the
    local file is gone: a shard that could not be uploaded before the store's deadline makes room for
    the next checkpoint.
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
        """Queue a shard. Raises `CheckpointError` when too many wait or the uploader is closed."""
        self._jobs.submit(shard)

    def pending(self) -> set[Path]:
        """The local files that are still to be uploaded, the one under way included."""
        return {shard.path for shard in self._jobs.pending()}

    def discard(self) -> int:
        """Drop what is queued (not what is under way) and its local files; the number of shards dropped."""
        dropped = self._jobs.discard()
        for shard in dropped:
            _remove_staged(shard)
        return len(dropped)

    def close(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` for what is pending, then drop the rest. False if an upload is still under way."""
        done = self._jobs.close(timeout_s)
        self.discard()
        return done

    def _upload(self, shard: StagedShard) -> None:
        # Workers stage a checkpoint only after the one before was released, so their shards never mix.
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
        # Every error: report it to the agent and keep the thread alive, or no checkpoint would follow.
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
