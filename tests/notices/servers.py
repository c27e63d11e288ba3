"""Metadata servers on loopback, as the clouds document them, and a watch of sources for tests."""

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from elastic_pt.notices.notice import Decision
from elastic_pt.notices.watch import Source, Watch
from elastic_pt.telemetry.catalogue import Metrics

WAIT_S = 20.0
USUAL_LEAD_S = 25.0


@dataclass
class Request:
    """One request to a server."""

    method: str
    path: str
    query: dict[str, str]
    headers: Any


@dataclass
class Answer:
    """The server's answer."""

    status: int = 200
    text: str = ""
    headers: dict[str, str] = field(default_factory=dict)


class Cloud:
    """A metadata server. `fault` answers instead of the cloud; if it returns None, the request hangs until the end."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.questions: list[str] = []
        self.fault: Callable[[], Answer | None] | None = None
        self._ended = threading.Event()
        cloud = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                where = urlsplit(self.path)
                query = {key: value[0] for key, value in parse_qs(where.query).items()}
                cloud._serve(self, Request(self.command, where.path, query, self.headers))

            do_GET = do_PUT = do_POST = _answer

            def log_message(self, *_: object) -> None:
                """Log nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def answer(self, request: Request) -> Answer:
        """The answer by the cloud's documentation."""
        raise NotImplementedError

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Answer until the end of the block."""
        thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            self.tell()
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def tell(self, **changes: object) -> None:
        """Change the cloud's values; requests that wait for a change are answered."""
        with self.changed:
            vars(self).update(changes)
            self.changed.notify_all()

    def until_asked(self, path: str, times: int = 1) -> None:
        """Wait until a path has been requested so many times in total."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.questions.count(path) >= times, WAIT_S), path

    def until_asked_again(self, path: str, times: int) -> None:
        """Wait until a path has been requested so many more times."""
        self.until_asked(path, self.questions.count(path) + times)

    def _serve(self, handler: BaseHTTPRequestHandler, request: Request) -> None:
        with self.changed:
            fault = self.fault
        found = self.answer(request) if fault is None else fault()
        with self.changed:
            self.questions.append(request.path)
            self.changed.notify_all()
        if found is None:
            self._ended.wait(WAIT_S)
            handler.close_connection = True
            return
        body = found.text.encode()
        handler.send_response(found.status)
        for name, value in {**found.headers, "Content-Length": str(len(body))}.items():
            handler.send_header(name, value)
        with suppress(ConnectionError):
            handler.end_headers()
            handler.wfile.write(body)


ACTION = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
TOKEN = "/latest/api/token"


class Imds(Cloud):
    """AWS's instance metadata service, version 2 only."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: set[str] = set()
        self.documents: dict[str, str] = {}

    def answer(self, request: Request) -> Answer:
        """A token for a PUT with a lifetime; documents for a GET with a valid token."""
        if request.path == TOKEN:
            lifetime = request.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
            if request.method != "PUT" or not 1 <= int(lifetime or 0) <= 21600:
                return Answer(400)
            token = f"token-{len(self.questions)}"
            self.tokens.add(token)
            return Answer(text=token)
        if request.headers.get("X-aws-ec2-metadata-token") not in self.tokens:
            return Answer(401)
        text = self.documents.get(request.path)
        return Answer(404) if text is None else Answer(text=text)

    def interrupt(self, action: str, lead_s: float) -> None:
        """Announce a spot interruption."""
        due = datetime.now(UTC) + timedelta(seconds=lead_s)
        notice = {"action": action, "time": f"{due:%Y-%m-%dT%H:%M:%SZ}"}
        self.tell(documents=self.documents | {ACTION: json.dumps(notice)})


PREEMPTED = "/computeMetadata/v1/instance/preempted"
MAINTENANCE = "/computeMetadata/v1/instance/maintenance-event"


class GcpMetadata(Cloud):
    """Google Cloud's metadata server: ETags, and answers that wait for a change."""

    def __init__(self) -> None:
        super().__init__()
        self.values = {PREEMPTED: "FALSE", MAINTENANCE: "NONE"}
        self.outdated = 0
        """Requests for a change since a value that was not the newest one."""

    def answer(self, request: Request) -> Answer:
        """The value; with `wait_for_change`, after it differs from that of `last_etag`."""
        if request.headers.get("Metadata-Flavor") != "Google":
            return Answer(403)
        if request.path not in self.values:
            return Answer(404)
        with self.changed:
            if request.query.get("wait_for_change") == "true":
                self.outdated += self._etag(request.path) != request.query.get("last_etag")
                self.changed.wait_for(
                    lambda: (
                        self._ended.is_set()
                        or self._etag(request.path) != request.query.get("last_etag")
                    ),
                    float(request.query.get("timeout_sec", "60")),
                )
            headers = {"Metadata-Flavor": "Google", "ETag": self._etag(request.path)}
            return Answer(text=self.values[request.path], headers=headers)

    def _etag(self, path: str) -> str:
        return f"{hash(self.values[path]) & 0xFFFFFFFF:x}"


EVENTS = "/metadata/scheduledevents"
NAME = "/metadata/instance/compute/name"


class AzureMetadata(Cloud):
    """Azure's metadata service: the machine's name, and the document of scheduled events."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.events: list[Any] = []
        self.incarnation = 1

    def answer(self, request: Request) -> Answer:
        """Needs the header `Metadata` and a version."""
        if request.headers.get("Metadata") != "true" or "api-version" not in request.query:
            return Answer(400)
        if request.path == NAME:
            return Answer(text=self.name)
        if request.path == EVENTS:
            document = {"DocumentIncarnation": self.incarnation, "Events": self.events}
            return Answer(text=json.dumps(document))
        return Answer(404)

    def schedule(self, *events: Any) -> None:
        """The current events."""
        self.tell(events=list(events), incarnation=self.incarnation + 1)


def scheduled(event_type: str, *resources: str, lead_s: float, **changes: str) -> dict[str, Any]:
    """An event of Azure's document."""
    due = datetime.now(UTC) + timedelta(seconds=lead_s)
    return {
        "EventId": f"{event_type}-{'-'.join(resources)}",
        "EventType": event_type,
        "ResourceType": "VirtualMachine",
        "Resources": list(resources),
        "EventStatus": "Scheduled",
        "NotBefore": format_datetime(due, usegmt=True),
        "Description": "",
        "EventSource": "Platform",
        "DurationInSeconds": -1,
        **changes,
    }


class Heard:
    """The decisions of a watch, in order."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self._decisions: queue.Queue[Decision] = queue.Queue()
        self.put = self._decisions.put

    def next(self) -> Decision:
        """Wait for the next one."""
        return self._decisions.get(timeout=WAIT_S)

    @property
    def more(self) -> bool:
        """Whether another one has arrived already."""
        return not self._decisions.empty()

    def value(self, name: str, **labels: str) -> float | None:
        """A metric's value."""
        return self.metrics.registry.get_sample_value(f"elastic_pt_{name}", labels)

    def until_up(self, source: str, value: float) -> None:
        """Wait until the metric says that a source answers (1) or does not (0)."""
        deadline_s = time.monotonic() + WAIT_S
        while self.value("notice_source_up", source=source) != value:
            assert time.monotonic() < deadline_s, (source, value)
            threading.Event().wait(0.01)


@contextmanager
def watched(*sources: Source, often: bool = True) -> Iterator[Heard]:
    """Watch sources until the end of the block; `often` reads them without the usual pauses."""
    heard = Heard(Metrics())
    if often:
        for source in sources:
            source.interval_s = 0.01  # type: ignore[misc]
    watch = Watch(sources, heard.put, heard.metrics, USUAL_LEAD_S)
    watch.start()
    try:
        yield heard
    finally:
        watch.close()
