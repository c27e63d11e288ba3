"""A node's parts of checkpoints: one in flight, one pending, and no file is left behind."""

import threading
from pathlib import Path
from typing import Any

import pytest

from elastic_pt.agent.uploads import Place, Uploads
from elastic_pt.checkpoint.layout import checkpoint_directory, shard_key
from elastic_pt.checkpoint.nodes import NodeRefusal, notice_key
from elastic_pt.checkpoint.upload import StagedShard
from elastic_pt.store.port import Store
from tests.checkpoint.world import full_tensors, memory_store, stage, training_state

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

    def write(self, key: str, source: bytes | Path) -> None:
        """See `Store.write`."""
        self.begun.set()
        assert self.gate.wait(WAIT_S)
        self.store.write(key, source)


class Uploading:
    """The uploads of a node with two workers, and what it reported."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Gated()
        self.said: list[tuple[str, Place]] = []
        self._heard = threading.Condition()
        store: Store = self.store  # type: ignore[assignment]
        self.uploads = Uploads(
            store,
            on_uploaded=lambda place: self._say("uploaded", place),
            on_failed=lambda place, _: self._say("failed", place),
            on_dropped=lambda place, _: self._say("dropped", place),
        )

    def _say(self, what: str, place: Place) -> None:
        with self._heard:
            self.said.append((what, place))
            self._heard.notify_all()

    def until(self, what: str, place: Place) -> None:
        """Wait for a report."""
        with self._heard:
            assert self._heard.wait_for(lambda: (what, place) in self.said, WAIT_S), self.said

    def save(self, place: Place, *ranks: int) -> None:
        """Workers stage their shards."""
        for shard in self.shards(place):
            if shard.rank in ranks:
                self.uploads.add(shard)
            else:
                shard.path.unlink()

    def shards(self, place: Place) -> list[StagedShard]:
        """The staged files of a checkpoint."""
        return stage(
            self.folder,
            full_tensors(SMALL),
            2,
            directory(place),
            training_state(place.step),
            workers=2,
        )

    def files(self) -> int:
        """How many staged files there are."""
        return len(list(self.folder.glob("*.safetensors")))

    def end(self) -> None:
        """Let all requests pass, and end the thread."""
        self.store.gate.set()
        self.uploads.close()


def directory(place: Place) -> str:
    """The directory of a checkpoint."""
    return checkpoint_directory(place.step, place.generation, "beef")


@pytest.fixture
def node(tmp_path: Path) -> Uploading:
    """Such a node, and a store that does not answer yet."""
    return Uploading(tmp_path)


def test_one_is_in_flight_and_a_newer_one_replaces_the_pending_one(node: Uploading) -> None:
    """Generation 1's checkpoint stays in flight; of those that come after it only the newest is uploaded."""
    first, second, third = Place(1, 10), Place(2, 20), Place(3, 30)
    for place in (first, second, third):
        node.save(place, 0, 1)
    assert node.said == [("dropped", second)]
    assert node.files() == 4
    node.store.gate.set()
    node.until("uploaded", third)
    assert node.said == [("dropped", second), ("uploaded", first), ("uploaded", third)]
    assert node.files() == 0
    assert node.store.size(notice_key(directory(first), 0)) is not None
    assert node.store.keys(directory(second)) == []
    node.end()


def test_an_abandoned_checkpoint_frees_its_files_and_the_next_one_starts(node: Uploading) -> None:
    """The request that is running ends by itself; the node's other shard is dropped at once."""
    first, second = Place(1, 10), Place(2, 20)
    node.save(first, 0, 1)
    assert node.store.begun.wait(WAIT_S)
    node.save(second, 0, 1)
    node.uploads.abandon(first, "another lineage")
    assert node.files() == 3
    node.store.gate.set()
    node.until("uploaded", second)
    assert node.files() == 0
    assert node.store.size(shard_key(directory(first), 1)) is None
    node.end()


def test_an_abandoned_pending_checkpoint_is_never_uploaded(node: Uploading) -> None:
    """Only the one in flight goes on."""
    first, second = Place(1, 10), Place(2, 20)
    node.save(first, 0, 1)
    node.save(second, 0, 1)
    node.uploads.abandon(second, "another lineage")
    node.uploads.abandon(Place(9, 9), "unknown")
    node.store.gate.set()
    node.until("uploaded", first)
    assert node.said == [("dropped", second), ("uploaded", first)]
    assert node.files() == 0
    node.end()


def test_a_part_that_lacks_a_shard_is_refused(node: Uploading) -> None:
    """A worker died before it had staged its shard: the other nodes are told, and the files are freed."""
    first, second = Place(1, 10), Place(2, 20)
    node.save(first, 1)
    node.save(second, 0)
    node.uploads.stopped("gone")
    node.store.gate.set()
    for place in (first, second):
        node.until("uploaded", place)
        refusal = NodeRefusal.from_bytes(node.store.read(notice_key(directory(place), 0)))
        assert refusal.why == "gone"
    assert node.files() == 0
    assert node.store.size(shard_key(directory(second), 0)) is None
    node.end()
