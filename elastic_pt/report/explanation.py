"""Explains the changes between a run's generations from its log alone. Pure: records in, explanations out.

    GENERATION   causes, frontier step, resume, time to agree ─┐
    RECOVERY     the phases up to its first step ──────────────┼─► Change   one per generation but the first
    QUARANTINE   a quarantined checkpoint, a node kept out ────┤
    CONTROL      an operator's request ────────────────────────┤
    COMMIT       proof that it trained ────────────────────────┘
    STOP ────────────────────────────────────────────────────────► End

Every time in here is a duration that one node measured on its own monotonic clock. The times of the records are
not used: they come from the wall clocks of different machines.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final

from elastic_pt.runlog.records import (
    COMPLETED,
    Cause,
    CauseKind,
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

_PLANNED: Final = frozenset({CauseKind.JOINED, CauseKind.LEFT, CauseKind.BARRED})
"""Causes that do not break a generation: its workers stop after the same step, and nothing is lost."""


class FirstStep(StrEnum):
    """What the log records of a generation's first step."""

    DONE = "done"
    """A RECOVERY has its duration."""
    NOT_MEASURED = "not measured"
    """The generation did steps, but there is no RECOVERY."""
    REPLACED = "replaced"
    """The next generation came before any step was on record."""
    ENDED = "ended"
    """The end of the run came before any step was on record."""
    AWAITED = "awaited"
    """It is the newest generation, and the run has not ended."""
    UNKNOWN = "unknown"
    """A run of stock torchrun: the log has its members, but no steps."""


@dataclass(frozen=True)
class SetAside:
    """A committed checkpoint that turned out unusable."""

    directory: str
    step: int | None
    """None if no COMMIT names it."""
    why: str


@dataclass(frozen=True)
class KeptOut:
    """A node that must wait before it may be a member again."""

    node: str
    seconds: float
    why: str


@dataclass(frozen=True)
class Change:
    """Why and how one generation followed the one before."""

    index: int
    """Index of its GENERATION record."""
    generation: int
    nodes: tuple[str, ...]
    world_size: int
    reason: str
    causes: tuple[Cause, ...]
    planned: bool
    """All members had stopped after the same step: nothing was lost."""
    resumed_by_new_nodes: bool
    """No member of the generation before was left, so the causes are unknown."""
    frontier_step: int
    """The newest step that a member had done before."""
    resume_step: int
    """The step from which it resumed; 0 is the start."""
    restored_from: str
    """Where the state came from: `memory`, `bucket`, or `start` (the seed)."""
    why_not_memory: str
    """Why it was not `memory`; empty if it was, or if an earlier version wrote the record."""
    agree_s: float
    """Seconds from when the change was noticed to the record."""
    first_step: FirstStep
    recovery: Recovery | None = None
    set_aside: tuple[SetAside, ...] = ()
    kept_out: tuple[KeptOut, ...] = ()
    requests: tuple[Request, ...] = ()
    """What operators had asked for since the generation before, as far as it changes the world."""

    @property
    def lost_steps(self) -> int | None:
        """The number of steps that are done again; None if no member was left that counted them."""
        if self.resumed_by_new_nodes or self.frontier_step < self.resume_step:
            return None
        return self.frontier_step - self.resume_step

    def __str__(self) -> str:
        size = f"{_count(len(self.nodes), 'node')}, world {self.world_size}"
        clauses = [*_what_happened(self), *_how_it_went_on(self)]
        return f"generation {self.generation} ({size}): {'; '.join(clauses)}"


@dataclass(frozen=True)
class End:
    """How the run ended."""

    index: int
    """Index of its STOP record."""
    generation: int
    step: int
    reason: str

    def __str__(self) -> str:
        if self.reason == COMPLETED:
            return f"end: completed at step {self.step}"
        return f"end: failed in generation {self.generation} at step {self.step}: {self.reason}"


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


def as_json(found: Change | End) -> dict[str, Any]:
    """An explanation for programs: its fields, and the sentence for people as `text`."""
    fields = {"kind": type(found).__name__.lower(), **dataclasses.asdict(found)}
    if isinstance(found, Change):
        fields["lost_steps"] = found.lost_steps
    return {**fields, "text": str(found)}


def _change(
    index: int, generation: Generation, members: set[str], set_aside: list[SetAside]
) -> Change:
    """The change that a GENERATION makes; `members` are the incarnations of the one before."""
    stayed = members & {member.incarnation for member in generation.members}
    anew = not stayed and not generation.causes
    return Change(
        index=index,
        generation=generation.number,
        nodes=tuple(member.node for member in generation.members),
        world_size=generation.world_size,
        reason=generation.reason,
        causes=generation.causes,
        planned=not anew and all(cause.kind in _PLANNED for cause in generation.causes),
        resumed_by_new_nodes=anew,
        frontier_step=generation.frontier_step,
        resume_step=generation.resume_step,
        restored_from=generation.restored_from,
        why_not_memory=generation.why_not_memory,
        agree_s=generation.agree_s,
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


# ---- texts -------------------------------------------------------------------------------------------


def _what_happened(change: Change) -> list[str]:
    clauses = []
    for kind in CauseKind:
        causes = [cause for cause in change.causes if cause.kind is kind]
        if kind is CauseKind.BARRED:
            fresh = {each.node for each in change.kept_out}
            causes = [cause for cause in causes if cause.node not in fresh]
        for detail in dict.fromkeys(cause.detail for cause in causes):
            alike = [cause for cause in causes if cause.detail == detail]
            clauses.append(_trouble(kind, alike, detail, change))
    clauses += [
        f"node {each.node} kept out for {each.seconds:g} s: {each.why}" for each in change.kept_out
    ]
    if change.resumed_by_new_nodes:
        clauses.append(f"no member of generation {change.generation - 1} was left; {change.reason}")
    asked = map(str, change.requests)
    return [*(clauses or [change.reason]), *asked, *map(_aside, change.set_aside)]


def _trouble(kind: CauseKind, causes: list[Cause], detail: str, change: Change) -> str:
    nodes = _named(causes)
    match kind:
        case CauseKind.LOST:
            silence = _range([cause.detect_s for cause in causes])
            noticed = f"noticed {silence} after its last sign of life"
            return f"{nodes} lost{_at(change)}: {detail}, {noticed}"
        case CauseKind.FAILED:
            return f"{nodes} failed: {detail}"
        case CauseKind.UNUSABLE:
            return f"{nodes} could not use the checkpoint: {detail}"
        case CauseKind.BARRED:
            return f"{nodes} kept out: {detail}"
        case CauseKind.LEFT | CauseKind.JOINED:
            return f"{nodes} {kind}{_after(change)}" + (f": {detail}" if detail else "")
        case _:
            return f"{nodes} {kind}{_at(change)}: {detail}"


def _aside(found: SetAside) -> str:
    name = found.directory if found.step is None else f"of step {found.step}"
    return f"the checkpoint {name} was quarantined: {found.why}"


def _how_it_went_on(change: Change) -> list[str]:
    clauses = []
    if change.planned and change.first_step is not FirstStep.UNKNOWN:
        clauses.append(f"agreed {_seconds(change.agree_s)} after {_planned_since(change)}")
    elif not change.resumed_by_new_nodes:
        clauses.append(f"agreed after {_seconds(change.agree_s)}")
    match change.first_step:
        case FirstStep.DONE if change.recovery is not None:
            clauses += _phases(change, change.recovery)
        case FirstStep.NOT_MEASURED:
            clauses.append(f"resumed from step {change.resume_step}; its start is not on record")
        case FirstStep.REPLACED:
            clauses.append("replaced before its first step was on record")
        case FirstStep.ENDED:
            clauses.append("the run ended before its first step was on record")
        case FirstStep.AWAITED:
            clauses.append("its first step is not on record yet")
    if change.first_step in (FirstStep.DONE, FirstStep.NOT_MEASURED):
        clauses.append(_again(change))
    return clauses


def _phases(change: Change, recovery: Recovery) -> list[str]:
    why = f" ({change.why_not_memory})" if change.why_not_memory else ""
    source = "memory" if change.restored_from == "memory" else f"the bucket{why}"
    state = (
        f"restored step {change.resume_step} from {source}"
        if change.resume_step
        else f"initialised weights{why}"
    )
    since = (
        _planned_since(change)
        if change.planned
        else "the new nodes had formed a generation"
        if change.resumed_by_new_nodes
        else "it was noticed"
    )
    return [
        f"workers connected after {_seconds(recovery.start_s)}, "
        f"process group {_seconds(recovery.group_s)}, "
        f"{state} in {_seconds(recovery.restore_s)}, "
        f"first step {_seconds(recovery.step_s)}",
        f"training again {_seconds(recovery.total_s)} after {since}",
    ]


def _planned_since(change: Change) -> str:
    resumed = any(each.verb is Verb.RESUME for each in change.requests)
    return "the resume was noticed" if resumed else "all members had stopped"


def _again(change: Change) -> str:
    count, first = change.lost_steps, change.resume_step + 1
    if count is None:
        return f"steps from {first} on done again, number unknown"
    if count == 0:
        return "no step done again"
    which = str(first) if count == 1 else f"{first} to {change.frontier_step}"
    return f"{_count(count, 'step')} ({which}) done again"


def _at(change: Change) -> str:
    if change.first_step is FirstStep.UNKNOWN:
        return ""
    return f" at step {change.frontier_step}" if change.frontier_step else " before the first step"


def _after(change: Change) -> str:
    return f" after step {change.frontier_step}" if change.frontier_step else _at(change)


def _named(causes: list[Cause]) -> str:
    return f"node{'' if len(causes) == 1 else 's'} {', '.join(cause.node for cause in causes)}"


def _range(values: list[float]) -> str:
    least, most = f"{min(values):.2f}", f"{max(values):.2f}"
    return f"{most} s" if least == most else f"{least} to {most} s"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s"
