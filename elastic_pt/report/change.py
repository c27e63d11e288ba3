"""A change between two generations of a run, and its end: as facts, and in words."""

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from elastic_pt.runlog.records import COMPLETED, Cause, CauseKind, Recovery, Request, Verb

_NOTICED: Final = ", noticed "
_OF_SEVERAL: Final = {
    "its address refuses": "their addresses refuse",
    "it does not read": "they do not read",
}
"""The record has a text for each node. Nodes with the same text are told together."""


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
    reached_step: int | None
    """The newest step that the generation before had done; None if unknown."""
    frontier_step: int
    """The newest step that was ever done before."""
    resume_step: int
    """The step from which it resumed; 0 is the start."""
    restored_from: str
    """Where the state came from: `memory`, `bucket`, or `start` (the seed)."""
    why_not_memory: str
    """Why it was not `memory`; empty if it was, or if an earlier version wrote the record."""
    agree_s: float
    """Seconds from when the change was noticed to the record."""
    below_minimum_s: float
    """Of these: fewer nodes than `elastic.nodes_min` were there."""
    first_step: FirstStep
    recovery: Recovery | None = None
    set_aside: tuple[SetAside, ...] = ()
    kept_out: tuple[KeptOut, ...] = ()
    requests: tuple[Request, ...] = ()
    """What operators had asked for since the generation before, as far as it changes the world."""

    @property
    def lost_steps(self) -> int | None:
        """The number of steps that were lost by this change; None if unknown.

        Each loss counts once: a step that is lost is done again by this generation or, if that is too short, by a later one.
        """
        if self.reached_step is None or self.reached_step < self.resume_step:
            return None
        return self.reached_step - self.resume_step

    def __str__(self) -> str:
        happened = [clause.text for clause in what_happened(self)]
        title = title_of(self.generation, len(self.nodes), self.world_size)
        return f"{title}: {'; '.join([*happened, *_how_it_went_on(self)])}"

    @property
    def short(self) -> str:
        """What happened and what it cost, without the phases."""
        asked = set(map(str, self.requests))
        told = [each.text for each in what_happened(self) if each.text not in asked]
        what = "; ".join(each.partition(_NOTICED)[0] for each in told)
        clauses = [f"generation {self.generation}: {what}"]
        if self.first_step is FirstStep.DONE and self.recovery is not None:
            seconds = _seconds(self.recovery.total_s)
            who = "1 node trains" if len(self.nodes) == 1 else f"{len(self.nodes)} nodes train"
            clauses += [f"{who} again after {seconds}", _again(self)]
        elif self.first_step is not FirstStep.UNKNOWN:
            clauses.append(_how_it_went_on(self)[-1])
        return "; ".join(clauses)


@dataclass(frozen=True)
class Clause:
    """One thing that happened, in words."""

    nodes: tuple[str, ...]
    """The nodes to which it happened; empty for the run as a whole."""
    text: str


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


def as_json(found: Change | End) -> dict[str, Any]:
    """An explanation for programs: its fields, and the sentence for people as `text`."""
    fields = {"kind": type(found).__name__.lower(), **dataclasses.asdict(found)}
    if isinstance(found, Change):
        fields["lost_steps"] = found.lost_steps
    return {**fields, "text": str(found)}


# ---- texts -------------------------------------------------------------------------------------------


def title_of(generation: int, nodes: int, world_size: int) -> str:
    """How the text about a generation begins."""
    return f"generation {generation} ({_count(nodes, 'node')}, world {world_size})"


def what_happened(change: Change) -> list[Clause]:
    """Why the members changed: the first clauses of the text."""
    clauses = []
    for kind in CauseKind:
        causes = [cause for cause in change.causes if cause.kind is kind]
        if kind is CauseKind.BARRED:
            fresh = {each.node for each in change.kept_out}
            causes = [cause for cause in causes if cause.node not in fresh]
        for detail in dict.fromkeys(cause.detail for cause in causes):
            alike = [cause for cause in causes if cause.detail == detail]
            nodes = tuple(cause.node for cause in alike)
            clauses.append(Clause(nodes, _trouble(kind, alike, detail, change)))
    clauses += [
        Clause((each.node,), f"node {each.node} kept out for {each.seconds:g} s: {each.why}")
        for each in change.kept_out
    ]
    if change.resumed_by_new_nodes:
        gone = f"no member of generation {change.generation - 1} was left; {change.reason}"
        clauses.append(Clause((), gone))
    asked = [*map(str, change.requests), *map(_aside, change.set_aside)]
    return [*(clauses or [Clause((), change.reason)]), *(Clause((), text) for text in asked)]


def _trouble(kind: CauseKind, causes: list[Cause], detail: str, change: Change) -> str:
    nodes = _named(causes)
    if len(causes) > 1:
        for one, several in _OF_SEVERAL.items():
            detail = detail.replace(one, several)
    match kind:
        case CauseKind.LOST:
            silence = _range([cause.detect_s for cause in causes])
            whose = "its" if len(causes) == 1 else "their"
            noticed = f"{_NOTICED}{silence} after {whose} last sign of life"
            return f"{nodes} lost{_at(change)}: {detail}{noticed}"
        case CauseKind.FAILED:
            return f"{nodes} failed: {detail}"
        case CauseKind.UNUSABLE:
            return f"{nodes} could not use the checkpoint: {detail}"
        case CauseKind.DAMAGED:
            return f"{nodes} found damaged data: {detail}"
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
    if change.below_minimum_s:
        clauses.append(f"{_seconds(change.below_minimum_s)} of that with too few nodes")
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
    lost, first = change.lost_steps, change.resume_step + 1
    if lost is None:
        return f"steps from {first} on done again, number unknown"
    count = change.frontier_step - change.resume_step
    if count == 0:
        return "no step done again"
    which = str(first) if count == 1 else f"{first} to {change.frontier_step}"
    earlier = count - lost
    whose = f", {'all' if earlier == count else earlier} of them lost earlier" if earlier else ""
    return f"{_count(count, 'step')} ({which}) done again{whose}"


def _at(change: Change) -> str:
    if change.first_step is FirstStep.UNKNOWN:
        return ""
    return f" at step {change.reached_step}" if change.reached_step else " before the first step"


def _after(change: Change) -> str:
    return f" after step {change.reached_step}" if change.reached_step else _at(change)


def _named(causes: list[Cause]) -> str:
    return f"node{'' if len(causes) == 1 else 's'} {', '.join(cause.node for cause in causes)}"


def _range(values: list[float]) -> str:
    least, most = f"{min(values):.2f}", f"{max(values):.2f}"
    return f"{most} s" if least == most else f"{least} to {most} s"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s"
