"""Batches for one worker, read ahead by one thread; its whole state is one integer.

    SlotLoader.__next__ ─► steps to read ─► thread: plan, announce, read ─► batches, or an error ─► SlotLoader.__next__

`SlotLoader` gives a worker its own slots of each step. A worker that starts at step s builds one with
`first_step = s`. Nothing is replayed, even if other workers computed step s - 1.
"""

import dataclasses
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from queue import SimpleQueue
from types import TracebackType
from typing import Final

import numpy as np
import torch

from elastic_pt.data.order import Integers
from elastic_pt.data.plan import DataPlan, RowSources
from elastic_pt.data.shards import TokenReader

STEPS_AHEAD_MIN: Final = 2
STEPS_AHEAD_MAX: Final = 64
"""Blocks are fetched for this many coming steps."""
CLOSE_TIMEOUT_S: Final = 5.0
"""How long `close` waits for a read that goes on. It would give a batch that nobody needs."""
_REQUESTS_DEEP: Final = 4
_ROWS_ASKED: Final = 160
_ROWS_PLANNED: Final = 4096
"""Rows of coming steps that are planned at once: the order costs less per row for many."""


class LateCause(StrEnum):
    """Why a step waited for its batch: on what the reading thread spent most of the time for it."""

    STORE = "store"
    """Blocks had to be fetched: the store was slow, absent or failing."""
    LOCAL = "local"
    """Reading from this machine's disk, hashing or planning took longer than the steps before."""


@dataclass(frozen=True)
class StepBatch:
    """What one worker reads for one step. V: its slots, B: micro-batch, T: sequence_length + 1."""

    step: int
    tokens_VBT: torch.Tensor
    """int64; [:, :, :-1] are inputs, [:, :, 1:] are targets."""
    sources: RowSources
    """Of all rows of the step, also those of other workers."""
    late: LateCause | None = None
    """None: it was ready when it was asked for."""


def steps_ahead(latency_s: float, step_s: float, before: int, *, late: bool) -> int:
    """For how many coming steps blocks are fetched: enough for a few requests one after the other.

    At least twice as many as before if a step was late: its blocks had not arrived.
    """
    wanted = 2 + math.ceil(_REQUESTS_DEEP * latency_s / max(step_s, 1e-3))
    if late:
        return min(STEPS_AHEAD_MAX, max(wanted, 2 * before))
    # Slowly down again: one late step costs more than some steps too many.
    return max(STEPS_AHEAD_MIN, min(STEPS_AHEAD_MAX, max(wanted, before - 1)))


class _StepReader:
    """Reads one step after the other, in the reading thread."""

    def __init__(
        self,
        plan: DataPlan,
        reader: TokenReader,
        slots: range,
        micro_batch: int,
        steps: range,
    ) -> None:
        self._plan, self._reader = plan, reader
        self._slots, self._micro_batch = slots, micro_batch
        self._first_step, self._last_step = steps.start, steps.stop
        self._planned: dict[int, list[tuple[int, int]]] = {}
        """Rows of steps to come."""
        self._planned_end = steps.start
        self._at_once = 1
        self._ahead = STEPS_AHEAD_MIN
        self._announced_end = steps.start + 1
        self.step_s = 0.0
        """What the caller takes for a step, a moving average."""

    def read(self, step: int) -> tuple[StepBatch, LateCause]:
        """The batch, and the cause if it comes late."""
        began_s, store_wait_s, late = time.monotonic(), self._reader.store_wait_s, self._reader.late
        # The first batch does not share the store with what comes after it: the worker waits for nothing else.
        if step > self._first_step:
            self._announce(step)
        self._plan_until(step + 1)
        windows = self._reader.windows(self._planned.pop(step), self._plan.sequence_length)
        if step == self._first_step:
            self._announce(step)
        self._ahead = steps_ahead(
            self._reader.latency_s, self.step_s, self._ahead, late=self._reader.late > late
        )
        shape = (len(self._slots), self._micro_batch, self._plan.sequence_length + 1)
        batch = StepBatch(step, windows.view(shape), self._plan.row_sources(step))
        fetching_s = self._reader.store_wait_s - store_wait_s
        mostly_store = 2 * fetching_s > time.monotonic() - began_s
        return batch, LateCause.STORE if mostly_store else LateCause.LOCAL

    def _announce(self, step: int) -> None:
        """Tell the reader which rows come after this step."""
        rows = len(self._slots) * self._micro_batch
        ahead = min(self._ahead, self._reader.rows_ahead_max // max(1, rows))
        for coming in range(self._announced_end, min(step + 1 + ahead, self._last_step)):
            self._plan_until(coming + 1)
            self._reader.expect(self._planned[coming], self._plan.sequence_length)
            self._announced_end = coming + 1
        self._announced_end = max(self._announced_end, step + 2)

    def _plan_until(self, end: int) -> None:
        """Know the rows of all steps before `end`."""
        while self._planned_end < end:
            # One step at first, so that the first batch comes soon.
            steps = range(
                self._planned_end, min(self._planned_end + self._at_once, self._last_step)
            )
            rows = self._plan.rows_of_steps(steps, self._slots, self._micro_batch)
            self._planned.update(zip(steps, rows, strict=True))
            self._planned_end = steps.stop
            most = max(1, _ROWS_PLANNED // max(1, len(rows[0])))
            self._at_once = min(2 * self._at_once, most)


class NextUse:
    """When a run needs blocks again, for eviction."""

    def __init__(self, plan: DataPlan) -> None:
        self._plan = plan
        self.step = 0
        """The present one."""

    def __call__(self, source: int, starts: Integers, ends: Integers) -> Integers:
        """The next step that reads a token of each span; approximate if a span has very many rows."""
        length, rows = self._plan.sequence_length, self._plan.rows_per_source[source]
        first = np.minimum(np.maximum(0, starts - 1) // length, rows - 1)
        last = np.minimum((ends - 1) // length, rows - 1)
        count = min(_ROWS_ASKED, int((last - first).max(initial=0)) + 1)
        asked = first[:, None] + (last - first)[:, None] * np.arange(count) // max(1, count - 1)
        epoch = int(self._plan.rows_read(self.step)[source]) // rows
        nearest = np.full(asked.size, np.iinfo(np.int64).max)
        for each in (epoch + 1, epoch):
            step = self._plan.plan_rows_of(source, each, asked.ravel()) // self._plan.global_batch
            nearest = np.where(step >= self.step, step, nearest)
        soonest: Integers = nearest.reshape(asked.shape).min(axis=1)
        return soonest


class SlotLoader(Iterator[StepBatch]):
    """Iterates over this worker's slots of the steps [`first_step`, `last_step`).

    `slots` is any range, strided or contiguous.

    From the start one thread reads `prefetch_steps` (at least 1) batches ahead. `close` and the end of the `with` block
    end it. An error while reading, such as `DataError`, is raised by the `next` of its step; no batch comes after it.
    Runs in workers; do not share it between threads.
    """

    def __init__(
        self,
        plan: DataPlan,
        reader: TokenReader,
        *,
        slots: range,
        first_step: int,
        last_step: int,
        micro_batch: int,
        prefetch_steps: int,
    ) -> None:
        self._next_step, self._last_step = first_step, last_step
        self._asked_s = 0.0
        self._next_use = NextUse(plan)
        self._next_use.step = first_step
        reader.follow(self._next_use, plan.chunk_rows, plan.open_tokens(len(slots)))
        self._steps = _StepReader(plan, reader, slots, micro_batch, range(first_step, last_step))
        self._to_read: SimpleQueue[int | None] = SimpleQueue()
        """Steps, `prefetch_steps` at most; None ends the thread."""
        self._done: SimpleQueue[tuple[StepBatch, LateCause] | BaseException] = SimpleQueue()
        self._closed = False
        for step in range(first_step, min(first_step + prefetch_steps, last_step)):
            self._to_read.put(step)
        self._asked_end = first_step + prefetch_steps
        # A daemon: a process that ends does not wait for a read.
        self._thread = threading.Thread(
            target=self._read_ahead, name="elastic-pt-loader", daemon=True
        )
        self._thread.start()

    @property
    def next_step(self) -> int:
        """The step of the next batch: the whole state."""
        return self._next_step

    def __next__(self) -> StepBatch:
        if self._closed or self._next_step >= self._last_step:
            raise StopIteration
        now_s = time.monotonic()
        if self._asked_s:
            self._steps.step_s += (now_s - self._asked_s - self._steps.step_s) / 4
        late = self._done.empty()
        # No limit here: each read has its own, and the watchdog has one for the step.
        done = self._done.get()
        self._asked_s = time.monotonic()
        if isinstance(done, BaseException):
            self.close()
            raise done
        if self._asked_end < self._last_step:
            self._to_read.put(self._asked_end)
            self._asked_end += 1
        batch, cause = done
        if late:
            batch = dataclasses.replace(batch, late=cause)
        assert batch.step == self._next_step, f"step {batch.step} came instead of {self._next_step}"
        self._next_step += 1
        self._next_use.step = self._next_step
        return batch

    def _read_ahead(self) -> None:
        while (step := self._to_read.get()) is not None and not self._closed:
            try:
                self._done.put(self._steps.read(step))
            except BaseException as error:  # the caller waits for an answer
                self._done.put(error)
                return

    def close(self) -> None:
        """End the reading thread: it begins no other read.

        Waits up to `CLOSE_TIMEOUT_S` for the one that goes on. Close the reader before, so that no request is begun for it.
        """
        self._closed = True
        self._to_read.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)

    def __enter__(self) -> "SlotLoader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
