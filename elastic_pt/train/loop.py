"""The training loop: every decision of a worker between its first and its last step.

    batch ─► run_step ─► evaluation due? ─► report ─► checkpoint or snapshot due? ─► stop requested? ─► next step

A snapshot is one copy of the state into memory that survives this process. A checkpoint is a snapshot whose memory is
kept until the agent has hashed and uploaded it. All workers make the same decisions, because they decide from the
values that `run_step` agreed on.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from elastic_pt.config import Config
from elastic_pt.data.loader import LateCause, StepBatch
from elastic_pt.data.plan import RowSources
from elastic_pt.train.checkpoints import Agent, Checkpoints, unwatched
from elastic_pt.train.clock import Phase, StepTimes
from elastic_pt.train.evaluation import Evaluated, Evaluation
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
    evaluation: Evaluation | None = None,
) -> Outcome:
    """Train until the last step or until the agent asks all workers to stop. Worker process; communicates.

    `enter(phase, steps done)` informs the watchdog of the next phase. `evaluation` may be missing if none is ever due.
    """
    last_checkpoint = checkpoints.committed_step
    request = -1
    """The newest request for a checkpoint that a save of this worker has met."""
    while state.steps_done < config.train.steps:
        state.clock.begin()
        enter(WorkerPhase.DATA, state.steps_done)
        batch = next(batches)
        assert batch.step == state.steps_done
        pending, asked = checkpoints.pending, agent.checkpoint_request
        enter(WorkerPhase.COMPUTE, state.steps_done)
        tokens_SBT = batch.tokens_VBT.to(state.device, non_blocking=True)
        result = run_step(
            state,
            tokens_SBT,
            Control(agent.drain_requested, pending, asked > request),
            snapshots.offer,
        )
        sources = losses_by_source(
            batch.sources, result.row_losses, tokens_per_row=config.data.sequence_length
        )
        times = state.clock.end()
        evaluated = None
        if config.evaluation.due(state.steps_done, config.train.steps):
            assert evaluation is not None
            evaluated = evaluation.measure(state, enter)
        report(agent, state, result, times, batch.late, sources, evaluated)
        if result.verdict.rung is Rung.STOP:
            return Outcome.DIVERGED
        snapshots.measure(times.seconds)
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
    state: TrainState,
    result: StepResult,
    times: StepTimes,
    late: LateCause | None,
    sources: dict[str, tuple[int, float]],
    evaluated: Evaluated | None,
) -> None:
    """Report a finished step to the agent, which keeps the message as a line of the history.

    Steps are counted from 1 here: `step` steps are done.
    """
    rows = state.config.train.global_batch
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
        tokens=rows * state.config.data.sequence_length,
        seconds=times.seconds,
        data_wait_s=times.phases[Phase.DATA],
        **({} if late is None else {"data_wait_cause": late.value}),
        phases={phase: round(seconds, 6) for phase, seconds in times.phases.items()},
        checkpoint_stall_s=round(times.stall_s, 6),
        straggler_wait_s=round(result.straggler_wait_s, 6),
        sources=_json_sources(sources),
        skipped=result.verdict.reason,
        **({} if evaluated is None else _content_of(evaluated)),
    )


def _content_of(evaluated: Evaluated) -> dict[str, object]:
    """The fields of an evaluation in the message of its step."""
    return {
        "held_out_loss": _json_number(evaluated.held_out.loss),
        "held_out_sources": _json_sources(evaluated.held_out.by_source),
        "evaluation_s": round(evaluated.seconds, 6),
    }


def losses_by_source(
    sources: RowSources, row_losses: NDArray[np.float64], *, tokens_per_row: int
) -> dict[str, tuple[int, float]]:
    """For each source with rows in the step: how many, and their mean cross-entropy per token.

    Adds in the order of the rows, so the bits are the same for any number of workers.
    """
    rows = np.bincount(sources.of_row, minlength=len(sources.names))
    sums = np.bincount(sources.of_row, weights=row_losses, minlength=len(sources.names))
    return {
        name: (count, total / (count * tokens_per_row))
        for name, count, total in zip(sources.names, rows.tolist(), sums.tolist(), strict=True)
        if count
    }


def _json_sources(sources: dict[str, tuple[int, float]]) -> dict[str, list[int | float | None]]:
    return {name: [rows, _json_number(loss)] for name, (rows, loss) in sources.items()}


def _json_number(value: float) -> float | None:
    """JSON has no NaN: a non-finite number becomes null."""
    return value if abs(value) < float("inf") else None
