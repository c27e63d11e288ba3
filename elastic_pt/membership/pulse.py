"""The pulse: an object in the bucket that changes while the newest generation trains.

It is for nodes that can reach the bucket but no member. The first member overwrites `pulse.json` with a growing
count, about once a second: one request a second for the whole fleet. A node that cannot reach the members watches
whether the object changes, on its own clock. The pulse is a hint, like the lobby: it keeps nodes from taking over
too early, and the log decides in any case.
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
    """Writes and reads the pulse. Agent process. Raises `StoreError` when the bucket does not answer."""

    store: Store
    incarnation: str
    _count: int = 0

    def beat(self, generation: int) -> None:
        """Write that this generation trains."""
        self._count += 1
        self.store.write(KEY, json.dumps([generation, self.incarnation, self._count]).encode())

    def feel(self) -> bytes:
        """The pulse's bytes, which change while a generation trains; empty if none ever has."""
        try:
            return self.store.read(KEY)
        except NotFound:
            return b""

    def record(self, index: int) -> Record | None:
        """The log's record at `index`, read without the log's lock; None if it is not there or is damaged."""
        key = record_key(index)
        try:
            return Record.from_bytes(self.store.read(key), key=key)
        except (NotFound, LogDamaged):
            return None
