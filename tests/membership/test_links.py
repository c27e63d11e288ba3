"""Connections between agents, over real sockets on loopback; a peer that dies is a real process."""

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from elastic_pt.config import ElasticSection
from elastic_pt.membership.decision.status import Limits, NodePhase, NodeStatus, Peer
from elastic_pt.membership.links import Links
from elastic_pt.membership.participant import Participant
from elastic_pt.membership.peers import MESSAGE, STATUS, Message
from elastic_pt.membership.resources import Answer, NothingInMemory, Resources
from elastic_pt.runlog.access import Access
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import Member
from elastic_pt.store.open import open_store
from tests.access import TLS
from tests.membership.world import changed, waiting

DEADLINE_S = 20.0
AT_ONCE_S = 0.5
"""Far below the interval of `RARELY`: an event within this time did not wait for the interval."""
RARELY = Limits(
    ElasticSection(
        nodes_max=8, heartbeat_interval_s=15.0, heartbeat_timeout_s=60.0, takeover_s=120.0
    ),
    slots=8,
)
OFTEN = changed(RARELY, heartbeat_interval_s=0.05)


@dataclasses.dataclass
class Agent:
    """One node's connections. No node takes turns here; a test sets the targets."""

    participant: Participant
    links: Links
    news: asyncio.Event

    @property
    def member(self) -> Member:
        """The port at which it answers."""
        return self.participant.member

    def asks(self, *others: Member) -> None:
        """Keep asking these."""
        for other in others:
            self.participant.table.watch(other.incarnation)
        self.links.aim(others)

    def knows(self, other: Member) -> Peer:
        """Its facts about another node."""
        return self.participant.table.peers[other.incarnation]

    def has_heard(self, other: Member) -> bool:
        """Whether there is proof of life of the other node."""
        peer = self.participant.table.peers.get(other.incarnation)
        return peer is not None and peer.heard_s is not None


class Secrets(NothingInMemory):
    """A node that holds rows in memory."""

    @property
    def routes(self) -> Mapping[str, Answer]:
        """One path."""
        return {"/v1/rows": self._answer}

    async def _answer(self, _: web.Request) -> web.StreamResponse:
        return web.Response(text="rows")


@asynccontextmanager
async def agent(
    name: str,
    directory: Path,
    *,
    limits: Limits = RARELY,
    address: str = "127.0.0.1",
    access: Access = TLS,
) -> AsyncIterator[Agent]:
    """Serve one node's connections."""
    store = open_store(f"file://{directory}")
    member = Member(name, f"{name}1", address, 0, os.getpid(), 1)
    participant = Participant(
        waiting(name, member=member),
        limits,
        Resources(
            log=RunLog(store, writer=name),
            hints=store,
            clock_s=time.monotonic,
            bind_store=lambda: pytest.fail("no generation starts here"),
            choose_resume=lambda _: None,
            on_drain=lambda _: None,
            states=Secrets(),
        ),
    )
    news = asyncio.Event()
    links = Links(participant, access, news.set)
    port = await links.serve(address)
    participant.me.say(member=dataclasses.replace(member, port=port))
    try:
        yield Agent(participant, links, news)
    finally:
        await links.close()


async def until(condition: Callable[[], bool], what: str, *, within_s: float = DEADLINE_S) -> float:
    """Poll until a condition holds; returns the seconds it took."""
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() < began_s + within_s, f"not within {within_s} s: {what}"
        await asyncio.sleep(0.002)
    return time.monotonic() - began_s


async def connected(one: Agent, *others: Agent) -> None:
    """Make one agent ask others, and wait until each pair has proof of life."""
    one.asks(*(other.member for other in others))
    for other in others:
        await until(lambda other=other: one.has_heard(other.member), "an answer")  # type: ignore[misc]
        await until(
            lambda other=other: one.member.incarnation in other.participant.table.peers,
            "a question",
        )  # type: ignore[misc]
        one.links.say(asks=True)
        other.links.say(asks=True)
        await until(lambda other=other: other.has_heard(one.member), "an answer to that")  # type: ignore[misc]


def run(scenario: Coroutine[Any, Any, None]) -> None:
    """Run a scenario on a new event loop."""
    asyncio.run(asyncio.wait_for(scenario, 4 * DEADLINE_S))


def bearer(token: str) -> dict[str, str]:
    """The header with a token."""
    return {"Authorization": f"Bearer {token}"}


def session(headers: dict[str, str]) -> aiohttp.ClientSession:
    """Requests with the run's certificate and these headers."""
    connector = aiohttp.TCPConnector(ssl=TLS.client_context() or True)
    return aiohttp.ClientSession(headers=headers, connector=connector)


def url_of(member: Member, path: str) -> str:
    """URL of a path of an agent."""
    return TLS.url(member.address, member.port) + path


# ---- the token ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [{}, bearer("wrong"), bearer(""), {"Authorization": TLS.token}])
def test_requests_without_the_token_get_401(tmp_path: Path, headers: dict[str, str]) -> None:
    """The status page, the endpoints, the link and the rows in memory answer 401 to a request without the run's token."""

    async def scenario() -> None:
        async with agent("a", tmp_path) as a, session(headers) as stranger:
            for path in ("/v1/status", "/v1/endpoints", "/v1/link", "/v1/rows"):
                async with stranger.get(url_of(a.member, path)) as answer:
                    assert answer.status == 401
                    text = await answer.text()
                    assert a.member.incarnation not in text
                    assert "rows" not in text
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await stranger.ws_connect(url_of(a.member, "/v1/link"))
            assert refused.value.status == 401
            assert a.participant.table.peers == {}

    run(scenario())


@pytest.mark.parametrize("path", ["/v1/status", "/v1/endpoints", "/v1/link", "/v1/rows"])
def test_a_token_that_is_not_utf_8_gets_401(tmp_path: Path, path: str) -> None:
    """Any bytes in place of the token are refused like a wrong token."""

    async def scenario() -> None:
        async with agent("a", tmp_path) as a:
            reader, writer = await asyncio.open_connection(
                a.member.address, a.member.port, ssl=TLS.client_context()
            )
            head = f"GET {path} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer ".encode()
            writer.write(head + b"\xff\xfe\r\n\r\n")
            status = await reader.readline()
            assert b" 401 " in status
            writer.close()

    run(scenario())


def test_status_page_with_the_token(tmp_path: Path) -> None:
    """`/v1/status` has the node's status in the form that `STATUS` reads."""

    async def scenario() -> None:
        async with (
            agent("a", tmp_path) as a,
            session(TLS.headers) as operator,
        ):
            a.participant.me.say(step=7)
            async with operator.get(url_of(a.member, "/v1/status")) as answer:
                assert answer.status == 200
                assert STATUS.validate_json(await answer.read()) == a.participant.me.now

    run(scenario())


def said_by(name: str, **changes: object) -> str:
    """A message of a node that has the token."""
    message = Message(1, 0, True, waiting(name))
    return json.dumps(MESSAGE.dump_python(message, mode="json") | changes)


@pytest.mark.parametrize(
    "frame",
    [
        "rubbish",
        "{}",
        "[" * 100_000,
        said_by("z", count=-1),
        said_by("z", refusal="x" * 2000),
        said_by("z", status={"member": 1}),
        b"\x00\x01",
        said_by("z", padding="x" * 300_000),
    ],
    ids=["text", "object", "nested", "count", "refusal", "status", "binary", "too large"],
)
def test_garbage_closes_only_its_link(tmp_path: Path, frame: str | bytes) -> None:
    """After garbage the link is closed, nothing is stored, and other links continue."""

    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            a = await stack.enter_async_context(agent("a", tmp_path))
            b = await stack.enter_async_context(agent("b", tmp_path))
            await connected(b, a)
            node = await stack.enter_async_context(session(TLS.headers))
            link = await node.ws_connect(url_of(a.member, "/v1/link"))
            if isinstance(frame, bytes):
                await link.send_bytes(frame)
            else:
                await link.send_str(frame)
            received = await asyncio.wait_for(link.receive(), DEADLINE_S)
            assert received.type in (
                aiohttp.WSMsgType.CLOSE,
                aiohttp.WSMsgType.CLOSING,
                aiohttp.WSMsgType.CLOSED,
            )
            assert list(a.participant.table.peers) == [b.member.incarnation]
            b.participant.me.say(step=3)
            b.links.say(asks=False)
            await until(lambda: a.knows(b.member).status == b.participant.me.now, "b's words")

    run(scenario())


def test_peer_that_answers_garbage_is_not_heard(tmp_path: Path) -> None:
    """It counts neither as heard nor as reached, and not as gone."""

    async def scenario() -> None:
        asked = asyncio.Event()

        async def answer_rubbish(request: aiohttp.web.Request) -> aiohttp.web.StreamResponse:
            socket = aiohttp.web.WebSocketResponse()
            await socket.prepare(request)
            await socket.receive()
            asked.set()
            await socket.send_str("rubbish")
            await socket.receive()
            return socket

        application = aiohttp.web.Application()
        application.add_routes([aiohttp.web.get("/v1/link", answer_rubbish)])
        runner = aiohttp.web.AppRunner(application)
        await runner.setup()
        await aiohttp.web.TCPSite(runner, "127.0.0.1", 0, ssl_context=TLS.server_context()).start()
        try:
            async with agent("a", tmp_path, limits=OFTEN) as a:
                liar = Member("z", "z1", "127.0.0.1", runner.addresses[0][1], 1, 1)
                a.asks(liar)
                for _ in range(3):
                    await asyncio.wait_for(asked.wait(), DEADLINE_S)
                    asked.clear()
                peer = a.knows(liar)
                assert (peer.status, peer.heard_s, peer.reached, peer.refused) == (
                    None,
                    None,
                    False,
                    False,
                )
        finally:
            await runner.cleanup()

    run(scenario())


# ---- what is told when -------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_one_connection_proves_both_directions(tmp_path: Path, address: str) -> None:
    """One connection gives both ends proof of life, over IPv4 and IPv6. Only the end that connected has `reached`."""

    async def scenario() -> None:
        async with (
            agent("a", tmp_path, address=address) as a,
            agent("b", tmp_path, address=address) as b,
        ):
            assert (f"[{address}]" in url_of(a.member, "")) is (":" in address)
            await connected(a, b)
            assert a.knows(b.member).status == b.participant.me.now
            assert b.knows(a.member).status == a.participant.me.now
            assert a.knows(b.member).reached
            assert not b.knows(a.member).reached

    run(scenario())


def test_status_change_is_sent_at_once_to_both_ends(tmp_path: Path) -> None:
    """A changed status arrives at all connected peers long before the next interval, and causes a turn there."""

    async def scenario() -> None:
        async with (
            agent("a", tmp_path) as a,
            agent("b", tmp_path) as b,
            agent("c", tmp_path) as c,
        ):
            await connected(a, b, c)
            for speaker, listeners in ((a, [b, c]), (b, [a]), (c, [a])):
                for listener in listeners:
                    listener.news.clear()
                speaker.participant.me.say(phase=NodePhase.RUNNING)
                speaker.links.say(asks=False)
                for listener in listeners:
                    await asyncio.wait_for(listener.news.wait(), AT_ONCE_S)
                    said = listener.knows(speaker.member).status
                    assert said is not None
                    assert said.phase is NodePhase.RUNNING

    run(scenario())


def test_a_question_is_answered_at_once(tmp_path: Path) -> None:
    """Both ends of a connection can ask and get a proof of life without waiting for the interval."""

    async def scenario() -> None:
        async with agent("a", tmp_path) as a, agent("b", tmp_path) as b:
            await connected(a, b)
            for asker, other in ((a, b), (b, a)):
                asked_s = time.monotonic()
                asker.links.say(asks=True)
                # A `say` right after it does not cancel the question.
                asker.links.say(asks=False)
                await until(
                    lambda asker=asker, other=other, asked_s=asked_s: (  # type: ignore[misc]
                        (asker.knows(other.member).heard_s or 0.0) >= asked_s
                    ),
                    "an answer",
                    within_s=AT_ONCE_S,
                )

    run(scenario())


def test_peers_are_asked_once_per_interval(tmp_path: Path) -> None:
    """There is one question and one answer per interval: an answer is not answered."""

    async def scenario() -> None:
        interval_s = 0.1
        limits = changed(RARELY, heartbeat_interval_s=interval_s)
        async with (
            agent("a", tmp_path, limits=limits) as a,
            agent("b", tmp_path, limits=limits) as b,
        ):
            await connected(a, b)
            tables = a.participant.table, b.participant.table
            before = [table._count for table in tables]
            began_s = time.monotonic()
            heard_s = a.knows(b.member).heard_s
            await until(lambda: tables[1]._count >= before[1] + 10, "ten answers")
            intervals = (time.monotonic() - began_s) / interval_s
            assert tables[0]._count - before[0] <= intervals + 2
            assert tables[1]._count - before[1] <= intervals + 2
            assert (a.knows(b.member).heard_s or 0.0) > (heard_s or 0.0)

    run(scenario())


def test_connection_to_a_former_target_is_closed(tmp_path: Path) -> None:
    """A peer that is no longer a target loses its connection, and stops sending."""

    async def scenario() -> None:
        async with (
            agent("a", tmp_path) as a,
            agent("b", tmp_path) as b,
            agent("c", tmp_path) as c,
        ):
            await connected(a, b, c)
            b.news.clear()
            a.asks(c.member)
            await asyncio.wait_for(b.news.wait(), AT_ONCE_S)
            await until(lambda: not b.links._open, "the end of the link")
            assert not a.knows(b.member).refused
            asked_s = time.monotonic()
            a.links.say(asks=True)
            await until(lambda: (a.knows(c.member).heard_s or 0.0) >= asked_s, "c's answer")

    run(scenario())


def test_closing_is_fast_while_messages_arrive(tmp_path: Path) -> None:
    """An agent closes its links at once, even if a message arrives at that moment."""

    async def scenario() -> None:
        limits = changed(RARELY, heartbeat_interval_s=0.001)
        async with agent("b", tmp_path, limits=limits) as b:
            for _ in range(40):
                async with agent("a", tmp_path, limits=limits) as a:
                    a.asks(b.member)
                    await until(lambda a=a: a.has_heard(b.member), "b's words")  # type: ignore[misc]
                    closing_s = time.monotonic()
                    await asyncio.wait_for(a.links.close(), 4 * AT_ONCE_S)
                    assert time.monotonic() - closing_s < 4 * AT_ONCE_S

    run(scenario())


# ---- losses ------------------------------------------------------------------------------------------


def test_closed_port_counts_as_refused(tmp_path: Path) -> None:
    """A node whose address refuses connections counts as gone at once, and causes a turn."""

    async def scenario() -> None:
        async with agent("b", tmp_path) as b:
            gone = b.member
        async with agent("a", tmp_path) as a:
            a.asks(gone)
            await asyncio.wait_for(a.news.wait(), AT_ONCE_S)
            assert a.knows(gone).refused

    run(scenario())


def test_another_incarnation_at_the_same_port_counts_as_refused(tmp_path: Path) -> None:
    """If another incarnation answers at the address, the previous one is dead."""

    async def scenario() -> None:
        async with agent("a", tmp_path) as a, agent("b", tmp_path) as b:
            earlier = dataclasses.replace(b.member, incarnation="b0")
            a.asks(earlier)
            took_s = await until(lambda: a.knows(earlier).refused, "a refusal")
            assert took_s < AT_ONCE_S
            assert a.knows(earlier).status is None

    run(scenario())


def test_a_peer_that_closes_its_server_is_gone_and_may_come_back(tmp_path: Path) -> None:
    """A closed server is detected at once. If the same incarnation answers again, it is no longer refused."""

    async def scenario() -> None:
        async with agent("a", tmp_path, limits=OFTEN) as a, agent("b", tmp_path) as b:
            await connected(a, b)
            hung_up_s = time.monotonic()
            await b.links.close()
            await until(lambda: a.knows(b.member).refused, "a refusal", within_s=AT_ONCE_S)
            assert time.monotonic() - hung_up_s < AT_ONCE_S + 0.2
            again = Links(b.participant, TLS, b.news.set)
            again_port = await again.serve("127.0.0.1")
            moved = dataclasses.replace(b.member, port=again_port)
            a.asks()
            a.asks(moved)
            await until(lambda: not a.knows(moved).refused, "b again")
            await again.close()

    run(scenario())


def serve_for_ever(directory: str, identity: str) -> None:
    """Another process that answers as node b, until the test ends it."""

    async def serve() -> None:
        async with agent(
            "b", Path(directory), limits=OFTEN, access=Access(TLS.token, identity)
        ) as b:
            print(json.dumps(dataclasses.asdict(b.member)), flush=True)
            await asyncio.Event().wait()

    asyncio.run(serve())


@pytest.fixture
def process(tmp_path: Path) -> Any:
    """Node b in a separate process, and its port."""
    code = "import sys; from tests.membership.test_links import serve_for_ever; serve_for_ever(*sys.argv[1:])"
    started = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), TLS.identity],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert started.stdout is not None
    yield started, Member(**json.loads(started.stdout.readline()))
    started.kill()
    started.wait()


def test_a_killed_process_is_noticed_at_once(
    tmp_path: Path, process: tuple[subprocess.Popen[bytes], Member]
) -> None:
    """SIGKILL of a peer's process gives a refused address within half a second, long before the next interval."""
    peer, b = process

    async def scenario() -> None:
        async with agent("a", tmp_path) as a:
            a.asks(b)
            await until(lambda: a.has_heard(b), "b's first words")
            a.news.clear()
            killed_s = time.monotonic()
            peer.kill()
            await until(lambda: a.knows(b).refused, "a refusal", within_s=0.5)
            assert time.monotonic() - killed_s < 0.5
            assert a.news.is_set()

    run(scenario())


def test_end_of_an_incoming_connection_is_news(tmp_path: Path) -> None:
    """The end that only answered takes a turn when the other end closes. The peer does not count as gone."""

    async def scenario() -> None:
        async with agent("a", tmp_path) as a, agent("b", tmp_path) as b:
            await connected(b, a)
            a.news.clear()
            await b.links.close()
            await asyncio.wait_for(a.news.wait(), AT_ONCE_S)
            assert not a.knows(b.member).refused

    run(scenario())


def test_a_stopped_process_is_silent_and_not_gone(
    tmp_path: Path, process: tuple[subprocess.Popen[bytes], Member]
) -> None:
    """A stopped peer does not refuse. Its proof of life gets old, and is renewed when it continues."""
    peer, b = process

    async def scenario() -> None:
        async with agent("a", tmp_path, limits=OFTEN) as a:
            a.asks(b)
            await until(lambda: a.has_heard(b), "b's first words")
            peer.send_signal(signal.SIGSTOP)
            stopped_s = time.monotonic()
            while Path(f"/proc/{peer.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
                await asyncio.sleep(0.001)
            before = a.participant.table._count
            await until(lambda: a.participant.table._count >= before + 10, "ten questions")
            heard_s = a.knows(b).heard_s
            assert heard_s is not None
            assert heard_s < stopped_s + AT_ONCE_S
            assert not a.knows(b).refused
            peer.send_signal(signal.SIGCONT)
            continued_s = time.monotonic()
            await until(lambda: (a.knows(b).heard_s or 0.0) > continued_s, "b again")

    run(scenario())


def test_stuck_connection_is_replaced(
    tmp_path: Path, process: tuple[subprocess.Popen[bytes], Member]
) -> None:
    """A connection that has been silent for the timeout is replaced: the network may have changed."""
    peer, b = process

    async def scenario() -> None:
        limits = changed(OFTEN, heartbeat_timeout_s=0.5)
        async with agent("a", tmp_path, limits=limits) as a:
            a.asks(b)
            await until(lambda: a.has_heard(b), "b's first words")
            (stuck,) = a.links._open
            peer.send_signal(signal.SIGSTOP)
            await until(lambda: stuck not in a.links._open, "the end of the link")
            peer.send_signal(signal.SIGCONT)
            continued_s = time.monotonic()
            await until(lambda: (a.knows(b).heard_s or 0.0) > continued_s, "b again")
            assert not a.knows(b).refused

    run(scenario())


def test_status_page_has_every_field() -> None:
    """`STATUS` writes every field of a NodeStatus."""
    said = STATUS.dump_python(waiting("a"), mode="json")
    assert set(said) == {each.name for each in dataclasses.fields(NodeStatus)}
    assert STATUS.validate_python(said) == waiting("a")
