"""What happened lately, in words, for people who look at a run: from the end of its log. Pure."""

import datetime
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from elastic_pt.report.change import Change, FirstStep
from elastic_pt.report.explanation import explain
from elastic_pt.report.status import text_of
from elastic_pt.runlog.records import (
    COMPLETED,
    Commit,
    Control,
    Generation,
    Quarantine,
    Record,
    Recovery,
    Stop,
)


class Mood(StrEnum):
    """How an event is to be taken."""

    PLAIN = "plain"
    GOOD = "good"
    WARNING = "warning"
    BAD = "bad"


@dataclass(frozen=True)
class Event:
    """One thing that happened, in words."""

    time: datetime.datetime
    mood: Mood
    text: str


@dataclass(frozen=True)
class KeptOut:
    """A node that the run keeps out for a while."""

    node: str
    until: datetime.datetime
    why: str


def events_of(records: Iterable[Record], step: int = 0) -> tuple[Event, ...]:
    """What happened, in words, oldest first. Pure. `records` are the end of a log, `step` the newest one that was done.

    A RECOVERY is told with its generation, and of several commits in a row only the newest is told.
    """
    known = list(records)
    changes = {each.index: each for each in explain(known) if isinstance(each, Change)}
    reached = _reached(known, step)
    told = [each for each in known if not isinstance(each.body, Recovery)]
    found = []
    for commits, group in itertools.groupby(told, lambda each: isinstance(each.body, Commit)):
        alike = list(group)
        for record in alike[-1:] if commits else alike:
            change = changes.get(record.index)
            if change is None:
                found.append(_event(record, len(alike)))
            else:
                found.append(_event_of_change(record, change, *reached[record.index]))
    return tuple(found)


def _reached(records: Sequence[Record], step: int) -> dict[int, tuple[int, bool]]:
    """By the index of each GENERATION: the newest step that was done until the next one, and whether there is one."""
    found: dict[int, tuple[int, bool]] = {}
    newest, replaced = step, False
    for record in reversed(records):
        match record.body:
            case Commit():
                newest = max(newest, record.body.newest.step)
            case Stop():
                newest = max(newest, record.body.step)
            case Generation():
                found[record.index] = newest, replaced
                newest, replaced = record.body.frontier_step, True
    return found


def _event_of_change(record: Record, change: Change, reached: int, replaced: bool) -> Event:
    """A failure is over once a step is done that had not been done before. Else a crash loop would look well."""
    text = change.short
    if change.planned:
        return Event(record.written_at, Mood.PLAIN, text)
    if change.first_step is not FirstStep.DONE or reached <= change.frontier_step:
        text += "; it did no new step" if replaced and change.first_step is FirstStep.DONE else ""
        return Event(record.written_at, Mood.WARNING, text)
    return Event(record.written_at, Mood.GOOD, text)


def _event(record: Record, alike: int) -> Event:
    body, mood, text = record.body, Mood.PLAIN, text_of(record)
    match body:
        case Commit():
            newest = body.newest
            loss = "" if newest.loss is None else f", loss {newest.loss:.4f}"
            more = f" ({alike} commits in a row)" if alike > 1 else ""
            text = f"checkpoint of step {newest.step} committed{loss}{more}"
        case Quarantine(node=node):
            mood = Mood.WARNING if node else Mood.BAD
            text = text if node else f"the checkpoint {text} cannot be used"
        case Stop():
            mood = Mood.GOOD if body.reason == COMPLETED else Mood.BAD
            text = f"the run {'is completed' if body.reason == COMPLETED else 'has failed: ' + body.reason}, step {body.step}"
        case Control():
            mood = Mood.WARNING
    return Event(record.written_at, mood, text)


def kept_out(records: Iterable[Record], now: datetime.datetime) -> tuple[KeptOut, ...]:
    """The nodes that are kept out at `now`, by the times of the records. Pure."""
    found: dict[str, KeptOut] = {}
    for record in records:
        body = record.body
        if isinstance(body, Quarantine) and body.node:
            until = record.written_at + datetime.timedelta(seconds=body.seconds)
            found[body.node] = KeptOut(body.node, until, body.why)
    return tuple(each for each in found.values() if each.until > now)
