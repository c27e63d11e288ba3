"""What happened in each step, kept beside every commit as JSON lines, one a step.

    rank 0's reports ─► StepHistory (agent's memory) ─► history/<checkpoint>.jsonl ─► read_steps

Steps wait in memory until a checkpoint of them is committed. That may take long, so what waits is bounded in
bytes, and is written in parts that every store takes. The parts before the last one have keys of their own,
and the last one, which the COMMIT names, begins with their number:

    history/<checkpoint>.000.jsonl  history/<checkpoint>.001.jsonl  …  history/<checkpoint>.jsonl

Appending a step costs the same however many wait.
"""

import json
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from elastic_pt.store.port import Store

PART_BYTES: Final = 8 * 2**20
WAITING_BYTES_MAX: Final = 256 * 2**20
"""Bytes of steps that wait for a commit; beyond them the oldest steps are forgotten."""
_PARTS: Final = "parts"


@dataclass(frozen=True)
class _Line:
    """One step as it will be written."""

    step: int
    loss: float | None
    text: bytes


class StepHistory:
    """Steps that no commit has taken yet. Agent process; safe to share between threads."""

    def __init__(
        self, *, part_bytes: int = PART_BYTES, waiting_bytes_max: int = WAITING_BYTES_MAX
    ) -> None:
        self._part_bytes = part_bytes
        self._waiting_bytes_max = waiting_bytes_max
        self._lines: deque[_Line] = deque()
        self._bytes = 0
        self._lock = threading.Lock()

    def note(self, generation: int, message: dict[str, Any]) -> None:
        """Remember a step. What was known of this step and later ones is replaced: they are done again."""
        text = json.dumps({"generation": generation} | message).encode() + b"\n"
        line = _Line(message["step"], message["loss"], text)
        with self._lock:
            while self._lines and self._lines[-1].step >= line.step:
                self._bytes -= len(self._lines.pop().text)
            self._lines.append(line)
            self._bytes += len(text)
            while self._bytes > self._waiting_bytes_max and len(self._lines) > 1:
                self._bytes -= len(self._lines.popleft().text)

    def write(self, store: Store, key: str, step: int) -> float | None:
        """Write the steps up to `step` to `key`, and tell the loss of the last one. Raises `StoreError`."""
        with self._lock:
            lines = [line for line in self._lines if line.step <= step]
        parts = [bytearray()]
        for line in lines:
            if parts[-1] and len(parts[-1]) + len(line.text) > self._part_bytes:
                parts.append(bytearray())
            parts[-1] += line.text
        *earlier, last = parts
        for number, part in enumerate(earlier):
            store.create(_part_key(key, number), bytes(part))
        header = json.dumps({_PARTS: len(earlier)}).encode() + b"\n" if earlier else b""
        store.create(key, header + bytes(last))
        return lines[-1].loss if lines else None

    def committed(self, step: int) -> None:
        """Forget the steps up to `step`: a commit names them."""
        with self._lock:
            while self._lines and self._lines[0].step <= step:
                self._bytes -= len(self._lines.popleft().text)


def read_steps(store: Store, key: str) -> Iterator[dict[str, Any]]:
    """The steps that a commit's history tells, in order. Raises `NotFound` if a part of it is gone. Any process."""
    lines = store.read(key).splitlines()
    first = json.loads(lines[0]) if lines else {}
    if _PARTS in first:
        for number in range(first[_PARTS]):
            yield from map(json.loads, store.read(_part_key(key, number)).splitlines())
        lines = lines[1:]
    yield from map(json.loads, lines)


def _part_key(key: str, number: int) -> str:
    return f"{key.removesuffix('.jsonl')}.{number:03d}.jsonl"
