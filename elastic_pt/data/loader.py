"""Batches for one worker, read ahead by one thread of `torchdata`; its whole state is one integer.

`SlotLoader` gives a worker its own slots of each step. A worker that starts at step s builds one with
`first_step = s` and has its place: nothing is replayed, whoever computed step s - 1.

`held_out_batches` gives every held-out token as a target exactly once, for evaluation.
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
    """An error on its way to the caller; torchdata would rewrap it in a text of many lines."""

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
    """Iterates over this worker's slots of the steps from `first_step` until `last_step` steps are done.

    The last batch is thus that of step `last_step` - 1. `slots` is any range, strided or contiguous.

    `prefetch_steps` (at least 1) batches are read ahead in one thread, which `close` or leaving the
    `with` block ends. An error while reading, `DataError` included, is raised by the `next` of its step.
    Runs in workers; not to be shared between threads.
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
        """The step that `next` will give: the whole state."""
        return self._next_step

    def __next__(self) -> StepBatch:
        item: StepBatch | _Failure = next(self._batches)
        if isinstance(item, _Failure):
            raise item.error
        assert item.step == self._next_step, f"step {item.step} came instead of {self._next_step}"
        self._next_step += 1
        return item

    def close(self) -> None:
        """End the reading thread; at most the batch that is being read is waited for."""
        self._node.stop()
        for _ in self._batches:  # each one taken lets the thread come closer to its end
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
    """Every held-out token, end tokens included, as a target exactly once: at most [batch, sequence_length].

    The stream of a source is read in windows one after the other; the end token stands in front of it,
    so that its first token has a context. The last batch of a source has the windows that are left, and
    the last window is filled up with end tokens as inputs and `ignored` as targets. The sum of the losses
    over `manifest.held_out_bytes` (times ln 2) is bits per byte. Nothing comes if nothing is held out.
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
            # Input i is the token before target i; only the first of all is the end token in front.
            first = 1 if start == 0 else 0
            inputs_BT.view(-1)[first : end - start] = tokens[: end - start - first]
            yield HeldOutBatch(number, inputs_BT, targets_BT)
