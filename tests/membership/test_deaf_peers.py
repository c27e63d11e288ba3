"""Addresses that do not answer, close the connection, or refuse: none delays an agent; retries are slow."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from elastic_pt.membership.links import _Link
from elastic_pt.membership.peers import MESSAGE, Message
from elastic_pt.runlog.records import Member
from tests.membership.test_links import RARELY, agent, run, until
from tests.membership.world import changed, waiting

INTERVAL_S = 0.1
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def stranger(handle: Handler) -> AsyncIterator[Member]:
    """A listener at a node's address that is not a node."""
    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield Member("z", "z1", "127.0.0.1", server.sockets[0].getsockname()[1], 1, 1)


def test_deaf_address_times_out_and_is_tried_again(tmp_path: Path) -> None:
    """A peer that accepts but sends nothing is dropped after the timeout. It is not gone, and delays no other peer."""
    calls = ended = 0

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls, ended
        calls += 1
        try:
            await reader.read()
        finally:
            ended += 1
            writer.close()

    async def scenario() -> None:
        hurried = changed(RARELY, heartbeat_timeout_s=0.5, heartbeat_interval_s=INTERVAL_S)
        async with (
            stranger(say_nothing) as z,
            agent("b", tmp_path) as b,
            agent("patient", tmp_path) as patient,
            agent("hurried", tmp_path, limits=hurried) as a,
        ):
            patient.asks(z, b.member)
            await until(lambda: patient.has_heard(b.member), "b's answer, long before z's timeout")
            await until(lambda: calls == 1, "a connection to z")
            patient.asks(b.member)
            await until(lambda: ended == 1, "the end of that connection")
            a.asks(z)
            await until(lambda: calls >= 4, "more calls")
            assert (a.knows(z).status, a.knows(z).refused) == (None, False)

    run(scenario())


def test_dead_address_is_tried_once_per_interval(tmp_path: Path) -> None:
    """An address without an agent costs one attempt per interval, for any time."""
    calls = refusals = 0

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1
        writer.close()

    def count_refusal() -> None:
        nonlocal refusals
        refusals += 1

    async def scenario() -> None:
        limits = changed(RARELY, heartbeat_interval_s=INTERVAL_S)
        async with agent("b", tmp_path) as b:
            gone = b.member
        async with stranger(hang_up) as z, agent("a", tmp_path, limits=limits) as a:
            a.links._on_news = count_refusal
            began_s = time.monotonic()
            a.asks(z, gone)
            await until(lambda: min(calls, refusals) >= 6, "six connections to each")
            intervals = (time.monotonic() - began_s) / INTERVAL_S
            assert refusals <= intervals + 1
            assert calls <= 2 * (intervals + 1), "aiohttp tries twice after a closed connection"
            assert a.knows(gone).refused
            assert not a.knows(z).refused

    run(scenario())


def test_messages_to_a_stuck_peer_do_not_pile_up() -> None:
    """While a connection is stuck no caller waits, and one message with the newest status follows afterwards."""
    sent: list[Message] = []

    async def scenario() -> None:
        flows = asyncio.Event()

        async def send(text: str) -> None:
            sent.append(MESSAGE.validate_json(text))
            await flows.wait()

        link = _Link(send)
        made = iter(range(1, 10))
        pump = asyncio.create_task(
            link.pump(lambda _, asks: Message(next(made), 0, asks, waiting("a")), None)
        )
        link.say(asks=False)
        await until(lambda: len(sent) == 1, "the message that gets stuck")
        for number in range(1000):
            link.say(asks=number == 0)
        flows.set()
        await until(lambda: len(sent) == 2, "one message for all calls")
        for _ in range(10):
            await asyncio.sleep(0)
        pump.cancel()

    run(scenario())
    assert [message.asks for message in sent] == [False, True]
