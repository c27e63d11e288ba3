"""Connections of strangers and of hostile agents, over real sockets: an agent goes on answering its real peers."""

import asyncio
import gzip
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import pytest

from elastic_pt.checkpoint.peer import Peer, PeerAddress
from elastic_pt.errors import ElasticPtError
from elastic_pt.membership import listener
from elastic_pt.membership.asking import ask_endpoints, ask_status
from elastic_pt.runlog.access import Access, issue, new_authority
from elastic_pt.runlog.records import Member
from tests.access import PLAIN, TLS
from tests.membership.test_links import (
    OFTEN,
    Agent,
    agent,
    connected,
    run,
    said_by,
    session,
    until,
    url_of,
)

STRANGERS: Final = 200
STRANGERS_MAX: Final = 32
HELD_S: Final = 0.3
TOKEN: Final = f"Authorization: Bearer {TLS.token}\r\n"


async def goes_on(a: Agent, b: Agent) -> None:
    """Both hear each other anew."""
    now_s = time.monotonic()
    await until(lambda: (b.knows(a.member).heard_s or 0.0) > now_s, "an answer to b", within_s=5.0)
    await until(lambda: (a.knows(b.member).heard_s or 0.0) > now_s, "an answer to a", within_s=5.0)


def is_closed(connection: socket.socket) -> bool:
    """Whether the other end has closed it."""
    try:
        return connection.recv(4096) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def dialled(member: Member, count: int) -> list[socket.socket]:
    """Connections that send nothing."""
    found = []
    for _ in range(count):
        connection = socket.create_connection((member.address, member.port))
        connection.setblocking(False)
        found.append(connection)
    return found


@pytest.mark.parametrize("access", [TLS, PLAIN], ids=["tls", "plain"])
def test_strangers_do_not_take_all_connections(
    access: Access, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many connections that send nothing the oldest are closed, and a new peer gets in all the same."""
    monkeypatch.setattr(listener, "_STRANGERS_MAX", STRANGERS_MAX)

    async def scenario() -> None:
        async with (
            agent("a", tmp_path, limits=OFTEN, access=access) as a,
            agent("b", tmp_path, limits=OFTEN, access=access) as b,
            agent("c", tmp_path, limits=OFTEN, access=access) as c,
        ):
            await connected(b, a)
            held = await asyncio.to_thread(dialled, a.member, STRANGERS)
            # Long before the time after which each of them would be closed anyway.
            await until(
                lambda: sum(map(is_closed, held)) >= STRANGERS - STRANGERS_MAX,
                "the end of most",
                within_s=5.0,
            )
            await goes_on(a, b)
            await connected(c, a)
            for each in held:
                each.close()

    run(scenario())


HEADS: Final = {
    "nothing": b"",
    "half a head": f"GET /v1/status HTTP/1.1\r\nHost: a\r\n{TOKEN}".encode(),
    "no token": b"GET /v1/status HTTP/1.1\r\nHost: a\r\n\r\n",
    "not HTTP": bytes(range(256)) * 100,
    "huge head": b"GET /v1/status HTTP/1.1\r\nX: " + b"x" * 1_000_000,
    "many heads": b"GET /v1/status HTTP/1.1\r\n" + b"X: x\r\n" * 100_000,
    "two lengths": f"GET /v1/status HTTP/1.1\r\nHost: a\r\n{TOKEN}Content-Length: 4\r\n"
    "Content-Length: 40\r\n\r\nabcd".encode(),
    "smuggled": f"GET /v1/status HTTP/1.1\r\nHost: a\r\n{TOKEN}Content-Length: 4\r\n"
    "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /v1/status HTTP/1.1\r\n\r\n".encode(),
    "broken frame": f"GET /v1/link HTTP/1.1\r\nHost: a\r\n{TOKEN}Upgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
    + b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
}


@pytest.mark.parametrize("head", HEADS)
def test_bytes_of_any_kind_end_only_their_connection(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slow and broken requests, also with the certificate, are closed in time. Peers are answered meanwhile."""
    monkeypatch.setattr(listener, "_STRANGER_S", HELD_S)

    async def scenario() -> None:
        async with (
            agent("a", tmp_path, limits=OFTEN) as a,
            agent("b", tmp_path, limits=OFTEN) as b,
        ):
            await connected(b, a)
            reader, writer = await asyncio.open_connection(
                a.member.address, a.member.port, ssl=TLS.client_context()
            )
            with suppress(OSError):
                writer.write(HEADS[head])
                await writer.drain()
            await goes_on(a, b)
            if head not in ("no token", "two lengths", "smuggled"):
                with suppress(OSError):
                    await asyncio.wait_for(reader.read(), 10.0)
            writer.close()
            assert list(a.participant.table.peers) == [b.member.incarnation]

    run(scenario())


@pytest.mark.parametrize("kind", ["another run", "no certificate", "plain", "recorded"])
def test_without_the_certificate_nothing_is_answered(kind: str, tmp_path: Path) -> None:
    """A stranger gets no byte of HTTP: with another run's certificate, without TLS, or with recorded bytes."""
    other = Access(TLS.token, issue(new_authority(), "x", "x"))

    async def scenario() -> None:
        async with agent("a", tmp_path, limits=OFTEN) as a, agent("b", tmp_path, limits=OFTEN) as b:
            await connected(b, a)
            request = f"GET /v1/status HTTP/1.1\r\nHost: a\r\n{TOKEN}\r\n".encode()
            where = a.member.address, a.member.port
            context = other.client_context() if kind == "another run" else None
            if kind == "no certificate":
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            if kind == "recorded":
                request = await asyncio.to_thread(recorded, a.member)
                assert len(request) > 500
            got = b""
            with suppress(OSError):
                reader, writer = await asyncio.open_connection(*where, ssl=context)
                writer.write(request)
                got = await asyncio.wait_for(reader.read(), 20.0)
            assert b"HTTP" not in got
            assert a.member.incarnation.encode() not in got
            await goes_on(a, b)

    run(scenario())


def recorded(member: Member) -> bytes:
    """What a real peer sends to an agent, as the network sees it."""
    sent = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as relay:

        def pass_on() -> None:
            near, _ = relay.accept()
            far = socket.create_connection((member.address, member.port))

            def back() -> None:
                with suppress(OSError):
                    while data := far.recv(65536):
                        near.sendall(data)
                    near.shutdown(socket.SHUT_WR)

            threading.Thread(target=back, daemon=True).start()
            with suppress(OSError):
                while data := near.recv(65536):
                    sent.extend(data)
                    far.sendall(data)
                far.shutdown(socket.SHUT_WR)

        threading.Thread(target=pass_on, daemon=True).start()
        place = Member("r", "a1", "127.0.0.1", relay.getsockname()[1], 1, 1)
        assert ask_status([place], TLS, 10.0)
    return bytes(sent)


def test_a_link_speaks_for_one_node(tmp_path: Path) -> None:
    """A message of another incarnation than the first one closes the link, and is not stored."""

    async def scenario() -> None:
        async with agent("a", tmp_path) as a, session(TLS.headers) as node:
            link = await node.ws_connect(url_of(a.member, "/v1/link"))
            await link.send_str(said_by("y"))
            await until(lambda: list(a.participant.table.peers) == ["y1"], "y's message")
            await link.send_str(said_by("z"))
            while not (await asyncio.wait_for(link.receive(), 10.0)).type.name.startswith("CLOS"):
                pass
            assert list(a.participant.table.peers) == ["y1"]

    run(scenario())


# ---- hostile answers ---------------------------------------------------------------------------------

HEAD: Final = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
BOMB: Final = gzip.compress(bytes(200 << 20), 1)


def endless(connection: socket.socket) -> None:
    """A body without an end."""
    connection.sendall(HEAD + b"\r\n")
    while True:
        connection.sendall(bytes(1 << 16))


def slow(connection: socket.socket) -> None:
    """A byte now and then."""
    connection.sendall(HEAD + b"Content-Length: 1000000\r\n\r\n")
    while True:
        connection.sendall(b"[")
        time.sleep(0.05)


def slow_head(connection: socket.socket) -> None:
    """A head without an end."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        connection.sendall(b"x")
        time.sleep(0.05)


def bomb(connection: socket.socket) -> None:
    """A small body that is 200 MB when it is unpacked."""
    head = HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(BOMB)
    connection.sendall(head + BOMB)


def nested(connection: socket.socket) -> None:
    """JSON that is nested too deeply."""
    connection.sendall(HEAD + b"Content-Length: 100000\r\n\r\n" + b"[" * 100_000)


def elsewhere(connection: socket.socket) -> None:
    """A redirect to another place."""
    connection.sendall(
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"
    )


def rubbish(connection: socket.socket) -> None:
    """No HTTP."""
    connection.sendall(bytes(range(256)) * 64)


def short(connection: socket.socket) -> None:
    """Less than it says."""
    connection.sendall(HEAD + b"Content-Length: 100\r\n\r\n[]")


ANSWERS: Final[list[Callable[[socket.socket], None]]] = [
    endless,
    slow,
    slow_head,
    bomb,
    nested,
    elsewhere,
    rubbish,
    short,
]


@contextmanager
def hostile(answer: Callable[[socket.socket], None]) -> Iterator[Member]:
    """An agent that answers each request like this."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def one(connection: socket.socket) -> None:
            with connection, suppress(OSError):
                connection.recv(65536)
                answer(connection)

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    threading.Thread(target=one, args=(connection,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield Member("x", "x1", "127.0.0.1", server.getsockname()[1], 1, 1)
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)


def peak_bytes() -> int:
    """The most memory that this process has had."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda each: each.__name__)
def test_hostile_answers_are_bounded(answer: Callable[[socket.socket], None]) -> None:
    """Whatever an agent answers: the asker has nothing, in bounded time, without holding it in memory."""
    with hostile(answer) as member:
        before, began_s = peak_bytes(), time.monotonic()
        assert ask_status([member], PLAIN, 0.5) == {}
        assert ask_endpoints([member], PLAIN, 0.5) == {}
        peer = Peer(PeerAddress(member.address, member.port), PLAIN, 0.5)
        with suppress(ElasticPtError):
            found = peer.get("/v1/steps", 1 << 20)
            assert found is None or len(found) <= 1 << 20
        with pytest.raises(ElasticPtError):
            peer.record("/v1/snapshots/1/1/0")
        target = bytearray(1 << 20)
        with suppress(ElasticPtError):
            peer.read_into("/v1/snapshots/1/1/0", 0, memoryview(target))
        assert time.monotonic() - began_s < 20.0
        assert peak_bytes() - before < 96 << 20
