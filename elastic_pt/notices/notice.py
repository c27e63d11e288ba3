"""The normal form of a notice, and the decision what to do. Pure.

Announcement ─ update ─► notices in force ─ decide ─► Leave | CheckpointNow | Stay
"""

import datetime
import email.utils
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class NoticeKind(StrEnum):
    """What will happen to the machine."""

    PREEMPT = "preempt"
    """It is taken away."""
    MAINTENANCE = "maintenance"
    """It is restarted or replaced; its processes end."""
    PAUSE = "pause"
    """It pauses for some seconds; its processes survive."""
    REBALANCE = "rebalance"
    """It is more likely than usual to be taken away soon."""


LEAVE_KINDS: Final = frozenset({NoticeKind.PREEMPT, NoticeKind.MAINTENANCE})
"""Kinds that end all processes of this machine. The others are advice."""

_NEWS_S: Final = 1.0
"""A deadline that is earlier by less than this is the same one: clocks differ a little."""


class SourceError(Exception):
    """A source gave no usable answer."""


@dataclass(frozen=True)
class Announcement:
    """One event as a source announces it."""

    event_id: str
    """The same in each answer about the same event."""
    kind: NoticeKind
    detail: str
    """The source's own word for the event, such as `terminate`."""
    due: datetime.datetime | None = None
    """When it happens, by the source's clock; None if the source names no time."""
    lead_s: float | None = None
    """The longest lead that the source promises; None if it promises none."""


@dataclass(frozen=True)
class Notice:
    """One event that this node has received."""

    source: str
    event_id: str
    kind: NoticeKind
    detail: str
    lead_s: float
    """Seconds from its receipt to the moment when the machine is taken away."""
    deadline_s: float
    """The same as a moment of this machine's monotonic clock."""

    def __str__(self) -> str:
        return f"{self.source} {self.detail}, {self.lead_s:.0f} s ahead"


@dataclass(frozen=True)
class Leave:
    """Leave the run in good order before `notice.deadline_s`, which is the earliest one."""

    notice: Notice


@dataclass(frozen=True)
class CheckpointNow:
    """Continue, and commit a checkpoint soon: this machine is at risk."""

    notice: Notice


@dataclass(frozen=True)
class Stay:
    """No notice is in force, or none any more."""


Decision = Leave | CheckpointNow | Stay

InForce = Mapping[str, Notice]
"""The notices of one source, by event."""


@dataclass(frozen=True)
class Moment:
    """One moment on this machine's two clocks."""

    monotonic_s: float
    utc: datetime.datetime


def receive(source: str, told: Announcement, now: Moment, usual_lead_s: float) -> Notice:
    """The notice of an announcement that was received `now`; if it names no time, the lead is `usual_lead_s`.

    The deadline is fixed here, on the monotonic clock. A wrong wall clock on either side can only shorten the lead:
    it is never longer than the source promises.
    """
    leads = [] if told.lead_s is None else [told.lead_s]
    if told.due is not None:
        leads.append((told.due - now.utc).total_seconds())
    lead_s = max(0.0, min(leads, default=usual_lead_s))
    return Notice(source, told.event_id, told.kind, told.detail, lead_s, now.monotonic_s + lead_s)


def update(
    before: InForce, source: str, told: Iterable[Announcement], now: Moment, usual_lead_s: float
) -> InForce:
    """The notices in force after a source has returned all its events. A known event changes only if its deadline is clearly earlier."""
    after = {}
    for each in told:
        notice, known = receive(source, each, now, usual_lead_s), before.get(each.event_id)
        is_news = known is None or notice.deadline_s < known.deadline_s - _NEWS_S
        after[each.event_id] = notice if is_news or known is None else known
    return after


def decide(notices: Sequence[Notice]) -> Decision:
    """What this node should do about all notices in force.

    This does not estimate how long a step and an upload take. A node leaves at once for any lead, even if its last
    checkpoint will not be ready in time.
    """
    leave = [notice for notice in notices if notice.kind in LEAVE_KINDS]
    if leave:
        return Leave(min(leave, key=lambda notice: notice.deadline_s))
    return CheckpointNow(notices[-1]) if notices else Stay()


def moment(text: str) -> datetime.datetime:
    """Parse a time of a cloud: ISO 8601, or the format of HTTP dates. Without a zone it is UTC."""
    try:
        found = datetime.datetime.fromisoformat(text.strip())
    except ValueError:
        try:
            found = email.utils.parsedate_to_datetime(text)
        except (ValueError, TypeError, OverflowError) as error:
            raise SourceError(f"{text[:80]!r}: expected a date and time") from error
    return found if found.tzinfo is not None else found.replace(tzinfo=datetime.UTC)
