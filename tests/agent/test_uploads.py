"""What a node uploads: one checkpoint in flight, one pending, and the shares of lost nodes."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_pt.agent.uploads import Uploads
from elastic_pt.checkpoint.layout import checkpoint_directory, shard_key
from elastic_pt.checkpoint.nodes import NodeRefusal, notice_key
from elastic_pt.checkpoint.upload import KeptShard
from elastic_pt.runlog.state import State
from elastic_pt.store.port import Source, Store
from tests.checkpoint.world import full_tensors, memory_store, stage, training_state, upload_nodes

WAIT_S = 20.0
SMALL = {"b": (3,), "w": (4, 2)}


class Gated:
    """A store whose writes wait at a gate."""

    def __init__(self) -> None:
        self.store = memory_store()
        self.gate = threading.Event()
        self.begun = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def write(self, key: str, source: Source) -> None:
        """See `Store.write`."""
        self.begun.set()
        assert self.gate.wait(WAIT_S)
        self.store.write(key, source)


class Uploading:
    """The uploads of a node with two workers, and what it reported."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Gated()
        self.said: list[tuple[str, State, int]] = []
        self._heard = threading.Condition()
        store: Store = self.store  # type: ignore[assignment]
        self.uploads = Uploads(
            store,
            on_uploaded=lambda state, ranks: self._say("uploaded", state, ranks.start),
            on_failed=lambda state, _: self._say("failed", state, -1),
            on_dropped=lambda state, _: self._say("dropped", state, -1),
        )

    def _say(self, what: str, state: State, first_rank: int) -> None:
        with self._heard:
            self.said.append((what, state, first_rank))
            self._heard.notify_all()

    def until(self, what: str, state: State, first_rank: int = 0) -> None:
        """Wait for a report."""
        wanted = (what, state, first_rank)
        with self._heard:
            assert self._heard.wait_for(lambda: wanted in self.said, WAIT_S), self.said

    def shards(self, state: State) -> list[KeptShard]:
        """The buffers of two nodes with two workers each."""
        training = training_state(state.step)
        return stage(self.folder, full_tensors(SMALL), 4, directory(state), training, workers=2)

    def save(self, state: State, *ranks: int) -> None:
        """Workers of this node keep their states."""
        for shard in self.shards(state):
            if shard.rank in ranks:
                self.uploads.add(shard)

    def has_notice(self, state: State, first_rank: int = 0) -> bool:
        """Whether the bucket has a whole share."""
        return self.store.size(notice_key(directory(state), first_rank)) is not None

    def until_written(self, key: str) -> None:
        """Wait until the bucket has an object."""
        give_up_at_s = time.monotonic() + WAIT_S
        while self.store.size(key) is None:
            assert time.monotonic() < give_up_at_s
            time.sleep(0.01)

    def end(self) -> None:
        """Let all requests pass, and end the thread."""
        self.store.gate.set()
        self.uploads.close()


def directory(state: State) -> str:
    """The directory of a checkpoint."""
    return checkpoint_directory(state.step, state.generation, "beef")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Uploading]:
    """Such a node, and a store that does not answer yet."""
    node = Uploading(tmp_path)
    yield node
    node.end()


def test_one_is_in_flight_and_a_newer_one_replaces_the_pending_one(node: Uploading) -> None:
    """Generation 1's checkpoint stays in flight; of those that come after it only the newest is uploaded."""
    first, second, third = State(1, 10), State(2, 20), State(3, 30)
    for state in (first, second, third):
        node.save(state, 0, 1)
    assert node.said == [("dropped", second, -1)]
    assert node.uploads.states() == {first, third}
    node.store.gate.set()
    node.until("uploaded", third)
    assert node.said[1:] == [("uploaded", first, 0), ("uploaded", third, 0)]
    assert node.has_notice(first)
    assert node.store.keys(directory(second)) == []


def test_the_next_one_starts_after_an_abandoned_one(node: Uploading) -> None:
    """The request that is running ends by itself; the node's other shard is not uploaded."""
    first, second = State(1, 10), State(2, 20)
    node.save(first, 0, 1)
    assert node.store.begun.wait(WAIT_S)
    node.save(second, 0, 1)
    node.uploads.abandon(first)
    node.store.gate.set()
    node.until("uploaded", second)
    assert node.store.size(shard_key(directory(first), 1)) is None
    assert not node.has_notice(first)


def test_an_abandoned_pending_checkpoint_is_never_uploaded(node: Uploading) -> None:
    """Only the one in flight goes on."""
    first, second = State(1, 10), State(2, 20)
    node.save(first, 0, 1)
    node.save(second, 0, 1)
    node.uploads.abandon(second)
    node.uploads.abandon(State(9, 9))
    assert node.uploads.states() == {first}
    node.store.gate.set()
    node.until("uploaded", first)
    assert node.store.keys(directory(second)) == []


def test_a_failure_of_an_abandoned_upload_is_none(node: Uploading) -> None:
    """The buffer may be overwritten once the checkpoint is over. The upload that reads it then fails, without a report."""
    first, second = State(1, 10), State(2, 20)
    node.save(first, 0, 1)
    assert node.store.begun.wait(WAIT_S)
    node.uploads.abandon(first)
    for path in node.folder.rglob("snapshot-*"):
        path.unlink()
    node.save(second, 0, 1)
    node.store.gate.set()
    node.until("uploaded", second)
    assert [what for what, _, _ in node.said if what == "failed"] == []


def test_a_part_that_lacks_a_shard_is_refused(node: Uploading) -> None:
    """A worker died before it had saved its state: the other nodes are told."""
    first, second = State(1, 10), State(2, 20)
    node.save(first, 1)
    node.save(second, 0)
    node.uploads.stopped("gone")
    node.store.gate.set()
    for state in (first, second):
        node.until("uploaded", state)
        refusal = NodeRefusal.from_bytes(node.store.read(notice_key(directory(state), 0)))
        assert refusal.why == "gone"
    assert node.store.size(shard_key(directory(second), 0)) is None


def test_the_part_of_a_lost_node_comes_before_the_pending_one(node: Uploading) -> None:
    """Copies of a lost node's shards are uploaded next: only they are missing. A late owner writes the same bytes."""
    first, second = State(1, 10), State(2, 20)
    lost = node.shards(first)[2:]
    node.save(first, 0, 1)
    node.save(second, 0, 1)
    for _ in range(2):
        node.uploads.adopt(lost)
    node.store.gate.set()
    node.until("uploaded", second)
    assert node.said == [("uploaded", first, 0), ("uploaded", first, 2), ("uploaded", second, 0)]
    assert node.has_notice(first, 2)
    upload_nodes(node.store.store, lost)


def test_a_shard_that_comes_after_its_checkpoint_is_over_holds_nothing_up(node: Uploading) -> None:
    """Another node refused before this node's second worker had saved. Its shard would never be a whole part."""
    node.store.gate.set()
    first, second = State(1, 10), State(1, 20)
    node.save(first, 0)
    node.until_written(shard_key(directory(first), 0))
    node.uploads.abandon(first)
    node.save(first, 1)
    node.until("uploaded", first, 1)
    assert node.uploads.states() == set()
    node.save(second, 0, 1)
    node.until("uploaded", second)
    assert node.has_notice(second)


def test_a_late_shard_of_an_older_checkpoint_does_not_replace_a_newer_one(node: Uploading) -> None:
    """The messages of two workers come in any order."""
    first, second, third = State(1, 10), State(1, 20), State(1, 30)
    node.save(first, 0, 1)
    node.save(second, 0)
    node.save(third, 0)
    node.save(second, 1)
    node.save(third, 1)
    assert node.said == [("dropped", second, -1), ("uploaded", second, 1)]
    node.store.gate.set()
    node.until("uploaded", third)
    assert node.has_notice(third)
