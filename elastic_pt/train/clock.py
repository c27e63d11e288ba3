"""Where the time of a step goes: a stop watch of one worker with four phases.

    end ─► stalled (snapshots, checkpoints, waits for room) ─► begin ─► data ─► compute ⇄ communicate ─► optimizer ─► end
      └─► evaluated ─► stalled ...

Exactly one phase runs between `begin` and `end`, so the phases add up to the seconds of the step. An evaluation comes
after `end` and counts neither as a phase nor as a stall.

On the CPU, gloo blocks the worker in each collective. `communicate` is the time in FSDP2's collectives and in the
agreement, so it includes the wait for slower workers. The additions of the canonical tree are `compute`.

On CUDA the worker only enqueues kernels, and nothing here waits for the device:

    compute       until the device has finished the backward passes: the agreement copies its first numbers to the device,
                  which waits for them. It includes FSDP2's collectives, hidden behind kernels or not
    communicate   from there until the result of the agreement is on the host
    optimizer     enqueueing the update; the device does it during `compute` of the next step
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)


class Phase(StrEnum):
    """A part of a step."""

    DATA = "data"
    """Waiting for the batch."""
    COMPUTE = "compute"
    """Forward and backward passes."""
    COMMUNICATE = "communicate"
    """In collectives."""
    OPTIMIZER = "optimizer"
    """From the agreement to the end: norm, clipping, update."""


@dataclass(frozen=True)
class StepTimes:
    """The times of a finished step of one worker."""

    seconds: float
    phases: dict[Phase, float]
    """Seconds; they add up to `seconds`."""
    stall_s: float
    """From the end of the step before, or of its evaluation, to the start of this one; 0 for a worker's first step."""


class StepClock:
    """The stop watch of one worker. One thread at a time uses it: on CUDA, backward passes run in another thread."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._began_s = self._since_s = clock_s()
        self._ended_s: float | None = None
        self._phase = Phase.DATA
        self._seconds = dict.fromkeys(Phase, 0.0)
        self.last_communicate_s = 0.0
        """Seconds of the last finished step in collectives; 0 before there is one."""

    def begin(self) -> None:
        """A step begins, in its phase `data`."""
        self._began_s = self._since_s = self._clock_s()
        self._phase = Phase.DATA
        self._seconds = dict.fromkeys(Phase, 0.0)

    def enter(self, phase: Phase) -> None:
        """Count the time from now on for `phase`."""
        now_s = self._clock_s()
        self._seconds[self._phase] += now_s - self._since_s
        self._phase, self._since_s = phase, now_s

    @contextmanager
    def communicating(self) -> Iterator[None]:
        """Count the time inside the block for `communicate`, and then go back to the phase before."""
        phase = self._phase
        self.enter(Phase.COMMUNICATE)
        yield
        self.enter(phase)

    def end(self) -> StepTimes:
        """The step is done."""
        self.enter(self._phase)
        stall_s = 0.0 if self._ended_s is None else self._began_s - self._ended_s
        self._ended_s = self._since_s
        self.last_communicate_s = self._seconds[Phase.COMMUNICATE]
        # What an evaluation communicates belongs to no step.
        phases, self._seconds = self._seconds, dict.fromkeys(Phase, 0.0)
        return StepTimes(self._since_s - self._began_s, phases, stall_s)

    def evaluated(self) -> float:
        """An evaluation is done that began at the last `end`: its seconds. They are no stall."""
        assert self._ended_s is not None
        began_s, self._ended_s = self._ended_s, self._clock_s()
        return self._ended_s - began_s


class TimedCollective:
    """One of FSDP2's collectives, unchanged, whose time counts as `communicate`."""

    def __init__(self, collective: AllGather | ReduceScatter, clock: StepClock) -> None:
        self._collective = collective
        self._clock = clock
        self.allocate = collective.allocate

    def __call__(self, *arguments: Any, **options: Any) -> dist.Work | None:
        """Communicates."""
        with self._clock.communicating():
            return self._collective(*arguments, **options)


def time_collectives(model: torch.nn.Module, clock: StepClock, *, reduce_scatter: bool) -> None:
    """Count the time of FSDP2's all-gathers, and of its own `reduce_scatter` if that is in use."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(TimedCollective(DefaultAllGather(), clock))  # type: ignore[arg-type]
            if reduce_scatter:
                module.set_custom_reduce_scatter(TimedCollective(DefaultReduceScatter(), clock))  # type: ignore[arg-type]
