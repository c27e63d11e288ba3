"""The lobby: nodes find each other in it while no member can be asked.

A waiting node creates its card, an empty object below `lobby/`. The key has all that others need, so one listing
shows a thousand nodes:

    lobby/<node>!<incarnation>!<address>!<port>!<pid>!<workers>[!<zone>]

Cards are hints. A dead node's card costs one refused connection, and no decision uses a listing.
"""

import urllib.parse
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import astuple
from itertools import islice
from typing import Final

import structlog
from pydantic import TypeAdapter

from elastic_pt.errors import StoreError
from elastic_pt.runlog.records import Member
from elastic_pt.store.port import Store

LOBBY: Final = "lobby/"
"""Cards of waiting nodes lie below this key."""

_INTERVAL_S: Final = 0.5
_SEPARATOR: Final = "!"
"""S3 keys may contain it unquoted, and `quote` never produces it."""

_CARDS_MAX: Final = 8192
_MEMBER: Final = TypeAdapter(Member)

log = structlog.get_logger("elastic_pt.lobby")


def card_key(member: Member) -> str:
    """The key of a node's card."""
    told = astuple(member) if member.zone else astuple(member)[:-1]
    fields = (urllib.parse.quote(str(each), safe="") for each in told)
    return LOBBY + _SEPARATOR.join(fields)


def members_in(keys: Iterable[str]) -> list[Member]:
    """The members of these cards, by their keys; other keys are skipped, and those beyond `_CARDS_MAX`."""
    found = []
    for key in islice(keys, _CARDS_MAX):
        with suppress(ValueError):
            node, incarnation, address, port, pid, workers, *zone = (
                urllib.parse.unquote(each) for each in key.removeprefix(LOBBY).split(_SEPARATOR)
            )
            values = (node, incarnation, address, port, pid, workers, *zone)
            names = Member.__dataclass_fields__
            found.append(_MEMBER.validate_python(dict(zip(names, values, strict=False))))
    return found


class Lobby:
    """One node's view of the lobby. Agent process, one thread; blocks on the bucket, never raises `StoreError`."""

    def __init__(self, store: Store, clock_s: Callable[[], float]) -> None:
        self._store = store
        self._clock_s = clock_s
        self._card: str | None = None
        self._found: dict[str, Member] = {}
        self._looked_s = float("-inf")

    def waiting(self, me: Member) -> list[Member]:
        """The other waiting nodes. Lists the cards, and creates this node's card if it is missing, at most twice a second."""
        if self._clock_s() - self._looked_s >= _INTERVAL_S:
            self._looked_s = self._clock_s()
            try:
                self._look(me)
            except StoreError as error:
                log.warning("lobby_unreachable", error=str(error))
        return list(self._found.values())

    def leave(self) -> None:
        """Delete this node's card."""
        self._found = {}
        if self._card is not None:
            card, self._card = self._card, None
            self._delete(card)

    def forget(self, member: Member) -> None:
        """Delete the card of a waiting node that is gone."""
        if self._found.pop(member.incarnation, None) is not None:
            self._delete(card_key(member))

    def _look(self, me: Member) -> None:
        keys = self._store.keys(LOBBY)
        mine = card_key(me)
        if mine not in keys:
            self._card = mine
            self._store.write(mine, b"")
        found = members_in(key for key in keys if key != mine)
        self._found = {each.incarnation: each for each in found}

    def _delete(self, key: str) -> None:
        with suppress(StoreError):
            self._store.delete(key)
