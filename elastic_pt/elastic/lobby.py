"""Where nodes find each other while no member is there to ask.

A waiting node leaves its card under `lobby/<node>.<incarnation>.json` and reads the others'. Cards are
hints: a card of a dead node only costs a refused connection, and nothing is ever decided from a listing.
"""

import urllib.parse
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import structlog
from pydantic import TypeAdapter

from elastic_pt.elastic.membership import MESH_NODES_MAX
from elastic_pt.elastic.records import Member
from elastic_pt.errors import NotFound, StoreError
from elastic_pt.store.port import Store

MEMBER: Final = TypeAdapter(Member)
"""How a node's card is written."""

LOBBY: Final = "lobby/"
"""Cards of waiting nodes lie below this key."""

_INTERVAL_S: Final = 0.5

log = structlog.get_logger("elastic_pt.lobby")


def card_key(member: Member) -> str:
    """Where a node's card lies; the keys sort as the nodes' names do."""
    return f"{LOBBY}{urllib.parse.quote(member.node, safe='')}.{member.incarnation}.json"


class Lobby:
    """One node's view of the lobby. Agent process, one thread; blocks on the bucket, never raises `StoreError`."""

    def __init__(self, store: Store, clock_s: Callable[[], float]) -> None:
        self._store = store
        self._clock_s = clock_s
        self._card: str | None = None
        self._found: dict[str, Member] = {}
        self._looked_s = float("-inf")

    def waiting(self, me: Member) -> list[Member]:
        """Announce this node and list the others, by name; asks the store at most twice a second.

        Of a crowd only the first are listed: they are the ones to ask, and they hear of all who ask.
        """
        if self._clock_s() - self._looked_s >= _INTERVAL_S:
            self._looked_s = self._clock_s()
            try:
                self._look(me)
            except StoreError as error:
                log.warning("lobby_unreachable", error=str(error))
        return [self._found[key] for key in sorted(self._found)]

    def leave(self) -> None:
        """This node waits no longer."""
        self._found = {}
        if self._card is not None:
            card, self._card = self._card, None
            self._delete(card)

    def forget(self, member: Member) -> None:
        """A waiting node is gone; its card goes too."""
        if self._found.pop(card_key(member), None) is not None:
            self._delete(card_key(member))

    def _look(self, me: Member) -> None:
        keys = self._store.keys(LOBBY)
        mine = card_key(me)
        if mine not in keys:
            self._store.write(mine, MEMBER.dump_json(me))
            self._card = mine
        others = [key for key in keys if key != mine]
        self._found = {key: each for key, each in self._found.items() if key in others}
        for key in others:
            if len(self._found) < MESH_NODES_MAX and key not in self._found:
                with suppress(NotFound, ValueError):
                    self._found[key] = MEMBER.validate_json(self._store.read(key))

    def _delete(self, key: str) -> None:
        with suppress(StoreError):
            self._store.delete(key)
