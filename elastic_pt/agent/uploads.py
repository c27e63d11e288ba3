"""The parts of checkpoints that this node uploads: one in flight, at most one of its own pending (agent process).

    a worker's shard ─► add ───► in flight ─► Uploader ─► `on_uploaded`, after the last shard of the part
                                 pending  ─► (after the one in flight)
                                 replaced by a newer one ─► `on_dropped`
    copies of a lost node ─► adopt ─► after the one in flight

A part has the shards of one node. The part in flight may belong to an earlier generation. Workers of the newest
generation add the pending one, and do not save another before it has been uploaded. So a node keeps at most two
checkpoints of its own at a time. Parts that it uploads for lost nodes come first: only they are missing.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from elastic_pt.checkpoint.layout import parse_directory
from elastic_pt.checkpoint.upload import KeptShard, Uploader
from elastic_pt.errors import CheckpointError
from elastic_pt.store.port import Store


class Place(NamedTuple):
    """Which checkpoint."""

    generation: int
    step: int

    @classmethod
    def of(cls, shard: KeptShard) -> "Place":
        """The checkpoint of a shard."""
        name = parse_directory(shard.directory)
        return cls(name.generation, name.step)


@dataclass
class _Part:
    """The shards of one node's workers in one checkpoint."""

    place: Place
    ranks: range
    adopted: bool = False
    shards: dict[int, KeptShard] = field(default_factory=dict)
    done: int = 0
    abandoned: bool = False


class Uploads:
    """The parts that this node uploads, one after the other. Thread-safe; it calls back without a lock."""

    def __init__(
        self,
        store: Store,
        *,
        on_uploaded: Callable[[Place, range], None],
        on_failed: Callable[[Place, Exception], None],
        on_dropped: Callable[[Place, str], None],
    ) -> None:
        """`on_uploaded`: the part is uploaded, or has failed; `on_dropped`: a newer one has replaced it, for a reason."""
        self._on_uploaded = on_uploaded
        self._on_failed = on_failed
        self._on_dropped = on_dropped
        self._uploader = Uploader(store, on_uploaded=self._done, on_failed=self._failed)
        self._lock = threading.Lock()
        self._parts: list[_Part] = []
        """The one in flight comes first."""
        self._newest = Place(0, 0)
        """The newest checkpoint that the workers of this node have begun to add."""

    def add(self, shard: KeptShard) -> None:
        """Upload a shard of a worker of this node. Its checkpoint replaces an older one that is pending.

        A shard that comes late is not uploaded: its checkpoint is over, or has been replaced.
        """
        place, replaced = Place.of(shard), list[_Part]()
        with self._lock:
            part = self._find(place, shard.ranks)
            late = part.abandoned if part is not None else place <= self._newest
            if part is None and not late:
                self._newest = place
                replaced = [each for each in self._parts[1:] if not each.adopted]
                self._parts = [each for each in self._parts if each not in replaced]
                part = _Part(place, shard.ranks)
                self._parts.append(part)
            if part is not None and not late:
                part.shards[shard.rank] = shard
                if part is self._parts[0]:
                    self._uploader.submit(shard)
        if late:
            self._on_uploaded(place, range(shard.rank, shard.rank + 1))
        for each in replaced:
            self._on_dropped(each.place, f"step {place.step} has replaced it")

    def adopt(self, shards: Sequence[KeptShard]) -> None:
        """Upload copies of all shards of a node that is no member any more."""
        first = shards[0]
        with self._lock:
            if self._find(Place.of(first), first.ranks) is not None:
                return
            part = _Part(Place.of(first), first.ranks, adopted=True)
            part.shards = {each.rank: each for each in shards}
            self._parts.insert(1, part)
            if part is self._parts[0]:
                self._submit(part)

    def stopped(self, why: str) -> None:
        """All workers are gone: a shard that they have not added will never come."""
        with self._lock:
            shards = [
                KeptShard(Path(), each.run_id, each.directory, rank, part.ranks, why)
                for part in self._parts
                for each in [next(iter(part.shards.values()))]
                for rank in part.ranks
                if rank not in part.shards
            ]
        for shard in shards:
            self.add(shard)

    def abandon(self, place: Place) -> None:
        """The checkpoint is over. A request that is running ends by itself, and then the next part begins."""
        with self._lock:
            dropped = [each for each in self._parts if each.place == place]
            for part in dropped:
                part.abandoned = True
                if part is not self._parts[0]:
                    self._parts.remove(part)
                    continue
                part.done += len(self._uploader.discard()) + len(part.ranks) - len(part.shards)
                if part.done >= len(part.ranks):
                    self._next()

    def places(self) -> set[Place]:
        """The checkpoints of which parts are not uploaded yet."""
        with self._lock:
            return {part.place for part in self._parts}

    def close(self) -> None:
        """Start no more uploads."""
        self._uploader.close(0.0)

    def _find(self, place: Place, ranks: range) -> _Part | None:
        wanted = (place, ranks)
        return next((each for each in self._parts if (each.place, each.ranks) == wanted), None)

    def _next(self) -> None:
        """The part in flight is done: begin with the next one."""
        del self._parts[0]
        if self._parts:
            self._submit(self._parts[0])

    def _submit(self, part: _Part) -> None:
        # A shard that is missing comes first: it ends the part.
        for shard in sorted(part.shards.values(), key=lambda each: (not each.missing, each.rank)):
            with suppress(CheckpointError):  # closed: this node leaves
                self._uploader.submit(shard)

    # ---- in the uploader's thread ---------------------------------------------------------------

    def _failed(self, shard: KeptShard, error: Exception) -> None:
        place = Place.of(shard)
        with self._lock:
            part = self._find(place, shard.ranks)
        if part is not None and not part.abandoned:
            self._on_failed(place, error)
        self._done(shard)

    def _done(self, shard: KeptShard) -> None:
        ended = None
        with self._lock:
            part = self._find(Place.of(shard), shard.ranks)
            if part is not None and part is self._parts[0]:
                part.done += 1
                if part.done >= len(part.ranks):
                    ended = part
                    self._next()
        if ended is not None:
            self._on_uploaded(ended.place, ended.ranks)
