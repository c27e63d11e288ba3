"""Snapshots and mirrors of two nodes, with the real agent code and real HTTP."""

import asyncio
import dataclasses
import mmap
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from aiohttp import web
from structlog.testing import capture_logs

from elastic_pt.agent import holdings
from elastic_pt.agent.restoring import complete_history
from elastic_pt.agent.snapshot_answers import _SENDS_MAX
from elastic_pt.agent.snapshots import Snapshots
from elastic_pt.checkpoint.history import StepHistory
from elastic_pt.checkpoint.memory import FailedCopy, MemoryState, Place, Places
from elastic_pt.checkpoint.peer import RANGE_BYTES_MAX, Peer, PeerAddress, snapshot_path
from elastic_pt.checkpoint.restore import load_rows
from elastic_pt.checkpoint.snapshot import (
    BUFFERS,
    PAYLOAD_OFFSET,
    SnapshotBuffers,
    open_buffer,
    require_crcs,
)
from elastic_pt.errors import CheckpointError, StoreError
from elastic_pt.membership.decision.at_risk import at_risk
from elastic_pt.membership.decision.mirrors import mirrored_by
from elastic_pt.membership.decision.status import Held, NodeStatus
from elastic_pt.membership.node import Formed
from elastic_pt.runlog.records import Generation, InMemory, Member
from elastic_pt.runlog.state import State
from tests.access import TLS
from tests.checkpoint.world import full_tensors, local_rows, training_state

DEADLINE_S = 60.0


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
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=TLS.server_context()).start()
        ports.append(int(runner.addresses[0][1]))
        ready.set()
        return runner

    def run() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(serve())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        # Long polls of readers that are gone.
        polls = asyncio.all_tasks(loop)
        for poll in polls:
            poll.cancel()
        loop.run_until_complete(asyncio.gather(*polls, return_exceptions=True))
        loop.close()

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

    def __init__(self, directory: Path, rank: int, mirror_bytes_per_s: int = 0) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.rank = rank
        self.complete: list[tuple[int, int]] = []
        self.changes: list[set[tuple[int, int]]] = []
        """The states that were held each time when the agent was woken."""
        self.skips = 0
        self.mirrored_bytes = 0
        self._changed = threading.Condition()
        self.history = StepHistory()
        self.snapshots = Snapshots(
            directory,
            f"node-{rank}",
            TLS,
            mirror_bytes_per_s=mirror_bytes_per_s,
            timeout_s=5.0,
            history=self.history,
            on_complete=self._on_complete,
            on_change=self._on_change,
            on_skip=self._on_skip,
            on_mirrored=self._on_mirrored,
        )
        self.port = 0
        self.tensors = full_tensors()
        self.kept: set[int] = set()

    def _on_skip(self) -> None:
        self.skips += 1

    def _on_mirrored(self, size: int) -> None:
        self.mirrored_bytes += size

    def _on_change(self) -> None:
        self.changes.append({(each.generation, each.step) for each in self.snapshots.held})

    def _on_complete(self, generation: int, step: int, mirrors_have_room: bool) -> None:
        with self._changed:
            self.mirrors_have_room = mirrors_have_room
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
        self,
        generation: int,
        step: int,
        *,
        complete_step: int = 0,
        mirrors_have_room: bool = True,
        checkpoint: bool = False,
        every_steps: int = 1,
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
                "every_steps": every_steps,
                "every_reason": "mirrors",
                "step_seconds": 1.0,
                "complete_seconds": 0.0,
                "complete_step": complete_step,
                "checkpoint": checkpoint,
                "mirrors_have_room": mirrors_have_room,
            }
        )


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[list[Node]]:
    """Two nodes that mirror each other, before their first generation."""
    with ExitStack() as stack:
        yield serving(stack, *(Node(tmp_path / f"node-{rank}", rank) for rank in range(2)))


def serving(stack: ExitStack, *nodes: Node) -> list[Node]:
    """These nodes answer each other until the end of the stack."""
    for node in nodes:
        node.port = stack.enter_context(served(node.snapshots))
        stack.callback(node.snapshots.close)
    return list(nodes)


def generation(
    nodes: list[Node], number: int = 1, memory: InMemory | None = None, *, copies: int = 1
) -> Generation:
    """A generation of these nodes, each with so many copies of its state on others."""
    members = tuple(
        Member(f"node-{node.rank}", f"node-{node.rank}", "127.0.0.1", node.port, 1, 1)
        for node in nodes
    )
    mirrors = mirrored_by([""] * len(nodes), copies, across_zones=False)
    slots = (1,) * len(nodes)
    return Generation(
        number, members, slots, "127.0.0.1", 1, None, "test", memory=memory, mirrors=mirrors
    )


def hold_step_5(nodes: list[Node], copies: int = 1) -> None:
    """Generation 1 of these nodes has a complete snapshot of step 5, with so many copies on other nodes."""
    for node in nodes:
        node.begin(generation(nodes, copies=copies))
    for node in nodes:
        node.write(1, 5)
    for node in nodes:
        node.await_complete(1, 5)


def restored(node: Node, following: Generation) -> dict[str, torch.Tensor]:
    """All rows of the state that a generation of this node alone resumes from."""
    places = node.snapshots.places(following)
    assert places is not None
    return read_all(node, places)


def read_all(
    node: Node, places: Places, on_failed: Callable[[FailedCopy], None] = lambda _: None
) -> dict[str, torch.Tensor]:
    """All rows of a state."""
    tensors = {name: torch.zeros_like(each) for name, each in node.tensors.items()}
    wanted = {name: (0, each.shape[0]) for name, each in tensors.items()}
    with MemoryState(places, range(len(places.shards)), on_failed) as memory:
        assert memory.index.state.step == places.step
        load_rows(memory, memory.index, wanted, tensors, memory.other_copy)
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


def test_step_is_complete_once_the_mirror_has_it(pair: list[Node]) -> None:
    """A planned change waits for the mirror's copy, and the agent is woken when it is there."""
    hold_step_5(pair)
    for node in pair:
        assert node.snapshots.is_complete(5, {"a-1", "b-1"})
        assert not node.snapshots.is_complete(6, {"a-1", "b-1"})
        assert node.changes[-1] == {(1, 5)}


def test_bytes_of_neighbours_are_counted(pair: list[Node]) -> None:
    """A node counts what it has copied of others' states, and not what its own workers wrote."""
    hold_step_5(pair)
    for node, other in (pair, reversed(pair)):
        copy = node.snapshots.find(State(1, 5), other.rank)
        assert copy is not None
        assert node.mirrored_bytes == copy.size > 0


def test_changed_byte_in_a_peers_memory_is_found(pair: list[Node]) -> None:
    """A bit that flips in a mapped file after its CRCs were computed is never copied into a weight."""
    hold_step_5(pair, copies=0)
    path = next(pair[1].directory.glob("snapshot-g1-rank-1-0"))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        content[-3] ^= 1
    with pytest.raises(CheckpointError, match="CRC-32"):
        restored(pair[0], generation(pair, 2, InMemory(1, 5, (0, 1))))


def test_after_a_bad_copy_the_good_one_is_read(pair: list[Node]) -> None:
    """A wrong byte, a missing file and a peer without an answer cost nothing while another copy is good."""
    hold_step_5(pair)
    path = next(pair[0].directory.glob("snapshot-g1-rank-1-0"))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        content[-3] ^= 1
    next(pair[0].directory.glob("snapshot-g1-rank-0-0")).unlink()
    both = InMemory(1, 5, (0, 0), ((1,), (1,)))
    places = pair[0].snapshots.places(generation(pair, 2, both))
    assert places is not None
    # A peer that is gone is asked first.
    gone = Place("gone", host="127.0.0.1", port=1)
    places = dataclasses.replace(places, shards=tuple((gone, *each) for each in places.shards))
    failed: list[FailedCopy] = []
    found = read_all(pair[0], places, failed.append)
    assert all(torch.equal(found[name], each) for name, each in pair[0].tensors.items())
    assert {(each.rank, each.holder, each.damaged) for each in failed} == {
        (0, "gone", False),
        (1, "gone", False),
        (0, "node-0", True),
        (1, "node-0", True),
    }


def test_own_copy_that_failed_is_not_offered_to_workers_again(pair: list[Node]) -> None:
    """The next generation's workers read the peer's copy, not the bad one of their own node."""
    hold_step_5(pair)
    failed = {"generation": 1, "step": 5, "rank": 1, "holder": "node-0", "damaged": True, "why": ""}
    pair[0].snapshots.copy_failed(failed)
    places = pair[0].snapshots.places(generation(pair, 2, InMemory(1, 5, (0, 1), ((1,), ()))))
    assert places is not None
    assert [[each.holder for each in shard] for shard in places.shards] == [
        ["node-0", "node-1"],
        ["node-1"],
    ]


def test_failed_crcs_are_tried_again(pair: list[Node]) -> None:
    """An error that passes, such as too many open files, does not end the snapshots of the generation."""
    first = generation(pair)
    for node in pair:
        node.begin(first)
    path = next(pair[0].directory.glob("snapshot-g1-rank-0-0"))
    away = path.rename(path.with_name("away"))
    for node in pair:
        node.write(1, 5)
    pair[1].await_complete(1, 5)
    assert not pair[0].complete
    away.rename(path)
    pair[0].await_complete(1, 5)


def test_bound_for_bytes_spreads_a_copy_over_time(tmp_path: Path) -> None:
    """A mirror with a bound takes as long as its bytes need. The workers wait for it with their next snapshot."""
    with ExitStack() as stack:
        bounded = Node(tmp_path / "node-1", 1, mirror_bytes_per_s=8 << 20)
        pair = serving(stack, Node(tmp_path / "node-0", 0), bounded)
        first = generation(pair)
        for node in pair:
            node.begin(first)
        began_s = time.monotonic()
        pair[0].write(1, 5)
        pair[0].await_complete(1, 5)
        pair[0].write(1, 6)
        pair[0].await_complete(1, 6)
        # Two copies of 4.8 MB. The time of the last range does not count.
        assert time.monotonic() - began_s >= 0.9


def test_neighbour_of_a_full_node_continues_without_a_copy(
    tmp_path: Path, small_memory: Path
) -> None:
    """A real mirror without room says so: the neighbour's steps are complete without it, counted, and at risk."""
    with ExitStack() as stack:
        writer, full = pair = serving(stack, Node(tmp_path / "node-0", 0), Node(small_memory, 1))
        first = generation(pair)
        writer.begin(first)
        # Of the full node only its agent runs: its worker has no buffers.
        full.snapshots.starts(cast(Formed, SimpleNamespace(generation=first, node_rank=1)))
        for step in (5, 6):
            writer.write(
                1, step, complete_step=step - 1 if step > 5 else 0, mirrors_have_room=False
            )
            writer.await_complete(1, step)
            assert not writer.mirrors_have_room
        assert writer.skips == 2
        assert full.snapshots.held == ()
        # Whatever the other node's worker has: nobody else has the rows of this one.
        others = Held(1, 6, 1, 2, 2)
        risks = {}
        for copied in (False, True):
            held = [
                (*writer.snapshots.held, others),
                (others, *(writer.snapshots.held if copied else ())),
            ]
            answers = {
                member.incarnation: dataclasses.replace(NodeStatus.first(member, {}), held=each)
                for member, each in zip(first.members, held, strict=True)
            }
            risks[copied] = at_risk(first, answers, step=6, committed_step=2)
        assert risks[False].node == risks[False].any_node == 4
        assert risks[True].any_node == 0


def test_mirror_that_takes_too_long_is_counted(
    pair: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its neighbour waits no longer, and the snapshot counts as left out, once."""
    monkeypatch.setattr(holdings, "MIRROR_S", 0.0)
    pair[0].begin(generation(pair))
    pair[0].write(1, 5)
    while not pair[0].snapshots.held:
        assert not pair[0].complete
        threading.Event().wait(0.01)
    with capture_logs() as events:
        pair[0].snapshots.note_step()
        pair[0].snapshots.note_step()
    assert [each["event"] for each in events] == ["mirror_too_slow"]
    assert (pair[0].complete, pair[0].skips) == ([(1, 5)], 1)


def test_workers_without_room_drop_spare_copies(pair: list[Node]) -> None:
    """No room beside the state that is resumed from: the copies that others hold too go first. That is counted."""
    hold_step_5(pair)
    for node in pair:
        node.snapshots.starts(
            cast(
                Formed,
                SimpleNamespace(
                    generation=generation(pair, 2, InMemory(1, 5, (0, 1), ((1,), (0,)))),
                    node_rank=node.rank,
                ),
            )
        )
    with capture_logs() as events:
        pair[0].snapshots.no_room()
        pair[0].snapshots.no_room()
    assert [each["event"] for each in events] == ["copies_dropped"]
    assert [(each.first_rank, each.end_rank) for each in pair[0].snapshots.held] == [(0, 1)]
    assert pair[0].skips == 2


def test_own_rows_are_read_without_the_network(tmp_path: Path) -> None:
    """After a worker's crash nothing is read from a peer: the peer's server is stopped, and no copy fails."""
    with ExitStack() as stack:
        first = Node(tmp_path / "node-0", 0)
        stack.callback(first.snapshots.close)
        first.port = stack.enter_context(served(first.snapshots))
        other = Node(tmp_path / "node-1", 1)
        stack.callback(other.snapshots.close)
        with served(other.snapshots) as other.port:
            hold_step_5([first, other])
        both = InMemory(1, 5, (0, 1), ((1,), (0,)))
        places = first.snapshots.places(generation([first, other], 2, both))
        assert places is not None
        failed: list[FailedCopy] = []
        found = read_all(first, places, failed.append)
        assert all(torch.equal(found[name], each) for name, each in first.tensors.items())
        assert failed == []


def test_cadence_and_its_reason_are_logged_once(pair: list[Node]) -> None:
    """The event log says how often snapshots are taken, and what sets that, each time when it changes."""
    pair[0].begin(generation(pair))
    with capture_logs() as events:
        for step, every in ((5, 1), (6, 1), (7, 3)):
            pair[0].write(1, step, every_steps=every)
    logged = [each for each in events if each["event"] == "snapshot_cadence"]
    assert [(each["every_steps"], each["reason"]) for each in logged] == [
        (1, "mirrors"),
        (3, "mirrors"),
    ]


def test_stopped_mirror_frees_its_memory(pair: list[Node]) -> None:
    """A mapping of a removed file keeps its memory. A mirror that waits for its neighbour's next step ends at once."""
    hold_step_5(pair)
    mirrors = [thread for thread in threading.enumerate() if thread.name == "mirror"]
    for node in pair:
        node.snapshots.stop_mirrors()
    for thread in mirrors:
        thread.join(2.0)
        assert not thread.is_alive()
    # One mapping is left for each file: that of its worker.
    maps = Path("/proc/self/maps").read_text()
    for node in pair:
        other = 1 - node.rank
        assert f"{node.directory}/snapshot-g1-rank-{node.rank}-0" in maps
        assert f"{node.directory}/snapshot-g1-rank-{other}-0" not in maps


def test_range_that_is_too_large_is_refused(pair: list[Node]) -> None:
    """A single request never keeps the server busy for long; `Peer` splits a longer read into several ranges."""
    hold_step_5(pair)
    url = TLS.url("127.0.0.1", pair[0].port) + snapshot_path(1, 5, 0)
    request = urllib.request.Request(url, headers={"Range": f"bytes=0-{RANGE_BYTES_MAX}"})
    with pytest.raises(urllib.error.HTTPError, match="416"):
        urllib.request.urlopen(request, timeout=DEADLINE_S, context=TLS.client_context())


def test_mirror_leaves_room_for_a_buffer_of_this_node(
    pair: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker without a buffer saves no checkpoints. So a mirror needs room for one buffer more than its own."""
    for node in pair:
        node.begin(generation(pair, 1))
    needed = (BUFFERS + 1) * (PAYLOAD_OFFSET + pair[0].buffers.size)
    free = [needed - 1]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free[0]))
    pair[0].write(1, 5)
    pair[0].await_complete(1, 5)
    assert not pair[0].mirrors_have_room
    free[0] = needed
    pair[0].write(1, 6, complete_step=5, mirrors_have_room=False)
    pair[0].await_complete(1, 6)
    assert pair[0].mirrors_have_room


def test_reader_beyond_the_servers_limits_succeeds_later(
    pair: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While all places for sending are taken, a range is refused with 503 within half a second. Then it is sent."""
    hold_step_5(pair)
    free = threading.Event()
    send = pair[0].snapshots._answers._send

    async def stalled(*arguments: Any) -> web.StreamResponse:
        """A reader that takes nothing for a while."""
        while not free.is_set():
            await asyncio.sleep(0.01)
        return await send(*arguments)

    monkeypatch.setattr(pair[0].snapshots._answers, "_send", stalled)
    url = TLS.url("127.0.0.1", pair[0].port) + snapshot_path(1, 5, 0)
    request = urllib.request.Request(url, headers={"Range": "bytes=0-9"})

    def read() -> int:
        try:
            with urllib.request.urlopen(
                request, timeout=DEADLINE_S, context=TLS.client_context()
            ) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    with ThreadPoolExecutor(_SENDS_MAX + 1) as readers:
        first = [readers.submit(read) for _ in range(_SENDS_MAX + 1)]
        done, _ = wait(first, DEADLINE_S, FIRST_COMPLETED)
        assert [each.result() for each in done] == [503]
        free.set()
        assert sorted(each.result() for each in first) == [206] * _SENDS_MAX + [503]
    assert read() == 206


def test_mirror_without_room_says_so(pair: list[Node]) -> None:
    """Its neighbour goes on, and keeps the state that the generation resumed from: the newer one has no copy."""
    hold_step_5(pair)
    pair[0].begin(generation(pair, 2, InMemory(1, 5, (0, 1), ((1,), (0,)))))
    pair[0].write(2, 6)
    peer = Peer(PeerAddress("127.0.0.1", pair[0].port), TLS, 5.0)
    assert pair[0].skips == 0
    asked = peer.get("/v1/snapshots/next?generation=2&after=0&copied=1&mirror=node-1", 100)
    assert asked == b'{"step": 6, "kept": [], "complete": 0}'
    threading.Thread(
        target=peer.get,
        args=("/v1/snapshots/next?generation=2&after=6&copied=0&mirror=node-1", 100),
        daemon=True,
    ).start()
    pair[0].await_complete(2, 6)
    assert not pair[0].mirrors_have_room
    assert pair[0].skips == 1
    pair[0].write(2, 7, complete_step=6, mirrors_have_room=False)
    assert {each.generation for each in pair[0].snapshots.held} == {1, 2}
    pair[0].snapshots.committed(6)
    assert {each.generation for each in pair[0].snapshots.held} == {2}


def test_reader_of_a_file_that_has_become_shorter_is_told_at_once(pair: list[Node]) -> None:
    """It must not wait for its timeout: another copy may be good."""
    hold_step_5(pair)
    path = next(pair[0].directory.glob("snapshot-g1-rank-0-0"))
    with path.open("r+b") as file:
        file.truncate(PAYLOAD_OFFSET + 10)
    peer = Peer(PeerAddress("127.0.0.1", pair[0].port), TLS, 30.0)
    began_s = time.monotonic()
    with pytest.raises(StoreError):
        peer.read_into(snapshot_path(1, 5, 0), 0, memoryview(bytearray(100)))
    assert time.monotonic() - began_s < 20.0


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
    peer = Peer(PeerAddress("127.0.0.1", pair[0].port), TLS, 5.0)
    with pytest.raises(CheckpointError, match=f"{pair[0].port}.*does not hold it"):
        peer.read_into(snapshot_path(1, 5, 0), 0, memoryview(bytearray(10)))
    with pytest.raises(CheckpointError, match="does not hold it"):
        peer.record(snapshot_path(1, 5, 0))
    gone = Peer(PeerAddress("127.0.0.1", 1), TLS, 5.0)
    with pytest.raises(StoreError, match="refused"):
        gone.read_into(snapshot_path(1, 5, 0), 0, memoryview(bytearray(10)))


def keep_step_6(nodes: list[Node]) -> None:
    """Both workers keep step 6 for a checkpoint, and take snapshots of 7, 8 and 9, each complete before the next."""
    hold_step_5(nodes)
    for step in range(6, 10):
        for node in nodes:
            node.write(1, step, complete_step=step - 1, checkpoint=step == 6)
        for node in nodes:
            node.await_complete(1, step)


def held_steps(node: Node) -> dict[tuple[int, int], int | None]:
    """What the buffer files on a node hold, by rank and number."""
    found = {}
    for path in node.directory.glob("snapshot-g1-rank-*"):
        _, _, _, rank, number = path.name.split("-")
        with open_buffer(path) as content:
            found[int(rank), int(number)] = content.step()
    return found


def test_kept_step_is_held_by_its_node_and_its_mirror(pair: list[Node]) -> None:
    """A node has the rows of a kept step of its own workers and of the neighbour that it mirrors, while newer steps come."""
    keep_step_6(pair)
    for node in pair:
        kept = node.snapshots.kept_state(1, 6)
        assert sorted(kept) == [0, 1]
        for rank, (path, record) in kept.items():
            assert (record.generation, record.step, record.rank) == (1, 6, rank)
            with open_buffer(path) as content:
                assert content.step() == 6
                found = bytearray(record.size)
                content.read_into(0, [memoryview(found)])
                require_crcs(record, memoryview(found))
        assert node.snapshots.checkpoints() == ((1, 6),)
        assert node.snapshots.kept_state(1, 7) == {}


def test_released_step_is_overwritten_on_its_mirror_too(pair: list[Node]) -> None:
    """After the owner has released a step, its mirror uses that buffer again, and keeps nothing of it."""
    keep_step_6(pair)
    for node in pair:
        node.kept.clear()
        node.snapshots.release(1, 6)
        node.snapshots.release(1, 6)
    for step in range(10, 14):
        for node in pair:
            node.write(1, step, complete_step=step - 1)
        for node in pair:
            node.await_complete(1, step)
    for node in pair:
        assert 6 not in held_steps(node).values()
        assert node.snapshots.kept_state(1, 6) == {}


def test_kept_step_outlives_its_generation_until_it_is_released(pair: list[Node]) -> None:
    """A new generation, even one from the bucket, removes no file of a kept step. `release` does, and no other file."""
    keep_step_6(pair)
    before = {node.rank: node.snapshots.kept_state(1, 6) for node in pair}
    for node in pair:
        node.begin(generation(pair, 2))
        assert node.snapshots.held == ()
        assert node.snapshots.kept_state(1, 6) == before[node.rank]
        left = set(node.directory.glob("snapshot-g1-*"))
        assert left == {path for path, _ in before[node.rank].values()}
        node.snapshots.release(1, 6)
        assert not list(node.directory.glob("snapshot-g1-*"))
        assert len(list(node.directory.glob("snapshot-g2-*"))) == BUFFERS


def test_node_that_joined_later_gets_the_lines_of_earlier_steps(pair: list[Node]) -> None:
    """Whichever node commits next can write a history without a hole, also one that was no member before."""
    old, new = (node.history for node in pair)
    for step in range(1, 8):
        old.add({"step": step, "loss": 0.5 * step})
    following = generation(pair, 2, InMemory(1, 6, (0, 0)))
    formed = cast(Formed, SimpleNamespace(generation=following, node_rank=1))
    complete_history(new, formed, 2, TLS, 5.0)
    assert [line.step for line in new.through(100)] == [3, 4, 5, 6]
    assert new.through(3) == old.through(3)[2:]
    # A node that was a member, then not, then again one, has a gap.
    new.forget(100)
    for step in (3, 6):
        new.add({"step": step, "loss": 1.0})
    complete_history(new, formed, 2, TLS, 5.0)
    assert [line.step for line in new.through(100)] == [3, 4, 5, 6]
    # No peer has the line of step 2, so the history will have a hole. Training goes on.
    with capture_logs() as events:
        complete_history(new, formed, -1, TLS, 5.0)
    assert [(each["event"], each.get("first_step")) for each in events] == [
        ("history_incomplete", 0)
    ]
    # Nothing is asked where nothing is missing.
    before = new.text()
    complete_history(new, formed, 2, TLS, 5.0)
    assert new.text() == before


def test_request_beyond_the_state_is_cut(pair: list[Node]) -> None:
    """A range that ends after the shard file is refused, and no byte of another file is sent."""
    first = generation(pair)
    for node in pair:
        node.begin(first)
    for node in pair:
        node.write(1, 5)
    pair[0].await_complete(1, 5)
    peer = Peer(PeerAddress("127.0.0.1", pair[0].port), TLS, 5.0)
    size = pair[0].buffers.size
    content = bytearray(size)
    peer.read_into(snapshot_path(1, 5, 0), 0, memoryview(content))
    file = next(pair[0].directory.glob("snapshot-g1-rank-0-0"))
    assert content == file.read_bytes()[PAYLOAD_OFFSET:]
    with pytest.raises(StoreError, match="expected"):
        peer.read_into(snapshot_path(1, 5, 0), size - 4, memoryview(bytearray(8)))
