"""The pulse: an object in the bucket that changes while the newest generation trains.

It is for nodes that can reach the bucket but no member. The first member overwrites `pulse.json` with a growing
count and its newest step, about once a second: one request a second for the whole fleet. A node that cannot reach the members watches
whether the object changes, with its own clock. The pulse is a hint, like the lobby: it keeps nodes from taking over
too early, and the log decides in any case.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog

from elastic_pt.errors import LogDamaged, NotFound, StoreError
from elastic_pt.membership.decision.memory import Memory
from elastic_pt.membership.decision.progress import pulse_bytes, reached_step
from elastic_pt.membership.decision.status import NodePhase
from elastic_pt.membership.own_status import OwnStatus
from elastic_pt.runlog.log import RunLog, RunView, record_key
from elastic_pt.runlog.records import Generation, Record
from elastic_pt.store.port import Store

KEY: Final = "pulse.json"
PULSE_BYTES_MAX: Final = 4096
"""Far more than it has. Anyone who can write to the bucket can write it."""
_PULSES_PER_TAKEOVER: Final = 4
_LOOK_AGAIN_S: Final = 0.2
_LOOK_S: Final = 1.0
"""Seconds, at most, between two looks of the first member at the end of the log: an operator may have asked for something."""

log = structlog.get_logger("elastic_pt.participant")


@dataclass
class Pulse:
    """Writes and reads the pulse. Agent process. Raises `StoreError` when the bucket does not answer."""

    store: Store
    incarnation: str
    _count: int = 0

    def beat(self, generation: int, step: int) -> None:
        """Write a new pulse: this generation trains, and has reached this step."""
        self._count += 1
        self.store.write(KEY, pulse_bytes(generation, self.incarnation, self._count, step))

    def feel(self) -> bytes:
        """The pulse's bytes, which change while a generation trains; empty before the first pulse."""
        try:
            return self.store.read(KEY, 0, PULSE_BYTES_MAX)
        except NotFound:
            return b""

    def record(self, index: int) -> Record | None:
        """The log's record at `index`, read without the log's lock; None if it is not there or is damaged."""
        key = record_key(index)
        try:
            return Record.from_bytes(self.store.read(key), key=key)
        except (NotFound, LogDamaged):
            return None


def beats(store: Store, watch_s: float) -> bool:
    """Whether the pulse changes within `watch_s`, so that the newest generation trains. Blocks; any process."""
    pulse, until_s = Pulse(store, incarnation=""), time.monotonic() + watch_s
    before = pulse.feel()
    while before and time.monotonic() < until_s:
        time.sleep(_LOOK_AGAIN_S)
        if pulse.feel() != before:
            return True
    return False


class PulseWatch:
    """Writes or reads the pulse, whichever is due. Agent process; `step` from one thread of its own."""

    def __init__(
        self,
        me: OwnStatus,
        run_log: RunLog,
        pulse: Pulse,
        memory: Memory,
        takeover_s: float,
        clock_s: Callable[[], float],
    ) -> None:
        self._me = me
        self._log = run_log
        self._pulse = pulse
        self._memory = memory
        self._pause_s = takeover_s / _PULSES_PER_TAKEOVER
        self._clock_s = clock_s
        self._written_s = self._read_s = self._looked_s = float("-inf")
        self.log_has_grown = False
        """Whether the log has a record that this node has not read."""

    def step(self, *, cut_off: bool) -> None:
        """Write or read the pulse if that is due; `cut_off` means that no member answers this node.

        Blocks on the bucket; never raises `StoreError`.
        """
        now_s, view = self._clock_s(), self._log.view
        try:
            if (generation := self._led(view)) is not None:
                if now_s - self._written_s >= self._pause_s:
                    self._written_s = now_s
                    me = self._me.stated
                    reached = reached_step(generation, {me.member.incarnation: me})
                    self._pulse.beat(generation.number, reached or 0)
                if now_s - self._looked_s >= min(2 * self._pause_s, _LOOK_S):
                    self._looked_s = now_s
                    self._look_at_log(view)
            elif cut_off and now_s - self._read_s >= self._pause_s:
                self._read_s = now_s
                self._memory.pulse_read(self._pulse.feel(), now_s, self._clock_s())
        except StoreError as error:
            self._memory.bucket_failed(self._clock_s())
            log.debug("pulse_unreachable", cause=str(error))

    def _led(self, view: RunView) -> Generation | None:
        """The newest generation, if this node is its first member and it trains; else None."""
        generation, me = view.generation, self._me.stated
        leads = (
            generation is not None
            and view.stop is None
            and generation.rank_of(me.member.incarnation) == 0
            and me.phase is not NodePhase.WAITING
            and me.broken < generation.number
        )
        return generation if leads else None

    def _look_at_log(self, view: RunView) -> None:
        """Detect a record of another writer. Mark the generation as broken if it is another GENERATION.

        `Participant.turn` may still wait for a request that was sent when the bucket did not answer. The workers must
        end before that.
        """
        next_record = self._pulse.record(view.length)
        self.log_has_grown = next_record is not None
        if next_record is not None and isinstance(next_record.body, Generation):
            if self._log.view.length == view.length:
                log.warning("taken_over", generation=next_record.body.number)
            self._me.give_up(view.generation_number)
