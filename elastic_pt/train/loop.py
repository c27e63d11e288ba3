"""The training loop: every decision of a worker's life between its first and its last step.

    batch ─► run_step ─► report ─► checkpoint due? ─► stop asked for? ─► next step

A checkpoint is staged (copied into the agent's memory) right here, between two steps; hashing and upload
are the agent's. All workers take the same decisions, because they decide from what `run_step` agreed on.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from elastic_pt.checkpoint.layout import TrainingState
from elastic_pt.checkpoint.shard_file import Staging, StagingFull, write_shard
from elastic_pt.config import Config
from elastic_pt.data.loader import StepBatch
from elastic_pt.train.health import Rung
from elastic_pt.train.state import TrainState
from elastic_pt.train.step import Control, StepResult, run_step
from elastic_pt.workers.assignment import Outcome
from elastic_pt.workers.heartbeat import Phase

_PAUSE_MIN_S: Final = 0.1
_PAUSE_MAX_S: Final = 5.0


class Agent(Protocol):
    """What the loop needs of the node's agent (`workers.channel.WorkerSide`)."""

    @property
    def drain_requested(self) -> bool:
        """Whether to stop at a step boundary."""

    def released(self, step: int) -> bool:
        """Whether the agent is done with the checkpoint of `step`."""

    def send(self, kind: str, **content: object) -> None:
        """Tell the agent something."""


@dataclass(frozen=True)
class Provenance:
    """What a checkpoint says about where it comes from."""

    data_fingerprint: str
    tokenizer_sha256: str
    config_fingerprint: str


def unwatched(phase: Phase, step: int) -> None:
    """What `train` tells where no agent watches."""


def train(
    config: Config,
    state: TrainState,
    batches: Iterator[StepBatch],
    agent: Agent,
    staging: Staging,
    provenance: Provenance,
    enter: Callable[[Phase, int], None] = unwatched,
) -> Outcome:
    """Train until the last step or until the agent wants the world to change. Worker process; communicates.

    `enter(phase, steps done)` is told what comes next, for the watchdog.
    """
    last_checkpoint = state.steps_done
    staged_step: int | None = None
    while state.steps_done < config.train.steps:
        started_s = time.monotonic()
        enter(Phase.DATA, state.steps_done)
        batch = next(batches)
        assert batch.step == state.steps_done
        data_wait_s = time.monotonic() - started_s
        pending = staged_step is not None and not agent.released(staged_step)
        enter(Phase.COMPUTE, state.steps_done)
        tokens_SBT = batch.tokens_VBT.to(state.device, non_blocking=True)
        result = run_step(
            state,
            tokens_SBT,
            Control(agent.drain_requested, pending),
        )
        report(agent, config, state, result, time.monotonic() - started_s, data_wait_s)
        if result.verdict.rung is Rung.STOP:
            return Outcome.DIVERGED
        finished = state.steps_done == config.train.steps
        due = state.steps_done - last_checkpoint >= config.checkpoint.every_steps
        if finished or result.control.drain or (due and not result.control.checkpoint_pending):
            # Whoever stops here has no later step to checkpoint, so it waits for room; others go on without.
            # Less than the others' patience in the barrier at the end, or they would fail for this worker's trouble.
            longest_s = (
                min(config.elastic.settle_timeout_s, config.elastic.collective_timeout_s) / 2
            )
            patience_s = longest_s if finished or result.control.drain else 0.0
            stage_or_skip(config, state, agent, staging, provenance, enter, patience_s)
            last_checkpoint = staged_step = state.steps_done
        if result.control.drain and not finished:
            return Outcome.DRAINED
    return Outcome.COMPLETED


def stage_or_skip(
    config: Config,
    state: TrainState,
    agent: Agent,
    staging: Staging,
    provenance: Provenance,
    enter: Callable[[Phase, int], None],
    patience_s: float,
) -> None:
    """Stage a checkpoint; where there is no room within `patience_s`, tell the agent that there will be none."""
    give_up_at_s = time.monotonic() + patience_s
    pause_s = _PAUSE_MIN_S
    while True:
        enter(Phase.STAGE, state.steps_done)
        try:
            return stage(config, state, agent, staging, provenance)
        except StagingFull as error:
            final = time.monotonic() + pause_s > give_up_at_s
            agent.send(
                "skipped" if final else "no_room",
                step=state.steps_done,
                rank=state.rank,
                generation=staging.generation,
                why=str(error),
            )
            if final:
                return None
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _PAUSE_MAX_S)


def stage(
    config: Config, state: TrainState, agent: Agent, staging: Staging, provenance: Provenance
) -> None:
    """Copy this worker's rows of the whole state into the agent's staging directory, and say so."""
    started_s = time.monotonic()
    path = staging.path(state.steps_done, state.rank)
    write_shard(
        path,
        {name: (each.rows, each.global_shape, each.first_row) for name, each in state.slices()},
        TrainingState(
            step=state.steps_done,
            optimizer_step=state.optimizer.step_count,
            data_fingerprint=provenance.data_fingerprint,
            tokenizer_sha256=provenance.tokenizer_sha256,
            config_fingerprint=provenance.config_fingerprint,
            skipped_in_a_row=state.skipped_in_a_row,
        ),
    )
    agent.send(
        "staged",
        step=state.steps_done,
        rank=state.rank,
        generation=staging.generation,
        path=str(path),
        seconds=time.monotonic() - started_s,
    )


def report(
    agent: Agent,
    config: Config,
    state: TrainState,
    result: StepResult,
    seconds: float,
    data_wait_s: float,
) -> None:
    """Tell the agent about a finished step. Steps are counted from 1 here: `step` are done."""
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
