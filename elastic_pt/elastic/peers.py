"""How agents hear of each other: one small HTTP question, asked again and again.

    POST /v1/heartbeat   the asker's NodeStatus as JSON; the answer is the asked node's NodeStatus
    GET  /v1/status      the same answer, for people and `elastic-pt status`

Whoever asks has spoken too, so a newcomer that asks the members has announced itself. Questions carry
the run's token (`Authorization: Bearer`), which lies in the run directory: who can read the bucket can
take part. `PeerTable` keeps what was heard, by this node's monotonic clock.
"""

import asyncio
import errno
import hmac
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import aiohttp
from aiohttp import web
from pydantic import TypeAdapter, ValidationError

from elastic_pt.elastic.membership import NodeStatus, Peer
from elastic_pt.elastic.records import Member
from elastic_pt.errors import AlreadyExists, NotFound
from elastic_pt.store.port import Store

STATUS: Final = TypeAdapter(NodeStatus)
TOKEN_KEY: Final = "token"
"""Where the secret lies that this run's agents share."""
_BODY_BYTES_MAX: Final = 64 * 1024
_REFUSALS_UNTIL_GONE: Final = 2
_PEERS_MAX: Final = 4096


class PeerTable:
    """What this node has heard, by incarnation. Used from the agent's event loop only."""

    def __init__(self) -> None:
        self.peers: dict[str, Peer] = {}

    def watch(self, incarnation: str) -> None:
        """Start the silence clock of a node that should answer."""
        if incarnation not in self.peers:
            self.peers[incarnation] = Peer(
                None, watched_since_s=time.monotonic(), heard_s=None, refused=False
            )

    def heard(self, status: NodeStatus) -> None:
        """Note what a node said just now."""
        incarnation = status.member.incarnation
        known = self.peers.get(incarnation)
        if known is None and len(self.peers) >= _PEERS_MAX:
            return
        now_s = time.monotonic()
        since_s = now_s if known is None else known.watched_since_s
        self.peers[incarnation] = Peer(
            status, watched_since_s=since_s, heard_s=now_s, refused=False
        )

    def refused(self, incarnation: str) -> None:
        """Note that nobody answers for this incarnation at its address any more."""
        known = self.peers.get(incarnation)
        if known is not None:
            self.peers[incarnation] = Peer(
                known.status, known.watched_since_s, known.heard_s, refused=True
            )


def run_token(store: Store) -> str:
    """The secret that this run's agents share, made by whoever comes first."""
    try:
        return store.read(TOKEN_KEY).decode()
    except NotFound:
        with suppress(AlreadyExists):
            store.create(TOKEN_KEY, secrets.token_hex(32).encode())
        return store.read(TOKEN_KEY).decode()


def url_of(member: Member, path: str) -> str:
    """URL of a path on a node's agent."""
    host = f"[{member.address}]" if ":" in member.address else member.address
    return f"http://{host}:{member.port}{path}"


async def serve(
    address: str, token: str, answer: Callable[[], NodeStatus], table: PeerTable
) -> tuple[web.AppRunner, int]:
    """Answer peers on a free port of `address`; returns the runner (to clean up) and the port."""

    def authorized(request: web.Request) -> bool:
        return hmac.compare_digest(
            request.headers.get("Authorization", "").encode(), f"Bearer {token}".encode()
        )

    async def heartbeat(request: web.Request) -> web.Response:
        if not authorized(request):
            return web.Response(status=401, text="this run's token is missing or wrong\n")
        try:
            table.heard(STATUS.validate_json(await request.read()))
        except ValidationError as error:
            return web.Response(
                status=400, text=f"not a node's status: {error.error_count()} mistakes\n"
            )
        return web.Response(body=STATUS.dump_json(answer()), content_type="application/json")

    async def status(request: web.Request) -> web.Response:
        if not authorized(request):
            return web.Response(status=401, text="this run's token is missing or wrong\n")
        return web.Response(body=STATUS.dump_json(answer()), content_type="application/json")

    application = web.Application(client_max_size=_BODY_BYTES_MAX)
    application.add_routes([web.post("/v1/heartbeat", heartbeat), web.get("/v1/status", status)])
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.2)
    await runner.setup()
    site = web.TCPSite(runner, address, 0)
    await site.start()
    return runner, runner.addresses[0][1]


async def watch(
    member: Member,
    session: aiohttp.ClientSession,
    answer: Callable[[], NodeStatus],
    table: PeerTable,
    interval_s: float,
    on_gone: Callable[[Member], Awaitable[None]],
) -> None:
    """Ask one node for ever (until cancelled), and note answers and refusals. Ends when it is gone."""
    table.watch(member.incarnation)
    refusals = 0
    while True:
        try:
            async with session.post(
                url_of(member, "/v1/heartbeat"), data=STATUS.dump_json(answer())
            ) as response:
                body = await response.content.read(_BODY_BYTES_MAX)
            if response.status == 200:
                status = STATUS.validate_json(body)
                if status.member.incarnation == member.incarnation:
                    refusals = 0
                    table.heard(status)
                else:
                    refusals = _REFUSALS_UNTIL_GONE
        except aiohttp.ClientConnectorError as error:
            refusals += error.os_error.errno == errno.ECONNREFUSED
        except (aiohttp.ClientError, TimeoutError, ValidationError):
            pass
        if refusals >= _REFUSALS_UNTIL_GONE:
            table.refused(member.incarnation)
            await on_gone(member)
            return
        await asyncio.sleep(interval_s)
