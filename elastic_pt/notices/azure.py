"""Azure: scheduled events, from the instance metadata service.

    GET /metadata/instance/compute/name                        this machine's name, read once
    GET /metadata/scheduledevents?api-version=2020-07-01       {"DocumentIncarnation": n, "Events": [...]}

The document also lists events of other machines of the same scale set or availability set: only events that name
this machine count. The first answer may take two minutes, while Azure enables the service. An event that is no longer
listed was cancelled. We confirm no event (`StartRequests`): that would start it for all machines that it names.
https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events
"""

from collections.abc import Collection, Sequence
from typing import Any, Final
from urllib.parse import urlencode

import aiohttp

from elastic_pt.notices.http import REQUEST_TIMEOUT_S, ask, json_object
from elastic_pt.notices.notice import Announcement, NoticeKind, SourceError, moment

URL: Final = "http://169.254.169.254"
_HEADERS: Final = {"Metadata": "true"}
_EVENTS_VERSION: Final = "2020-07-01"
_NAME_VERSION: Final = "2021-02-01"
_FIRST_TIMEOUT_S: Final = 130.0
_KINDS: Final = {
    "Preempt": (NoticeKind.PREEMPT, 30.0),
    "Terminate": (NoticeKind.PREEMPT, 900.0),
    "Reboot": (NoticeKind.MAINTENANCE, 900.0),
    "Redeploy": (NoticeKind.MAINTENANCE, 600.0),
    "Freeze": (NoticeKind.PAUSE, 900.0),
}
"""Each type of event, with the lead that is documented for it."""
_COMING: Final = ("Scheduled", "Started")


def scheduled_events(text: str, names: Collection[str]) -> list[Announcement]:
    """The events of a document that are coming to a machine with one of these names."""
    events = json_object(text, "scheduledevents").get("Events")
    if not isinstance(events, list):
        raise SourceError(f"scheduledevents: {text[:80]!r}; expected a list of Events")
    return [
        _announcement(each)
        for each in events
        if _concerns(each, names) and each.get("EventStatus") in _COMING
    ]


def _concerns(event: Any, names: Collection[str]) -> bool:
    resources = event.get("Resources") if isinstance(event, dict) else None
    return isinstance(resources, list) and any(name in resources for name in names)


def _announcement(event: dict[str, Any]) -> Announcement:
    event_id, event_type = event.get("EventId"), event.get("EventType")
    # Empty once the event has started.
    due = event.get("NotBefore") or ""
    if event_type not in _KINDS or not isinstance(event_id, str) or not isinstance(due, str):
        raise SourceError(
            f"scheduledevents: {str(event)[:80]!r}; expected EventId, NotBefore, and EventType "
            f"one of {', '.join(_KINDS)}"
        )
    kind, lead_s = _KINDS[event_type]
    if event["EventStatus"] == "Started":
        return Announcement(event_id, kind, event_type, lead_s=0.0)
    return Announcement(event_id, kind, event_type, moment(due) if due else None, lead_s)


class Azure:
    """The scheduled events of this machine."""

    name = "azure"
    interval_s = 1.0

    def __init__(self, names: Collection[str], url: str = URL) -> None:
        """`names` are names of this machine in events, in addition to the name that Azure returns for it."""
        self._names = set(names)
        self._url = url
        self._knows_name = False
        self._answered = False

    async def read(self, session: aiohttp.ClientSession) -> Sequence[Announcement]:
        """The events that are coming to this machine. Raises `SourceError`."""
        if not self._knows_name:
            url = self._at("instance/compute/name", _NAME_VERSION, format="text")
            name = (await ask(session, "GET", url, _HEADERS)).body(none=404)
            self._names |= {name} if name else set()
            self._knows_name = True
        timeout_s = REQUEST_TIMEOUT_S if self._answered else _FIRST_TIMEOUT_S
        url = self._at("scheduledevents", _EVENTS_VERSION)
        text = (await ask(session, "GET", url, _HEADERS, timeout_s)).body() or ""
        self._answered = True
        return scheduled_events(text, self._names)

    def _at(self, path: str, version: str, **query: str) -> str:
        return f"{self._url}/metadata/{path}?{urlencode({'api-version': version, **query})}"
