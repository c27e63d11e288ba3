"""The history of the steps between two commits: bounded in memory, written in parts.

A commit names the key of the first part. A part holds one line of JSON per step. If the history is longer, the
part's last line is `{"next": KEY}`, the key of the next part. The first part is created last, so a reader that finds
it finds all parts.
"""

import json
import threading
from collections import deque
from collections.abc import Sequence
from itertools import count, pairwise
from typing import Annotated, Any, Final, NamedTuple, NotRequired, cast

from pydantic import AfterValidator, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from elastic_pt.errors import CheckpointError, one_line
from elastic_pt.failpoints import Failpoint, failpoint
from elastic_pt.store.port import Store

PART_BYTES_MAX: Final = 8 << 20
HISTORY_BYTES_MAX: Final = 64 << 20
_Number = Annotated[int, Field(ge=0, le=1 << 53)]
_Value = Annotated[FiniteFloat, Field(ge=-1e300, le=1e300)]
_Text = Annotated[str, AfterValidator(one_line)]
_Sources = dict[_Text, Annotated[list[_Number | _Value | None], Field(min_length=2, max_length=2)]]


class _Step(TypedDict):
    """What readers use of a line. They ignore all else."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    step: _Number
    generation: NotRequired[_Number]
    rank: NotRequired[_Number]
    world_size: NotRequired[_Number]
    loss: NotRequired[_Value | None]
    z_loss: NotRequired[_Value | None]
    gradient_norm: NotRequired[_Value | None]
    learning_rate: NotRequired[_Value | None]
    rows: NotRequired[Annotated[list[_Number], Field(min_length=2, max_length=2)]]
    tokens: NotRequired[_Number]
    seconds: NotRequired[_Value]
    data_wait_s: NotRequired[_Value]
    data_wait_cause: NotRequired[_Text]
    phases: NotRequired[dict[_Text, _Value]]
    checkpoint_stall_s: NotRequired[_Value]
    straggler_wait_s: NotRequired[_Value]
    sources: NotRequired[_Sources]
    skipped: NotRequired[_Text]
    held_out_loss: NotRequired[_Value | None]
    held_out_sources: NotRequired[_Sources]
    evaluation_s: NotRequired[_Value]


class _More(TypedDict):
    """The last line of a full part."""

    next: str


_STEP: Final = TypeAdapter(_Step)
_LINE: Final = TypeAdapter(_Step | _More)


class Line(NamedTuple):
    """A step and its line of JSON, with the newline."""

    step: int
    text: bytes


class StepHistory:
    """The steps since the last commit, in order. Agent process; thread-safe.

    Every agent keeps them: the node that commits next may be any. Adding a step costs O(1) on average. Beyond
    `bytes_max` every second line of the older half is dropped.
    """

    def __init__(self, bytes_max: int = HISTORY_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._lines: deque[Line] = deque()
        self._bytes = 0
        self._lock = threading.Lock()

    def add(self, entry: dict[str, Any]) -> None:
        """Add a step. It replaces the earlier lines of this step and of later steps."""
        line = Line(entry["step"], json.dumps(entry).encode() + b"\n")
        with self._lock:
            while self._lines and self._lines[-1].step >= line.step:
                self._bytes -= len(self._lines.pop().text)
            self._lines.append(line)
            self._bytes += len(line.text)
            if self._bytes > self._bytes_max:
                self._thin()

    def through(self, step: int, after: int = 0) -> list[Line]:
        """The lines of the steps after `after`, up to and with `step`."""
        with self._lock:
            return [line for line in self._lines if after < line.step <= step]

    def forget(self, step: int) -> None:
        """Drop the lines up to and with `step`: they are written with a commit."""
        with self._lock:
            while self._lines and self._lines[0].step <= step:
                self._bytes -= len(self._lines.popleft().text)

    def text(self) -> bytes:
        """All lines, for a node that has fewer."""
        with self._lock:
            return b"".join(line.text for line in self._lines)

    def misses(self, first: int, last: int) -> bool:
        """Whether lines of the steps from `first` to `last` are missing."""
        with self._lock:
            steps = [line.step for line in self._lines if first <= line.step <= last]
        return steps != list(range(first, last + 1))

    def adopt(self, text: bytes, first: int, last: int) -> bool:
        """Take the lines of another node for the steps from `first` to `last`, if it has them. Raises `ValueError`."""
        lines = [
            Line(step, each + b"\n")
            for each in text.splitlines()
            if first <= (step := _STEP.validate_json(each)["step"]) <= last
        ]
        if any(one.step >= other.step for one, other in pairwise(lines)):
            raise ValueError("the steps do not grow")
        if not lines or (lines[0].step, lines[-1].step) != (first, last):
            return False
        with self._lock:
            self._lines = deque([*lines, *(line for line in self._lines if line.step > last)])
            self._bytes = sum(len(line.text) for line in self._lines)
        return True

    def _thin(self) -> None:
        lines = list(self._lines)
        half = len(lines) // 2
        self._lines = deque(lines[:half:2] + lines[half:])
        self._bytes = sum(len(line.text) for line in self._lines)


def write_history(
    store: Store, key: str, lines: Sequence[Line], part_bytes_max: int = PART_BYTES_MAX
) -> None:
    """Create the history at `key`, in parts of about `part_bytes_max` bytes (committing agent)."""
    parts: list[list[bytes]] = [[]]
    size = 0
    for line in lines:
        if parts[-1] and size + len(line.text) > part_bytes_max:
            parts.append([])
            size = 0
        parts[-1].append(line.text)
        size += len(line.text)
    for index in reversed(range(len(parts))):
        if index + 1 < len(parts):
            parts[index].append(json.dumps({"next": _part_key(key, index + 1)}).encode() + b"\n")
        store.create(_part_key(key, index), b"".join(parts[index]))
        failpoint(Failpoint.HISTORY_PART)


def read_history(store: Store, key: str) -> list[dict[str, Any]]:
    """All parts of a history, as `write_history` wrote it. Raises `NotFound` if it is missing, else `CheckpointError`."""
    entries: list[dict[str, Any]] = []
    for index in count():
        part = _part_key(key, index)
        for number, line in enumerate(store.read(part).splitlines(), start=1):
            entries.append(step_line(line, f"{store.url}/{part}: line {number}"))
        # Compute the key of the next part from the first key. Do not trust the key in the line.
        if not entries or "next" not in entries[-1]:
            break
        entries.pop()
    return entries


def step_line(line: bytes, origin: str) -> dict[str, Any]:
    """A line of a history: a step, or the name of the next part. Raises `CheckpointError` that begins with `origin`."""
    try:
        return cast(dict[str, Any], _LINE.validate_json(line))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"][1:])) or "it"
        raise CheckpointError(
            f"{origin}: {where:.80}: {first['msg']}; expected a step as an agent wrote it"
        ) from None


def _part_key(key: str, index: int) -> str:
    return key if index == 0 else f"{key.removesuffix('.jsonl')}.{index}.jsonl"
