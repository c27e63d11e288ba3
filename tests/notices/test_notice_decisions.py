"""From announcements to notices with deadlines, and the decision about the notices in force. No clock, no server."""

from datetime import UTC, datetime, timedelta, timezone

import pytest

from elastic_pt.notices.notice import (
    Announcement,
    CheckpointNow,
    Leave,
    Moment,
    NoticeKind,
    SourceError,
    Stay,
    decide,
    moment,
    receive,
    update,
)

UTC_NOW = datetime(2026, 11, 27, 13, 0, tzinfo=UTC)
NOW = Moment(1000.0, UTC_NOW)
USUAL_S = 25.0


def told(
    event_id: str = "e",
    kind: NoticeKind = NoticeKind.PREEMPT,
    *,
    in_s: float | None = None,
    lead_s: float | None = None,
) -> Announcement:
    """An event that is due in `in_s` seconds by the source's clock."""
    due = None if in_s is None else UTC_NOW + timedelta(seconds=in_s)
    return Announcement(event_id, kind, "terminate", due, lead_s)


@pytest.mark.parametrize("lead_s", [120.0, 30.0, 15.0, 5.0, 0.0])
def test_a_lead_becomes_a_moment_of_the_monotonic_clock(lead_s: float) -> None:
    """The deadline is fixed at the receipt, so a later change of the wall clock has no effect."""
    notice = receive("aws", told(in_s=lead_s, lead_s=120.0), NOW, USUAL_S)
    assert (notice.lead_s, notice.deadline_s) == (lead_s, 1000.0 + lead_s)
    assert str(notice) == f"aws terminate, {lead_s:.0f} s ahead"


@pytest.mark.parametrize(
    ("event", "lead_s"),
    [
        (told(in_s=3600.0, lead_s=120.0), 120.0),
        (told(in_s=-3600.0, lead_s=120.0), 0.0),
        (told(lead_s=30.0), 30.0),
        (told(in_s=7.0), 7.0),
        (told(), USUAL_S),
    ],
    ids=["source's clock is ahead", "source's clock is behind", "no time", "no promise", "neither"],
)
def test_a_wrong_clock_can_only_shorten_the_lead(event: Announcement, lead_s: float) -> None:
    """The lead is the shorter of the announced and the promised time, and never negative."""
    assert receive("s", event, NOW, USUAL_S).lead_s == lead_s


def test_a_repeated_event_keeps_its_first_deadline() -> None:
    """A source that names no time repeats the same answer: the deadline counts from the first one."""
    first = update({}, "gcp", [told(lead_s=30.0)], NOW, USUAL_S)
    later = Moment(1020.0, UTC_NOW + timedelta(seconds=20))
    assert update(first, "gcp", [told(lead_s=30.0)], later, USUAL_S) == first
    # The two clocks of a machine drift a little.
    drifted = Moment(1019.9, UTC_NOW + timedelta(seconds=20))
    timed = update({}, "aws", [told(in_s=60.0)], NOW, USUAL_S)
    assert update(timed, "aws", [told(in_s=60.0)], drifted, USUAL_S) == timed


def test_a_corrected_event_has_the_earlier_deadline() -> None:
    """A source may correct the time of an event; the earlier deadline counts."""
    first = update({}, "s", [told(in_s=60.0)], NOW, USUAL_S)
    second = update(first, "s", [told(in_s=10.0)], NOW, USUAL_S)
    assert second["e"].deadline_s == 1010.0


def test_an_event_that_the_source_no_longer_lists_is_withdrawn() -> None:
    """Only events that the source lists are in force; its other events stay."""
    both = update({}, "s", [told("e"), told("f")], NOW, USUAL_S)
    assert update(both, "s", [told("f")], NOW, USUAL_S).keys() == {"f"}
    assert update(both, "s", [], NOW, USUAL_S) == {}


def test_the_earliest_deadline_decides() -> None:
    """Of several notices, the one with the earliest deadline makes the node leave, also if there is advice."""
    soon, late = (receive("s", told(in_s=in_s), NOW, USUAL_S) for in_s in (5.0, 60.0))
    maintenance = receive("s", told(kind=NoticeKind.MAINTENANCE, in_s=2.0), NOW, USUAL_S)
    advice = receive("s", told(kind=NoticeKind.REBALANCE, in_s=1.0), NOW, USUAL_S)
    assert decide([late, soon, advice]) == Leave(soon)
    assert decide([late, maintenance, soon]) == Leave(maintenance)


@pytest.mark.parametrize("kind", [NoticeKind.REBALANCE, NoticeKind.PAUSE])
def test_advice_asks_only_for_a_checkpoint(kind: NoticeKind) -> None:
    """A node continues on a machine that only may be taken away or only pauses."""
    notice = receive("s", told(kind=kind), NOW, USUAL_S)
    assert decide([notice]) == CheckpointNow(notice)


def test_without_a_notice_the_node_stays() -> None:
    """A node without a notice does not leave."""
    assert decide([]) == Stay()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("2017-09-18T08:22:00Z", datetime(2017, 9, 18, 8, 22, tzinfo=UTC)),
        ("Mon, 19 Sep 2016 18:29:47 GMT", datetime(2016, 9, 19, 18, 29, 47, tzinfo=UTC)),
        ("2026-11-27T14:05:00+01:00", datetime(2026, 11, 27, 13, 5, tzinfo=UTC)),
        ("2026-11-27 13:05:00", datetime(2026, 11, 27, 13, 5, tzinfo=UTC)),
    ],
)
def test_the_time_formats_of_the_clouds_are_parsed(text: str, wanted: datetime) -> None:
    """ISO 8601 and HTTP dates; a time without a zone is UTC, not that of this machine."""
    assert moment(text) == wanted
    assert moment(text).astimezone(timezone(timedelta(hours=5))) == wanted


@pytest.mark.parametrize(
    "text", ["", "soon", "2026-13-45T00:00:00Z", "Mon, 99 Sep 2016", "x" * 400]
)
def test_a_malformed_time_is_an_error_in_one_line(text: str) -> None:
    """The error shows the start of the value, and what was expected."""
    with pytest.raises(SourceError, match=r"expected a date and time$") as caught:
        moment(text)
    assert len(str(caught.value)) < 150
