"""How far a run has come: which steps are done, lost, and done again. Pure.

    reached   the newest step that the workers of one generation have done
    frontier  the newest step that those of any generation have done
    lost      from the step that a new generation resumes from to what the one before reached: lost by this change
    again     from the step that it resumes from to the frontier: lost by this change or by earlier ones

A GENERATION records `reached_step` and `frontier_step`. Ledgers, counters, costs and explanations take them from there.
"""

import json
from collections.abc import Mapping
from typing import Final

from pydantic_core import from_json

from elastic_pt.membership.decision.status import NodeStatus
from elastic_pt.runlog.records import Generation

_STEP_MAX: Final = 1 << 53


def reached_step(generation: Generation, statuses: Mapping[str, NodeStatus]) -> int | None:
    """The newest step of this generation; None if no member's status is among `statuses`, by incarnation.

    A node's `step` is an earlier generation's until its workers have done their first one.
    """
    known = [
        statuses[each.incarnation] for each in generation.members if each.incarnation in statuses
    ]
    if not known:
        return None
    steps = [
        each.step
        for each in known
        if each.start_times is not None and each.start_times.generation == generation.number
    ]
    return max([generation.resume_step, *steps])


def frontier_step(generation: Generation | None, reached: int | None) -> int:
    """The newest step of all, after this generation has reached a step (None: unknown)."""
    return max(0 if generation is None else generation.frontier_step, reached or 0)


def pulse_bytes(generation: int, incarnation: str, count: int, step: int) -> bytes:
    """The stored form of a pulse: the first member of a generation, a growing count, and the step that it has reached."""
    return json.dumps([generation, incarnation, count, step]).encode()


def step_in_pulse(pulse: bytes | None, generation: int) -> int | None:
    """The step that this generation had reached by its pulse; None if the pulse does not tell."""
    try:
        number, _, _, step = from_json(pulse or b"")
    except (ValueError, TypeError):
        # There is none, an earlier version wrote it, or it is damaged: it is a hint only.
        return None
    usable = isinstance(step, int) and 0 <= step <= _STEP_MAX
    return step if number == generation and usable else None
