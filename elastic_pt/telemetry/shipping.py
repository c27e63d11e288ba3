"""Ships events to the bucket: `events/<node>-<hex>/<8 digits>.jsonl`. Agent process.

An object is written again while it grows up to 256 KiB, and then the next number begins: a run of months makes few
objects. The first event, warnings and errors are written within a second, the others after at most five seconds. While the bucket is slow or
unreachable, the newest 10,000 events are kept; older ones are dropped and counted. Training never waits.
"""

import json
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any, Final

from elastic_pt.store.port import Store

_BUFFER_EVENTS_MAX: Final = 10_000
_FLUSH_INTERVAL_S: Final = 5.0
_URGENT_INTERVAL_S: Final = 1.0
"""Shortest time between two writes, so that many errors do not become many requests."""
_URGENT: Final = ("warning", "error", "critical")
"""A failed worker is a warning: its traceback must be there if the node dies next."""
_PART_BYTES_MAX: Final = 256 * 1024
_CLOSE_TIMEOUT_S: Final = 10.0
_BOUND: Final = ("timestamp", "run", "node", "generation", "step")


class EventBuffer:
    """Events that are not in the bucket yet, and the object that grows. `take` from any thread, `flush` from one."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name
        self._lines: deque[str] = deque()
        self._lock = threading.Lock()
        self.dropped = 0
        """Events that were dropped since the start, because the bucket could not be written."""
        self._told = 0
        self._sequence = 0
        self._part = b""

    @property
    def is_new(self) -> bool:
        """Whether the object that grows has no event yet."""
        return not self._part

    def take(self, event: Mapping[str, Any]) -> None:
        """Keep one event, and drop the oldest if there is no room."""
        line = json.dumps(event, default=str)
        with self._lock:
            self._lines.append(line)
            self._drop_oldest()

    def flush(self) -> bool:
        """Write what is kept; False if the bucket could not be written. Never raises."""
        with self._lock:
            lines = list(self._lines)
            self._lines.clear()
            dropped = self._dropped_event(self.dropped - self._told, lines)
            will_be_told = self.dropped
        done = 0
        try:
            while done < len(lines):
                count, part = _grown(self._part, [*dropped, *lines[done:]])
                if count:
                    self._store.write(f"events/{self._name}/{self._sequence:08d}.jsonl", part)
                    self._part = part
                    self._told = will_be_told
                    done += count - len(dropped)
                    dropped = []
                else:
                    self._sequence += 1
                    self._part = b""
        except Exception:  # any error: the thread must go on, and these events are retried
            with self._lock:
                self._lines.extendleft(reversed(lines[done:]))
                self._drop_oldest()
            return False
        return True

    def _drop_oldest(self) -> None:
        while len(self._lines) > _BUFFER_EVENTS_MAX:
            self._lines.popleft()
            self.dropped += 1

    def _dropped_event(self, count: int, lines: list[str]) -> list[str]:
        """The event that tells of dropped ones, bound to the same run and moment as the oldest that is kept."""
        if not count or not lines:
            return []
        oldest = json.loads(lines[0])
        told = {"event": "events_dropped", "level": "warning", "count": count}
        return [json.dumps(told | {name: oldest[name] for name in _BOUND if name in oldest})]


class EventSink:
    """Collects events for the bucket; a thread writes them."""

    def __init__(self, store: Store, name: str) -> None:
        """`name` is that of this agent: `<node>-<hex>`."""
        self._buffer = EventBuffer(store, name)
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Events that were dropped since the start, because the bucket could not be written."""
        return self._buffer.dropped

    def take(self, event: Mapping[str, Any]) -> None:
        """Keep one event; never blocks."""
        self._buffer.take(event)
        if self._buffer.is_new or event.get("level") in _URGENT:
            self._wake.set()

    def close(self, timeout_s: float = _CLOSE_TIMEOUT_S) -> None:
        """Write the remaining events, within a bounded time."""
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._closing.is_set():
            self._wake.wait(_FLUSH_INTERVAL_S - _URGENT_INTERVAL_S)
            self._wake.clear()
            # After a failure nothing is urgent: the store has retried until its own deadline.
            self._closing.wait(_URGENT_INTERVAL_S if self._buffer.flush() else _FLUSH_INTERVAL_S)
        self._buffer.flush()


def _grown(part: bytes, lines: list[str]) -> tuple[int, bytes]:
    """How many of the lines the part has room for (at least one if it is empty), and the part with them."""
    grown = bytearray(part)
    for count, line in enumerate(lines):
        if grown and len(grown) + len(line) >= _PART_BYTES_MAX:
            return count, bytes(grown)
        grown += line.encode() + b"\n"
    return len(lines), bytes(grown)
