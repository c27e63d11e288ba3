"""Google Cloud: preemption and host maintenance, from the metadata server.

    GET /computeMetadata/v1/instance/preempted              FALSE, or TRUE
    GET /computeMetadata/v1/instance/maintenance-event      NONE, MIGRATE_ON_HOST_MAINTENANCE, TERMINATE_...

The first answer comes at once, with an ETag. Later requests wait for another value (`wait_for_change`, `last_etag`),
so a change arrives at once. A Spot VM gets 30 seconds, best effort; maintenance is announced 60 seconds ahead. A live
migration only pauses the machine.
https://cloud.google.com/compute/docs/metadata/querying-metadata
"""

from collections.abc import Mapping, Sequence
from typing import Final
from urllib.parse import urlencode

import aiohttp

from elastic_pt.notices.http import REQUEST_TIMEOUT_S, ask
from elastic_pt.notices.notice import Announcement, NoticeKind, SourceError

# The address of metadata.google.internal: no name server is needed.
URL: Final = "http://169.254.169.254"
_WAIT_S: Final = 20
_PREEMPTED: Final = {
    "FALSE": None,
    "TRUE": Announcement("preempted", NoticeKind.PREEMPT, "preempted", lead_s=30.0),
}
_MAINTENANCE: Final = {
    "NONE": None,
    "MIGRATE_ON_HOST_MAINTENANCE": Announcement(
        "migrate", NoticeKind.PAUSE, "live migration", lead_s=60.0
    ),
    "TERMINATE_ON_HOST_MAINTENANCE": Announcement(
        "terminate", NoticeKind.MAINTENANCE, "host maintenance", lead_s=60.0
    ),
}


class Gcp:
    """A source for one of the two values."""

    interval_s = 1.0
    """Seconds between an answer and the next request. The server itself waits, so this is only a limit."""

    def __init__(
        self, name: str, url: str, key: str, known: Mapping[str, Announcement | None]
    ) -> None:
        self.name = name
        self._url = f"{url}/computeMetadata/v1/instance/{key}"
        self._known = known
        self._etag = ""

    async def read(self, session: aiohttp.ClientSession) -> Sequence[Announcement]:
        """The value now; after the first read, wait up to 20 s for another value. Raises `SourceError`."""
        url, timeout_s, etag = self._url, REQUEST_TIMEOUT_S, self._etag
        if etag:
            wait = {"wait_for_change": "true", "timeout_sec": _WAIT_S, "last_etag": etag}
            url, timeout_s = f"{url}?{urlencode(wait)}", timeout_s + _WAIT_S
        # After a failure the next request does not wait: the value may have changed.
        self._etag = ""
        answer = await ask(session, "GET", url, {"Metadata-Flavor": "Google"}, timeout_s)
        text = answer.body(none=404)
        if text is None:
            return []
        if text.upper() not in self._known:
            wanted = ", ".join(self._known)
            raise SourceError(f"{self._url}: {text[:80]!r}; expected one of {wanted}")
        self._etag = answer.headers.get("ETag", "")
        found = self._known[text.upper()]
        return [] if found is None else [found]


def sources(url: str = URL) -> list[Gcp]:
    """A source for each value: each request waits for its own value."""
    return [
        Gcp("gcp", url, "preempted", _PREEMPTED),
        Gcp("gcp-maintenance", url, "maintenance-event", _MAINTENANCE),
    ]
