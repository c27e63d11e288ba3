"""Snapshots and mirrors of two nodes, with the real agent code and real HTTP."""

import asyncio
import mmap
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from aiohttp import web

from elastic_pt.agent.snapshots import Snapshots, mirrored_by
from elastic_pt.checkpoint.history import StepHistory
from elastic_pt.checkpoint.memory import MemoryState
from elastic_pt.checkpoint.peer import Peer, PeerAddress, snapshot_path
from elastic_pt.checkpoint.restore import load_rows
from elastic_pt.checkpoint.snapshot import PAYLOAD_OFFSET, SnapshotBuffers
from elastic_pt.errors import CheckpointError, StoreError
from elastic_pt.membership.node import Formed
from elastic_pt.runlog.records import Generation, InMemory, Member
from tests.checkpoint.world import full_tensors, local_rows, training_state

DEADLINE_S = 60.0
TOKEN = "token"


@contextmanager
def served(snapshots: Snapshots) -> Iterator[int]:
    """Answer the requests of peers, on a port of the loopback interface."""
    ready, ports = threading.Event(), []
    loop = asyncio.new_event_loop()

    async def serve() -> web.AppRunner:
        application = web.Application()
        for path, answer in snapshots.routes.items():
            application.router.add_get(path, answer)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        ports.append(int(runner.addresses[0][1]))
        ready.set()
        return runner

    def run() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(serve())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(DEADLINE_S)
    try:
        yield ports[0]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(DEADLINE_S)


class Node:
    """One node with one worker: its scratch directory, its agent's part, and the worker's buffers."""

    def __init__(self, directory: Path, rank: int, copies: int = 1) -> None:
        directory.mkdir()
        self.directory = directory
        self.rank = rank
        self.complete: list[tuple[int, int]] = []
        self._changed = threading.Condition()
        self.snapshots = Snapshots(
            directory,
            f"node-{rank}",
            TOKEN,
            copies=copies,
            timeout_s=5.0,
            history=StepHistory(),
            on_complete=self._on_complete,
        )
        self.port = 0
        self.tensors = full_tensors()
        self.kept: set[int] = set()

    def _on_complete(self, generation: int, step: int) -> None:
        with self._changed:
            self.complete.append((generation, step))
            self._changed.notify_all()

    def await_complete(self, generation: int, step: int) -> None:
        """Block until this node and its mirrors hold a step."""
        with self._changed:
            assert self._changed.wait_for(
                lambda: (generation, step) in self.complete, DEADLINE_S
            ), self.complete

    def begin(self, generation: Generation) -> None:
        """Workers of a generation start."""
        self.snapshots.starts(
            cast(Formed, SimpleNamespace(generation=generation, node_rank=self.rank))
        )
        self.buffers = SnapshotBuffers(
            self.directory,
            generation.number,
            self.rank,
            local_rows(self.tensors, self.rank, generation.world_size),
        )
        self.buffers.allocate()

    def write(
        self, generation: int, step: int, *, complete_step: int = 0, checkpoint: bool = False
    ) -> None:
        """The worker takes a snapshot, or saves a checkpoint, which it keeps from then on."""
        if checkpoint:
            self.kept.add(step)
        buffer = self.buffers.write(
            training_state(step), kept=self.kept, complete_step=complete_step
        )
        self.snapshots.written(
            {
                "generation": generation,
                "rank": self.rank,
                "step": step,
                "buffer": buffer.number,
                "seconds": 0.0,
                "every_steps": 1,
                "step_seconds": 1.0,
                "complete_step": complete_step,
                "checkpoint": checkpoint,
            }
        )


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[list[Node]]:
    """Two nodes that mirror each other, before their first generation."""
    with ExitStack() as stack:
        nodes = [Node(tmp_path / f"node-{rank}", rank) for rank in range(2)]
        for node in nodes:
            node.port = stack.enter_context(served(node.snapshots))
            stack.callback(node.snapshots.close)
        yield nodes


def generation(nodes: list[Node], number: int = 1, memory: InMemory | None = None) -> Generation:
    """A generation of these nodes."""
    members = tuple(
        Member(f"node-{node.rank}", f"node-{node.rank}", "127.0.0.1", node.port, 1, 1)
        for node in nodes
    )
    return Generation(number, members, (1,) * len(nodes), "127.0.0.1", 1, None, "test", memory=memory)  # fmt: skip


def hold_step_5(nodes: list[Node], copies: int = 1) -> None:
    """Generation 1 of these nodes has a complete snapshot of step 5, with so many copies on other nodes."""
    for node in nodes:
        node.snapshots._copies = copies
        node.begin(generation(nodes))
    for node in nodes:
        node.write(1, 5)
    for node in nodes:
        node.await_complete(1, 5)


def restored(node: Node, following: Generation) -> dict[str, torch.Tensor]:
    """All rows of the state that a generation of this node alone resumes from."""
    places = node.snapshots.places(following)
    assert places is not None
    tensors = {name: torch.zeros_like(each) for name, each in node.tensors.items()}
    wanted = {name: (0, each.shape[0]) for name, each in tensors.items()}
    with MemoryState(places, range(len(places.shards))) as memory:
        assert memory.index.state.step == places.step
        load_rows(memory, memory.index, wanted, tensors)
    return tensors


def test_state_survives_the_loss_of_either_node(pair: list[Node]) -> None:
    """Each node copies the other one's rows, so a single node has every row of the step, bit for bit."""
    hold_step_5(pair)
    for node in pair:
        ranks = [(each.first_rank, each.end_rank) for each in node.snapshots.held]
        assert ranks == [(0, 2)]
        found = restored(node, generation([node], 2, InMemory(1, 5, (0, 0))))
        assert all(torch.equal(found[name], each) for name, each in node.tensors.items())


def test_rows_are_read_from_a_peer(pair: list[Node]) -> None:
    """A node without a copy of a row reads its byte ranges from the node that has it."""
    hold_step_5(pair, copies=0)
    following = generation(pair, 2, InMemory(1, 5, (0, 1)))
    found = restored(pair[0], following)
    assert all(torch.equal(found[name], each) for name, each in pair[0].tensors.items())


def test_step_is_complete_only_when_its_mirror_has_it(pair: list[Node]) -> None:
    """The worker may overwrite older rows only after the mirror has copied the newer ones."""
    first = generation(pair)
    pair[0].begin(first)
    pair[0].write(1, 5)
    # The other node has not started, so it copies nothing.
    with pair[0]._changed:
        assert not pair[0]._changed.wait_for(lambda: pair[0].complete, 0.5)
    pair[1].begin(first)
    pair[0].await_complete(1, 5)


def test_changed_byte_in_a_peers_memory_is_found(pair: list[Node]) -> None:
    """A bit that flips in a mapped file after its CRCs were computed is never copied into a weight."""
    hold_step_5(pair, copies=0)
    path = next(pair[1].directory.glob("snapshot-g1-rank-1-0"))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        content[-3] ^= 1
    with pytest.raises(CheckpointError, match="CRC-32"):
        restored(pair[0], generation(pair, 2, InMemory(1, 5, (0, 1))))


def test_state_is_kept_until_the_next_generation_has_its_own(pair: list[Node]) -> None:
    """The state that a generation resumed from stays on its nodes until it has a complete state on all nodes."""
    hold_step_5(pair)
    second = generation(pair, 2, InMemory(1, 5, (0, 1)))
    for node in pair:
        node.begin(second)
    assert {each.generation for node in pair for each in node.snapshots.held} == {1}
    for node in pair:
        node.write(2, 6)
    for node in pair:
        node.await_complete(2, 6)
    for node in pair:
        node.write(2, 7, complete_step=6)
    for node in pair:
        node.await_complete(2, 7)
        assert {each.generation for each in node.snapshots.held} == {2}
        assert not list(node.directory.glob("snapshot-g1-*"))


def test_state_of_another_lineage_is_dropped(pair: list[Node]) -> None:
    """A generation that resumes from the bucket starts with no state in memory."""
    hold_step_5(pair)
    for node in pair:
        node.begin(generation(pair, 2))
        assert node.snapshots.held == ()


def test_peer_that_holds_a_state_no_more_says_so(pair: list[Node]) -> None:
    """A missing state is an error that names the peer. A lost peer is another error, of the surroundings."""
    peer = Peer(PeerAddress("127.0.0.1", pair[0].port), TOKEN, 5.0)
    with pytest.raises(CheckpointError, match=f"{pair[0].port}.*does not hold it"):
        peer.read(snapshot_path(1, 5, 0), 0, 10)
    with pytest.raises(CheckpointError, match="does not hold it"):
        peer.record(snapshot_path(1, 5, 0))
    gone = Peer(PeerAddress("127.0.0.1", 1), TOKEN, 5.0)
    with pytest.raises(StoreError, match="refused"):
        gone.read(snapshot_path(1, 5, 0), 0, 10)


def test_node_that_joined_later_gets_the_lines_of_earlier_steps(pair: list[Node]) -> None:
    """Whichever node commits next can write a history without a hole, also one that was no member before."""
    old, new = (node.snapshots for node in pair)
    for step in range(1, 8):
        old._history.add({"step": step, "loss": 0.5 * step})
    formed = SimpleNamespace(generation=generation(pair, 2, InMemory(1, 6, (0, 0))), node_rank=1)
    new.complete_history(cast(Formed, formed), committed_step=2)
    assert [line.step for line in new._history.through(100)] == [3, 4, 5, 6]
    assert new._history.through(3) == old._history.through(3)[2:]
    # A node that was a member, then not, then again one, has a gap.
    new._history.forget(100)
    for step in (3, 6):
        new._history.add({"step": step, "loss": 1.0})
    new.complete_history(cast(Formed, formed), committed_step=2)
    assert [line.step for line in new._history.through(100)] == [3, 4, 5, 6]
    # Nothing is asked where nothing is missing.
    before = new._history.text()
    new.complete_history(cast(Formed, formed), committed_step=2)
    assert new._history.text() == before


def test_request_beyond_the_state_is_cut(pair: list[Node]) -> None:
    """A range that ends after the shard file is refused, and no byte of another file is sent."""
    first = generation(pair)
    for node in pair:
        node.begin(first)
    for node in pair:
        node.write(1, 5)
    pair[0].await_complete(1, 5)
    peer = Peer(PeerAddress("127.0.0.1", pair[0].port), TOKEN, 5.0)
    size = pair[0].buffers.size
    content = peer.read(snapshot_path(1, 5, 0), 0, size)
    file = next(pair[0].directory.glob("snapshot-g1-rank-0-0"))
    assert content == file.read_bytes()[PAYLOAD_OFFSET:]
    with pytest.raises(StoreError, match="expected"):
        peer.read(snapshot_path(1, 5, 0), size - 4, size + 4)


def test_every_node_has_its_mirrors_on_other_nodes() -> None:
    """In the ring, the nodes before a node copy it. A node never copies itself, and never copies a node twice."""
    for nodes in range(1, 9):
        for copies in range(4):
            ring = mirrored_by(nodes, copies)
            assert all(len(set(mirrors)) == min(copies, nodes - 1) for mirrors in ring)
            assert all(index not in mirrors for index, mirrors in enumerate(ring))
            work = [index for mirrors in ring for index in mirrors]
            assert len({work.count(index) for index in range(nodes)}) == 1
