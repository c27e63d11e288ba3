"""One optimizer step: V slots forward and backward, one agreement of all workers, one update.

    round 0 .. ceil(V/W)-1: slot of this worker ─► loss ─► backward (gradients enter the canonical tree)
    agree_on_step:          losses, row sums of squares and control bits, one all-reduce
    judge ─► clip ─► AdamW

Each entry of the agreement's vector is non-zero on at most one worker, so the sum is exact in any order; of the
control bits only zero or not zero counts. They make all workers stop, checkpoint or take a snapshot after the same step
at no extra cost.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from elastic_pt.model.loss import LossSums
from elastic_pt.model.optimizer import local_rows
from elastic_pt.train.exact import RowSquares, fold
from elastic_pt.train.health import Rung, Verdict, judge
from elastic_pt.train.schedule import learning_rate
from elastic_pt.train.state import TrainState

_CLIP_EPSILON: Final = 1e-6
_CONTROLS: Final = 4


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


@dataclass(frozen=True)
class StepResult:
    """The result of a step; the same on all workers."""

    step: int
    loss: float
    """Mean cross-entropy per token, in nats."""
    z_loss: float
    gradient_norm: float
    learning_rate: float
    verdict: Verdict
    agreed: Agreed


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
    train = state.config.train
    step = state.steps_done
    losses_2V = torch.zeros(2, train.slots, dtype=torch.float64, device=state.device)
    for index in range(state.rounds.count):
        state.rounds.index = index
        slot = state.rounds.slot_of(state.rank)
        if slot < train.slots:
            losses_2V[:, slot] = _backward(state, tokens_SBT[index], 1.0)
        else:
            # FSDP2 gathers and reduces in every backward pass, so a worker without a slot runs a tiny one.
            _backward(state, tokens_SBT.new_zeros(1, 2), 0.0)
    gradients = [_gradient(parameter) for parameter in state.model.parameters()]
    losses_2V, norm, agreed = _agree_on_step(state, losses_2V, gradients, control, offer())
    tokens = train.global_batch * state.config.data.sequence_length
    loss, z_loss = (value / tokens for value in fold(losses_2V).tolist())
    verdict = judge(
        loss, norm, skipped_in_a_row=state.skipped_in_a_row, skipped_max=train.max_skipped_steps
    )
    rate = learning_rate(step, train)
    if verdict.rung is Rung.UPDATE:
        scale = min(1.0, train.clip_norm / (norm + _CLIP_EPSILON)) if train.clip_norm else 1.0
        state.optimizer.step(rate, scale)
    state.optimizer.zero_grad()
    state.steps_done = step + 1
    state.skipped_in_a_row = 0 if verdict.rung is Rung.UPDATE else state.skipped_in_a_row + 1
    return StepResult(step, loss, z_loss, norm, rate, verdict, agreed)


def _backward(state: TrainState, tokens_BT: Tensor, weight: float) -> Tensor:
    """Forward and backward of one slot; returns its sums of cross-entropy and z-loss, float64 [2]."""
    train = state.config.train
    inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:].contiguous()
    sums = state.model(inputs_BT, targets_BT, train.z_loss)
    assert isinstance(sums, LossSums)
    share = weight / (train.global_batch * state.config.data.sequence_length)
    (sums.total * share).backward()  # type: ignore[no-untyped-call]
    return torch.stack((sums.cross_entropy, sums.z_loss)).detach().double()


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return local_rows(parameter.grad)


def _agree_on_step(
    state: TrainState, losses_2V: Tensor, gradients: list[Tensor], control: Control, offer: Offer
) -> tuple[Tensor, float, Agreed]:
    """One all-reduce: losses of all slots [2, V], gradient norm, and the requests and offers of all workers."""
    exact = state.config.train.numerics == "exact"
    squares = state.row_squares.total_rows if exact else 1
    bits = _CONTROLS + state.world_size
    vector = torch.zeros(
        bits + losses_2V.numel() + squares, dtype=torch.float64, device=state.device
    )
    vector[:bits] = torch.tensor(_bits_of(state, control, offer), dtype=torch.float64)
    vector[bits:-squares] = losses_2V.flatten()
    if exact:
        state.row_squares.write(vector[-squares:], gradients)
    else:
        norm = torch.nn.utils.get_total_norm(gradients)
        vector[-1] = norm.double().square()
    dist.all_reduce(vector)
    norm_value = RowSquares.norm(vector[-squares:])
    return vector[bits:-squares].view(2, -1), norm_value, _agreed(vector[:bits].tolist())


def _bits_of(state: TrainState, control: Control, offer: Offer) -> list[float]:
    """This worker's part of the vector's head: three control bits, the cadence, and an entry for each worker.

    An entry is 2 · (complete step + 1), plus 1 if a mirror has no room; 0: this worker takes no snapshots.
    """
    entries = [0.0] * state.world_size
    if offer.complete_step is not None:
        entries[state.rank] = 2.0 * (1 + offer.complete_step) + (not offer.mirrors_have_room)
    every = float(offer.snapshot_every) if state.rank == 0 else 0.0
    bits = (control.drain, control.checkpoint_pending, control.checkpoint)
    return [*(float(each) for each in bits), every, *entries]


def _agreed(head: list[float]) -> Agreed:
    drain, pending, checkpoint, every, *entries = head
    oldest = int(min(entries)) // 2
    return Agreed(
        drain=bool(drain),
        checkpoint_pending=bool(pending),
        checkpoint=bool(checkpoint),
        complete_step=oldest - 1 if oldest else None,
        snapshot_every=int(every),
        mirrors_have_room=not any(int(each) % 2 for each in entries),
    )
