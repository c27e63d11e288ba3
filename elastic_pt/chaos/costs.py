"""What each fault of a chaos run cost: seconds until training went on, and steps that were lost. Pure."""

import math
from collections.abc import Sequence
from typing import Final

from elastic_pt.chaos.play import Played, Struck
from elastic_pt.chaos.result import Cost
from elastic_pt.runlog.records import Generation, Record, Stop

_NOT_REPORTED: Final = 1


def costs_of(played: Played, records: Sequence[Record]) -> tuple[Cost, ...]:
    """The cost of each fault that struck, in their order."""
    return tuple(_cost_of(played, records, each) for each in played.struck)


def _cost_of(played: Played, records: Sequence[Record], struck: Struck) -> Cost:
    ended = _ended_by(records, struck)
    if ended is None:
        return Cost(struck.number, None, None)
    body = ended.body
    assert isinstance(body, Generation)
    trained_at_s = _trained_at_s(played, records, ended)
    recovery_s = None if trained_at_s is None else trained_at_s - struck.time_s
    return Cost(struck.number, recovery_s, lost_steps_of(played, ended))


def lost_steps_of(played: Played, record: Record) -> int:
    """Steps that were done before a GENERATION and are done again: as it says, or, if more, as workers were seen.

    A worker that begins a step has done the one before, which the members may not have known when it was lost.
    """
    generation = record.body
    assert isinstance(generation, Generation)
    seen = [each.step for each in played.progress if each.time_s <= _at_s(record)]
    done = max(seen, default=0) - _NOT_REPORTED
    said = 0 if generation.reached_step is None else generation.lost_steps
    return max(0, said, done - generation.resume_step)


def _ended_by(records: Sequence[Record], struck: Struck) -> Record | None:
    """The first generation after a fault that names a struck node in a cause, or that has only new members."""
    before: Generation | None = None
    for record in records:
        body = record.body
        if not isinstance(body, Generation):
            continue
        if before is not None and body.number > struck.generation > 0:
            named = any(cause.node in struck.nodes for cause in body.causes)
            if named or body.follows_the_loss_of_all(before):
                return record
        before = body
    return None


def _trained_at_s(played: Played, records: Sequence[Record], ended: Record) -> float | None:
    """When the first step of that generation, or of a later one, was done, as Unix time."""
    later = [each for each in records if each.index >= ended.index]
    began = [(_at_s(each), each.body) for each in later if isinstance(each.body, Generation)]
    for (at_s, generation), (until_s, _) in zip(began, [*began[1:], (math.inf, None)], strict=True):
        done = (
            each.time_s
            for each in played.progress
            if at_s <= each.time_s < until_s and each.step > generation.resume_step
        )
        if (first_s := next(done, None)) is not None:
            return first_s
    stops = [each for each in later if isinstance(each.body, Stop)]
    return _at_s(stops[0]) if stops else None


def _at_s(record: Record) -> float:
    return record.written_at.timestamp()
