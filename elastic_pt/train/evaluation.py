"""The held-out loss during training. Its bits do not depend on the number of workers (worker process).

    step due? ─► passes: batch i on worker i mod W ─► row losses, one all-reduce ─► mean

A batch has the shape of a training slot. All workers make the same number of passes, because FSDP2 gathers weights in
each of them; a worker without a batch evaluates padding. Each row's loss has its own place in the all-reduced vector and
is non-zero on at most one worker, so the sum is exact.

Whether an evaluation is due depends on the step alone. It ends before its step is reported and before that state
is copied: whoever resumes from the state of a step has its held-out loss in the history.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from elastic_pt.config import Config
from elastic_pt.data.held_out import HeldOutLoss, held_out_rows, mean_loss, read_held_out
from elastic_pt.data.plan import DataPlan
from elastic_pt.data.shards import TokenReader
from elastic_pt.failpoints import Failpoint, failpoint
from elastic_pt.model.loss import IGNORED, LossSums
from elastic_pt.train.state import TrainState
from elastic_pt.workers.heartbeat import WorkerPhase


@dataclass(frozen=True)
class Evaluated:
    """A finished evaluation; `held_out` is the same on all workers."""

    held_out: HeldOutLoss
    seconds: float
    """Wall time of this worker."""


class Evaluation:
    """What a worker needs to evaluate. One per worker; not thread-safe."""

    def __init__(self, config: Config, plan: DataPlan, reader: TokenReader) -> None:
        self._manifest, self._names, self._reader = plan.manifest, plan.names_shown, reader
        self._shape = (config.train.micro_batch, plan.sequence_length)
        self._rows = held_out_rows(plan.manifest, plan.sequence_length, config.evaluation.rows)

    @torch.no_grad()
    def measure(self, state: TrainState, enter: Callable[[WorkerPhase, int], None]) -> Evaluated:
        """Evaluate the weights. Communicates; every worker calls it after the same step.

        `enter` informs the watchdog: its limit holds for each pass. Changes nothing in `state` but its clock.
        """
        batch = self._shape[0]
        losses_R = torch.zeros(len(self._rows), dtype=torch.float64, device=state.device)
        for first_of_pass in range(0, len(self._rows), batch * state.world_size):
            enter(WorkerPhase.EVALUATE, state.steps_done)
            first = first_of_pass + batch * state.rank
            losses_R[first : first + batch] = self._losses(state, first)
            failpoint(Failpoint.PASS_EVALUATED)
        # Without a backward pass the root keeps its gathered weights, and `state.slices` would give other memory.
        assert isinstance(state.model, FSDPModule)
        state.model.reshard()
        dist.all_reduce(losses_R)
        held_out = mean_loss(self._rows, losses_R.tolist(), self._names)
        return Evaluated(held_out, state.clock.evaluated())

    def _losses(self, state: TrainState, first: int) -> torch.Tensor:
        """The losses of the rows from `first` on, float64: a batch of them, fewer at the end, or none after it."""
        rows = self._rows[first : first + self._shape[0]]
        inputs_BT, targets_BT = read_held_out(
            self._manifest, self._reader, rows, self._shape, ignored=IGNORED
        )
        sums = state.model(inputs_BT.to(state.device), targets_BT.to(state.device))
        assert isinstance(sums, LossSums)
        return sums.of_rows(self._shape[0])[: len(rows)]
