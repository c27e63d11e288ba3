"""Events wait for the bucket in a bounded buffer: the newest are kept, and dropped ones are counted. A local file, formats."""

import contextlib
import io
import json
import os
import queue
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog

from elastic_pt.store.open import open_store
from elastic_pt.store.port import Source, Store
from elastic_pt.telemetry import log_file, shipping
from elastic_pt.telemetry.events import EventContext, EventOutput, LogFormat, configure_events
from elastic_pt.telemetry.log_file import LogFile
from elastic_pt.telemetry.shipping import EventBuffer, EventSink
from tests.membership.bucket import WatchedStore

DEADLINE_S = 20.0


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
    monkeypatch.setattr(shipping, "_BUFFER_EVENTS_MAX", 4)
    store = Filling(open_store(f"file://{tmp_path}"))
    sink = EventBuffer(store, "node-1234")
    for number in range(3):
        sink.take({"event": "step", "number": number})
    store.down = down
    store.during = lambda: (
        [sink.take({"event": "step", "number": 3 + n}) for n in range(6)] and None
    )  # type: ignore[method-assign]
    sink.flush()
    store.down, store.during = False, lambda: None  # type: ignore[method-assign]
    sink.flush()
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
    monkeypatch.setattr(shipping, "_BUFFER_EVENTS_MAX", 10)
    store = WatchedStore(open_store(f"file://{tmp_path}"))
    store.down = True
    sink = EventBuffer(store, "node-1234")
    for number in range(8):
        sink.take({"event": "step", "number": number})
    sink.flush()
    for number in range(8, 20):
        sink.take({"event": "step", "number": number})
        if number == 12:
            sink.flush()
    store.down = False
    sink.flush()
    (key,) = store.keys("events/")
    told, *kept = [json.loads(line) for line in store.read(key).splitlines()]
    assert [each["number"] for each in kept] == list(range(10, 20))
    assert (told["event"], told["count"]) == ("events_dropped", 10)
    sink.take({"event": "last", "name": "\udcff"})
    sink.flush()
    assert [json.loads(line) for line in store.read(key).splitlines()][-1]["event"] == "last"


def numbers(store: Store) -> list[list[int]]:
    """The numbers of the events, per object in order."""
    return [
        [json.loads(line)["number"] for line in store.read(key).splitlines()]
        for key in sorted(store.keys("events/"))
    ]


def test_an_object_grows_until_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many flushes make few objects of bounded size, and each event is in exactly one of them."""
    monkeypatch.setattr(shipping, "_PART_BYTES_MAX", 400)
    store = open_store(f"file://{tmp_path}")
    sink = EventBuffer(store, "node-1234")
    for number in range(40):
        sink.take({"event": "step", "number": number})
        assert sink.flush()
    found = numbers(store)
    assert [each for part in found for each in part] == list(range(40))
    assert 3 <= len(found) <= 5
    assert all(store.size(key) <= 400 for key in store.keys("events/"))  # type: ignore[operator]


def test_many_waiting_events_become_several_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an outage, one flush writes everything in order, and a line larger than an object is not lost."""
    monkeypatch.setattr(shipping, "_PART_BYTES_MAX", 400)
    store = WatchedStore(open_store(f"file://{tmp_path}"))
    sink = EventBuffer(store, "node-1234")
    store.down = True
    for number in range(40):
        sink.take({"event": "x" * 1000 if number == 20 else "step", "number": number})
    assert not sink.flush()
    store.down = False
    assert sink.flush()
    assert [each for part in numbers(store) for each in part] == list(range(40))
    assert sink.dropped == 0


def test_the_count_of_dropped_events_pushes_none_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an outage that was too long, each event is either in the bucket or counted, over several objects."""
    monkeypatch.setattr(shipping, "_BUFFER_EVENTS_MAX", 20)
    monkeypatch.setattr(shipping, "_PART_BYTES_MAX", 200)
    store = open_store(f"file://{tmp_path}")
    sink = EventBuffer(store, "node-1234")
    for number in range(30):
        sink.take({"event": "step", "run": "s3://b/run", "node": "a", "number": number})
    assert sink.flush()
    keys = store.keys("events/")
    told, *kept = [json.loads(line) for key in keys for line in store.read(key).splitlines()]
    assert [each["number"] for each in kept] == list(range(10, 30))
    assert (told["count"], told["run"], told["node"]) == (10, "s3://b/run", "a")
    assert sink.dropped == 10


@pytest.mark.parametrize(("first", "level"), [(True, "info"), (False, "error"), (False, "warning")])
def test_the_first_event_warnings_and_errors_are_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool, level: str
) -> None:
    """A node that dies soon after its start, or after a failure, has left these events in the bucket."""
    monkeypatch.setattr(shipping, "_FLUSH_INTERVAL_S", 3600.0)
    monkeypatch.setattr(shipping, "_URGENT_INTERVAL_S", 0.0)
    store = Filling(open_store(f"file://{tmp_path}"))
    sink = EventSink(store, "node-1234")
    if not first:
        sink._buffer.take({"event": "step", "number": 0})
        sink._buffer.flush()
    written = queue.Queue[None]()
    store.during = lambda: written.put(None)  # type: ignore[method-assign]
    sink.take({"event": "step", "level": level, "number": 1})
    written.get(timeout=DEADLINE_S)
    sink.close()
    assert numbers(store) == ([[1]] if first else [[0, 1]])


def test_the_local_file_is_rotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file and its predecessors have bounded sizes, and the newest events are there."""
    monkeypatch.setattr(log_file, "_FILE_BYTES_MAX", 400)
    file = LogFile(tmp_path / "log", pytest.fail)
    for number in range(200):
        file.take({"event": "step", "number": number})
    file.close()
    paths = sorted(tmp_path.iterdir(), key=lambda path: path.name)
    assert [path.name for path in paths] == ["log", "log.1", "log.2", "log.3", "log.4"]
    assert all(path.stat().st_size <= 400 for path in paths)
    assert json.loads((tmp_path / "log").read_text().splitlines()[-1])["number"] == 199


def test_a_file_that_cannot_be_written_is_reported_once(tmp_path: Path) -> None:
    """Without its directory, events are lost and one failure is told; when it is there, events are written."""
    told = queue.Queue[str]()
    path = tmp_path / "logs" / "a.jsonl"
    file = LogFile(path, told.put)
    for number in range(3):
        file.take({"number": number})
    assert "logs" in told.get(timeout=DEADLINE_S)
    while file._queue.qsize():
        pass
    path.parent.mkdir()
    file.take({"number": 3})
    file.close()
    assert told.empty()
    assert json.loads(path.read_text().splitlines()[-1]) == {"number": 3}


def test_a_full_disk_loses_events_only() -> None:
    """A write that fails is told once; close returns."""
    told = queue.Queue[str]()
    file = LogFile(Path("/dev/full"), told.put)
    for number in range(3):
        file.take({"number": number})
    file.close()
    assert "No space left" in told.get(timeout=DEADLINE_S)
    assert told.empty()


def test_a_file_is_written_by_one_process_only(tmp_path: Path) -> None:
    """Two agents of a machine do not rotate one file under each other: the second tells it once, and takes over later."""
    told = queue.Queue[str]()
    path = tmp_path / "log"
    first, second = LogFile(path, pytest.fail), LogFile(path, told.put)
    first.take({"number": 0})
    while not path.exists() or not path.read_text():
        pass
    second.take({"number": 1})
    assert "{node}" in told.get(timeout=DEADLINE_S)
    first.take({"number": 2})
    first.close()
    second.take({"number": 3})
    second.close()
    assert told.empty()
    assert [json.loads(line)["number"] for line in path.read_text().splitlines()] == [0, 2, 3]


def test_the_lock_of_a_file_outlives_its_rotation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a file is renamed, another process does not get it, or it would write to an older one."""
    monkeypatch.setattr(log_file, "_FILE_BYTES_MAX", 40)
    told = queue.Queue[str]()
    path = tmp_path / "log"
    first, second = LogFile(path, pytest.fail), LogFile(path, told.put)

    def rotate(source: str, target: str) -> None:
        second.take({"number": "second"})
        second.close()
        Path(source).rename(target)

    first._handler.rotator = rotate
    for number in range(4):
        first.take({"number": number})
    first.close()
    assert "another process" in told.get(timeout=DEADLINE_S)
    assert (tmp_path / "log.1").exists()
    assert not [each for each in tmp_path.iterdir() if "second" in each.read_text()]


def test_events_that_a_slow_file_loses_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the file can be written again, one report tells how many events are missing."""
    monkeypatch.setattr(log_file, "_QUEUE_EVENTS_MAX", 2)
    told = queue.Queue[str]()
    os.mkfifo(tmp_path / "log")
    file = LogFile(tmp_path / "log", told.put)
    for number in range(10):
        file.take({"number": number})
    with (tmp_path / "log").open() as reader:
        cause = told.get(timeout=DEADLINE_S)
        file.close()
        kept = reader.read().splitlines()
    assert 2 <= len(kept) <= 3
    assert cause == f"too slow: {10 - len(kept)} events were dropped"
    assert told.empty()


def test_what_is_not_known_yet_is_missing() -> None:
    """Before the first generation or the first step of a node, its events have no such field."""
    context = EventContext("a", changing=lambda: {"generation": 2, "step": 0})
    assert context.fields() == {"node": "a", "generation": 2}
    assert EventContext("a", changing=lambda: {"generation": 0, "step": 0}).fields() == {
        "node": "a"
    }


@pytest.mark.parametrize(
    ("log_format", "terminal", "text"),
    [("auto", False, False), ("auto", True, True), ("json", True, False), ("text", False, True)],
)
def test_events_are_text_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, log_format: LogFormat, terminal: bool, text: bool
) -> None:
    """People read lines, machines JSON. Each event has run, node, rank, generation and step; its own fields win.

    A traceback shows no values of variables.
    """
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", out)
    newest = {"generation": 2, "step": 7}
    context = EventContext("a", run="s3://b/run", rank=3, changing=lambda: newest)
    configure_events(context, EventOutput(log_format=log_format))
    log = structlog.get_logger("test")
    log.info("commit", step=6)
    newest["step"] = 8
    try:
        hidden_value = "a value of a variable"
        raise RuntimeError(len(hidden_value))
    except RuntimeError:
        log.exception("failed")
    structlog.reset_defaults()
    told = out.getvalue()
    assert "a value of a variable" not in told.replace('hidden_value = "a value of a variable"', "")
    if text:
        assert "commit" in told
        assert "s3://b/run" not in told
        assert told.count("\n") > 4
        return
    commit, failed = (json.loads(line) for line in told.splitlines())
    bound = {"run": "s3://b/run", "node": "a", "rank": 3, "generation": 2}
    assert bound.items() <= commit.items()
    assert (commit["step"], failed["step"]) == (6, 8)
    assert "RuntimeError" in failed["exception"]


def test_a_closed_standard_error_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event that cannot be printed is lost, and its call site goes on."""
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        configure_events(EventContext("a"), EventOutput())
        structlog.get_logger("test").warning("lost")
        structlog.reset_defaults()
        with contextlib.suppress(OSError):
            full.close()


class Unbuffered(io.StringIO):
    """Notes each write, as the system call that it is where Python does not buffer (PYTHONUNBUFFERED)."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return super().write(text)


def test_an_event_is_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent and its workers share a standard error: a line and its end in two writes would mix with those of others."""
    stream = Unbuffered()
    monkeypatch.setattr(sys, "stderr", stream)
    configure_events(EventContext("file:///run", "node"), EventOutput(log_format="json"))
    structlog.get_logger("test").info("hello")
    (written,) = stream.writes
    assert written.endswith("}\n")
