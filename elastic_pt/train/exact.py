"""Sums over the slots of a step. Their bits do not depend on the number of workers.

A step has V slots; slot s contributes one gradient g(s), a pure function of (weights, data plan, step, s).
Floating-point addition is not associative, so the sum is defined as one binary tree over the slots:

    level 2                 g0+g1+g2+g3          ...        node (level, i) covers slots [i·2^level, (i+1)·2^level)
    level 1           g0+g1          g2+g3       ...        it is node(level-1, 2i) + node(level-1, 2i+1);
    level 0          g0    g1       g2    g3     ...        a node whose right half has no slots is its left half

The tree is the same for every set of workers. Worker r of W computes slots r, r + W, r + 2W, ...: in round k all
workers together compute the contiguous slots [kW, (k+1)W). So contributions arrive in the order of the slots, and
the pending partial sums are those of a binary counter, at most log2(V) + 1 of them (contiguous spans per worker
would leave up to W·log2(V/W) pending).

    backward of round k ─► FSDP2 ─► ExactReduceScatter: all-to-all, one piece per source ─► DyadicSum.add(slot, piece)
                                    output: zeros, and in the last round the root

FSDP2 skips its reduce-scatter in a world of one; there `ExactAllReduceHook` feeds the same tree.

On CUDA all of this runs on FSDP2's communication streams. The all-to-all copies and never adds, so NCCL and gloo
give the same bits. The CUDA path follows torch's documentation and source; `benchmarks/cuda/run.sh` checks it on a
machine with a GPU.

The gradient norm is a sum too. Squares are summed in float64 within each row by folding the row onto itself, then
over all rows in the model's order by the same fold. A row is never split over workers, and every operation is a
single IEEE addition or multiplication, so vector width, threads and shard borders have no effect.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from elastic_pt.config import TrainSection
from elastic_pt.train.clock import StepClock

_FOLD_ELEMENTS_MAX: Final = 1 << 22
"""Elements that are squared at once, to bound the float64 scratch memory; rows are never split."""


def make_deterministic(train: TrainSection, device: torch.device) -> None:
    """Pin everything in this process that could change the bits of a micro-batch."""
    torch.set_num_threads(train.threads)
    if train.numerics == "exact":
        if train.compile:
            torch.use_deterministic_algorithms(True)
        else:
            # The same for all but compiled code. The call above imports the compiler, which takes a second.
            torch.set_deterministic_debug_mode("error")
        # Uninitialised memory is always written before it is read; filling it with NaN first only costs time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda":
        torch.cuda.set_device(device)


class DyadicSum:
    """The canonical sum of V tensors of one shape, fed in any order. Worker process."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._pending: dict[tuple[int, int], Tensor] = {}

    def add(self, slot: int, contribution: Tensor) -> None:
        """Add one slot's tensor. Its memory becomes part of the sum, so the caller must not use it again."""
        assert 0 <= slot < self._slots
        level, index, value = 0, slot, contribution
        while (nodes := -(-self._slots >> level)) > 1:
            sibling = index ^ 1
            if sibling < nodes:
                other = self._pending.pop((level, sibling), None)
                if other is None:
                    assert (level, index) not in self._pending
                    self._pending[level, index] = value
                    return
                value = value.add_(other)
            level, index = level + 1, index >> 1
        self._pending[level, 0] = value

    def own_pending(self) -> None:
        """Copy partial sums that are views, so that the large buffer behind them can be freed."""
        for node, value in self._pending.items():
            if value.untyped_storage().nbytes() > value.nbytes:
                self._pending[node] = value.clone()

    def take_root(self) -> Tensor:
        """The finished sum; the tree is empty afterwards."""
        (value,) = self._pending.values()
        assert len(self._pending) == 1
        self._pending.clear()
        return value


class Rounds:
    """The rounds of a step: each worker computes at most one slot per round. Shared by all reductions of a model.

    `train.step` sets `index` before each backward pass, so that a reduction knows which slots it receives.
    """

    def __init__(self, slots: int, world_size: int) -> None:
        self.slots = slots
        self.world_size = world_size
        self.count = -(-slots // world_size)
        self.index = 0

    def slot_of(self, rank: int) -> int:
        """The slot that `rank` computes in this round; `slots` or more means none."""
        return self.index * self.world_size + rank

    @property
    def last(self) -> bool:
        """Whether this round completes the step."""
        return self.index == self.count - 1


class ExactReduceScatter:
    """FSDP2 calls this instead of its reduce-scatter, for one group of parameters. Worker process."""

    def __init__(self, rounds: Rounds, clock: StepClock) -> None:
        self._rounds = rounds
        self._clock = clock
        self._sum = DyadicSum(rounds.slots)

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for FSDP2's input and output."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp,
        async_op: bool = False,
    ) -> None:
        """Exchange pieces and add them to the tree: `input [W·n]`, `output [n]`. Communicates."""
        assert op == dist.ReduceOp.SUM  # type: ignore[comparison-overlap]
        assert not async_op
        received = torch.empty_like(input_tensor)
        with self._clock.communicating():
            dist.all_to_all_single(received, input_tensor, group=group)
        for source, piece in enumerate(received.view(self._rounds.world_size, -1)):
            slot = self._rounds.slot_of(source)
            if slot < self._rounds.slots:
                self._sum.add(slot, piece)
        _put_out(self._sum, self._rounds, output_tensor)


class ExactAllReduceHook:
    """The same sum in a world of one, where FSDP2 calls no reduce-scatter but still this hook."""

    def __init__(self, rounds: Rounds) -> None:
        self._rounds = rounds
        self._sum = DyadicSum(rounds.slots)

    def __call__(self, reduce_output: Tensor) -> None:
        """Take this round's gradient out of `reduce_output [n]` and leave zeros or the root there."""
        if reduce_output.is_cuda:
            # FSDP2 allocates it on its reduce-scatter stream, calls this hook on another stream, and frees it while
            # that stream may still read it. Without this mark the next group of parameters could overwrite it.
            reduce_output.record_stream(torch.cuda.current_stream(reduce_output.device))
        self._sum.add(self._rounds.slot_of(0), reduce_output.clone())
        _put_out(self._sum, self._rounds, reduce_output)


def _put_out(tree: DyadicSum, rounds: Rounds, output: Tensor) -> None:
    if rounds.last:
        # Adding zero turns -0 into +0, as FSDP2's accumulation onto zeros does when there are more rounds.
        torch.add(tree.take_root(), 0.0, out=output)
    else:
        tree.own_pending()
        output.zero_()


def install_exact_reduction(model: torch.nn.Module, rounds: Rounds, clock: StepClock) -> None:
    """Make every FSDP2 group of `model` sum its gradients over the canonical tree."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            if rounds.world_size > 1:
                module.set_custom_reduce_scatter(ExactReduceScatter(rounds, clock))  # type: ignore[arg-type]
            else:
                module.set_all_reduce_hook(ExactAllReduceHook(rounds))


def sum_without_scaling(module: FSDPModule) -> None:
    """Make FSDP2 sum gradients without a division; losses are divided by V already."""
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


def fold(values: Tensor) -> Tensor:
    """Sum over the last dimension in the one order that depends on its length only. Overwrites `values`."""
    width = values.shape[-1]
    while width > 1:
        half = (width + 1) // 2
        values[..., : width - half].add_(values[..., half:width])
        width = half
    return values[..., 0]


def row_square_sums(rows: Tensor) -> Tensor:
    """Sum of squares of each row, float64 `[rows]`, of a tensor `[rows, ...]`."""
    if rows.shape[0] == 0:
        return rows.new_zeros(0, dtype=torch.float64)
    matrix = rows.reshape(rows.shape[0], -1)
    rows_at_once = max(1, _FOLD_ELEMENTS_MAX // matrix.shape[1])
    return torch.cat([fold(part.double().square_()) for part in matrix.split(rows_at_once)])  # type: ignore[no-untyped-call]


class RowSquares:
    """Where each parameter's row sums lie in one vector over all rows of the model. Worker process.

    `parameters` gives the full row count and this worker's first row of each, in the model's order.
    """

    def __init__(self, parameters: Iterable[tuple[int, int]]) -> None:
        self._first: list[int] = []
        self.total_rows = 0
        for full_rows, first_row in parameters:
            self._first.append(self.total_rows + first_row)
            self.total_rows += full_rows

    def write(self, vector: Tensor, gradients: Iterable[Tensor]) -> None:
        """Put this worker's row sums into `vector [total_rows]` (float64, zeros elsewhere)."""
        for first, rows in zip(self._first, gradients, strict=True):
            vector[first : first + rows.shape[0]] = row_square_sums(rows)

    @staticmethod
    def norm(vector: Tensor) -> float:
        """The global gradient norm from the complete vector. Overwrites `vector`."""
        # Not torch.sqrt: its vector path on CPUs is not always correctly rounded.
        return math.sqrt(float(fold(vector)))
