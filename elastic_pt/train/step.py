"""One optimizer step: V slots forward and backward, one agreement of all workers, one update.

    round 0 .. ceil(V/W)-1: slot of this worker ─► loss ─► backward (gradients enter the canonical tree)
    agree_on_step:          losses, row sums of squares, control bits and waits, one all-reduce
    judge ─► clip ─► AdamW

Each entry of the agreement's vector is non-zero on at most one worker, so the sum is exact in any order; of the
control bits only zero or not zero counts. They make all workers stop, checkpoint or take a snapshot after the same step
at no extra cost. The loss of each row is in the vector too: 8 bytes, next to the 10⁹ or more operations that the row
costs, so there is no limit for large batches.

Shapes: V slots, B micro-batch, L = 2 + B losses of a slot: its cross-entropy, its z-loss, and each row's cross-entropy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from elastic_pt.data.ignored import inputs_and_targets
from elastic_pt.failpoints import Failpoint, failpoint
from elastic_pt.model.loss import IGNORED, LossSums
from elastic_pt.model.optimizer import local_rows
from elastic_pt.train.clock import Phase
from elastic_pt.train.exact import RowSquares, fold
from elastic_pt.train.health import Rung, Verdict, judge
from elastic_pt.train.schedule import learning_rate
from elastic_pt.train.state import TrainState

_CLIP_EPSILON: Final = 1e-6


@dataclass(frozen=True)
class Control:
    """One worker's requests to all workers for after this step."""

    drain: bool
    """Checkpoint and stop, because the members will change."""
    checkpoint_pending: bool
    """The previous checkpoint is still being uploaded, so one that does not end the generation has to wait."""
    checkpoint: bool = False
    """Checkpoint as soon as none is pending: an operator asks for it."""


@dataclass(frozen=True)
class Offer:
    """What one worker says of its snapshots."""

    complete_step: int | None = None
    """The newest step of this generation that its node and its mirrors hold whole, 0 for none; None if it takes none."""
    snapshot_every: int = 1
    """The cadence that it would choose. That of the first worker counts."""
    mirrors_have_room: bool = True
    """Whether all mirrors of the node have room."""


@dataclass(frozen=True)
class Agreed:
    """What all workers know of each other after a step; the same on each of them."""

    drain: bool
    """Whether any worker asked for it."""
    checkpoint_pending: bool
    """Whether any worker still has one."""
    checkpoint: bool
    """Whether an operator asks for one."""
    complete_step: int | None
    """The newest step that all nodes and their mirrors hold whole, 0 for none; None if a worker takes no snapshots."""
    snapshot_every: int
    mirrors_have_room: bool = True
    """Whether all mirrors of all nodes have room: then no older state is needed."""
    least_communicate_s: float = 0.0
    """The least time of any worker in the collectives of the step before; 0 in a generation's first step."""


@dataclass(frozen=True)
class StepResult:
    """The result of a step; the same on all workers, except `straggler_wait_s`."""

    step: int
    loss: float
    """Mean cross-entropy per token, in nats."""
    z_loss: float
    gradient_norm: float
    learning_rate: float
    verdict: Verdict
    agreed: Agreed
    row_losses: NDArray[np.float64]
    """Sum of the cross-entropy of each row of the global batch. Their sum is that of the loss."""
    straggler_wait_s: float
    """This worker's time in the collectives of the step before, beyond the least of any worker."""


def no_snapshots() -> Offer:
    """What a worker offers that takes none."""
    return Offer()


def run_step(
    state: TrainState,
    tokens_SBT: Tensor,
    control: Control,
    offer: Callable[[], Offer] = no_snapshots,
) -> StepResult:
    """Train step `state.steps_done` and advance the state. Communicates; every worker calls it.

    `tokens_SBT [slots of this worker, micro_batch, sequence_length + 1]`. `offer` is called as late as possible: a
    snapshot of the step before may have become complete during this one.
    """
    train, clock = state.config.train, state.clock
    step, waited_s = state.steps_done, clock.last_communicate_s
    failpoint(Failpoint.STEP_FORWARD, step)
    clock.enter(Phase.COMPUTE)
    losses_VL = torch.zeros(
        train.slots, 2 + train.micro_batch, dtype=torch.float64, device=state.device
    )
    for index in range(state.rounds.count):
        state.rounds.index = index
        slot = state.rounds.slot_of(state.rank)
        if slot < train.slots:
            losses_VL[slot] = _backward(state, tokens_SBT[index], 1.0)
        else:
            # FSDP2 gathers and reduces in every backward pass, so a worker without a slot runs a tiny one.
            _backward(state, tokens_SBT.new_zeros(1, 2), 0.0)
    gradients = [_gradient(parameter) for parameter in state.model.parameters()]
    failpoint(Failpoint.STEP_REDUCE, step)
    losses_VL, norm, agreed = _agree_on_step(state, losses_VL, gradients, control, offer())
    tokens = train.global_batch * state.config.data.sequence_length
    row_losses = losses_VL[:, 2:].flatten().cpu().numpy()
    loss, z_loss = (value / tokens for value in fold(losses_VL[:, :2].t()).tolist())
    verdict = judge(
        loss, norm, skipped_in_a_row=state.skipped_in_a_row, skipped_max=train.max_skipped_steps
    )
    rate = learning_rate(step, train)
    failpoint(Failpoint.STEP_OPTIMIZER, step)
    if verdict.rung is Rung.UPDATE:
        scale = min(1.0, train.clip_norm / (norm + _CLIP_EPSILON)) if train.clip_norm else 1.0
        state.optimizer.step(rate, scale)
    state.optimizer.zero_grad()
    state.steps_done = step + 1
    state.skipped_in_a_row = 0 if verdict.rung is Rung.UPDATE else state.skipped_in_a_row + 1
    wait_s = waited_s - agreed.least_communicate_s
    return StepResult(step, loss, z_loss, norm, rate, verdict, agreed, row_losses, wait_s)


def _backward(state: TrainState, tokens_BT: Tensor, weight: float) -> Tensor:
    """Forward and backward of one slot; returns its losses, float64 [L]."""
    train = state.config.train
    inputs_BT, targets_BT = inputs_and_targets(tokens_BT, ignored=IGNORED)
    sums = state.model(inputs_BT, targets_BT, train.z_loss)
    assert isinstance(sums, LossSums)
    share = weight / (train.global_batch * state.config.data.sequence_length)
    (sums.total * share).backward()  # type: ignore[no-untyped-call]
    slot = torch.stack((sums.cross_entropy, sums.z_loss)).detach().double()
    rows_B = sums.of_rows(targets_BT.shape[0])
    # The slot's sum is rounded to float32. Spread this over its rows, so that they add up to it.
    return torch.cat((slot, rows_B + (slot[0] - rows_B.sum()) / rows_B.numel()))


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return local_rows(parameter.grad)


def _agree_on_step(
    state: TrainState, losses_VL: Tensor, gradients: list[Tensor], control: Control, offer: Offer
) -> tuple[Tensor, float, Agreed]:
    """One all-reduce: losses of all slots, gradient norm, and the requests, offers and waits of all workers."""
    exact = state.config.train.numerics == "exact"
    squares = state.row_squares.total_rows if exact else 1
    head = _head_of(state, control, offer)
    vector = torch.zeros(
        len(head) + losses_VL.numel() + squares, dtype=torch.float64, device=state.device
    )
    vector[: len(head)] = torch.tensor(head, dtype=torch.float64)
    vector[len(head) : -squares] = losses_VL.flatten()
    if exact:
        state.row_squares.write(vector[-squares:], gradients)
    else:
        norm = torch.nn.utils.get_total_norm(gradients)
        vector[-1] = norm.double().square()
    with state.clock.communicating():
        dist.all_reduce(vector)
        agreed = _agreed(vector[: len(head)].tolist())
    state.clock.enter(Phase.OPTIMIZER)
    norm_value = RowSquares.norm(vector[-squares:])
    return vector[len(head) : -squares].view_as(losses_VL), norm_value, agreed


def _head_of(state: TrainState, control: Control, offer: Offer) -> list[float]:
    """This worker's part of the vector's head: three control bits, the cadence, and two entries for each worker.

    The first is 2 · (complete step + 1), plus 1 if a mirror has no room; 0: this worker takes no snapshots. The second
    is its time in the collectives of the step before.
    """
    offers, waits = [0.0] * state.world_size, [0.0] * state.world_size
    if offer.complete_step is not None:
        offers[state.rank] = 2.0 * (1 + offer.complete_step) + (not offer.mirrors_have_room)
    waits[state.rank] = state.clock.last_communicate_s
    every = float(offer.snapshot_every) if state.rank == 0 else 0.0
    bits = (control.drain, control.checkpoint_pending, control.checkpoint)
    return [*(float(each) for each in bits), every, *offers, *waits]


def _agreed(head: list[float]) -> Agreed:
    drain, pending, checkpoint, every, *entries = head
    offers, waits = entries[: len(entries) // 2], entries[len(entries) // 2 :]
    oldest = int(min(offers)) // 2
    return Agreed(
        drain=bool(drain),
        checkpoint_pending=bool(pending),
        checkpoint=bool(checkpoint),
        complete_step=oldest - 1 if oldest else None,
        snapshot_every=int(every),
        mirrors_have_room=not any(int(each) % 2 for each in offers),
        least_communicate_s=min(waits),
    )
