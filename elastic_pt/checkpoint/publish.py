"""Collects the notices of all nodes and writes the manifest that can be committed (committing agent).

    Collector (all notices) ─► publish_manifest ─► Checkpoint ─► COMMIT, by the caller

The committing node reads one notice of a few KB per node. A notice holds size and SHA-256 of the node's record, and the
node's rows of each tensor. That is enough to check that the checkpoint is complete, for thousands of nodes.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from typing import Final

from elastic_pt.checkpoint.index import read_root
from elastic_pt.checkpoint.layout import manifest_key, parse_directory
from elastic_pt.checkpoint.nodes import NodeNotice, NodeRefusal, RootManifest, notice_key
from elastic_pt.checkpoint.record import DOCUMENT_BYTES_MAX, decode
from elastic_pt.errors import CheckpointError, NotFound
from elastic_pt.failpoints import Failpoint, failpoint
from elastic_pt.runlog.records import Checkpoint
from elastic_pt.store.port import Store

_THREADS: Final = 64
"""Parallel requests of the committing agent."""


class ShareMissing(CheckpointError):
    """A node's share of a checkpoint is missing: the node wrote a refusal, or no notice in time."""

    def __init__(self, text: str, first_rank: int) -> None:
        super().__init__(text)
        self.first_rank = first_rank


class Collector:
    """Reads the notices of all nodes of one checkpoint as they appear (committing agent). Not thread-safe."""

    def __init__(self, store: Store, directory: str, nodes: Sequence[range]) -> None:
        """`nodes` are the ranks of each node's workers, in order."""
        self._store = store
        self._directory = directory
        self._nodes = nodes
        self.notices: list[NodeNotice] = []
        """Those that have been read, in order."""

    @property
    def missing(self) -> range:
        """The ranks of the first node whose notice has not been read; empty once all are there."""
        return next(iter(self._nodes[len(self.notices) :]), range(0))

    def read_more(self) -> bool:
        """Read the notices that have appeared. Returns whether all have been read.

        Reads keys by name and never lists. While a notice is missing, it asks only for that one, since all are needed;
        then it reads many in parallel. Raises `ShareMissing` after a node's refusal, and another `CheckpointError` for
        a wrong notice.
        """
        if self.missing and not self._read(1):
            return False
        while self.missing:
            if not self._read(_THREADS):
                return False
        return True

    def _read(self, count: int) -> bool:
        """Read the next `count` notices. Returns False if one of them is not there yet."""
        asked = self._nodes[len(self.notices) : len(self.notices) + count]
        if len(asked) == 1:
            looks = [_read_notice(self._store, self._directory, asked[0])]
        else:
            with ThreadPoolExecutor(min(_THREADS, len(asked))) as pool:
                looks = list(
                    pool.map(lambda ranks: _read_notice(self._store, self._directory, ranks), asked)
                )
        self.notices += [each for each in takewhile(lambda each: each is not None, looks) if each]
        return None not in looks


def publish_manifest(store: Store, notices: Sequence[NodeNotice]) -> Checkpoint:
    """Make the manifest of all node records, create it, and read it back (committing agent).

    Raises `CheckpointError` unless all notices are of one run and directory, with equal `TrainingState` and tensors,
    and the rows of the nodes tile every tensor. Raises `AlreadyExists` if another manifest exists. The checkpoint
    counts only after the caller has appended a COMMIT record. Publishing the same notices twice gives the same result.
    """
    if not notices:
        raise CheckpointError("checkpoint manifest: no notices; expected one of each node")
    notices = sorted(notices, key=lambda notice: notice.first_rank)
    first = notices[0]
    for notice in notices:
        key, first_key = notice.share.key, first.share.key
        if (notice.run_id, notice.directory) != (first.run_id, first.directory):
            raise CheckpointError(f"{key} and {first_key}: expected the same run and directory")
        if (notice.state, notice.tensors_sha256) != (first.state, first.tensors_sha256):
            raise CheckpointError(
                f"{key} and {first_key} differ in their training state; expected equal states"
            )
    name = parse_directory(first.directory)
    manifest = RootManifest(
        first.run_id,
        first.directory,
        first.tensors,
        tuple(notice.share for notice in notices),
        first.state,
    )
    data = manifest.to_bytes()
    if len(data) > DOCUMENT_BYTES_MAX:
        raise CheckpointError(
            f"{first.directory}: a manifest of {len(data)} bytes, expected at most {DOCUMENT_BYTES_MAX}"
        )
    sha256 = hashlib.sha256(data).hexdigest()
    checkpoint = Checkpoint(
        name.step, name.generation, first.directory, len(data), sha256, loss=None
    )
    key = manifest_key(first.directory)
    store.create(key, data)
    failpoint(Failpoint.MANIFEST_CREATED)
    if read_root(store, checkpoint, first.run_id) != manifest:
        raise CheckpointError(
            f"{key}: read back with another content; expected the manifest just written"
        )
    return checkpoint


def _read_notice(store: Store, directory: str, ranks: range) -> NodeNotice | None:
    """The notice of a node; None if there is none yet."""
    key = notice_key(directory, ranks.start)
    try:
        notice = decode(store.read(key, 0, DOCUMENT_BYTES_MAX), NodeNotice, NodeRefusal)
    except NotFound:
        return None
    except CheckpointError as error:
        raise CheckpointError(f"{key}: {error}") from error
    if (notice.directory, notice.first_rank) != (directory, ranks.start):
        raise CheckpointError(
            f"{key}: notice of rank {notice.first_rank} of {notice.directory}; "
            f"expected rank {ranks.start} of {directory}"
        )
    if isinstance(notice, NodeRefusal):
        raise ShareMissing(f"{key}: its node could not upload it: {notice.why}", ranks.start)
    if notice.ranks != ranks:
        raise CheckpointError(
            f"{key}: notice of ranks {_shown(notice.ranks)}; expected {_shown(ranks)}"
        )
    return notice


def _shown(ranks: range) -> str:
    return f"{ranks.start} to {ranks.stop - 1}"
