"""What each fault of a chaos run cost: seconds until training went on, and steps that were lost. Pure."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Final

from elastic_pt.chaos.play import Played, Struck
from elastic_pt.chaos.result import Cost
from elastic_pt.report.change import Change
from elastic_pt.report.explanation import explain
from elastic_pt.runlog.records import Generation, Record, Stop

_NOT_REPORTED: Final = 1
_SOON_S: Final = 20.0
_UNKNOWN_SHARE: Final = 0.5


def costs_of(played: Played, records: Sequence[Record]) -> tuple[Cost, ...]:
    """The cost of each fault that struck, in their order."""
    return tuple(_cost_of(played, records, each) for each in played.struck)


def _cost_of(played: Played, records: Sequence[Record], struck: Struck) -> Cost:
    ended = ended_by(records, struck)
    if ended is None:
        return Cost(struck.number, None, None)
    body = ended.body
    assert isinstance(body, Generation)
    from_s = struck.time_s
    if struck.spec.of.starts_nodes and body.causes:
        # The others train on while a newcomer starts: until they begin the last step without it.
        from_s = max(
            [from_s, *(s for each in played.progress if (s := each.time_s) < ended.written_at_s)]
        )
    trained_at_s = _trained_at_s(played, records, ended)
    recovery_s = None if trained_at_s is None else trained_at_s - from_s
    waited_s = 0.0 if trained_at_s is None else _waited_s(played, from_s, trained_at_s)
    return Cost(struck.number, recovery_s, lost_steps_of(played, records, ended), waited_s)


def _waited_s(played: Played, from_s: float, until_s: float) -> float:
    """How long processes waited for a processor between two Unix times; half of the time if the kernel does not tell."""
    if not played.waited:
        return (until_s - from_s) * _UNKNOWN_SHARE
    before = [each for each in played.waited if each.time_s <= from_s] or played.waited[:1]
    after = [each for each in played.waited if each.time_s >= until_s] or played.waited[-1:]
    return min(until_s - from_s, after[0].waited_s - before[-1].waited_s)


def lost_steps_of(played: Played, records: Sequence[Record], record: Record) -> int:
    """Steps of the generation before that are done again: as a GENERATION says, or, if more, as workers were seen."""
    generation = record.body
    assert isinstance(generation, Generation)
    return max(0, generation.lost_steps, _seen_lost_steps(played, records, record))


def _seen_lost_steps(played: Played, records: Sequence[Record], record: Record) -> int:
    """A worker that begins a step has done the one before, which the members may not have known when it was lost."""
    generation = record.body
    assert isinstance(generation, Generation)
    earlier = [r for r in records if r.index < record.index and isinstance(r.body, Generation)]
    if not earlier:
        return 0
    before = earlier[-1].body
    assert isinstance(before, Generation)
    done = _done_by(before, earlier[-1].written_at_s, record.written_at_s, played)
    return max(0, done - _NOT_REPORTED - generation.resume_step)


def hidden_losses(played: Played, records: Sequence[Record]) -> Iterator[str]:
    """Generations that tell of fewer lost steps than were seen, unless no member was left to know of them.

    Each loss counts once: what was done by the generation before. `elastic-pt explain` must tell what the log tells.
    """
    explained = {
        each.generation: each.lost_steps or 0
        for each in explain(records)
        if isinstance(each, Change)
    }
    generations = [each for each in records if isinstance(each.body, Generation)]
    for earlier, record in itertools.pairwise(generations):
        before, after = earlier.body, record.body
        assert isinstance(before, Generation)
        assert isinstance(after, Generation)
        seen = _seen_lost_steps(played, records, record)
        told = min(after.lost_steps, explained.get(after.number, 0))
        if told < seen and not after.follows_the_loss_of_all(before):
            yield f"generation {after.number} tells of {told} lost steps, {seen} were seen"


def _done_by(generation: Generation, from_s: float, until_s: float, played: Played) -> int:
    """The newest step that it was seen to have done. Before its own first step, workers of an older one may begin theirs."""
    began = [each.step for each in played.progress if from_s <= each.time_s <= until_s]
    mine = itertools.dropwhile(lambda step: step != generation.resume_step, began)
    return max(mine, default=generation.resume_step)


def ended_by(records: Sequence[Record], struck: Struck) -> Record | None:
    """The first generation after a fault that names a struck node in a cause, or that has only new members.

    Faults that may end none are taken for the cause only of one that follows soon: another fault may strike the same node.
    """
    before: Generation | None = None
    for record in records:
        body = record.body
        if not isinstance(body, Generation):
            continue
        if before is not None and body.number > struck.generation > 0:
            named = any(
                cause.node in struck.nodes
                and (struck.spec.of.on_nodes or cause.kind in struck.spec.of.evidence.causes)
                for cause in body.causes
            )
            soon = _ends_one(struck) or record.written_at_s <= struck.over_at_s + _SOON_S
            if (named or body.follows_the_loss_of_all(before)) and soon:
                return record
        before = body
    return None


def _ends_one(struck: Struck) -> bool:
    """Whether the generation that a fault strikes cannot go on."""
    kind = struck.spec.of
    does_as_agent = bool(kind.deed) and struck.ends_agent
    return bool(kind.evidence.causes) and struck.spec.for_s is None and not does_as_agent


def _trained_at_s(played: Played, records: Sequence[Record], ended: Record) -> float | None:
    """When the first step of that generation, or of a later one, was done, as Unix time."""
    later = [each for each in records if each.index >= ended.index]
    began = [(each.written_at_s, each.body) for each in later if isinstance(each.body, Generation)]
    for (at_s, generation), (until_s, _) in zip(began, [*began[1:], (math.inf, None)], strict=True):
        done = (
            each.time_s
            for each in played.progress
            if at_s <= each.time_s < until_s and each.step > generation.resume_step
        )
        if (first_s := next(done, None)) is not None:
            return first_s
    stops = [each for each in later if isinstance(each.body, Stop)]
    return stops[0].written_at_s if stops else None
