"""Events wait for the bucket in a bounded buffer: the newest survive, and what was lost is counted."""

import json
from pathlib import Path

import pytest

from elastic_pt.store.open import open_store
from elastic_pt.telemetry import events
from elastic_pt.telemetry.events import EventSink
from tests.elastic.bucket import WatchedStore


def test_a_full_buffer_drops_the_oldest_and_tells_how_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the bucket is away the newest events are kept; once it is back they are written behind a count of the rest."""
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
