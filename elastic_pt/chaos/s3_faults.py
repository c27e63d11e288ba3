"""What a proxy does to requests to an S3 server, and which of them it strikes. `FaultProxy.strike` declares a rule.

    Delay(2.0)                 pass the request on after that long, or when the rule is mended
    Bandwidth(1 << 20)         bodies of requests and answers pass at that rate; requests of one rule share it
    SLOW_DOWN, EXPIRED_TOKEN   answer with an error; the server never sees the request (`Answer`)
    Hang(30.0)                 say nothing for that long, then close the connection
    Cut()                      close the connection without an answer
    LOST_ANSWER                let the server carry the request out, then close the connection
    Reset(), Reset(True)       reset the connection (RST), before the answer or in the middle of it
    Truncate()                 send half of the answer's body, then close the connection
    HideNewest(3)              leave the three newest keys out of a ListObjectsV2 answer
    FlipBit()                  flip one bit of the body of a GET's answer

A rule strikes requests by method, by key and by chance. `Delay` and `Bandwidth` add to each other and to one other fault.
"""

import math
import random
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass(frozen=True)
class Delay:
    """Pass the request on after `seconds`, or when the rule is mended."""

    seconds: float = math.inf


@dataclass(frozen=True)
class Bandwidth:
    """Limit bodies to `bytes_per_s`, each direction apart. Requests without a body count as struck too."""

    bytes_per_s: int


@dataclass(frozen=True)
class Answer:
    """Answer with an S3 error, or with `body`. The server does not see the request, unless it is `carried_out`."""

    status: int
    code: str
    body: str = ""
    carried_out: bool = False


@dataclass(frozen=True)
class Hang:
    """Say nothing for `seconds`, or until the rule is mended, then close the connection."""

    seconds: float = math.inf


@dataclass(frozen=True)
class Cut:
    """Close the connection without an answer; before that, the server has `carried_out` the request or not seen it."""

    carried_out: bool = False


@dataclass(frozen=True)
class Reset:
    """Reset the connection: before the request is read, or in the middle of its answer."""

    in_answer: bool = False


@dataclass(frozen=True)
class Truncate:
    """Announce the whole body of an answer, send half of it, and close the connection."""


@dataclass(frozen=True)
class HideNewest:
    """Leave the newest `keys` keys of each page of a ListObjectsV2 answer out."""

    keys: int = 1


@dataclass(frozen=True)
class FlipBit:
    """Flip one bit of an object's bytes on their way to the reader."""


S3Fault = Delay | Bandwidth | Answer | Hang | Cut | Reset | Truncate | HideNewest | FlipBit

INTERNAL_ERROR: Final = Answer(500, "InternalError")
SLOW_DOWN: Final = Answer(503, "SlowDown")
ACCESS_DENIED: Final = Answer(403, "AccessDenied")
CONFLICT: Final = Answer(409, "ConditionalRequestConflict")
EXPIRED_TOKEN: Final = Answer(400, "ExpiredToken")
LOST_ANSWER: Final = Cut(carried_out=True)


@dataclass(frozen=True)
class Request:
    """A request as rules see it."""

    method: str
    key: str
    """The object's key inside its bucket; empty for a request about the bucket."""
    lists: bool
    """Whether it is a ListObjectsV2."""

    @classmethod
    def of(cls, method: str, path: str) -> "Request":
        """From the request line of a client that names the bucket in the path."""
        url = urlsplit(path)
        key = unquote(url.path).lstrip("/").partition("/")[2]
        lists = method == "GET" and parse_qs(url.query).get("list-type") == ["2"]
        return cls(method, key, lists)


class Pace:
    """Spreads bytes over time. Any thread."""

    def __init__(self, bytes_per_s: int) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0
        self._lock = threading.Lock()

    def after_s(self, size: int) -> float:
        """Seconds from now until `size` more bytes have passed."""
        with self._lock:
            now_s = time.monotonic()
            self._free_s = max(now_s, self._free_s) + size / self._bytes_per_s
            return self._free_s - now_s


class Rule:
    """One declared fault: which requests it strikes, until when, and how many it has struck. Any thread."""

    def __init__(
        self,
        fault: S3Fault,
        *,
        methods: Collection[str],
        key: str,
        share: float,
        after: int,
        times: int | None,
        draw: random.Random,
    ) -> None:
        """As in `FaultProxy.strike`; `draw` decides by chance, and where bits flip."""
        self.fault = fault
        self.up, self.down = (
            Pace(fault.bytes_per_s if isinstance(fault, Bandwidth) else 1) for _ in range(2)
        )
        self._methods = frozenset(methods)
        self._key = key
        self._share = share
        self._after = after
        self._times = times
        self._draw = draw
        self._struck = 0
        self._mended = threading.Event()
        self._lock = threading.Lock()

    @property
    def struck(self) -> int:
        """How many requests it has struck."""
        return self._struck

    @property
    def slows(self) -> bool:
        """Whether a request that it strikes is still served, only later."""
        return isinstance(self.fault, Delay | Bandwidth)

    def mend(self) -> None:
        """Strike no further request, and wake those that wait."""
        self._mended.set()

    def take(self, request: Request) -> bool:
        """Whether it strikes this request; counts it."""
        if not self._concerns(request):
            return False
        with self._lock:
            if self._mended.is_set() or self._struck == self._times:
                return False
            if self._after > 0:
                self._after -= 1
                return False
            if self._share < 1.0 and self._draw.random() >= self._share:
                return False
            self._struck += 1
            return True

    def spare(self) -> None:
        """A request that it was to strike gave it no opportunity, such as an answer without a body."""
        with self._lock:
            self._struck -= 1

    def wait(self, seconds: float) -> None:
        """Wait for that long, or until it is mended."""
        self._mended.wait(None if math.isinf(seconds) else seconds)

    def any_of(self, count: int) -> int:
        """A number from 0 to `count` - 1."""
        with self._lock:
            return self._draw.randrange(count)

    def _concerns(self, request: Request) -> bool:
        if isinstance(self.fault, HideNewest) and not request.lists:
            return False
        if isinstance(self.fault, FlipBit) and (request.method != "GET" or not request.key):
            return False
        if self._methods and request.method not in self._methods:
            return False
        return fnmatchcase(request.key, self._key)
