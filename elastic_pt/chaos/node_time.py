"""Whether the accounts of a run's time agree with what was seen from outside. Pure; the process of a chaos run.

    agents that were started and ended ─► check_lives      an account for each, from its start to its end
    steps that workers began           ─► check_steps      new steps are productive, steps done again are not
    faults, log                        ─► check_search, check_recoveries    it tells of all the time that a loss took
    silence of a lost node             ─► check_detection  who waited for it has counted that as such

Bounds are wide enough for a machine that is slow, and for what an agent that is killed cannot write any more.
"""

import itertools
import statistics
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from elastic_pt.chaos.arena import Life
from elastic_pt.chaos.costs import ended_by
from elastic_pt.chaos.play import Played
from elastic_pt.report.goodput import AgentTime
from elastic_pt.runlog.records import CauseKind, Generation, Record, Recovery
from elastic_pt.telemetry.account import WRITE_TIMEOUT_S, Account, interval_s
from elastic_pt.telemetry.goodput import Bucket

_SUM_S: Final = 0.02
"""An account is one reading of one clock: its buckets add up to its time but for rounding."""
_START_S: Final = 1.0
"""An account begins with the process, as the kernel tells."""
_LATE_S: Final = 1.5
"""An agent may handle the last message of its workers so late, and lose touch with a peer so long before its end."""
_STEPS: Final = 2
"""The last step of a generation was not seen to end. It may take so many times as long as others."""
_SHARE: Final = 0.25
"""The slowest worker of a step waits for no other one. So much of the step is its work, whatever else it waits for."""
_SILENCE_S: Final = 2.0
"""A shorter silence of a lost node may be that of a step that was done."""
_DETECTED_SHARE: Final = 0.3
"""So much of a silence counts as such at least: it begins with a sign of life, and the wait for it with a step."""
_FIRST_STEPS: Final = 2
"""The first step of a generation may wait all of its time, and one report may be lost."""


@dataclass(frozen=True)
class Trained:
    """What was seen of one generation."""

    generation: Generation
    new_s: tuple[float, ...]
    """Seconds of each step that had not been done before."""
    again_s: tuple[float, ...]
    """Seconds of each step that had been done and was lost."""


def trained(played: Played, records: Sequence[Record]) -> list[Trained]:
    """The steps of each generation, by when workers began them."""
    generations = [each for each in records if isinstance(each.body, Generation)]
    found: list[Trained] = []
    frontier = 0
    for record, later in itertools.zip_longest(generations, generations[1:]):
        generation = record.body
        assert isinstance(generation, Generation)
        if found and generation.follows_the_loss_of_all(found[-1].generation):
            # Nobody is left who knows how far they came, except for a hint.
            frontier = min(frontier, generation.frontier_step)
        theirs = (
            each
            for each in played.progress
            if record.written_at_s <= each.time_s
            and (later is None or each.time_s < later.written_at_s)
        )
        # Of workers that begin the same step, the first.
        began = [next(same) for _, same in itertools.groupby(theirs, lambda each: each.step)]
        steps = [
            (after.step, after.time_s - before.time_s)
            for before, after in itertools.pairwise(began)
            if after.step == before.step + 1
        ]
        new_s = tuple(seconds for step, seconds in steps if step > frontier)
        again_s = tuple(seconds for step, seconds in steps if step <= frontier)
        found.append(Trained(generation, new_s, again_s))
        frontier = max([frontier, *(each.step for each in began)])
    return found


def check_sums(accounts: Sequence[Account]) -> Iterator[str]:
    """Each second of an agent counts in exactly one bucket."""
    for each in accounts:
        spent_s, time_s = sum(each.seconds.values()), each.written_at - each.started_at
        if abs(spent_s - time_s) > _SUM_S:
            yield f"the buckets of {each.node} add up to {spent_s:.3f} s, expected {time_s:.3f}"


def check_lives(
    played: Played,
    records: Sequence[Record],
    accounts: Sequence[Account],
    agents: Sequence[AgentTime],
) -> Iterator[str]:
    """Each agent that took part has one account, which covers its life; nobody else has one."""
    times = {(each.node, each.started_at_s): each for each in agents}
    left = list(accounts)
    for life in played.lives:
        told = f"{life.node} (process {life.pid})"
        mine = [
            each
            for each in left
            if each.node == life.node
            and life.started_at_s - _START_S <= each.started_at <= life.began_by_s + _START_S
        ]
        if not mine:
            joined_s = _joined_s(life, records)
            if joined_s is not None and not _hindered(played, life.started_at_s, joined_s):
                yield f"{told} has no account from its start on"
            continue
        left.remove(mine[0])
        if life.ended_at_s is None:
            continue
        account, time = mine[0], times.get((life.node, mine[0].started_at))
        if time is None:
            yield f"the time of {told} is not counted"
            continue
        lacks_s = life.ended_at_s - time.ended_at_s
        most_s = interval_s(life.ended_at_s - life.started_at_s) + WRITE_TIMEOUT_S
        hindered = _hindered(played, life.ended_at_s - most_s, life.ended_at_s)
        if life.exit_code == 0 and not account.ended and not hindered:
            yield f"the account of {told} still counts, expected its end"
        elif not hindered and not -_LATE_S <= lacks_s <= most_s:
            yield f"the account of {told} lacks the last {lacks_s:.1f} s, expected {most_s:.1f} at most"
    for each in left:
        yield f"an account of {each.node} from {each.started_at:.1f} on, when no agent was started"


def _joined_s(life: Life, records: Sequence[Record]) -> float | None:
    """When it was first a member."""
    later = (each for each in records if each.written_at_s >= life.started_at_s)
    return next(
        (
            each.written_at_s
            for each in later
            if isinstance(each.body, Generation)
            and (life.node, life.pid) in {(member.node, member.pid) for member in each.body.members}
        ),
        None,
    )


def _hindered(played: Played, from_s: float, to_s: float) -> bool:
    """Whether a fault lasted then, through which an account may not have been written."""
    return any(
        each.spec.for_s is not None and each.time_s <= to_s and each.over_at_s >= from_s
        for each in played.struck
    )


def check_steps(
    played: Played,
    records: Sequence[Record],
    agents: Sequence[AgentTime],
    whole: Collection[str],
) -> Iterator[str]:
    """No more is productive than the steps took that were new, and not almost nothing; steps done again are told.

    Each worker is held for `step_s` before it begins a step, which counts as a wait.

    `whole`: the incarnations whose account has all of their time.
    """
    seen, held_s = trained(played, records), played.scenario.step_s
    usual_s = statistics.median([0.0, *(s for each in seen for s in (*each.new_s, *each.again_s))])
    for agent in agents:
        mine = [each for each in seen if agent.incarnation in each.generation.incarnations]
        most_s = sum(sum(each.new_s) - held_s * len(each.new_s) + _STEPS * usual_s for each in mine)
        # An agent that stands still takes the time for that of the step that its workers have reported.
        most_s += _LATE_S + sum(
            each.spec.for_s or 0.0 for each in played.struck if agent.node in each.nodes
        )
        if (found_s := agent.seconds[Bucket.PRODUCTIVE]) > most_s:
            yield (
                f"{agent.node}: {found_s:.1f} s productive, "
                f"but its new steps took {most_s:.1f} s at most"
            )
    known = [each for each in seen if each.generation.incarnations <= set(whole)]
    members = frozenset().union(*(each.generation.incarnations for each in known))
    theirs = [each for each in agents if each.incarnation in members]
    for bucket, steps in (
        (Bucket.PRODUCTIVE, sum(max(0, len(each.new_s) - _FIRST_STEPS) for each in known)),
        (Bucket.RECOMPUTE, sum(max(0, len(each.again_s) - _FIRST_STEPS) for each in known)),
    ):
        least_s = _SHARE * steps * (usual_s - held_s)
        if (found_s := sum(each.seconds[bucket] for each in theirs)) < least_s:
            yield f"{found_s:.1f} s {bucket}, but {steps} such steps took {least_s:.1f} s at least"


def check_recoveries(played: Played, records: Sequence[Record]) -> Iterator[str]:
    """The log tells at least the time from what ended a generation to the first step of the next one."""
    began: Record | None = None
    for record in records:
        if isinstance(record.body, Generation):
            began = record
        if not isinstance(record.body, Recovery) or began is None:
            continue
        generation, from_s = began.body, began.written_at_s
        assert isinstance(generation, Generation)
        done = (
            each.time_s
            for each in played.progress
            if each.time_s > from_s and each.step > generation.resume_step
        )
        until_s = next(done, from_s)
        took_s, told_s = until_s - from_s + generation.agree_s, record.body.total_s
        if told_s < took_s - 2 * _LATE_S and not _hindered(played, from_s, until_s):
            yield (
                f"generation {generation.number} tells of {told_s:.1f} s to its first step, "
                f"expected {took_s:.1f} s"
            )


def check_search(played: Played, records: Sequence[Record]) -> Iterator[str]:
    """The log tells at least the time from the loss of a node to the next generation."""
    for struck in played.struck:
        others = (each for each in played.struck if each is not struck and each.spec.for_s)
        record = ended_by(records, struck)
        if record is None or not isinstance(record.body, Generation) or any(others):
            continue
        causes = record.body.causes
        lost = {each.node for each in causes if each.kind is CauseKind.LOST} & set(struck.nodes)
        if not lost or record.body.number != struck.generation + 1:
            continue
        told_s = record.body.agree_s + max(each.detect_s for each in causes)
        took_s = record.written_at_s - struck.time_s
        if told_s < took_s - _LATE_S:
            yield (
                f"generation {record.body.number} tells of {told_s:.1f} s from the loss to its record, "
                f"expected {took_s:.1f} s"
            )


def check_detection(
    played: Played, records: Sequence[Record], agents: Sequence[AgentTime]
) -> Iterator[str]:
    """Members that trained with a lost node until it fell silent have counted the wait for it.

    Asked if it is the only fault, and no step was done in that time: then nothing else can have ended their steps.
    """
    if len(played.struck) != 1:
        return
    (struck,) = played.struck
    record = ended_by(records, struck)
    if record is None or not isinstance(record.body, Generation):
        return
    causes = record.body.causes
    silence_s = max((each.detect_s for each in causes if each.kind is CauseKind.LOST), default=0.0)
    others = {each.kind for each in causes} - {CauseKind.LOST}
    until_s = record.written_at_s - record.body.agree_s
    done = (each for each in played.progress if struck.time_s + _LATE_S < each.time_s < until_s)
    follows = record.body.number == struck.generation + 1
    if silence_s < _SILENCE_S or others or any(done) or not follows:
        return
    before = next(
        each.generation
        for each in trained(played, records)
        if each.generation.number == struck.generation
    )
    if struck.step <= before.resume_step:
        return
    stayed = before.incarnations & record.body.incarnations
    for agent in agents:
        found_s, least_s = agent.seconds[Bucket.DETECT], _DETECTED_SHARE * silence_s
        if agent.incarnation in stayed and found_s < least_s:
            yield (
                f"{agent.node}: {found_s:.1f} s {Bucket.DETECT}, expected {least_s:.1f} at least of a silence "
                f"of {silence_s:.1f} s"
            )
