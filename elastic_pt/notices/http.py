"""Requests to a metadata server, with limits on time and size. Redirects are not followed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import aiohttp

from elastic_pt.notices.notice import SourceError

REQUEST_TIMEOUT_S: Final = 2.0
"""Seconds for one whole request. A metadata server is on the machine itself."""
_ANSWER_BYTES_MAX: Final = 256 * 1024
_CONNECT_TIMEOUT_S: Final = 2.0


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    url: str
    status: int
    headers: Mapping[str, str]
    text: str

    def body(self, *, none: int | None = None) -> str | None:
        """The text of an answer 200; None for the status `none`. Raises `SourceError` for any other status."""
        if self.status == none:
            return None
        if self.status != 200:
            wanted = "200" if none is None else f"200 or {none}"
            raise SourceError(f"{self.url}: HTTP {self.status}; expected {wanted}")
        return self.text


async def ask(
    session: aiohttp.ClientSession,
    method: str,
    url: str,
    headers: Mapping[str, str],
    timeout_s: float = REQUEST_TIMEOUT_S,
) -> Answer:
    """Send one request. No redirect is followed. An answer of more than 256 KiB is an error.

    Raises `SourceError`, `TimeoutError`, and what aiohttp raises for a server that cannot be reached.
    """
    timeout = aiohttp.ClientTimeout(
        total=timeout_s, sock_connect=min(timeout_s, _CONNECT_TIMEOUT_S)
    )
    async with session.request(
        method, url, headers=headers, timeout=timeout, allow_redirects=False
    ) as response:
        body = bytearray()
        async for part in response.content.iter_any():
            body += part
            if len(body) > _ANSWER_BYTES_MAX:
                raise SourceError(
                    f"{url}: more than {_ANSWER_BYTES_MAX} bytes; expected a short answer"
                )
        try:
            text = body.decode().strip()
        except UnicodeDecodeError as error:
            raise SourceError(f"{url}: not UTF-8; expected text") from error
        return Answer(url, response.status, response.headers, text)


def json_object(text: str, what: str) -> dict[str, Any]:
    """A JSON object. Raises `SourceError` that names `what` it should have been."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{what}: {text[:80]!r}; expected JSON") from error
    if not isinstance(found, dict):
        raise SourceError(f"{what}: {text[:80]!r}; expected a JSON object")
    return found
