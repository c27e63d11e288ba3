"""What an HTTP server of an agent writes about requests: nothing about malformed ones, an event about a bug."""

import asyncio
import socket

import pytest
from aiohttp import web
from structlog.testing import capture_logs

from elastic_pt.telemetry.http_log import http_logger

MALFORMED = (
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /\x00 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
    b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
)


async def _answers(*requests: bytes) -> list[bytes]:
    async def broken(_: web.Request) -> web.Response:
        raise RuntimeError("out\nof order")

    application = web.Application()
    application.router.add_get("/broken", broken)
    runner = web.AppRunner(application, access_log=None, logger=http_logger())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    found = []
    for request in requests:
        reader, writer = await asyncio.open_connection(*runner.addresses[0][:2])
        writer.write(request)
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        found.append(await asyncio.wait_for(reader.readline(), 10))
        writer.close()
    await runner.cleanup()
    return found


def test_a_malformed_request_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """It is answered with 400. A peer could fill the log otherwise."""
    with capture_logs() as events:
        answers = asyncio.run(_answers(*MALFORMED))
    assert all(b" 400 " in each for each in answers)
    assert events == []
    assert capfd.readouterr() == ("", "")


def test_a_bug_is_one_event(capfd: pytest.CaptureFixture[str]) -> None:
    """Of one line, without a traceback between the events."""
    with capture_logs() as events:
        (answer,) = asyncio.run(_answers(b"GET /broken HTTP/1.1\r\nHost: a\r\n\r\n"))
    assert b" 500 " in answer
    assert [(each["event"], each["log_level"]) for each in events] == [("request_failed", "error")]
    assert "RuntimeError" in events[0]["cause"]
    assert capfd.readouterr() == ("", "")
