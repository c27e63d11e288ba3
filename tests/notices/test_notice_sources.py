"""Each source against a local server that follows its cloud's documented protocol."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import structlog

from elastic_pt.notices import aws, gcp
from elastic_pt.notices import azure as azure_source
from elastic_pt.notices.azure import Azure, scheduled_events
from elastic_pt.notices.file import File
from elastic_pt.notices.notice import CheckpointNow, Leave, NoticeKind, SourceError, Stay
from tests.notices.servers import (
    ACTION,
    EVENTS,
    MAINTENANCE,
    NAME,
    PREEMPTED,
    REBALANCE,
    TOKEN,
    USUAL_LEAD_S,
    Answer,
    AzureMetadata,
    Cloud,
    GcpMetadata,
    Heard,
    Imds,
    Request,
    scheduled,
    watched,
)

LEADS_S = [120.0, 30.0, 15.0, 5.0, 0.0]
ROUNDING_S = 3.0
"""Times have whole seconds, and the test itself takes time."""


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Ends servers and watches."""
    with ExitStack() as opened:
        yield opened


@pytest.fixture
def imds(stack: ExitStack) -> Imds:
    """AWS."""
    server = Imds()
    stack.enter_context(server.serving())
    return server


@pytest.fixture
def google(stack: ExitStack) -> GcpMetadata:
    """Google Cloud."""
    server = GcpMetadata()
    stack.enter_context(server.serving())
    return server


@pytest.fixture
def azure(stack: ExitStack) -> AzureMetadata:
    """Azure, on the machine `vm_7`."""
    server = AzureMetadata("vm_7")
    stack.enter_context(server.serving())
    return server


def leave(heard: Heard, source: str, lead_s: float, *, kind: str = "preempt") -> Leave:
    """The next decision is to leave, with this lead."""
    decision = heard.next()
    assert isinstance(decision, Leave)
    notice = decision.notice
    assert (notice.source, notice.kind) == (source, kind)
    assert max(0.0, lead_s - ROUNDING_S) <= notice.lead_s <= lead_s
    assert abs(notice.deadline_s - notice.lead_s - time.monotonic()) < ROUNDING_S
    assert heard.value("notices_total", source=source, kind=kind) == 1
    assert heard.value("notice_lead_seconds") == notice.lead_s
    return decision


# ---- AWS ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead_s", LEADS_S)
def test_a_spot_interruption_has_its_lead(imds: Imds, stack: ExitStack, lead_s: float) -> None:
    """F16: for any lead, the notice is heeded once, with the time of the instance action as its deadline."""
    imds.interrupt("terminate", lead_s)
    heard = stack.enter_context(watched(*aws.sources(imds.url)))
    leave(heard, "aws", lead_s)
    imds.until_asked_again(ACTION, 3)
    assert not heard.more


def test_hibernation_begins_at_once(imds: Imds, stack: ExitStack) -> None:
    """AWS starts to hibernate with the notice itself, so the lead is 0 for any time that it names."""
    imds.interrupt("hibernate", 120.0)
    leave(stack.enter_context(watched(*aws.sources(imds.url))), "aws", 0.0)


def test_an_interruption_that_disappears_is_withdrawn(imds: Imds, stack: ExitStack) -> None:
    """The node stays, and a later interruption is a new notice."""
    heard = stack.enter_context(watched(*aws.sources(imds.url)))
    imds.interrupt("stop", 120.0)
    assert isinstance(heard.next(), Leave)
    imds.tell(documents={})
    assert heard.next() == Stay()
    imds.interrupt("terminate", 60.0)
    assert isinstance(heard.next(), Leave)


def test_a_rebalance_recommendation_is_advice(imds: Imds, stack: ExitStack) -> None:
    """It asks for a checkpoint. The later interruption makes the node leave."""
    imds.tell(documents={REBALANCE: '{"noticeTime": "2020-10-16T19:18:24Z"}'})
    heard = stack.enter_context(watched(*aws.sources(imds.url)))
    decision = heard.next()
    assert isinstance(decision, CheckpointNow)
    assert decision.notice.kind is NoticeKind.REBALANCE
    imds.interrupt("terminate", 120.0)
    leave(heard, "aws", 120.0)


def test_an_expired_token_is_renewed(imds: Imds, stack: ExitStack) -> None:
    """A token is requested once, and again only after a 401. The next notice is received."""
    heard = stack.enter_context(watched(*aws.sources(imds.url)))
    imds.until_asked_again(REBALANCE, 3)
    assert imds.questions.count(TOKEN) <= 2
    imds.tell(tokens=set())
    imds.interrupt("terminate", 120.0)
    leave(heard, "aws", 120.0)
    assert heard.value("notice_source_up", source="aws") == 1


def test_a_token_is_renewed_before_it_expires(imds: Imds, stack: ExitStack) -> None:
    """The token is renewed before its lifetime ends, so no request gets a 401 for that reason."""
    now_s = [0.0]
    stack.enter_context(watched(*aws.sources(imds.url, clock_s=lambda: now_s[0])))
    imds.until_asked_again(REBALANCE, 2)
    imds.until_asked_again(ACTION, 2)
    before = imds.questions.count(TOKEN)
    now_s[0] = 3600.0
    imds.until_asked(TOKEN, before + 1)
    imds.until_asked_again(REBALANCE, 3)
    assert imds.questions.count(TOKEN) <= before + 2


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"action": "terminate"}', '{"action": "dance", "time": "2026-01-01T00:00:00Z"}',
     '{"action": "stop", "time": "soon"}', "[" * 100_000],
)  # fmt: skip
def test_a_malformed_answer_of_aws_has_no_effect(imds: Imds, stack: ExitStack, text: str) -> None:
    """F17: a malformed answer changes nothing and is reported; the next good answer counts."""
    heard = stack.enter_context(watched(*aws.sources(imds.url)))
    imds.tell(documents={ACTION: text})
    heard.until_up("aws", 0)
    assert not heard.more
    imds.interrupt("terminate", 30.0)
    leave(heard, "aws", 30.0)
    heard.until_up("aws", 1)


# ---- Google Cloud ------------------------------------------------------------------------------------


def test_a_preempted_spot_vm_has_thirty_seconds(google: GcpMetadata, stack: ExitStack) -> None:
    """The request waits at the server for the change, so the notice arrives at once. There is one request at a time."""
    heard = stack.enter_context(watched(*gcp.sources(google.url)))
    google.until_asked(PREEMPTED)
    google.tell(values=google.values | {PREEMPTED: "TRUE"})
    leave(heard, "gcp", 30.0)
    google.tell(values=google.values | {PREEMPTED: "FALSE"})
    assert heard.next() == Stay()
    google.tell(values=google.values | {MAINTENANCE: "TERMINATE_ON_HOST_MAINTENANCE"})
    assert isinstance(heard.next(), Leave)
    assert not heard.more
    # A value may have changed between an answer and the next request, but no more often than that.
    assert google.outdated <= 3
    assert google.questions.count(PREEMPTED) <= 3


@pytest.mark.parametrize(
    ("value", "leaves"),
    [("TERMINATE_ON_HOST_MAINTENANCE", True), ("MIGRATE_ON_HOST_MAINTENANCE", False)],
)
def test_host_maintenance_ends_a_machine_and_live_migration_does_not(
    google: GcpMetadata, stack: ExitStack, value: str, leaves: bool
) -> None:
    """A machine has a minute before it is terminated. A live migration does not end its processes."""
    google.tell(values=google.values | {MAINTENANCE: value})
    heard = stack.enter_context(watched(*gcp.sources(google.url)))
    if leaves:
        leave(heard, "gcp-maintenance", 60.0, kind="maintenance")
    else:
        assert isinstance(heard.next(), CheckpointNow)


def test_a_server_that_does_not_wait_is_not_flooded(google: GcpMetadata, stack: ExitStack) -> None:
    """There is a pause between two requests, even if the server answers at once."""
    google.fault = lambda: Answer(text="FALSE", headers={"ETag": "1"})
    stack.enter_context(watched(*gcp.sources(google.url), often=False))
    began_s = time.monotonic()
    google.until_asked(PREEMPTED, 2)
    assert time.monotonic() - began_s > 0.5


# ---- Azure -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead_s", LEADS_S)
def test_a_preempt_event_has_its_lead(
    azure: AzureMetadata, stack: ExitStack, lead_s: float
) -> None:
    """The lead ends at NotBefore, and is at most the half minute that Azure promises."""
    azure.schedule(scheduled("Preempt", "vm_3", "vm_7", lead_s=lead_s))
    heard = stack.enter_context(watched(Azure({"node-1"}, azure.url)))
    leave(heard, "azure", min(lead_s, 30.0))
    azure.until_asked_again(EVENTS, 3)
    assert not heard.more
    assert azure.questions.count(NAME) == 1


def test_events_of_other_machines_have_no_effect(azure: AzureMetadata, stack: ExitStack) -> None:
    """F17: the document lists events of all machines of a set; only an event that names this machine counts, until it is cancelled."""
    foreign = scheduled("Preempt", "vm_70", "vm_8", lead_s=30.0)
    azure.schedule(foreign, "no event", {"Resources": ["vm_8"], "EventType": 5})
    heard = stack.enter_context(watched(Azure({"node-1"}, azure.url)))
    azure.until_asked_again(EVENTS, 3)
    assert not heard.more
    azure.schedule(foreign, scheduled("Redeploy", "vm_7", lead_s=600.0))
    leave(heard, "azure", 600.0, kind="maintenance")
    azure.schedule(foreign)
    assert heard.next() == Stay()
    assert heard.value("notice_source_up", source="azure") == 1


def test_an_event_that_has_started_leaves_no_time() -> None:
    """After a hardware failure Azure announces nothing in advance: NotBefore is empty, and the lead is 0."""
    started = scheduled("Reboot", "vm_7", lead_s=0.0, EventStatus="Started", NotBefore="")
    frozen = scheduled("Freeze", "vm_7", lead_s=900.0)
    done = scheduled("Terminate", "vm_7", lead_s=0.0, EventStatus="Completed")
    text = json.dumps({"DocumentIncarnation": 2, "Events": [started, frozen, done]})
    found = scheduled_events(text, {"vm_7"})
    assert [(each.kind, each.lead_s) for each in found] == [
        (NoticeKind.MAINTENANCE, 0.0),
        (NoticeKind.PAUSE, 900.0),
    ]


@pytest.mark.parametrize(
    "changes", [{"EventType": "Dance"}, {"EventId": 5}, {"NotBefore": "soon"}, {"NotBefore": 5}]
)
def test_a_malformed_event_of_this_machine_is_an_error(changes: dict[str, Any]) -> None:
    """A malformed event that names this machine is reported as an error; nothing is guessed."""
    event = scheduled("Preempt", "vm_7", lead_s=30.0) | changes
    with pytest.raises(SourceError, match="expected"):
        scheduled_events(json.dumps({"Events": [event]}), {"vm_7"})


def test_the_first_answer_of_azure_may_be_late(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first request enables the service, which may take two minutes: it has a longer timeout."""

    class Slow(AzureMetadata):
        def answer(self, request: Request) -> Answer:
            if request.path == EVENTS:
                self._ended.wait(0.5)
            return super().answer(request)

    monkeypatch.setattr(azure_source, "REQUEST_TIMEOUT_S", 0.1)
    server = Slow("vm_7")
    stack.enter_context(server.serving())
    server.schedule(scheduled("Preempt", "vm_7", lead_s=30.0))
    with structlog.testing.capture_logs() as events:
        heard = stack.enter_context(watched(Azure({"n"}, server.url)))
        leave(heard, "azure", 30.0)
        first = next(each for each in events if each["event"] != "notices_watched")
        assert first["event"] != "notice_source_failed"
        heard.until_up("azure", 0)


# ---- the file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead_s", LEADS_S)
def test_a_notice_file_is_in_force_while_it_exists(
    tmp_path: Path, stack: ExitStack, lead_s: float
) -> None:
    """The node leaves because of the file; when the file is removed, the node stays."""
    path = tmp_path / "notice"
    heard = stack.enter_context(watched(File(path, "a")))
    path.with_suffix(".new").write_text(f"kind: preempt\nlead_s: {lead_s}\n")
    path.with_suffix(".new").rename(path)
    leave(heard, "file", lead_s)
    path.unlink()
    assert heard.next() == Stay()


def test_mithrils_file_is_parsed(tmp_path: Path, stack: ExitStack) -> None:
    """The file is parsed in Mithril's format, with a lead of at most five minutes; another status is no notice."""
    path = tmp_path / "MITHRIL_SIGNAL.yml"
    text = (
        "---\n# written by the platform\ninstance_status: {}\nbid_status: 'STATUS_OPEN'\n"
        'end_time: "2099-01-01T00:00:00Z"\n'
    )
    path.write_text(text.format("STATUS_RUNNING"))
    heard = stack.enter_context(watched(File(path, "a")))
    path.write_text(text.format("STATUS_PREEMPTING"))
    leave(heard, "file", 300.0)


@pytest.mark.parametrize(
    ("text", "effect"),
    [
        ('{"kind": "preempt", "node": "a"}', True),
        ("kind: preempt\nnode: b\n", False),
        ("withdrawn: true\n", False),
        ("", False),
        ("kind: dance\n", None),
        ("lead_s: -3\n", None),
        ("lead_s: nan\n", None),
        ("lead: 30\n", None),
        ("deadline: soon\n", None),
        ("\x00\xff", None),
        ("{", None),
        ("x" * 100_000, None),
    ],
)
def test_only_valid_files_for_this_node_have_an_effect(
    tmp_path: Path, stack: ExitStack, text: str, effect: bool | None
) -> None:
    """A file for another node, a withdrawn one and a malformed one have no effect; the malformed one is reported."""
    path = tmp_path / "notice"
    path.write_bytes(text.encode("latin-1"))
    source = File(path, "a")
    heard = stack.enter_context(watched(source))
    if effect is None:
        heard.until_up("file", 0)
    elif effect:
        leave(heard, "file", USUAL_LEAD_S)
    # This is the first decision.
    path.with_suffix(".new").write_text("event_id: last\nkind: rebalance\n")
    path.with_suffix(".new").rename(path)
    assert isinstance(heard.next(), CheckpointNow)


def test_a_pipe_is_an_error(tmp_path: Path, stack: ExitStack) -> None:
    """Reading a pipe must not wait for a writer."""
    path = tmp_path / "notice"
    os.mkfifo(path)
    heard = stack.enter_context(watched(File(path, "a")))
    heard.until_up("file", 0)


# ---- all of them -------------------------------------------------------------------------------------

FAULTS = {
    "401": lambda: Answer(401),
    "500": lambda: Answer(500),
    "503": lambda: Answer(503, "slow down"),
    "redirect": lambda: Answer(302, headers={"Location": "http://127.0.0.1:1/"}),
    "endless": lambda: Answer(200, "x" * 300_000),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_failing_source_is_reported_once_and_withdraws_nothing(
    imds: Imds, google: GcpMetadata, azure: AzureMetadata, stack: ExitStack, fault: Any
) -> None:
    """F17: a failure only writes one event; notices in force stay, and the source is read again later."""
    clouds: list[Cloud] = [imds, google, azure]
    for cloud in clouds:
        cloud.fault = fault
    imds.interrupt("terminate", 120.0)
    with structlog.testing.capture_logs() as events:
        heard = stack.enter_context(
            watched(*aws.sources(imds.url), *gcp.sources(google.url), Azure({"n"}, azure.url))
        )
        names = ("aws", "aws-rebalance", "gcp", "gcp-maintenance", "azure")
        for name in names:
            heard.until_up(name, 0)
        for cloud, path in ((imds, TOKEN), (google, PREEMPTED), (azure, NAME)):
            cloud.until_asked_again(path, 3)
        assert not heard.more
        imds.tell(fault=None)
        leave(heard, "aws", 120.0)
        imds.tell(fault=fault)
        heard.until_up("aws", 0)
        imds.tell(fault=None)
        heard.until_up("aws", 1)
    assert not heard.more
    told = [each["source"] for each in events if each["event"] == "notice_source_failed"]
    # AWS has failed twice.
    assert [told.count(name) for name in ("gcp", "gcp-maintenance", "azure", "aws")] == [1, 1, 1, 2]


def test_a_hanging_source_does_not_delay_the_others(
    imds: Imds, stack: ExitStack, tmp_path: Path
) -> None:
    """F17: a request has two seconds. In this time other sources are read, and closing the watch does not wait for it."""
    imds.fault = lambda: None
    path = tmp_path / "notice"
    path.write_text("lead_s: 5\n")
    with watched(*aws.sources(imds.url), File(path, "a")) as heard:
        # A series is there before its first notice: `increase()` sees that one too.
        assert None not in [
            heard.value("notices_total", source="file", kind=kind) for kind in NoticeKind
        ]
        leave(heard, "file", 5.0)
        heard.until_up("aws", 0)
        imds.until_asked(TOKEN)
        began_s = time.monotonic()
    assert time.monotonic() - began_s < 1.0


def test_a_redirect_is_not_followed(google: GcpMetadata, stack: ExitStack) -> None:
    """A redirect is an error: it could lead to a server other than the machine's own."""
    other = GcpMetadata()
    stack.enter_context(other.serving())
    other.values = {PREEMPTED: "TRUE", MAINTENANCE: "TERMINATE_ON_HOST_MAINTENANCE"}
    google.fault = lambda: Answer(302, headers={"Location": other.url + PREEMPTED})
    heard = stack.enter_context(watched(*gcp.sources(google.url)))
    google.until_asked(PREEMPTED, 3)
    assert not heard.more
    assert other.questions == []


def test_a_refused_connection_is_reported(stack: ExitStack) -> None:
    """A refused connection counts as a source that does not answer."""
    heard = stack.enter_context(watched(*aws.sources("http://127.0.0.1:1")))
    heard.until_up("aws", 0)
    assert not heard.more
