"""Events wait for the bucket in a bounded buffer: the newest are kept, and dropped ones are counted."""

import json
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_pt.store.open import open_store
from elastic_pt.store.port import Source
from elastic_pt.telemetry import events
from elastic_pt.telemetry.events import EventSink
from tests.membership.bucket import WatchedStore


class Filling(WatchedStore):
    """A store that may be down. More events arrive during a write."""

    def write(self, key: str, source: Source) -> None:
        self.during()
        super().write(key, source)

    during: Callable[[], None] = staticmethod(lambda: None)  # type: ignore[assignment]


@pytest.mark.parametrize("down", [True, False])
def test_events_dropped_during_a_write_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, down: bool
) -> None:
    """Kept and dropped events add up to all events, whether the write succeeds or fails."""
    monkeypatch.setattr(events, "_BUFFER_EVENTS_MAX", 4)
    monkeypatch.setattr(events, "_FLUSH_INTERVAL_S", 3600.0)
    buffer = deque[str](maxlen=4)
    store = Filling(open_store(f"file://{tmp_path}"))
    sink = EventSink(store, "node-1234")
    sink._buffer = buffer
    for number in range(3):
        sink.take({"event": "step", "number": number})
    store.down = down
    store.during = lambda: (
        [sink.take({"event": "step", "number": 3 + n}) for n in range(6)] and None
    )  # type: ignore[method-assign]
    sink._flush()
    store.down, store.during = False, lambda: None  # type: ignore[method-assign]
    sink._flush()
    lines = [
        json.loads(line) for key in store.keys("events/") for line in store.read(key).splitlines()
    ]
    kept = [each["number"] for each in lines if each["event"] == "step"]
    dropped = sum(each["count"] for each in lines if each["event"] == "events_dropped")
    assert len(kept) + dropped == 9
    assert kept[-4:] == [5, 6, 7, 8]


def test_full_buffer_drops_and_counts_the_oldest_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest events are kept while the bucket is unreachable. Then they are written, after a count of the dropped ones."""
    monkeypatch.setattr(events, "_BUFFER_EVENTS_MAX", 10)
    monkeypatch.setattr(events, "_FLUSH_INTERVAL_S", 3600.0)
    store = WatchedStore(open_store(f"file://{tmp_path}"))
    store.down = True
    sink = EventSink(store, "node-1234")
    for number in range(8):
        sink.take({"event": "step", "number": number})
    sink._flush()
    for number in range(8, 20):
        sink.take({"event": "step", "number": number})
        if number == 12:
            sink._flush()
    store.down = False
    sink._flush()
    (key,) = store.keys("events/")
    told, *kept = [json.loads(line) for line in store.read(key).splitlines()]
    assert [each["number"] for each in kept] == list(range(10, 20))
    assert (told["event"], told["count"]) == ("events_dropped", 10)
    sink.take({"event": "last", "name": "\udcff"})
    sink._flush()
    assert len(store.keys("events/")) == 2
