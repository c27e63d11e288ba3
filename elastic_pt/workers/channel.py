"""The messages between an agent and its workers: JSON lines over one Unix socket on the node.

    worker ─► agent   step        a step is done: numbers for metrics, status and the history
                      activity    what the worker does now (restore, train, ...), for the goodput ledger
                      snapshot    a buffer holds the state of a step; `checkpoint`: it is kept for the bucket
                      no_snapshots  there is no memory for them
                      no_room     there is no buffer for a checkpoint; the worker tries again
                      skipped     there was none in time: no node waits for this checkpoint any more
                      event       a structured event of the worker, for the agent's sinks
                      unusable    a committed checkpoint, or a state in memory, failed verification while it was read
                      copy_failed  one copy of a worker's rows in memory could not be read
    agent ─► worker   drain       checkpoint and stop at a step that all workers agree on
                      checkpoint  checkpoint at such a step and go on
                      released    the agent is done with the checkpoint of a step, so the next one may come
                      complete    the node and its mirrors hold the state of a step whole

If the agent ends, its workers read the end of the stream and exit at once.
"""

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import structlog

_LINE_BYTES_MAX: Final = 64 * 1024 * 1024
_CONNECT_TIMEOUT_S: Final = 30.0
ORPHANED_EXIT_CODE: Final = 75

_SHOWN_BYTES: Final = 300
_ACCEPT_PAUSE_S: Final = 0.2
_SENDER_TIMEOUT_S: Final = 0.1
"""Another thread sends its message in less, unless the socket is full."""
EVENTS_DROPPED: Final = "events_dropped"
_BOUND: Final = ("timestamp", "run", "node", "rank", "generation", "step")

Message = dict[str, Any]

log = structlog.get_logger("elastic_pt.channel")


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """The same path through an open descriptor: the address of a Unix socket has at most 107 bytes."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


class AgentSide:
    """The agent's end: one thread per worker handles its messages in order. Agent process."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with _short(path) as name:
            self._listener.bind(name)
        self._listener.listen()
        self._closing = threading.Event()
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._lock = threading.Lock()

    def listen(self, handle: Callable[[Message], None]) -> None:
        """Accept connections, and call `handle` with each message."""
        threading.Thread(target=self._accept, args=(handle,), name="channel", daemon=True).start()

    def drain(self, reason: str) -> None:
        """Ask all workers to checkpoint and stop at a step on which they agree."""
        self._broadcast({"kind": "drain", "reason": reason})

    def checkpoint(self, request: int) -> None:
        """Ask all workers for a checkpoint of a step on which they agree; `request` tells such wishes apart."""
        self._broadcast({"kind": "checkpoint", "request": request})

    def release(self, generation: int, step: int) -> None:
        """Tell all workers that the agent is done with their checkpoint of `step`: they may overwrite its buffer."""
        self._broadcast({"kind": "released", "generation": generation, "step": step})

    def complete(self, generation: int, step: int, mirrors_have_room: bool) -> None:
        """Tell all workers that their node holds the state of `step` whole, and so do its mirrors that have room.

        `mirrors_have_room`: all of its mirrors have room.
        """
        content = {"generation": generation, "step": step, "mirrors_have_room": mirrors_have_room}
        self._broadcast({"kind": "complete", **content})

    def _broadcast(self, message: Message) -> None:
        """Send to all workers that are connected."""
        line = json.dumps(message).encode() + b"\n"
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            try:
                whole = connection.send(line, socket.MSG_DONTWAIT) == len(line)
            except BlockingIOError:
                whole = False
            except OSError:
                continue
            if not whole:
                # The worker has not read hundreds of messages. Drop it: half a line would corrupt the stream.
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def drain_messages(self, timeout_s: float) -> None:
        """Wait until all messages of dead workers have been handled, at most `timeout_s` for each."""
        with self._lock:
            threads = list(self._connections.values())
        for thread in threads:
            thread.join(timeout_s)

    def close(self) -> None:
        """Stop listening."""
        self._closing.set()
        self._listener.close()

    def _accept(self, handle: Callable[[Message], None]) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                # Too many open files, or no memory. Try again: a worker is waiting.
                if not self._closing.wait(_ACCEPT_PAUSE_S):
                    log.warning("channel_not_accepted", cause=str(error))
                continue
            thread = threading.Thread(
                target=self._read, args=(connection, handle), name="channel-reader", daemon=True
            )
            with self._lock:
                self._connections[connection] = thread
            thread.start()

    def _read(self, connection: socket.socket, handle: Callable[[Message], None]) -> None:
        try:
            with connection, connection.makefile("rb") as lines:
                while line := lines.readline(_LINE_BYTES_MAX):
                    if line.endswith(b"\n"):
                        _take(line, handle)
        except OSError:
            pass
        finally:
            with self._lock:
                self._connections.pop(connection, None)


def _take(line: bytes, handle: Callable[[Message], None]) -> None:
    """Handle one message. An error must not end this thread, or the worker would exit as if its agent had died."""
    try:
        handle(json.loads(line))
    except Exception:
        text = line[:_SHOWN_BYTES].decode(errors="replace")
        log.exception("message_failed", message=text)


def _line(kind: str, content: Message) -> bytes:
    return json.dumps({"kind": kind, **content}).encode() + b"\n"


class WorkerSide:
    """A worker's end. A thread reads the agent's messages. Without its agent the process exits."""

    def __init__(self, path: Path, generation: int) -> None:
        self._generation = generation
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(_CONNECT_TIMEOUT_S)
        with _short(path) as name:
            self._socket.connect(name)
        self._socket.settimeout(None)
        self._sending = threading.Lock()
        self._unsent = b""
        """The rest of an event, for which the socket had no room."""
        self._dropped = 0
        self._closing = False
        self._drain = False
        self._checkpoint_request = -1
        self._released: set[int] = set()
        self._complete = 0
        self._unmirrored = 0
        threading.Thread(target=self._read, name="channel", daemon=True).start()

    @property
    def drain_requested(self) -> bool:
        """Whether the agent wants all workers to stop at a step boundary."""
        return self._drain

    @property
    def checkpoint_request(self) -> int:
        """The newest request for a checkpoint that the agent has passed on; -1 if there was none."""
        return self._checkpoint_request

    def released(self, step: int) -> bool:
        """Whether the agent is done with the checkpoint of `step`."""
        return step in self._released

    @property
    def complete_step(self) -> int:
        """The newest step of this generation that the node and its mirrors hold whole; 0 if there is none."""
        return self._complete

    @property
    def unmirrored_step(self) -> int:
        """The newest complete step that a mirror of the node had no room for; 0 if there is none."""
        return self._unmirrored

    def send(self, kind: str, **content: Any) -> None:
        """Send a message to the agent, and wait until the socket has room for it. Any thread may call it."""
        with self._sending:
            self._socket.sendall(self._unsent + _line(kind, content))
            self._unsent = b""

    def take(self, event: Mapping[str, Any]) -> None:
        """Send an event of this worker to the agent's sinks (`telemetry.events.Sink`).

        While the agent reads nothing, events are dropped; the next one that has room tells how many.
        """
        if not self._sending.acquire(timeout=_SENDER_TIMEOUT_S):
            self._dropped += 1  # Another thread waits for room. Two may count at once; one more or less does not matter.
            return
        try:
            lines = _line("event", {"content": event})
            if self._dropped:
                told = {name: event[name] for name in _BOUND if name in event}
                told |= {"event": EVENTS_DROPPED, "level": "warning", "count": self._dropped}
                lines = _line("event", {"content": told}) + lines
            if self._unsent:
                self._unsent = self._unsent[self._send_now(self._unsent) :]
            sent = 0 if self._unsent else self._send_now(lines)
            if sent:
                self._unsent, self._dropped = lines[sent:], 0
            else:
                self._dropped += 1
        except OSError:
            pass  # the agent has ended, and this process is about to
        finally:
            self._sending.release()

    def _send_now(self, data: bytes) -> int:
        """How many bytes the socket had room for."""
        try:
            return self._socket.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        """Close the connection; the agent still reads what was sent before."""
        self._closing = True
        if self._unsent and self._sending.acquire(timeout=_SENDER_TIMEOUT_S):
            with suppress(OSError):
                self._send_now(self._unsent)
            self._sending.release()
        self._socket.shutdown(socket.SHUT_RDWR)

    def _read(self) -> None:
        try:
            with self._socket.makefile("rb") as lines:
                for line in lines:
                    self._take(line)
        except OSError:
            pass
        finally:
            if not self._closing:
                os._exit(ORPHANED_EXIT_CODE)

    def _take(self, line: bytes) -> None:
        """Handle one message. Skip a line that cannot be decoded."""
        with suppress(ValueError, KeyError, TypeError):
            message = json.loads(line)
            if message["kind"] == "drain":
                self._drain = True
            elif message["kind"] == "checkpoint":
                self._checkpoint_request = max(self._checkpoint_request, message["request"])
            elif message["generation"] != self._generation:
                pass
            elif message["kind"] == "released":
                self._released.add(message["step"])
            elif message["kind"] == "complete":
                # First: a step must never look mirrored to a thread that reads both.
                if not message["mirrors_have_room"]:
                    self._unmirrored = message["step"]
                self._complete = message["step"]
