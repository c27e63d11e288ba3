"""A simulated S3 server under the production store: `S3Store`, its retries and its read-back are the real code.

Only what s3fs would do on the wire is simulated: a request takes time to the server, is applied there at one
moment, and takes time back. It may be refused, get lost on its way there or back (then it was applied and
the caller does not know), take long, or meet a server that does not answer.
"""

import os
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

import greenlet
from botocore import exceptions as boto
from fsspec.asyn import AsyncFileSystem

from elastic_pt.store.retry import Retry
from elastic_pt.store.s3 import S3Store
from tests.sim.scheduler import Process, Scheduler

URL: Final = "s3://bucket/run"
_BUCKET, _ROOT = "bucket", "run/"
_CONNECT_TIMEOUT_S: Final = 5.0
_RETRANSMISSION_MAX_S: Final = 60.0


@dataclass
class Weather:
    """How requests fare now."""

    error_share: float = 0.0
    """Refused with 500, 503 or (a create) 409."""
    lost_share: float = 0.0
    """Applied, but the answer never comes: the connection closes instead."""
    slowness: float = 1.0
    down: bool = False


@dataclass(frozen=True)
class Pace:
    """How long a request takes, half of it before it is applied."""

    low_s: float = 0.01
    high_s: float = 0.05
    tail_share: float = 0.02
    tail_s: float = 0.5


class Bucket:
    """The objects, and how requests to them fare."""

    def __init__(self, scheduler: Scheduler, pace: Pace) -> None:
        self.scheduler = scheduler
        self.pace = pace
        self.objects: dict[str, bytes] = {}
        self.weather = Weather()
        self.unreachable: dict[str, int] = {}
        """Machines whose requests get nowhere, with the number of faults that cause it."""
        self.requests: Counter[str] = Counter()
        """By the first part of the key."""
        self.on_change: Callable[[str, bytes | None, bytes | None], None] = lambda *_: None
        """Called with key, old and new object whenever one changes."""

    def store_for(self, process: Process, machine: str, timeout_s: float) -> S3Store:
        """The production store, as `open_store` makes it, for one process."""
        store = S3Store(
            URL,
            retry=Retry(
                timeout_s,
                clock_s=process.clock_s,
                sleep=process.sleep,
                draw=self.scheduler.random.random,
            ),
        )
        files = Files.of(self, process, machine, min(60.0, timeout_s / 2))
        store._client._built = (os.getpid(), files, f"{_BUCKET}/{_ROOT.rstrip('/')}")
        return store

    def put(self, key: str, data: bytes) -> None:
        """Store an object."""
        old = self.objects.get(key)
        self.objects[key] = data
        self.on_change(key, old, data)

    def is_reachable(self, machine: str) -> bool:
        """Whether requests from a machine get through."""
        return not self.weather.down and machine not in self.unreachable

    def serve(self, method: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Carry a request out. Raises `ClientError` as S3 would."""
        key = arguments.get("Key", "").removeprefix(_ROOT)
        match method:
            case "get_object":
                if key not in self.objects:
                    raise _error("NoSuchKey", 404)
                return {"Body": Body(self.objects[key])}
            case "put_object":
                if arguments.get("IfNoneMatch") == "*" and key in self.objects:
                    raise _error("PreconditionFailed", 412)
                self.put(key, arguments["Body"])
                return {}
            case "head_object":
                if key not in self.objects:
                    raise _error("404", 404)
                return {"ContentLength": len(self.objects[key])}
            case "list_objects_v2":
                prefix = arguments["Prefix"].removeprefix(_ROOT)
                found = sorted(key for key in self.objects if key.startswith(prefix))
                return {"Contents": [{"Key": _ROOT + key} for key in found]}
            case "delete_object":
                old = self.objects.pop(key, None)
                if old is not None:
                    self.on_change(key, old, None)
                return {}
        raise NotImplementedError(method)


class Body:
    """What s3fs reads an object from."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def read(self) -> bytes:
        """All bytes."""
        return self._data

    def close(self) -> None:
        """Nothing to close."""


class Files(AsyncFileSystem):  # type: ignore[misc]
    """What `Client` asks in place of s3fs, for one process. Blocks the running greenlet."""

    loop = None  # type: ignore[assignment]
    _bucket: Bucket
    _process: Process
    _machine: str
    _read_timeout_s: float

    @classmethod
    def of(cls, bucket: Bucket, process: Process, machine: str, read_timeout_s: float) -> "Files":
        """Not through the constructor, which starts fsspec's own thread."""
        files: Files = object.__new__(cls)
        files._bucket, files._process = bucket, process
        files._machine, files._read_timeout_s = machine, read_timeout_s
        return files

    async def _call_s3(self, method: str, **arguments: Any) -> dict[str, Any]:
        return self.call_s3(method, **arguments)

    def call_s3(
        self, method: str, *, timeout: float | None = None, **arguments: Any
    ) -> dict[str, Any]:
        """One request, as s3fs makes it: raises what botocore raises, or `TimeoutError` after `timeout`."""
        bucket, process, machine = self._bucket, self._process, self._machine
        scheduler, source = bucket.scheduler, bucket.scheduler.random
        what = arguments.get("Key", arguments.get("Prefix", "")).removeprefix(_ROOT)
        bucket.requests[what.partition("/")[0]] += 1
        weather, pace = bucket.weather, bucket.pace
        there_s, back_s = (
            weather.slowness * (pace.low_s + (pace.high_s - pace.low_s) * source.random()) / 2
            for _ in range(2)
        )
        if source.random() < pace.tail_share:
            there_s += pace.tail_s * source.random()
        fate = source.random()
        refused = fate < weather.error_share
        stubborn = source.random() < 0.5
        lost = not refused and fate < weather.error_share + weather.lost_share
        waiting = greenlet.getcurrent()
        done: list[bool] = []

        def answer(outcome: Any) -> None:
            if not done:
                done.append(True)
                waiting.switch(outcome)

        def arrive(again_s: float = 0.2) -> None:
            if not bucket.is_reachable(machine):
                # Sent again by the machine's TCP, long after the client stopped waiting for it.
                if stubborn and again_s < _RETRANSMISSION_MAX_S:
                    scheduler.after(again_s, lambda: arrive(2 * again_s))
                return
            if refused:
                result: Any = _refusal(source.random(), method)
            else:
                try:
                    result = bucket.serve(method, arguments)
                except boto.ClientError as error:
                    result = error
                if lost:
                    result = boto.ConnectionClosedError(endpoint_url=URL)
            scheduler.after(back_s, lambda: come_back(result))

        def come_back(result: Any, again_s: float = 0.2) -> None:
            if bucket.is_reachable(machine):
                process.soon(lambda: answer(result))
            elif stubborn and again_s < _RETRANSMISSION_MAX_S:
                scheduler.after(again_s, lambda: come_back(result, 2 * again_s))

        limit_s = self._read_timeout_s if timeout is None else min(timeout, self._read_timeout_s)
        if not stubborn and not bucket.is_reachable(machine):
            limit_s = min(limit_s, _CONNECT_TIMEOUT_S)
        scheduler.after(there_s, arrive)
        process.after(limit_s, lambda: answer(boto.ReadTimeoutError(endpoint_url=URL)))
        result = scheduler.block()
        if isinstance(result, Exception):
            raise result
        found: dict[str, Any] = result
        return found


def run_here(
    loop: object,
    function: Callable[..., Coroutine[Any, Any, Any]],
    *arguments: Any,
    timeout: float | None = None,
) -> Any:
    """Stands in for fsspec's `sync`: the coroutine blocks the running greenlet rather than a thread."""
    running = function(*arguments)
    try:
        running.send(None)
    except StopIteration as end:
        return end.value
    raise RuntimeError(f"{function.__name__} waits for something that is not simulated")


def _error(code: str, status: int) -> boto.ClientError:
    return boto.ClientError(
        {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "request"
    )


def _refusal(chance: float, method: str) -> boto.ClientError:
    if method == "put_object" and chance < 0.3:
        return _error("ConditionalRequestConflict", 409)
    return _error("SlowDown", 503) if chance < 0.7 else _error("InternalError", 500)
