"""AWS: the spot interruption and the rebalance recommendation, from the instance metadata service (IMDSv2).

    PUT /latest/api/token                                       a token for an hour; 401 later means: get a new one
    GET /latest/meta-data/spot/instance-action                  404, or {"action": "terminate", "time": "...Z"}
    GET /latest/meta-data/events/recommendations/rebalance      404, or {"noticeTime": "...Z"}

AWS gives an instance two minutes, best effort, and no time before it hibernates. An event has no id: a hash of its
text is used.
In a container the service answers only if the instance's hop limit is 2 or more.
https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
"""

import time
from collections.abc import Callable, Sequence
from typing import Final

import aiohttp

from elastic_pt.notices.http import ask, json_object
from elastic_pt.notices.message import id_of
from elastic_pt.notices.notice import Announcement, NoticeKind, SourceError, moment

URL: Final = "http://169.254.169.254"
_TOKEN_TTL_S: Final = 3600
_TOKEN_MARGIN_S: Final = 15
_LEADS_S: Final = {"terminate": 120.0, "stop": 120.0, "hibernate": 0.0}


def instance_action(text: str) -> list[Announcement]:
    """The event in `spot/instance-action`."""
    found = json_object(text, "spot/instance-action")
    action, due = found.get("action"), found.get("time")
    if action not in _LEADS_S or not isinstance(due, str):
        raise SourceError(
            f"spot/instance-action: {text[:80]!r}; expected an action (terminate, stop, hibernate) and a time"
        )
    kind, event_id = NoticeKind.PREEMPT, id_of(text)
    return [Announcement(event_id, kind, action, moment(due), _LEADS_S[action])]


def rebalance(text: str) -> list[Announcement]:
    """The event in `events/recommendations/rebalance`."""
    found = json_object(text, "recommendations/rebalance")
    if not isinstance(found.get("noticeTime"), str):
        raise SourceError(f"recommendations/rebalance: {text[:80]!r}; expected a noticeTime")
    return [Announcement(id_of(text), NoticeKind.REBALANCE, "rebalance")]


class Token:
    """The token that each request needs. It is renewed before it expires, and after a 401."""

    def __init__(self, url: str, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._url = url
        self._clock_s = clock_s
        self._token = ""
        self._until_s = float("-inf")

    async def get(self, session: aiohttp.ClientSession, path: str) -> str | None:
        """The text at a path; None if there is no such path (404). Raises `SourceError`."""
        for _ in range(2):
            headers = {"X-aws-ec2-metadata-token": await self._valid(session)}
            answer = await ask(session, "GET", self._url + path, headers)
            if answer.status != 401:
                break
            self._token = ""
        return answer.body(none=404)

    async def _valid(self, session: aiohttp.ClientSession) -> str:
        asked_s = self._clock_s()
        if not self._token or asked_s >= self._until_s:
            ttl = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_TTL_S)}
            answer = await ask(session, "PUT", f"{self._url}/latest/api/token", ttl)
            self._token = answer.body() or ""
            self._until_s = asked_s + _TOKEN_TTL_S - _TOKEN_MARGIN_S
        return self._token


class Aws:
    """A source of one of the two events."""

    interval_s = 2.0

    def __init__(
        self, name: str, token: Token, path: str, parse: Callable[[str], list[Announcement]]
    ) -> None:
        self.name = name
        self._token = token
        self._path = path
        self._parse = parse

    async def read(self, session: aiohttp.ClientSession) -> Sequence[Announcement]:
        """The event, if there is one. Raises `SourceError`."""
        text = await self._token.get(session, self._path)
        return [] if text is None else self._parse(text)


def sources(url: str = URL, clock_s: Callable[[], float] = time.monotonic) -> list[Aws]:
    """A source for each event, so that a failure of one does not hide the other."""
    token, below = Token(url, clock_s), "/latest/meta-data"
    return [
        Aws("aws", token, f"{below}/spot/instance-action", instance_action),
        Aws("aws-rebalance", token, f"{below}/events/recommendations/rebalance", rebalance),
    ]
