"""The membership thread of an agent: an event loop that connects a `Participant` with its peers and gives it turns.

    Links ──► Participant.received ──► news ──► Participant.turn (in a worker thread) ──► Links.aim, Links.say
                                                Participant.step_pulse (in another one)

`Node`, on the main thread, wakes this thread with `wake` and waits on `changed` for its results.
"""

import asyncio
import threading
from contextlib import suppress
from dataclasses import replace
from typing import Final, Protocol

import structlog

from elastic_pt.config import ElasticSection
from elastic_pt.errors import LogDamaged, StoreError
from elastic_pt.membership.decision.status import is_news
from elastic_pt.membership.links import Links
from elastic_pt.membership.participant import Participant
from elastic_pt.runlog.access import Access

_LEAVE_TIMEOUT_S: Final = 10.0
_LEAVE_CHECK_S: Final = 0.1

log = structlog.get_logger("elastic_pt.node")


class Driver(Protocol):
    """Drives a participant: the membership thread, or the simulator."""

    changed: threading.Condition
    """Notified after each turn, and whenever the main thread should check again."""
    crash: BaseException | None
    """Why the driver has ended, if it failed."""

    def start(self) -> None:
        """Answer peers and look for them; returns once the log has been read, or at a crash."""

    def stop(self) -> None:
        """Stop answering; peers see at once that this node is gone."""

    def wake(self, *, tell: bool = True) -> None:
        """Take a turn now; `tell` peers the own status at once. Any thread may call this."""


class MembershipThread:
    """The driver of a real agent. Agent process; other threads call the methods."""

    def __init__(self, participant: Participant, access: Access, elastic: ElasticSection) -> None:
        self._participant = participant
        self._access = access
        self._interval_s = elastic.heartbeat_interval_s
        self._port = elastic.port
        self.changed = threading.Condition()
        self.crash: BaseException | None = None
        self._ready = threading.Event()
        self._leave = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news: asyncio.Event | None = None
        self._links: Links | None = None
        self._thread = threading.Thread(target=self._run, name="membership", daemon=True)

    def start(self) -> None:
        """Answer peers and look for them; returns once the log has been read, or at a crash."""
        self._thread.start()
        self._ready.wait()

    def stop(self) -> None:
        """Stop answering; peers see at once that this node is gone."""
        self._leave.set()
        self.wake(tell=False)
        if self._thread.ident is not None:
            self._thread.join(timeout=_LEAVE_TIMEOUT_S)

    def wake(self, *, tell: bool = True) -> None:
        """Take a turn now; `tell` peers the own status at once. Any thread may call this."""
        loop, news, links = self._loop, self._news, self._links
        if loop is None or news is None or links is None or loop.is_closed():
            return

        def wake() -> None:
            news.set()
            if tell:
                links.say(asks=False)
            # Wake the waiters to re-read the log: the turn may block on the bucket for long.
            self._notify()

        loop.call_soon_threadsafe(wake)

    # ---- inside the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self.crash = error
            log.error("membership_crashed", error=repr(error))
        finally:
            self._ready.set()
            self._notify()

    async def _serve(self) -> None:
        participant = self._participant
        news = asyncio.Event()
        links = Links(participant, self._access, news.set)
        port = await links.serve(participant.member.address, self._port)
        participant.begin(replace(participant.member, port=port))
        self._loop, self._news, self._links = asyncio.get_running_loop(), news, links
        await asyncio.to_thread(participant.log.refresh)
        self._ready.set()
        pulse = asyncio.create_task(self._keep_pulse())
        try:
            while not self._leave.is_set() and not pulse.done():
                news.clear()
                turn = asyncio.create_task(self._turn(links))
                # A turn may block on the bucket for long. A node that leaves must stop answering before that ends.
                while not turn.done() and not self._leave.is_set():
                    await asyncio.wait({turn}, timeout=_LEAVE_CHECK_S)
                if not turn.done():
                    break
                turn.result()
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._interval_s):
                        await news.wait()
            if pulse.done():
                pulse.result()
        finally:
            pulse.cancel()
            self._loop = None
            await links.close()
            await asyncio.to_thread(participant.depart)

    async def _turn(self, links: Links) -> None:
        participant = self._participant
        told = participant.me.now
        try:
            await asyncio.to_thread(participant.turn)
        except LogDamaged:
            raise
        except StoreError as error:
            log.warning("turn_failed", error=str(error))
        links.aim(participant.contacts.targets)
        asks = participant.wants_answers()
        if asks or is_news(participant.me.now, told):
            links.say(asks=asks)
        self._notify()

    async def _keep_pulse(self) -> None:
        while True:
            broken = self._participant.broken
            await asyncio.to_thread(self._participant.step_pulse)
            if self._participant.broken != broken:
                self.wake()
            await asyncio.sleep(self._interval_s)

    def _notify(self) -> None:
        with self.changed:
            self.changed.notify_all()
