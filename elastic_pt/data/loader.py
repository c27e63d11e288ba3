"""Batches for one worker, read ahead by one thread of `torchdata`; its whole state is one integer.

`SlotLoader` gives a worker its own slots of each step. A worker that starts at step s builds one with
`first_step = s`. Nothing is replayed, even if other workers computed step s - 1.

`held_out_batches` is for evaluation: it gives every held-out token as a target exactly once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torchdata.nodes import BaseNode, Prefetcher

from elastic_pt.data.manifest import Manifest
from elastic_pt.data.plan import DataPlan
from elastic_pt.data.shards import TokenReader


@dataclass(frozen=True)
class StepBatch:
    """What one worker reads for one step. V: its slots, B: micro-batch, T: sequence_length + 1."""

    step: int
    tokens_VBT: torch.Tensor
    """int64; [:, :, :-1] are inputs, [:, :, 1:] are targets."""


@dataclass(frozen=True)
class HeldOutBatch:
    """Part of the held-out stream of one source. B: batch, T: sequence_length."""

    source: int
    inputs_BT: torch.Tensor
    targets_BT: torch.Tensor
    """int64; `ignored` where there is only padding."""


@dataclass(frozen=True)
class _Failure:
    """An error for the caller to raise. torchdata would wrap it in an error with a text of many lines."""

    error: Exception


class _StepNode(BaseNode[StepBatch | _Failure]):  # type: ignore[misc]  # torchdata has no types
    """Reads one step after the other; runs in the prefetching thread."""

    def __init__(
        self,
        plan: DataPlan,
        reader: TokenReader,
        slots: range,
        micro_batch: int,
        steps: range,
    ) -> None:
        super().__init__()
        self._plan, self._reader = plan, reader
        self._slots, self._micro_batch, self._steps = slots, micro_batch, steps
        self._next_step = steps.start
        self._stopped = False

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self._next_step = initial_state["next_step"] if initial_state else self._steps.start

    def get_state(self) -> dict[str, Any]:
        return {"next_step": self._next_step}

    def next(self) -> StepBatch | _Failure:
        if self._stopped or self._next_step >= self._steps.stop:
            raise StopIteration
        try:
            batch = self._read(self._next_step)
        except Exception as error:
            self._stopped = True
            return _Failure(error)
        self._next_step += 1
        return batch

    def stop(self) -> None:
        """Read nothing more."""
        self._stopped = True

    def _read(self, step: int) -> StepBatch:
        rows = self._plan.slot_rows(step, self._slots, self._micro_batch)
        windows = self._reader.windows(rows, self._plan.sequence_length)
        shape = (len(self._slots), self._micro_batch, self._plan.sequence_length + 1)
        return StepBatch(step, windows.view(shape))


class SlotLoader(Iterator[StepBatch]):
    """Iterates over this worker's slots of the steps [`first_step`, `last_step`).

    `slots` is any range, strided or contiguous.

    One thread reads `prefetch_steps` (at least 1) batches ahead. `close` and the end of the `with` block
    end it. An error while reading, such as `DataError`, is raised by the `next` of its step.
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
        self._next_step = first_step
        self._node = _StepNode(plan, reader, slots, micro_batch, range(first_step, last_step))
        self._batches = Prefetcher(self._node, prefetch_factor=prefetch_steps)

    @property
    def next_step(self) -> int:
        """The step of the next batch: the whole state."""
        return self._next_step

    def __next__(self) -> StepBatch:
        item: StepBatch | _Failure = next(self._batches)
        if isinstance(item, _Failure):
            raise item.error
        assert item.step == self._next_step, f"step {item.step} came instead of {self._next_step}"
        self._next_step += 1
        return item

    def close(self) -> None:
        """End the reading thread. Waits at most for the batch that it is reading."""
        self._node.stop()
        for _ in self._batches:  # empty the queue: the thread would wait on a full one
            pass

    def __enter__(self) -> "SlotLoader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def held_out_batches(
    manifest: Manifest, reader: TokenReader, sequence_length: int, batch: int, *, ignored: int
) -> Iterator[HeldOutBatch]:
    """Batches in which every held-out token, end tokens included, is a target exactly once.

    A batch is at most [batch, sequence_length]. The stream of each source is read in consecutive windows.
    An end token before the stream is the context of its first token. The last batch of a source has the
    remaining windows. Its last window is padded with end tokens as inputs and `ignored` as targets. Bits
    per byte are the sum of the losses, divided by (`manifest.held_out_bytes` * ln 2). Yields nothing if
    nothing is held out.
    """
    for number, source in enumerate(manifest.sources):
        total, per_batch = source.tokens("held_out"), batch * sequence_length
        for start in range(0, total, per_batch):
            end = min(start + per_batch, total)
            windows = -(-(end - start) // sequence_length)
            shape = (windows, sequence_length)
            inputs_BT = torch.full(shape, manifest.end_token_id, dtype=torch.int64)
            targets_BT = torch.full(shape, ignored, dtype=torch.int64)
            tokens = reader.stream(number, "held_out", max(0, start - 1), end)
            targets_BT.view(-1)[: end - start] = tokens[-(end - start) :]
            # Input i is the token before target i. The first input of a stream is the added end token.
            first = 1 if start == 0 else 0
            inputs_BT.view(-1)[first : end - start] = tokens[: end - start - first]
            yield HeldOutBatch(number, inputs_BT, targets_BT)
