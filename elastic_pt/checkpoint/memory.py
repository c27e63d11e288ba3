"""Reads the state of one step from the memory of several nodes (worker process).

    places (from the GENERATION) ─► the records of the buffers that hold wanted rows ─► MemoryState ─► restore.load_rows
              own buffer files: mapped, no network          peers: byte ranges over HTTP

A worker asks for rows, for any number of writers and readers. Rows are verified as in a committed checkpoint: each
block is compared with its CRC-32. All copies of a buffer are equal, so after a failed read of one copy the next one is
read, and the agent learns which copy has failed.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from elastic_pt.checkpoint.index import REQUEST_THREADS, PartialIndex
from elastic_pt.checkpoint.layout import TensorEntry, TensorSlice
from elastic_pt.checkpoint.peer import Peer, PeerAddress, snapshot_path
from elastic_pt.checkpoint.snapshot import BufferContent, Snapshot, open_buffer
from elastic_pt.errors import CheckpointError, StoreError
from elastic_pt.runlog.access import Access
from elastic_pt.store.parallel import in_order


@dataclass(frozen=True)
class Place:
    """One copy of the rows of an old rank: in a buffer file of this node, or in a peer's memory."""

    holder: str
    """The incarnation of the node that holds it."""
    path: str = ""
    """The buffer file; empty if a peer holds it."""
    record: str = ""
    """The buffer's `Snapshot` as text; empty if a peer holds it."""
    host: str = ""
    port: int = 0


@dataclass(frozen=True)
class Places:
    """Where the state of a step is, in the memory of the nodes of a generation."""

    generation: int
    """The generation that wrote it."""
    step: int
    shards: tuple[tuple[Place, ...], ...]
    """For each worker of that generation, by rank: its copies, in the order in which to read them."""
    access: Access
    timeout_s: float


@dataclass(frozen=True)
class FailedCopy:
    """A copy that could not be read."""

    rank: int
    holder: str
    damaged: bool
    """Its content is wrong or gone. Otherwise its node did not answer, and may do so later."""
    why: str


class MemoryState:
    """The state of one step in the memory of several nodes. `index`, `read_into` and `other_copy` are for `load_rows`."""

    def __init__(
        self,
        places: Places,
        ranks: Sequence[int],
        on_failed: Callable[[FailedCopy], None] = lambda _: None,
    ) -> None:
        """Read the records of these old ranks. Calls `on_failed` for each copy that fails, on the thread that reads it.

        Raises `CheckpointError` if the last copy of one is damaged, and `StoreError` if its node does not answer.
        """
        self._places = places
        self._left = {rank: list(places.shards[rank]) for rank in ranks}
        """The copies that have not failed."""
        self._on_failed = on_failed
        self._reading = threading.local()
        """The place that a thread has read last."""
        self._lock = threading.Lock()
        self._buffers: dict[str, BufferContent] = {}
        self._peers: dict[PeerAddress, Peer] = {}
        try:
            self.index = _index_of(list(in_order(ranks, self._record, REQUEST_THREADS)))
            """The training state, and the places of its rows."""
        except BaseException:
            self.__exit__()
            raise

    def read_into(self, key: str, start: int, parts: Sequence[memoryview]) -> int:
        """Fill the parts with the bytes of the shard file of the old rank `key`, from `start` on. See `index.Memory`.

        The bytes are from the first copy that has not failed.
        """
        rank = int(key)
        place = self._choose(rank)
        if place.path:
            return self._buffer(place).read_into(start, parts)
        self._peer(place).read_into(self._path(rank), start, *parts)
        return sum(len(part) for part in parts)

    def other_copy(self, key: str, error: Exception) -> bool:
        """Never read again the copy that this thread has read last. Returns whether another copy is left."""
        rank, place = int(key), getattr(self._reading, "place", None)
        with self._lock:
            left = self._left[rank]
            if place is not None and place in left:
                left.remove(place)
                damaged = isinstance(error, CheckpointError)
                self._on_failed(FailedCopy(rank, place.holder, damaged, str(error)))
            return bool(left)

    def __enter__(self) -> "MemoryState":
        return self

    def __exit__(self, *_: object) -> None:
        """Unmap the buffers."""
        for buffer in self._buffers.values():
            buffer.mapped.close()

    def _record(self, rank: int) -> Snapshot:
        """The record of a rank's first copy that has a right one."""
        while True:
            try:
                return self._record_at(rank, self._choose(rank))
            except (CheckpointError, StoreError) as error:
                if not self.other_copy(str(rank), error):
                    raise

    def _record_at(self, rank: int, place: Place) -> Snapshot:
        if place.path:
            self._buffer(place)
            found = Snapshot.from_bytes(place.record.encode())
        else:
            found = self._peer(place).record(self._path(rank))
        wanted = (self._places.generation, self._places.step, rank)
        if (found.generation, found.step, found.rank) != wanted:
            raise CheckpointError(
                f"snapshot of generation {found.generation}, step {found.step}, rank {found.rank}: expected "
                "generation {}, step {}, rank {}".format(*wanted)
            )
        return found

    def _choose(self, rank: int) -> Place:
        with self._lock:
            left = self._left[rank]
            if not left:
                raise CheckpointError(
                    f"snapshot of step {self._places.step}, rank {rank}: no copy could be read"
                )
            self._reading.place = left[0]
            return left[0]

    def _buffer(self, place: Place) -> BufferContent:
        with self._lock:
            if place.path not in self._buffers:
                self._buffers[place.path] = open_buffer(Path(place.path))
            return self._buffers[place.path]

    def _path(self, rank: int) -> str:
        return snapshot_path(self._places.generation, self._places.step, rank)

    def _peer(self, place: Place) -> Peer:
        address = PeerAddress(place.host, place.port)
        with self._lock:
            if address not in self._peers:
                self._peers[address] = Peer(address, self._places.access, self._places.timeout_s)
            return self._peers[address]


def _index_of(snapshots: Sequence[Snapshot]) -> PartialIndex:
    """The places of the rows in these buffers. Their states must be equal."""
    first = snapshots[0]
    pieces: dict[str, list[tuple[str, TensorSlice]]] = {}
    for each in snapshots:
        if each.state != first.state:
            raise CheckpointError(
                f"snapshots of ranks {first.rank} and {each.rank}: different training states; expected equal ones"
            )
        for piece in each.slices:
            pieces.setdefault(piece.name, []).append((str(each.rank), piece))
    tensors: Mapping[str, TensorEntry] = {
        name: TensorEntry(name, found[0][1].dtype, found[0][1].global_shape, tuple(found))
        for name, found in pieces.items()
    }
    return PartialIndex(first.state, tensors)
