"""Where nodes find each other while no member is there to ask.

A waiting node leaves its card under `lobby/<incarnation>.json` and reads the others'. Cards are hints: a
card of a dead node only costs a refused connection, and nothing is ever decided from a listing.
"""

import asyncio
import time
from contextlib import suppress
from typing import Final

import structlog
from pydantic import TypeAdapter

from elastic_pt.elastic.records import Member
from elastic_pt.errors import NotFound, StoreError
from elastic_pt.store.port import Store

MEMBER: Final = TypeAdapter(Member)
"""How a node's card is written."""

LOBBY: Final = "lobby/"
"""Cards of waiting nodes lie below this key."""

_INTERVAL_S: Final = 0.5

log = structlog.get_logger("elastic_pt.lobby")


class Lobby:
    """One node's view of the lobby. Agent process, membership thread."""

    def __init__(self, store: Store, me: Member) -> None:
        self._store = store
        self._me = me
        self._announced = False
        self._found: dict[str, Member] = {}
        self._looked_s = float("-inf")

    async def waiting(self) -> list[Member]:
        """Announce this node and list the others; asks the store at most twice a second."""
        if time.monotonic() - self._looked_s >= _INTERVAL_S:
            await asyncio.to_thread(self._look)
            self._looked_s = time.monotonic()
        return list(self._found.values())

    async def leave(self) -> None:
        """This node has become a member."""
        self._found = {}
        if self._announced:
            self._announced = False
            await self.forget(self._me)

    async def forget(self, member: Member) -> None:
        """A node is gone; its card goes too."""
        self._found.pop(member.incarnation, None)
        with suppress(StoreError):
            await asyncio.to_thread(self._store.delete, f"{LOBBY}{member.incarnation}.json")

    def _look(self) -> None:
        try:
            if not self._announced:
                self._store.write(f"{LOBBY}{self._me.incarnation}.json", MEMBER.dump_json(self._me))
                self._announced = True
            for key in self._store.keys(LOBBY):
                incarnation = key.removeprefix(LOBBY).removesuffix(".json")
                if incarnation not in self._found and incarnation != self._me.incarnation:
                    with suppress(NotFound, ValueError):
                        self._found[incarnation] = MEMBER.validate_json(self._store.read(key))
        except StoreError as error:
            log.warning("lobby_unreachable", error=str(error))
