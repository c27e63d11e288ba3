"""Explains the changes between a run's generations from its log alone. Pure: records in, explanations out.

    GENERATION   causes, steps, resume, time to agree ─────────┐
    RECOVERY     the phases up to its first step ──────────────┼─► Change   one per generation but the first
    QUARANTINE   a quarantined checkpoint, a node kept out ────┤
    CONTROL      an operator's request ────────────────────────┤
    COMMIT       proof that it trained ────────────────────────┘
    STOP ────────────────────────────────────────────────────────► End

Every time in here is a duration that one node measured on its own monotonic clock. The times of the records are
not used: they come from the wall clocks of different machines.
"""

from collections.abc import Iterable
from dataclasses import replace

from elastic_pt.report.change import Change, End, FirstStep, KeptOut, SetAside
from elastic_pt.runlog.records import (
    Checkpoint,
    Commit,
    Control,
    Generation,
    Quarantine,
    Record,
    Recovery,
    Reopen,
    Request,
    Stop,
    Verb,
)


def explain(records: Iterable[Record]) -> list[Change | End]:
    """Every change of the members, oldest first, and the end of the run if it has one.

    `records` are those of one log, from its first record on. The first generation is not a change.
    """
    changes: list[Change] = []
    ends: list[End] = []
    members: set[str] = set()
    checkpoints: tuple[Checkpoint, ...] = ()
    set_aside: list[SetAside] = []
    requests: list[Request] = []
    for record in records:
        body = record.body
        if isinstance(body, Generation):
            changes[-1:] = [
                _over(each, FirstStep.REPLACED, body.frontier_step) for each in changes[-1:]
            ]
            change = _change(record.index, body, members, set_aside)
            changes.append(replace(change, requests=tuple(requests)))
            members, set_aside = {each.incarnation for each in body.members}, []
            requests = []
        elif isinstance(body, Quarantine) and not body.node:
            steps = [each.step for each in checkpoints if each.directory == body.directory]
            set_aside.append(SetAside(body.directory, steps[0] if steps else None, body.why))
        elif isinstance(body, Reopen):
            ends, requests = [], []
        elif isinstance(body, Control):
            requests += [body.request] if _changes_world(body.request) else []
        elif changes:
            changes[-1] = _later(changes[-1], body)
        if isinstance(body, Commit):
            checkpoints = body.checkpoints
        elif isinstance(body, Stop):
            ends = [End(record.index, record.generation, body.step, body.reason)]
    return [*changes[1:], *ends]


def _change(
    index: int, generation: Generation, members: set[str], set_aside: list[SetAside]
) -> Change:
    """The change that a GENERATION makes; `members` are the incarnations of the one before."""
    stayed = members & {member.incarnation for member in generation.members}
    anew = not stayed and not generation.causes
    reached = generation.reached_step
    if reached is None and not anew:
        # An earlier version wrote the record.
        reached = generation.frontier_step
    return Change(
        index=index,
        generation=generation.number,
        nodes=tuple(member.node for member in generation.members),
        world_size=generation.world_size,
        reason=generation.reason,
        causes=generation.causes,
        planned=not anew and all(cause.kind.planned for cause in generation.causes),
        resumed_by_new_nodes=anew,
        reached_step=reached,
        frontier_step=generation.frontier_step,
        resume_step=generation.resume_step,
        restored_from=generation.restored_from,
        why_not_memory=generation.why_not_memory,
        agree_s=generation.agree_s,
        below_minimum_s=generation.below_minimum_s,
        first_step=FirstStep.AWAITED if generation.slots else FirstStep.UNKNOWN,
        set_aside=tuple(set_aside),
    )


def _changes_world(request: Request) -> bool:
    return request.verb is not Verb.CHECKPOINT and not request.done


def _later(change: Change, body: Recovery | Commit | Quarantine | Stop) -> Change:
    """The newest change, completed by one more record about it."""
    match body:
        case Recovery():
            return replace(change, recovery=body, first_step=FirstStep.DONE)
        # An older generation's checkpoint may be committed before the first step of this one.
        case Commit() if change.first_step is FirstStep.AWAITED and (
            body.newest.generation == change.generation
        ):
            return replace(change, first_step=FirstStep.NOT_MEASURED)
        case Quarantine():
            kept_out = KeptOut(body.node, body.seconds, body.why)
            return replace(change, kept_out=(*change.kept_out, kept_out))
        case Stop():
            return _over(change, FirstStep.ENDED, body.step)
    return change


def _over(change: Change, by: FirstStep, step: int) -> Change:
    """A change that a later record ended; `step` is the newest step done by then."""
    if change.first_step is not FirstStep.AWAITED:
        return change
    trained = step > max(change.frontier_step, change.resume_step)
    return replace(change, first_step=FirstStep.NOT_MEASURED if trained else by)
