"""Structured events: one JSON object a line, on standard error and in the run directory.

`configure_events` belongs to the composition roots. Events for the bucket are kept in a bounded buffer, and a
thread writes them as `events/<node>/<sequence>.jsonl`. While the bucket is slow or unreachable the oldest events are
dropped; training never waits.
"""

import json
import logging
import sys
import threading
from collections import deque
from typing import Any, Final

import structlog

from elastic_pt.store.port import Store

_BUFFER_EVENTS_MAX: Final = 10_000
_FLUSH_INTERVAL_S: Final = 5.0
_LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


class EventSink:
    """Collects events for the bucket. Agent process."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name
        self._buffer: deque[str] = deque(maxlen=_BUFFER_EVENTS_MAX)
        self._dropped = 0
        self._lock = threading.Lock()
        self._sequence = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)
        self._thread.start()

    def take(self, event: dict[str, Any]) -> None:
        """Keep one event; never blocks."""
        with self._lock:
            self._dropped += len(self._buffer) == _BUFFER_EVENTS_MAX
            self._buffer.append(json.dumps(event, default=str))

    def close(self) -> None:
        """Write the remaining events, within a bounded time."""
        self._closing.set()
        self._thread.join(timeout=2 * _FLUSH_INTERVAL_S)

    def _run(self) -> None:
        while not self._closing.wait(_FLUSH_INTERVAL_S):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        lines = []
        while self._buffer:
            lines.append(self._buffer.popleft())
        if not lines:
            return
        dropped = self._dropped
        told = {"event": "events_dropped", "level": "warning", "count": dropped}
        text = [json.dumps(told), *lines] if dropped else lines
        try:
            self._store.write(
                f"events/{self._name}/{self._sequence:08d}.jsonl",
                ("\n".join(text) + "\n").encode(),
            )
            self._sequence += 1
            with self._lock:
                # More may have been dropped while this was written.
                self._dropped -= dropped
        except Exception:  # any error: the thread must go on, and these events are retried
            self._put_back(lines)

    def _put_back(self, lines: list[str]) -> None:
        """Put events that could not be written back before the newer ones; drop the oldest if there is no room."""
        with self._lock:
            room = max(0, _BUFFER_EVENTS_MAX - len(self._buffer))
            self._dropped += max(0, len(lines) - room)
            self._buffer.extendleft(reversed(lines[len(lines) - min(room, len(lines)) :]))


def configure_events(level: str, node: str, sink: EventSink | None = None) -> None:
    """Send every event to standard error as JSON and, if given, to the sink."""

    def to_sink(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        if sink is not None:
            sink.take(dict(event))
        return event

    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            lambda _, __, event: {**event, "node": node},
            to_sink,
            structlog.processors.JSONRenderer(default=str),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
