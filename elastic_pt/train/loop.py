"""The training loop: every decision of a worker between its first and its last step.

    batch ─► run_step ─► report ─► checkpoint or snapshot due? ─► stop requested? ─► next step

A snapshot is one copy of the state into memory that survives this process. A checkpoint is a snapshot whose memory is
kept until the agent has hashed and uploaded it. All workers make the same decisions, because they decide from the
values that `run_step` agreed on.
"""

import time
from collections.abc import Callable, Iterator

from elastic_pt.config import Config
from elastic_pt.data.loader import StepBatch
from elastic_pt.train.checkpoints import Agent, Checkpoints, unwatched
from elastic_pt.train.health import Rung
from elastic_pt.train.snapshots import MemorySnapshots
from elastic_pt.train.state import TrainState
from elastic_pt.train.step import Control, StepResult, run_step
from elastic_pt.workers.assignment import Outcome
from elastic_pt.workers.heartbeat import WorkerPhase


def train(
    config: Config,
    state: TrainState,
    batches: Iterator[StepBatch],
    agent: Agent,
    checkpoints: Checkpoints,
    snapshots: MemorySnapshots,
    enter: Callable[[WorkerPhase, int], None] = unwatched,
) -> Outcome:
    """Train until the last step or until the agent asks all workers to stop. Worker process; communicates.

    `enter(phase, steps done)` informs the watchdog of the next phase.
    """
    last_checkpoint = checkpoints.committed_step
    request = -1
    """The newest request for a checkpoint that a save of this worker has met."""
    while state.steps_done < config.train.steps:
        started_s = time.monotonic()
        enter(WorkerPhase.DATA, state.steps_done)
        batch = next(batches)
        assert batch.step == state.steps_done
        data_wait_s = time.monotonic() - started_s
        pending, asked = checkpoints.pending, agent.checkpoint_request
        enter(WorkerPhase.COMPUTE, state.steps_done)
        tokens_SBT = batch.tokens_VBT.to(state.device, non_blocking=True)
        result = run_step(
            state,
            tokens_SBT,
            Control(agent.drain_requested, pending, asked > request),
            snapshots.offer,
        )
        seconds = time.monotonic() - started_s
        report(agent, config, state, result, seconds, data_wait_s)
        if result.verdict.rung is Rung.STOP:
            return Outcome.DIVERGED
        snapshots.measure(seconds)
        finished = state.steps_done == config.train.steps
        due = state.steps_done - last_checkpoint >= config.checkpoint.every_steps
        due = due or result.agreed.checkpoint
        due = (
            due
            and not result.agreed.checkpoint_pending
            and snapshots.complete_everywhere(result.agreed)
        )
        stops = finished or result.agreed.drain
        if stops or due:
            request = asked
            # A worker that stops has no later step to checkpoint, so it waits for room.
            timeout_s = room_timeout_s(config) if stops else 0.0
            checkpoints.save(state, snapshots, result.agreed, request=request, timeout_s=timeout_s)
            last_checkpoint = state.steps_done
        elif snapshots.due(state.steps_done, result.agreed):
            snapshots.take(state, result.agreed)
        if result.agreed.drain and not finished:
            return Outcome.DRAINED
    if last_checkpoint < state.steps_done:
        # All steps were done before, and their state was in memory only.
        checkpoints.save(state, snapshots, None, timeout_s=room_timeout_s(config))
    return Outcome.COMPLETED


def room_timeout_s(config: Config) -> float:
    """How long the last checkpoint may wait for room.

    The other workers wait in a barrier in this time. It must not time out, or they would fail too.
    """
    return min(config.elastic.settle_timeout_s, config.elastic.collective_timeout_s) / 2


def report(
    agent: Agent,
    config: Config,
    state: TrainState,
    result: StepResult,
    seconds: float,
    data_wait_s: float,
) -> None:
    """Report a finished step to the agent. Steps are counted from 1 here: `step` steps are done."""
    rows = config.train.global_batch
    agent.send(
        "step",
        step=state.steps_done,
        rank=state.rank,
        world_size=state.world_size,
        loss=_json_number(result.loss),
        z_loss=_json_number(result.z_loss),
        gradient_norm=_json_number(result.gradient_norm),
        learning_rate=result.learning_rate,
        rows=[result.step * rows, (result.step + 1) * rows],
        tokens=rows * config.data.sequence_length,
        seconds=seconds,
        data_wait_s=data_wait_s,
        skipped=result.verdict.reason,
    )


def _json_number(value: float) -> float | None:
    """JSON has no NaN: a non-finite number becomes null."""
    return value if abs(value) < float("inf") else None
