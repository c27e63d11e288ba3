"""One question to several agents at once, over HTTP with the run's access. Any process; blocks for at most `timeout_s`.

    ask_status       ─► /v1/status      the agent's own NodeStatus
    ask_endpoints    ─► /v1/endpoints   where the nodes that it knows to be up serve metrics

Agents that do not answer in time, or with something else, are left out of the result.
"""

import asyncio
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final, TypeVar

import aiohttp
from pydantic import TypeAdapter

from elastic_pt.membership.decision.status import NodeStatus
from elastic_pt.membership.endpoints import ENDPOINTS, Endpoint
from elastic_pt.membership.peers import STATUS
from elastic_pt.runlog.access import Access
from elastic_pt.runlog.records import Member

_ANSWER_BYTES_MAX: Final = 1024 * 1024

Answer = TypeVar("Answer")


def ask_status(
    members: Iterable[Member], access: Access, timeout_s: float, *, padding_bytes: int = 0
) -> dict[str, NodeStatus]:
    """The status of each agent that answers, by incarnation. With `padding_bytes` the request is that much larger."""
    padding = {"X-Elastic-PT-Padding": "0" * padding_bytes} if padding_bytes else {}
    answers = _ask(members, access, "/v1/status", STATUS, timeout_s, padding)
    # Another agent may use this port now: of another run, or a later incarnation of this node.
    return {each: said for each, said in answers.items() if said.member.incarnation == each}


def ask_endpoints(
    members: Iterable[Member], access: Access, timeout_s: float
) -> dict[str, list[Endpoint]]:
    """What each agent that answers knows about all nodes, by its incarnation."""
    return _ask(members, access, "/v1/endpoints", ENDPOINTS, timeout_s)


def _ask(
    members: Iterable[Member],
    access: Access,
    path: str,
    form: TypeAdapter[Answer],
    timeout_s: float,
    more: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Answer]:
    asked = list(members)
    return asyncio.run(_ask_all(asked, access, path, form, timeout_s, more)) if asked else {}


async def _ask_all(
    members: list[Member],
    access: Access,
    path: str,
    form: TypeAdapter[Answer],
    timeout_s: float,
    more: Mapping[str, str],
) -> dict[str, Answer]:
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    headers = {**access.headers, **more}

    async def ask(session: aiohttp.ClientSession, member: Member) -> Answer | None:
        try:
            url = access.url(member.address, member.port) + path
            async with session.get(url, allow_redirects=False) as response:
                return form.validate_json(await read_body(response))
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            return None

    # Without a limit on connections: silent agents must not take the places of others until the timeout.
    connector = aiohttp.TCPConnector(limit=0, ssl=access.client_context() or True)
    async with aiohttp.ClientSession(
        timeout=timeout, headers=headers, connector=connector, auto_decompress=False
    ) as session:
        answers = await asyncio.gather(*(ask(session, member) for member in members))
    return {
        member.incarnation: answer
        for member, answer in zip(members, answers, strict=True)
        if answer is not None
    }


async def read_body(response: aiohttp.ClientResponse) -> bytes:
    """The whole body, which may come in parts. Stops reading after `_ANSWER_BYTES_MAX`: what is longer is no JSON then."""
    body = bytearray()
    async for part in response.content.iter_any():
        body += part
        if len(body) > _ANSWER_BYTES_MAX:
            break
    return bytes(body)
