"""Each cloud's source with each disturbance: nothing changes, one event reports it, and the next good answer counts."""

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog

from elastic_pt.notices import aws, azure, gcp
from elastic_pt.notices.file import File
from elastic_pt.notices.notice import CheckpointNow, Leave, Stay
from elastic_pt.notices.watch import Source
from tests.notices.servers import (
    ACTION,
    MAINTENANCE,
    PREEMPTED,
    REBALANCE,
    Answer,
    AzureMetadata,
    Cloud,
    GcpMetadata,
    Heard,
    Imds,
    scheduled,
    watched,
)

HANG_S = 0.3
ADVICE = '{"noticeTime": "2020-10-16T19:18:24Z"}'
INTERRUPTION = '{"action": "terminate", "time": "2099-01-01T00:00:00Z"}'
PREEMPT = scheduled("Preempt", "vm_7", lead_s=30.0)
FOREIGN = scheduled("Preempt", "vm_8", lead_s=30.0)


@dataclass(frozen=True)
class Case:
    """One source: its server, and how an answer is set there."""

    server: Callable[[], Any]
    sources: Callable[[str], Sequence[Source]]
    put: Callable[[Any, Any], None]
    """Makes the server answer with a value; None for no event."""
    event: Any
    decision: type
    malformed: tuple[Any, ...]


def _document(path: str) -> Callable[[Imds, str | None], None]:
    return lambda cloud, text: cloud.tell(documents={} if text is None else {path: text})


def _value(path: str) -> Callable[[GcpMetadata, str | None], None]:
    nothing = {PREEMPTED: "FALSE", MAINTENANCE: "NONE"}
    return lambda cloud, text: cloud.tell(
        values=nothing if text is None else nothing | {path: text}
    )


def _events(cloud: AzureMetadata, event: Any) -> None:
    # An event of another machine is always there too.
    cloud.schedule(FOREIGN, *([] if event is None else [event]))


def _azure_server() -> AzureMetadata:
    return AzureMetadata("vm_7")


CASES = {
    "aws": Case(
        Imds,
        aws.sources,
        _document(ACTION),
        INTERRUPTION,
        Leave,
        ("", "<html>", "[]", "null", '{"action": "terminate", "time": 5}', INTERRUPTION[:-2]),
    ),
    "aws-rebalance": Case(
        Imds,
        aws.sources,
        _document(REBALANCE),
        ADVICE,
        CheckpointNow,
        ("", "<html>", "[]", "{}", '{"noticeTime": 5}', ADVICE[:-2]),
    ),
    "gcp": Case(
        GcpMetadata,
        gcp.sources,
        _value(PREEMPTED),
        "TRUE",
        Leave,
        ("", "YES", "TRUE FALSE", "<html>"),
    ),
    "gcp-maintenance": Case(
        GcpMetadata,
        gcp.sources,
        _value(MAINTENANCE),
        "TERMINATE_ON_HOST_MAINTENANCE",
        Leave,
        ("", "TRUE", "TERMINATE", "<html>"),
    ),
    "azure": Case(
        _azure_server,
        lambda url: [azure.Azure({"node-1"}, url)],
        _events,
        PREEMPT,
        Leave,
        (
            PREEMPT | {"EventType": "Dance"},
            PREEMPT | {"EventId": None},
            PREEMPT | {"NotBefore": "soon"},
        ),
    ),
}
FAULTS: dict[str, Callable[[], Answer | None]] = {
    "401": lambda: Answer(401),
    "403": lambda: Answer(403),
    "500": lambda: Answer(500),
    "503": lambda: Answer(503, "slow down"),
    "redirect": lambda: Answer(302, headers={"Location": "http://127.0.0.1:1/"}),
    "hanging": lambda: None,
}


@pytest.fixture(autouse=True)
def short_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that hangs ends after a fraction of a second."""
    monkeypatch.setattr("elastic_pt.notices.http.ask.__defaults__", (HANG_S,))
    monkeypatch.setattr(gcp, "REQUEST_TIMEOUT_S", HANG_S)
    monkeypatch.setattr(gcp, "_WAIT_S", HANG_S)
    monkeypatch.setattr(azure, "REQUEST_TIMEOUT_S", HANG_S)
    monkeypatch.setattr(azure, "_FIRST_TIMEOUT_S", HANG_S)


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    """The name of a source."""
    return str(request.param)


@pytest.fixture
def case(name: str) -> Case:
    """The source of that name."""
    return CASES[name]


@pytest.fixture
def cloud(case: Case) -> Iterator[Cloud]:
    """Its server, without an event."""
    server: Cloud = case.server()
    with server.serving():
        case.put(server, None)
        yield server


@pytest.fixture
def heard(case: Case, cloud: Cloud) -> Iterator[Heard]:
    """The decisions of a watch of the source."""
    with ExitStack() as stack:
        stack.enter_context(structlog.testing.capture_logs())
        yield stack.enter_context(watched(*case.sources(cloud.url)))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_withdraws_no_notice(
    name: str, case: Case, cloud: Cloud, heard: Heard, fault: str
) -> None:
    """F17: while the source refuses, fails or hangs, its notice stays in force; afterwards it can still be withdrawn."""
    case.put(cloud, case.event)
    assert isinstance(heard.next(), case.decision)
    cloud.tell(fault=FAULTS[fault])
    heard.until_up(name, 0)
    cloud.tell(fault=None)
    heard.until_up(name, 1)
    assert not heard.more
    case.put(cloud, None)
    assert heard.next() == Stay()


def test_a_malformed_answer_has_no_effect(
    name: str, case: Case, cloud: Cloud, heard: Heard
) -> None:
    """F17: each malformed answer is reported and changes nothing, with and without a notice in force."""
    for event in (None, case.event):
        for malformed in case.malformed:
            case.put(cloud, malformed)
            heard.until_up(name, 0)
            case.put(cloud, event)
            heard.until_up(name, 1)
            if event is not None and malformed is case.malformed[0]:
                assert isinstance(heard.next(), case.decision)
            assert not heard.more


def test_a_repeated_event_counts_once(name: str, case: Case, cloud: Cloud, heard: Heard) -> None:
    """F17: the source repeats its event in each answer; the node decides once. A withdrawn event may come again."""
    for times in (1, 2):
        case.put(cloud, case.event)
        decision = heard.next()
        assert isinstance(decision, case.decision)
        kind = decision.notice.kind
        path = {"azure": "/metadata/scheduledevents", "aws": ACTION, "aws-rebalance": REBALANCE}
        if name in path:
            cloud.until_asked_again(path[name], 3)
        assert not heard.more
        assert heard.value("notices_total", source=name, kind=kind) == times
        case.put(cloud, None)
        assert heard.next() == Stay()


def test_an_unreadable_file_withdraws_nothing(tmp_path: Path) -> None:
    """F17: a notice file that is replaced by a pipe is an error, not a withdrawal; a missing folder is no notice."""
    path, pipe = tmp_path / "folder" / "notice", tmp_path / "pipe"
    os.mkfifo(pipe)
    with structlog.testing.capture_logs(), watched(File(path, "a")) as heard:
        path.parent.mkdir()
        path.with_suffix(".new").write_text("lead_s: 60\n")
        path.with_suffix(".new").rename(path)
        assert isinstance(heard.next(), Leave)
        pipe.rename(path)
        heard.until_up("file", 0)
        assert not heard.more
        path.unlink()
        assert heard.next() == Stay()
        heard.until_up("file", 1)


def test_a_server_that_ends_in_the_middle_of_an_answer_changes_nothing() -> None:
    """F17: half an answer is a failure of the source."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        with structlog.testing.capture_logs(), watched(*gcp.sources(url)) as heard:
            server.settimeout(10.0)
            deadline_s = time.monotonic() + 10.0
            while heard.value("notice_source_up", source="gcp") != 0:
                assert time.monotonic() < deadline_s
                connection, _ = server.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nTR")
            assert not heard.more
