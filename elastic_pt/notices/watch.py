"""The thread that watches all sources of notices and decides what to do about their notices.

    one task per source:  read ─► update ─► events, metrics ─► decide ─► heed(Decision)

A source that fails is read again after a pause that grows from one second to ten. One event reports the failure, and
one event the next good answer. Agent process.
"""

import asyncio
import datetime
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, Protocol

import aiohttp
import structlog

from elastic_pt.notices.notice import (
    LEAVE_KINDS,
    Announcement,
    Decision,
    InForce,
    Moment,
    NoticeKind,
    Stay,
    decide,
    update,
)
from elastic_pt.telemetry.catalogue import Metrics

_AGAIN_MIN_S: Final = 1.0
_AGAIN_MAX_S: Final = 10.0
_CLOSE_TIMEOUT_S: Final = 2.0

log = structlog.get_logger("elastic_pt.notices")


class Source(Protocol):
    """A source of notices."""

    @property
    def name(self) -> str:
        """Its name in events, metrics and reasons."""

    @property
    def interval_s(self) -> float:
        """Seconds between an answer and the next read."""

    async def read(self, session: aiohttp.ClientSession) -> Sequence[Announcement]:
        """All current events of the source for this machine. If it raises anything, nothing changes."""


class Watch:
    """Watches sources until it is closed. Built and closed on the main thread."""

    def __init__(
        self,
        sources: Sequence[Source],
        heed: Callable[[Decision], None],
        metrics: Metrics,
        usual_lead_s: float,
    ) -> None:
        """`heed` is called on the thread with each new decision. `usual_lead_s` is the lead of events that name no time."""
        self._sources = sources
        self._heed = heed
        self._metrics = metrics
        self._usual_lead_s = usual_lead_s
        self._in_force: dict[Source, InForce] = {}
        self._decision: Decision = Stay()
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="notices", daemon=True)

    def start(self) -> None:
        """Start the thread, if there is a source."""
        if self._sources:
            for source in self._sources:
                for kind in NoticeKind:
                    # `increase()` never sees the first value of a new series.
                    self._metrics.notices.labels(source.name, kind)
            log.info("notices_watched", sources=[each.name for each in self._sources])
            self._thread.start()

    def close(self) -> None:
        """Stop reading sources and calling `heed`."""
        if self._thread.ident is None:
            self._loop.close()
            return
        # The loop is closed already if the thread has ended.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(_CLOSE_TIMEOUT_S)

    # ---- inside the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._watch_all())
        except Exception:
            log.exception("notices_crashed")
        finally:
            self._loop.close()

    async def _watch_all(self) -> None:
        # Proxies of the environment are not used: a metadata server is on this machine.
        async with aiohttp.ClientSession(trust_env=False) as session:
            tasks = [asyncio.create_task(self._watch(each, session)) for each in self._sources]
            await self._closing.wait()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self, source: Source, session: aiohttp.ClientSession) -> None:
        up = self._metrics.notice_source_up.labels(source.name)
        up.set(1)
        for kind in NoticeKind:
            # A series that begins at 1 has no increase.
            self._metrics.notices.labels(source.name, kind)
        failed, again_s = False, _AGAIN_MIN_S
        while True:
            try:
                self._take(source, await source.read(session))
            # Any exception: a source must never end the watch of the others.
            except Exception as error:
                if not failed:
                    cause = str(error) or type(error).__name__
                    log.warning("notice_source_failed", source=source.name, cause=cause)
                failed = True
                up.set(0)
                await asyncio.sleep(again_s)
                again_s = min(2 * again_s, _AGAIN_MAX_S)
                continue
            if failed:
                failed, again_s = False, _AGAIN_MIN_S
                up.set(1)
                log.info("notice_source_answers", source=source.name)
            await asyncio.sleep(source.interval_s)

    def _take(self, source: Source, told: Sequence[Announcement]) -> None:
        """Update the notices in force by the events of a source, and heed a new decision."""
        now = Moment(time.monotonic(), datetime.datetime.now(datetime.UTC))
        before = self._in_force.get(source, {})
        after = self._in_force[source] = update(before, source.name, told, now, self._usual_lead_s)
        for event_id, notice in after.items():
            if before.get(event_id) != notice:
                self._metrics.notices.labels(notice.source, notice.kind).inc()
                if notice.kind in LEAVE_KINDS:
                    self._metrics.notice_lead_seconds.set(notice.lead_s)
                log.warning(
                    "notice",
                    source=notice.source,
                    kind=notice.kind,
                    event_id=event_id,
                    detail=notice.detail,
                    lead_s=round(notice.lead_s, 3),
                )
        for event_id in before.keys() - after.keys():
            log.warning("notice_withdrawn", source=source.name, event_id=event_id)
        decision = decide(
            [each for notices in self._in_force.values() for each in notices.values()]
        )
        if decision != self._decision:
            self._decision = decision
            self._heed(decision)
