"""A sign in the bucket that the newest generation trains, for nodes that can reach the bucket but no member.

The first member overwrites `pulse.json` with a growing count, about once a second: one request a second
for the whole fleet. Whoever cannot reach the members watches whether it changes, on its own clock. It is a
hint like the lobby: it only keeps nodes from taking over too early, and the log decides all the same. The
first member glances at the log every second time: should it have been taken over, nobody else would tell it.
"""

import json
from dataclasses import dataclass
from typing import Final

from elastic_pt.errors import LogDamaged, NotFound
from elastic_pt.runlog.log import record_key
from elastic_pt.runlog.records import Record
from elastic_pt.store.port import Store

KEY: Final = "pulse.json"


@dataclass
class Pulse:
    """One node's hand on the pulse. Agent process. Raises `StoreError` when the bucket does not answer."""

    store: Store
    incarnation: str
    _count: int = 0

    def beat(self, generation: int) -> None:
        """Say that this generation trains."""
        self._count += 1
        self.store.write(KEY, json.dumps([generation, self.incarnation, self._count]).encode())

    def feel(self) -> bytes:
        """Something that changes while a generation trains; empty if none ever has."""
        try:
            return self.store.read(KEY)
        except NotFound:
            return b""

    def record(self, index: int) -> Record | None:
        """A glance at the log that nothing has to wait for; None if that record is not there (or is damaged)."""
        key = record_key(index)
        try:
            return Record.from_bytes(self.store.read(key), key=key)
        except (NotFound, LogDamaged):
            return None
