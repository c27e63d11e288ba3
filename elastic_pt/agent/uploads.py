"""The shares of checkpoints that this node uploads: one in flight, at most one of its own pending (agent process).

    a worker's shard ─► add ───► in flight ─► Uploader ─► `on_uploaded`, after the last shard of the share
                                 pending  ─► (after the one in flight)
                                 replaced by a newer one ─► `on_dropped`
    copies of a lost node ─► adopt ─► after the one in flight

A share has the shards of one node. The share in flight may belong to an earlier generation. Workers of the newest
generation add the pending one, and do not save another before it has been uploaded. So a node keeps at most two
checkpoints of its own at a time. Shares that it uploads for lost nodes come first: only they are missing.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from elastic_pt.checkpoint.layout import parse_directory
from elastic_pt.checkpoint.upload import KeptShard, Uploader
from elastic_pt.errors import CheckpointError
from elastic_pt.runlog.state import State
from elastic_pt.store.port import Store


@dataclass
class _Share:
    """The shards of one node's workers in one checkpoint."""

    state: State
    ranks: range
    adopted: bool = False
    shards: dict[int, KeptShard] = field(default_factory=dict)
    done: int = 0
    abandoned: bool = False


class Uploads:
    """The shares that this node uploads, one after the other. Thread-safe; it calls back without a lock."""

    def __init__(
        self,
        store: Store,
        *,
        on_uploaded: Callable[[State, range], None],
        on_failed: Callable[[State, Exception], None],
        on_dropped: Callable[[State, str], None],
        on_sent: Callable[[int, float], None] = lambda *_: None,
    ) -> None:
        """`on_uploaded`: the share is uploaded, or has failed; `on_dropped`: a newer one has replaced it, for a reason.

        `on_sent(bytes, seconds)`: one shard is uploaded.
        """
        self._on_uploaded = on_uploaded
        self._on_failed = on_failed
        self._on_dropped = on_dropped
        self._uploader = Uploader(
            store, on_uploaded=self._done, on_failed=self._failed, on_sent=on_sent
        )
        self._lock = threading.Lock()
        self._shares: list[_Share] = []
        """The one in flight comes first."""
        self._newest = State(0, 0)
        """The newest checkpoint that the workers of this node have begun to add."""

    def add(self, shard: KeptShard) -> None:
        """Upload a shard of a worker of this node. Its checkpoint replaces an older one that is pending.

        A shard that comes late is not uploaded: its checkpoint is over, or has been replaced.
        """
        state, replaced = _state_of(shard), list[_Share]()
        with self._lock:
            share = self._find(state, shard.ranks)
            late = share.abandoned if share is not None else state <= self._newest
            if share is None and not late:
                self._newest = state
                replaced = [each for each in self._shares[1:] if not each.adopted]
                self._shares = [each for each in self._shares if each not in replaced]
                share = _Share(state, shard.ranks)
                self._shares.append(share)
            if share is not None and not late:
                share.shards[shard.rank] = shard
                if share is self._shares[0]:
                    self._uploader.submit(shard)
        if late:
            self._on_uploaded(state, range(shard.rank, shard.rank + 1))
        for each in replaced:
            self._on_dropped(each.state, f"step {state.step} has replaced it")

    def adopt(self, shards: Sequence[KeptShard]) -> None:
        """Upload copies of all shards of a node that is no member any more."""
        first = shards[0]
        with self._lock:
            if self._find(_state_of(first), first.ranks) is not None:
                return
            share = _Share(_state_of(first), first.ranks, adopted=True)
            share.shards = {each.rank: each for each in shards}
            self._shares.insert(1, share)
            if share is self._shares[0]:
                self._submit(share)

    def stopped(self, why: str) -> None:
        """All workers are gone: a shard that they have not added will never come."""
        with self._lock:
            shards = [
                KeptShard(Path(), each.run_id, each.directory, rank, share.ranks, why)
                for share in self._shares
                for each in [next(iter(share.shards.values()))]
                for rank in share.ranks
                if rank not in share.shards
            ]
        for shard in shards:
            self.add(shard)

    def abandon(self, state: State) -> None:
        """The checkpoint is over. A request that is running ends by itself, and then the next share begins."""
        with self._lock:
            dropped = [each for each in self._shares if each.state == state]
            for share in dropped:
                share.abandoned = True
                if share is not self._shares[0]:
                    self._shares.remove(share)
                    continue
                share.done += len(self._uploader.discard()) + len(share.ranks) - len(share.shards)
                if share.done >= len(share.ranks):
                    self._next()

    def states(self) -> set[State]:
        """The checkpoints of which shares are not uploaded yet."""
        with self._lock:
            return {share.state for share in self._shares}

    def close(self) -> None:
        """Start no more uploads."""
        self._uploader.close(0.0)

    def _find(self, state: State, ranks: range) -> _Share | None:
        wanted = (state, ranks)
        return next((each for each in self._shares if (each.state, each.ranks) == wanted), None)

    def _next(self) -> None:
        """The share in flight is done: begin with the next one."""
        del self._shares[0]
        if self._shares:
            self._submit(self._shares[0])

    def _submit(self, share: _Share) -> None:
        # A shard that is missing comes first: it ends the share.
        for shard in sorted(share.shards.values(), key=lambda each: (not each.missing, each.rank)):
            with suppress(CheckpointError):  # closed: this node leaves
                self._uploader.submit(shard)

    # ---- in the uploader's thread ---------------------------------------------------------------

    def _failed(self, shard: KeptShard, error: Exception) -> None:
        state = _state_of(shard)
        with self._lock:
            share = self._find(state, shard.ranks)
        if share is not None and not share.abandoned:
            self._on_failed(state, error)
        self._done(shard)

    def _done(self, shard: KeptShard) -> None:
        ended = None
        with self._lock:
            share = self._find(_state_of(shard), shard.ranks)
            if share is not None and share is self._shares[0]:
                share.done += 1
                if share.done >= len(share.ranks):
                    ended = share
                    self._next()
        if ended is not None:
            self._on_uploaded(ended.state, ended.ranks)


def _state_of(shard: KeptShard) -> State:
    """The state that a shard belongs to."""
    name = parse_directory(shard.directory)
    return State(name.generation, name.step)
