"""When each node was a member, from the log. Pure: records in, spans and world sizes out.

The moments are the times of the records, in seconds since the first one. They come from the clocks of the machines that
wrote the records, so a time before that of the record before counts as equal to it. When no member of a generation is
left, no record says when they ended: their accounts do.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from elastic_pt.runlog.records import (
    Cause,
    CauseKind,
    Checkpoint,
    Commit,
    Control,
    Generation,
    Quarantine,
    Record,
    Stop,
    Verb,
)

STOPPED: Final = "the run ended"
_NOBODY_LEFT: Final = "no member of its generation was left"


@dataclass(frozen=True)
class Membership:
    """An incarnation's time as a member without a gap."""

    node: str
    start_s: float
    end_s: float
    first_generation: int
    last_generation: int
    unseen: bool
    """Whether no member of its generation was left to record its end."""
    detail: str
    """Why it ended, in words."""


@dataclass(frozen=True)
class Committed:
    """A commit: when, and of which checkpoint."""

    time_s: float
    checkpoint: Checkpoint


@dataclass
class _Open:
    node: str
    start_s: float
    first_generation: int


@dataclass
class Timeline:
    """What the log says about time. `add` takes its records in order."""

    agent_ends_s: Mapping[str, float] = field(default_factory=dict)
    """Unix time at which agents ended, by incarnation."""
    started_at_s: float = 0.0
    """Unix time of the first record."""
    now_s: float = 0.0
    """Time of the newest record."""
    memberships: list[Membership] = field(default_factory=list)
    world_sizes: list[tuple[float, int]] = field(default_factory=list)
    generation_times_s: dict[int, float] = field(default_factory=dict)
    commits: list[Committed] = field(default_factory=list)
    quarantined: dict[str, str] = field(default_factory=dict)
    """Why, by the directory of the checkpoint."""
    records: int = 0
    _members: dict[str, _Open] = field(default_factory=dict)
    _generation: int = 0

    def watch(self, records: Iterable[Record]) -> Iterator[Record]:
        """The same records, each added on its way."""
        for record in records:
            self.add(record)
            yield record

    def add(self, record: Record) -> None:
        """The next record of the log."""
        at_s = record.written_at_s
        if self.records == 0:
            self.started_at_s = at_s
        self.records += 1
        self.now_s = max(self.now_s, at_s - self.started_at_s)
        match record.body:
            case Generation() as generation:
                self._change(generation)
            case Commit() as commit:
                self.commits.append(Committed(self.now_s, commit.newest))
            case Quarantine(directory=directory, why=why) if directory:
                self.quarantined[directory] = why
            case Control(request=request) if request.verb is Verb.PAUSE and request.done:
                self._resize(0)
            case Stop():
                self.memberships += self._open_until(self.now_s, STOPPED)
                self._members = {}
                self._resize(0)

    def end_unseen(self, until_s: float = math.inf) -> None:
        """End all memberships: no member was left to record how."""
        ended = []
        for incarnation, each in self._members.items():
            at_s = self.agent_ends_s.get(incarnation, math.nan) - self.started_at_s
            end_s = self.now_s if math.isnan(at_s) else min(until_s, max(each.start_s, at_s))
            ended.append(self._close(each, end_s, _NOBODY_LEFT, unseen=True))
        if ended:
            end_s = max([self.world_sizes[-1][0], *(each.end_s for each in ended)])
            self.world_sizes.append((end_s, 0))
        self.memberships += ended
        self._members = {}

    def memberships_until(self, end_s: float) -> list[Membership]:
        """All memberships; those that have not ended last until `end_s`."""
        return [*self.memberships, *self._open_until(end_s, "")]

    def _change(self, generation: Generation) -> None:
        causes = {cause.node: cause for cause in generation.causes}
        if not generation.causes and not self._members.keys() & generation.incarnations:
            self.end_unseen(self.now_s)
        self.generation_times_s[generation.number] = self.now_s
        for incarnation in [each for each in self._members if each not in generation.incarnations]:
            gone = self._members.pop(incarnation)
            cause = causes.get(gone.node)
            end_s = self.now_s
            if cause is not None and cause.kind is CauseKind.LOST:
                # Its peers last heard it so long before the record.
                end_s = max(gone.start_s, end_s - generation.agree_s - cause.detect_s)
            self.memberships.append(self._close(gone, end_s, _why(cause)))
        self._generation = generation.number
        for member in generation.members:
            if member.incarnation not in self._members:
                self._members[member.incarnation] = _Open(
                    member.node, self.now_s, generation.number
                )
        self._resize(generation.world_size)

    def _open_until(self, end_s: float, why: str) -> list[Membership]:
        return [self._close(each, max(end_s, each.start_s), why) for each in self._members.values()]

    def _close(self, gone: _Open, end_s: float, why: str, *, unseen: bool = False) -> Membership:
        return Membership(
            gone.node, gone.start_s, end_s, gone.first_generation, self._generation, unseen, why
        )

    def _resize(self, world_size: int) -> None:
        self.world_sizes.append((self.now_s, world_size))


def _why(cause: Cause | None) -> str:
    if cause is None or cause.kind is CauseKind.JOINED:
        return "replaced by a new generation without a named cause"
    return f"{cause.kind}: {cause.detail}" if cause.detail else str(cause.kind)
