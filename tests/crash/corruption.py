"""Random changes to stored states: each is found before a weight is used, or changes no weight.

    truth ─► a committed checkpoint | a peer's snapshot over HTTP | a mapped buffer file with its record
                 one change: flip, truncate, swap, delete ─► read as a worker does ─► found | equal | WRONG

`found` is an error of the reader. `equal`: the change is where no reader looks (a notice, padding, a header that was
already hashed into the record), and every row has its bits. Anything else is a defect.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch

from elastic_pt.checkpoint import shard_file
from elastic_pt.checkpoint.index import read_index
from elastic_pt.checkpoint.layout import rows_per_block
from elastic_pt.checkpoint.memory import MemoryState, Place, Places
from elastic_pt.checkpoint.restore import load_rows
from elastic_pt.checkpoint.snapshot import (
    PAYLOAD_OFFSET,
    SnapshotBuffers,
    begin_buffer,
    describe_snapshot,
)
from elastic_pt.errors import CheckpointError, StoreError
from elastic_pt.store.open import open_store
from tests.access import TLS
from tests.agent.test_snapshots import Node, generation, served
from tests.checkpoint.world import (
    RUN_ID,
    full_tensors,
    local_rows,
    same_bits,
    training_state,
    write_checkpoint,
)

SHAPES: Final = {"head.weight": (7, 3), "norm.weight": (5,), "wide": (24, 40)}
RANKS: Final = 3
STEP: Final = 5
BLOCK_BYTES: Final = 512
"""Small blocks, so that a tensor has several."""
DELETE: Final = "delete"
KINDS: Final = ("flip", "truncate", "swap ranges", "swap files", DELETE, "zero", "repeat")

_TRIES: Final = 20
_PEER_TIMEOUT_S: Final = 0.2
"""A peer with a truncated file sends fewer bytes than it has announced, so the reader waits this long."""

Read = Callable[[dict[str, torch.Tensor]], None]
"""Fills tensors with all rows of the state. Raises the errors of a worker's reader."""


@dataclass(frozen=True)
class Target:
    """A stored state, the files of which are changed."""

    name: str
    files: Sequence[Path]
    read: Read
    forgets: bool = False
    """Whether the owner forgets a file that it finds deleted, so that only the last change may be a deletion."""


class Outcomes(Counter[tuple[str, str, str]]):
    """How often each kind of change to each target had each outcome."""

    def wrong(self) -> int:
        """The number of changes that changed a weight."""
        return sum(count for (_, _, outcome), count in self.items() if outcome == "WRONG")


def run(seed: int, count: int, folder: Path) -> Outcomes:
    """Make `count` random changes. A share of them is for each target. Runs in a process of its own."""
    shard_file.rows_per_block = partial(rows_per_block, block_bytes=BLOCK_BYTES)
    torch.set_num_threads(1)
    truth = full_tensors(SHAPES, seed)
    draw = random.Random(seed)
    outcomes = Outcomes()
    with ExitStack() as stack:
        targets = [
            (_checkpoint(folder / "run", truth), 0.55),
            (_mapped(folder / "mapped", truth), 0.25),
            (stack.enter_context(_of_peers(folder / "peers", truth)), 0.15),
        ]
        for target, share in targets:
            _require_whole(target, truth)
            for _ in range(int(count * share)):
                kind = draw.choice(
                    [each for each in KINDS if not (target.forgets and each == DELETE)]
                )
                outcomes[target.name, kind, _changed(target, kind, draw, truth)] += 1
            _require_whole(target, truth)
            outcomes[target.name, DELETE, _changed(target, DELETE, draw, truth)] += 1
    torn = _TornWrites(folder / "torn", truth)
    for _ in range(count - outcomes.total()):
        outcomes["buffer not hashed yet", "torn write", torn.outcome(draw)] += 1
    return outcomes


def _require_whole(target: Target, truth: Mapping[str, torch.Tensor]) -> None:
    """Fail unless the unchanged state is read. On a busy machine a peer may miss its short timeout, so try again."""
    outcomes = (_outcome(target.read, truth) for _ in range(_TRIES))
    assert next((each for each in outcomes if each != "found"), "") == "equal", target.name


def _outcome(read: Read, truth: Mapping[str, torch.Tensor]) -> str:
    found = {name: torch.full_like(each, float("nan")) for name, each in truth.items()}
    try:
        read(found)
    except (CheckpointError, StoreError):
        return "found"
    return "equal" if all(same_bits(found[name], truth[name]) for name in truth) else "WRONG"


def _changed(
    target: Target, kind: str, draw: random.Random, truth: Mapping[str, torch.Tensor]
) -> str:
    """The outcome of one change, which is undone afterwards."""
    path = draw.choice(target.files)
    other = draw.choice(target.files)
    before = {each: each.read_bytes() for each in (path, other)}
    try:
        _change(kind, path, other, draw)
        if all(each.exists() and each.read_bytes() == data for each, data in before.items()):
            return "no change"
        return _outcome(target.read, truth)
    finally:
        for each, data in before.items():
            _put(each, data)


def _change(kind: str, path: Path, other: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    size = len(data)
    length = draw.choice((1, 4, 40, 160, BLOCK_BYTES, size // 2))
    first, second = (draw.randrange(max(1, size - length)) for _ in range(2))
    match kind:
        case "flip":
            data[draw.randrange(size)] ^= 1 << draw.randrange(8)
        case "truncate":
            del data[draw.randrange(size) :]
        case "swap ranges":
            one, two = data[first : first + length], data[second : second + length]
            data[first : first + length] = two
            data[second : second + length] = one
        case "swap files":
            _put(path, other.read_bytes())
            _put(other, bytes(data))
            return
        case "delete":
            path.unlink()
            return
        case "zero":
            data[first : first + length] = bytes(min(length, size - first))
        case "repeat":
            data[first : first + length] = data[second : second + length]
    _put(path, bytes(data))


def _put(path: Path, data: bytes) -> None:
    """Write in place: other processes and this one have the file mapped."""
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(data)
        file.truncate()


def _checkpoint(root: Path, truth: Mapping[str, torch.Tensor]) -> Target:
    """A committed checkpoint in a local store."""
    scratch = root.with_name("scratch")
    scratch.mkdir()
    store = open_store(f"file://{root}")
    checkpoint = write_checkpoint(store, scratch, truth, RANKS, step=STEP, workers=2)
    wanted = {name: (0, each.shape[0]) for name, each in truth.items()}

    def read(into: dict[str, torch.Tensor]) -> None:
        index = read_index(store, checkpoint, RUN_ID, wanted)
        assert index.state == training_state(STEP)
        load_rows(store, index, wanted, into)

    files = [each for each in sorted((root / "ckpt").rglob("*")) if each.is_file()]
    return Target("checkpoint in a store", files, read)


def _read_memory(places: Places, into: dict[str, torch.Tensor]) -> None:
    wanted = {name: (0, each.shape[0]) for name, each in into.items()}
    with MemoryState(places, range(len(places.shards))) as memory:
        assert memory.index.state == training_state(STEP)
        load_rows(memory, memory.index, wanted, into)


def _mapped(folder: Path, truth: Mapping[str, torch.Tensor]) -> Target:
    """The buffer files of a node's own workers with their records, which are files here so that they can be changed."""
    folder.mkdir()
    files = []
    for rank in range(RANKS):
        buffers = SnapshotBuffers(folder, 1, rank, local_rows(truth, rank, RANKS))
        buffers.allocate()
        buffer = buffers.write(training_state(STEP))
        record = describe_snapshot(buffer, folder)
        assert record is not None
        text = folder / f"record-{rank}"
        text.write_bytes(record.to_bytes())
        files.append((buffer.path(folder), text))

    def read(into: dict[str, torch.Tensor]) -> None:
        try:
            shards = tuple(
                (Place(f"node-{rank}", str(path), text.read_bytes().decode()),)
                for rank, (path, text) in enumerate(files)
            )
        except (OSError, UnicodeDecodeError) as error:  # the record is text in the product
            raise CheckpointError(str(error)) from error
        _read_memory(Places(1, STEP, shards, TLS, 5.0), into)

    return Target("mapped buffer and record", [each for pair in files for each in pair], read)


@contextmanager
def _of_peers(folder: Path, truth: Mapping[str, torch.Tensor]) -> Iterator[Target]:
    """The buffers of other nodes, read over HTTP."""
    folder.mkdir()
    with ExitStack() as stack:
        nodes = [Node(folder / f"node-{rank}", rank) for rank in range(2)]
        for node in nodes:
            node.tensors = dict(truth)
            node.port = stack.enter_context(served(node.snapshots))
            stack.callback(node.snapshots.close)
        for node in nodes:
            node.begin(generation(nodes))
        for node in nodes:
            node.write(1, STEP)
        for node in nodes:
            node.await_complete(1, STEP)
        shards = tuple(
            (Place(rank, host="127.0.0.1", port=node.port),) for rank, node in enumerate(nodes)
        )
        places = Places(1, STEP, shards, TLS, _PEER_TIMEOUT_S)
        own = [
            path
            for node in nodes
            for path in node.directory.glob(f"snapshot-g1-rank-{node.rank}-*")
        ]
        yield Target(
            "peer's snapshot over HTTP",
            own,
            lambda into: _read_memory(places, into),
            forgets=True,
        )


class _TornWrites:
    """A worker's buffer that is overwritten from its beginning to a random byte, and not finished."""

    def __init__(self, folder: Path, truth: Mapping[str, torch.Tensor]) -> None:
        folder.mkdir()
        self._folder = folder
        buffers = SnapshotBuffers(folder, 1, 0, local_rows(truth, 0, 1))
        buffers.allocate()
        self._buffer = buffers.write(training_state(STEP))
        self._path = self._buffer.path(folder)
        self._before = self._path.read_bytes()

    def outcome(self, draw: random.Random) -> str:
        """What the agent finds in the buffer. It has not hashed it before."""
        torn = bytearray(self._before)
        begin_buffer(memoryview(torn), STEP + 1)  # type: ignore[arg-type]
        end = draw.randrange(PAYLOAD_OFFSET, len(torn))
        torn[PAYLOAD_OFFSET:end] = draw.randbytes(end - PAYLOAD_OFFSET)
        _put(self._path, bytes(torn))
        try:
            found = describe_snapshot(self._buffer, self._folder)
        finally:
            _put(self._path, self._before)
        return "found" if found is None else "WRONG"
