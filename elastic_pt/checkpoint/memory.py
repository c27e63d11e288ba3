"""Reads the state of one step from the memory of several nodes (worker process).

    places (from the GENERATION) ─► the records of the buffers that hold wanted rows ─► MemoryState ─► restore.load_rows
              own buffer files: mapped, no network          peers: byte ranges over HTTP

A worker asks for rows, for any number of writers and readers. Rows are verified as in a committed checkpoint: each
block is compared with its CRC-32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from elastic_pt.checkpoint.index import REQUEST_THREADS, PartialIndex, in_order
from elastic_pt.checkpoint.layout import TensorEntry, TensorSlice
from elastic_pt.checkpoint.peer import Peer, PeerAddress, snapshot_path
from elastic_pt.checkpoint.snapshot import BufferContent, Snapshot, open_buffer
from elastic_pt.errors import CheckpointError


@dataclass(frozen=True)
class Place:
    """Where the rows of one old rank are: in a buffer file of this node, or in a peer's memory."""

    rank: int
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
    shards: tuple[Place, ...]
    """One for each worker of that generation, by rank."""
    token: str
    timeout_s: float


class MemoryState:
    """The state of one step in the memory of several nodes. `index` and `read_into` are for `load_rows`."""

    def __init__(self, places: Places, ranks: Sequence[int]) -> None:
        """Open the buffers of these old ranks and read their records.

        Raises `CheckpointError` if one holds another state, or none, and `StoreError` if a peer does not answer.
        """
        self._places = places
        self._buffers: dict[int, BufferContent] = {}
        self._peers: dict[PeerAddress, Peer] = {}
        for rank in ranks:
            place = places.shards[rank]
            if place.path:
                self._buffers[rank] = open_buffer(Path(place.path))
            else:
                address = PeerAddress(place.host, place.port)
                if address not in self._peers:
                    self._peers[address] = Peer(address, places.token, places.timeout_s)
        self.index = _index_of(list(in_order(ranks, self._record, REQUEST_THREADS)))
        """The training state, and the places of its rows."""

    def read_into(self, key: str, start: int, parts: Sequence[memoryview]) -> int:
        """Fill the parts with the bytes of the shard file of the old rank `key`, from `start` on. See `index.Memory`."""
        rank = int(key)
        buffer = self._buffers.get(rank)
        if buffer is not None:
            return buffer.read_into(start, parts)
        self._peer(rank).read_into(self._path(rank), start, *parts)
        return sum(len(part) for part in parts)

    def __enter__(self) -> "MemoryState":
        return self

    def __exit__(self, *_: object) -> None:
        """Unmap the buffers."""
        for buffer in self._buffers.values():
            buffer.mapped.close()

    def _record(self, rank: int) -> Snapshot:
        place = self._places.shards[rank]
        found = (
            Snapshot.from_bytes(place.record.encode())
            if place.path
            else self._peer(rank).record(self._path(rank))
        )
        wanted = (self._places.generation, self._places.step, rank)
        if (found.generation, found.step, found.rank) != wanted:
            raise CheckpointError(
                f"snapshot of generation {found.generation}, step {found.step}, rank {found.rank}: expected "
                "generation {}, step {}, rank {}".format(*wanted)
            )
        return found

    def _path(self, rank: int) -> str:
        return snapshot_path(self._places.generation, self._places.step, rank)

    def _peer(self, rank: int) -> Peer:
        place = self._places.shards[rank]
        return self._peers[PeerAddress(place.host, place.port)]


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
