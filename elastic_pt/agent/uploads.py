"""This node's parts of checkpoints on their way to the bucket: one in flight, at most one pending (agent process).

    a worker's shard ─► add ─► in flight ─► Uploader ─► done        `on_uploaded` after the last shard of the node
                               pending  ─► (after the one in flight)
                               replaced by a newer one ─► `on_dropped`

The checkpoint in flight may belong to an earlier generation. Workers of the newest generation add the pending one, and
do not save another before it has been uploaded. So a node holds at most two checkpoints at a time.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from elastic_pt.checkpoint.layout import parse_directory
from elastic_pt.checkpoint.upload import StagedShard, Uploader, remove_staged
from elastic_pt.errors import CheckpointError
from elastic_pt.store.port import Store


class Place(NamedTuple):
    """Which checkpoint."""

    generation: int
    step: int

    @classmethod
    def of(cls, shard: StagedShard) -> "Place":
        """The checkpoint of a shard."""
        name = parse_directory(shard.directory)
        return cls(name.generation, name.step)


@dataclass
class _Part:
    """The shards of this node's workers in one checkpoint."""

    place: Place
    ranks: range
    shards: dict[int, StagedShard] = field(default_factory=dict)
    done: int = 0


class Uploads:
    """The parts that this node uploads, one after the other. Thread-safe; it calls back without a lock."""

    def __init__(
        self,
        store: Store,
        *,
        on_uploaded: Callable[[Place], None],
        on_failed: Callable[[Place, Exception], None],
        on_dropped: Callable[[Place, str], None],
    ) -> None:
        """`on_uploaded`: all shards of a place are done, uploaded or not; `on_failed` came before for each that is not."""
        self._on_uploaded = on_uploaded
        self._on_failed = on_failed
        self._on_dropped = on_dropped
        self._uploader = Uploader(store, on_uploaded=self._done, on_failed=self._failed)
        self._lock = threading.Lock()
        self._parts: list[_Part] = []
        """In flight, and then pending."""

    def add(self, shard: StagedShard) -> None:
        """Upload a shard, after the checkpoint in flight. It replaces a pending checkpoint that is older."""
        place, replaced = Place.of(shard), None
        with self._lock:
            part = next((each for each in self._parts if each.place == place), None)
            if part is None:
                part = _Part(place, shard.ranks)
                replaced = self._parts.pop() if len(self._parts) > 1 else None
                self._parts.append(part)
            part.shards[shard.rank] = shard
            if part is self._parts[0]:
                self._uploader.submit(shard)
        if replaced is not None:
            self._drop(replaced, f"the checkpoint of step {place.step} has replaced it")

    def stopped(self, why: str) -> None:
        """All workers are gone: a shard that they have not added will never come."""
        with self._lock:
            torn = [
                (each, each.ranks) for each in self._parts if len(each.shards) < len(each.ranks)
            ]
            shards = [
                StagedShard(Path(), each.run_id, each.directory, rank, ranks, why)
                for part, ranks in torn
                for each in [next(iter(part.shards.values()))]
                for rank in ranks
                if rank not in part.shards
            ]
        for shard in shards:
            self.add(shard)

    def abandon(self, place: Place, why: str) -> None:
        """The checkpoint is over: free the files that are not uploaded. A request that is running ends by itself."""
        dropped = None
        with self._lock:
            if self._parts and self._parts[0].place == place:
                part = self._parts[0]
                part.done += self._uploader.discard()
                part.done += len(part.ranks) - len(part.shards)
                if part.done >= len(part.ranks):
                    dropped = part
                    self._next()
            else:
                dropped = next((each for each in self._parts if each.place == place), None)
                if dropped is not None:
                    self._parts.remove(dropped)
        if dropped is not None:
            self._drop(dropped, why)

    def paths(self) -> set[Path]:
        """The local files that are needed."""
        with self._lock:
            return {shard.path for part in self._parts for shard in part.shards.values()}

    def close(self) -> None:
        """Start no more uploads. The files are removed with the scratch directory."""
        self._uploader.close(0.0)

    def _drop(self, part: _Part, why: str) -> None:
        for shard in part.shards.values():
            remove_staged(shard)
        self._on_dropped(part.place, why)

    def _next(self) -> None:
        """The part in flight is done: begin with the pending one. A shard that is missing comes first: it ends the part."""
        del self._parts[0]
        for part in self._parts:
            for shard in sorted(part.shards.values(), key=lambda each: not each.missing):
                with suppress(CheckpointError):  # closed: this node leaves
                    self._uploader.submit(shard)

    def _failed(self, shard: StagedShard, error: Exception) -> None:
        self._on_failed(Place.of(shard), error)
        self._done(shard)

    def _done(self, shard: StagedShard) -> None:
        place, ended = Place.of(shard), False
        with self._lock:
            if self._parts and self._parts[0].place == place:
                part = self._parts[0]
                part.done += 1
                ended = part.done >= len(part.ranks)
                if ended:
                    self._next()
        if ended:
            self._on_uploaded(place)
