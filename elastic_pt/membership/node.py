"""One node as its agent's main thread sees it: threads that carry its part in the membership.

    links (event loop) ─► Participant ─► turn, on a thread that may block on the bucket
    main thread ─► phase, progress ─┘          │
                 await_generation() ◄──────────┘  (rendezvous)

Runs in the agent process. The main thread, which owns the workers, tells what became of them
(`running`, `settling`, `spend`) and asks what to do next (`await_generation`, `must_reform`,
`await_settled`). Nothing here touches a worker.
"""

import asyncio
import datetime
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final

import structlog
from torch.distributed import DistNetworkError, DistStoreError, TCPStore  # type: ignore[attr-defined]

from elastic_pt.errors import ElasticPtError, LogDamaged, NodeFailure, StoreError
from elastic_pt.membership.budgets import Budgets
from elastic_pt.membership.links import Links, run_token
from elastic_pt.membership.lobby import Lobby
from elastic_pt.membership.lookups import without_dns
from elastic_pt.membership.participant import Participant, Surroundings
from elastic_pt.membership.pulse import Pulse
from elastic_pt.membership.status import Limits, NodeStatus, Phase, StartTimes, is_news
from elastic_pt.runlog.log import RunLog, RunView
from elastic_pt.runlog.records import Cause, CauseKind, Checkpoint, Generation, Member, Stop
from elastic_pt.store.port import Store

_STORE_CONNECT: Final = datetime.timedelta(seconds=20)
_LEAVE_S: Final = 10.0
_LOOK_UP_S: Final = 0.1

log = structlog.get_logger("elastic_pt.node")


@dataclass(frozen=True)
class Formed:
    """A generation that this node belongs to, with its store connected."""

    generation: Generation
    node_rank: int
    store: TCPStore


@dataclass(frozen=True)
class NodeOptions:
    """What one node brings along."""

    name: str
    address: str
    workers: int
    fingerprint: dict[str, str]
    limits: Limits
    budgets: Budgets = field(default_factory=Budgets)
    metrics_url: str = ""
    platform: Mapping[str, str] = field(default_factory=dict)
    """What computes on this node, as far as it decides the bits."""


class Left(Exception):
    """This node has left the run in good order."""


class Node:
    """See the module. `choose_resume` picks where a new generation goes on; `on_drain` asks the workers to stop.

    `hints` is the same bucket with little patience, for what nothing depends on.
    """

    def __init__(
        self,
        options: NodeOptions,
        store: Store,
        hints: Store,
        run_log: RunLog,
        *,
        choose_resume: Callable[[RunView], Checkpoint | None],
        on_drain: Callable[[str], None],
    ) -> None:
        self._options = options
        self._store = store
        self._log = run_log
        self._changed = threading.Condition()
        member = Member(
            options.name, secrets.token_hex(8), options.address, 0, os.getpid(), options.workers
        )
        self._participant = Participant(
            NodeStatus(
                member=member,
                phase=Phase.WAITING,
                generation=0,
                log_length=0,
                spent=0,
                failure=None,
                fingerprint=options.fingerprint,
                metrics_url=options.metrics_url,
            ),
            options.limits,
            options.budgets,
            Surroundings(
                log=run_log,
                lobby=Lobby(hints, time.monotonic),
                pulse=Pulse(hints, member.incarnation),
                clock_s=time.monotonic,
                bind_store=self._bind_store,
                choose_resume=choose_resume,
                on_drain=on_drain,
                platform=options.platform,
            ),
        )
        self._crash: BaseException | None = None
        self._ready = threading.Event()
        self._leave = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news: asyncio.Event | None = None
        self._links: Links | None = None
        self._thread = threading.Thread(target=self._run, name="membership", daemon=True)

    # ---- called by the main thread -------------------------------------------------------------

    def start(self) -> None:
        """Answer peers and begin to look for them."""
        self._thread.start()
        self._ready.wait()
        self._raise_crash()

    def request_leave(self) -> None:
        """Ask to go in good order; safe to call from a signal handler."""
        self._participant.leaving = True
        self._tell()

    def leave(self) -> None:
        """Stop answering; peers see at once that this node is gone."""
        self._leave.set()
        self._wake()
        if self._thread.ident is not None:
            self._thread.join(timeout=_LEAVE_S)

    @property
    def member(self) -> Member:
        """How this node introduces itself."""
        return self._participant.member

    @property
    def view(self) -> RunView:
        """The log as this node last read it."""
        return self._log.view

    def read_at_s(self, generation: int) -> float:
        """When this node first read that generation's record, on its monotonic clock."""
        return self._participant.read_at_s(generation)

    @property
    def leaving(self) -> bool:
        """Whether this node has asked to go."""
        return self._participant.leaving

    @property
    def reason(self) -> str:
        """What this node waits for or does, in words."""
        return self._participant.decision.reason

    def running(self) -> None:
        """The workers of the newest generation have been started."""
        self._say(phase=Phase.RUNNING)

    def settling(self) -> None:
        """The workers have stopped as planned; their checkpoint is on its way."""
        self._say(phase=Phase.SETTLING)

    def spend(self, generation: int, failure: Cause | None) -> None:
        """The workers of `generation` are gone; `failure` is None when that was planned."""
        if generation > self._participant.status.spent:
            self._say(phase=Phase.WAITING, spent=generation, failure=failure)
        else:
            self._say(phase=Phase.WAITING)

    def failure(
        self,
        detail: str,
        *,
        kind: CauseKind = CauseKind.FAILED,
        step: int = 0,
        signature: str = "",
        surroundings: bool = False,
    ) -> Cause:
        """A failure of this node's own workers, as the others are told of it."""
        # A path in an error may hold bytes that are no text, and peers are told in UTF-8.
        detail = detail.encode("utf-8", "backslashreplace").decode()
        return Cause(kind, self.member.node, detail, step, signature, surroundings=surroundings)

    def rest(self, why: str, seconds: float) -> None:
        """Take no part in the run for so long; the others go on without this node."""
        with self._changed:
            self._participant.rest(why, seconds)
        self._tell()

    def others_can_go_on(self) -> bool:
        """Whether enough other nodes are alive and fit, so that the run goes on when this one leaves."""
        return self._participant.others_can_go_on()

    def progress(self, step: int, loss: float | None) -> None:
        """Where the workers are, for heartbeats and `status`."""
        with self._changed:
            self._participant.say(step=step, loss=loss)

    def first_step(self, times: StartTimes) -> None:
        """The workers of a generation have done their first step."""
        self._say(start_times=times)

    def must_reform(self, generation: int) -> bool:
        """Whether workers of `generation` have no future: a member is lost, or the log says so."""
        self._raise_crash()
        view = self._log.view
        return (
            self._participant.broken >= generation
            or view.generation_number > generation
            or view.stop is not None
        )

    def await_generation(self) -> Formed | Stop:
        """Block until the log has a generation with this node that it has not spent, or the end of the run.

        Raises `Left` when this node has asked to leave and nothing holds it any more, and `ConfigError`
        when the run refuses it.
        """
        while True:
            with self._changed:
                self._changed.wait_for(self._has_next)
                self._raise_crash()
                found = self._next()
            if isinstance(found, Stop):
                return found
            if found is None:
                raise Left
            rank = found.rank_of(self.member.incarnation)
            assert rank is not None
            try:
                return Formed(found, rank, self._connect(found))
            except (DistNetworkError, DistStoreError) as error:
                log.warning(
                    "store_unreachable", generation=found.number, error=str(error).splitlines()[0]
                )
                self.spend(
                    found.number,
                    self.failure(
                        f"cannot reach the store at {found.store_address}:{found.store_port}",
                        kind=CauseKind.GAVE_UP,
                    ),
                )

    def await_settled(
        self, generation: int, step: int, deadline_s: float, given_up: Callable[[], bool]
    ) -> bool:
        """Block until the checkpoint of `step` is committed; False if `generation` has no future or it is given up."""

        def committed() -> bool:
            return any(
                each.generation == generation and each.step >= step
                for each in self._log.view.checkpoints
            )

        self._await(lambda: committed() or self.must_reform(generation) or given_up(), deadline_s)
        return committed()

    def await_reform(self, generation: int, deadline_s: float) -> bool:
        """Block until `generation` has no future (True), at most `deadline_s` seconds."""
        return self._await(lambda: self.must_reform(generation), deadline_s)

    def await_end(self, generation: int, deadline_s: float, given_up: Callable[[], bool]) -> bool:
        """Block until the log holds STOP; False if `generation` has no future or its last checkpoint is given up."""
        self._await(lambda: self.must_reform(generation) or given_up(), deadline_s)
        return self._log.view.stop is not None

    def notice_log(self) -> None:
        """The log has grown through another thread of this process: think again."""
        self._tell()

    # ---- shared --------------------------------------------------------------------------------

    def _await(self, condition: Callable[[], bool], deadline_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(condition, timeout=deadline_s)

    def _say(self, **changes: object) -> None:
        with self._changed:
            self._participant.say(**changes)
        self._tell()

    def _tell(self) -> None:
        """Peers should hear at once how things stand here, and this node think again."""
        self._wake(tell=True)

    def _wake(self, *, tell: bool = False) -> None:
        loop, news, links = self._loop, self._news, self._links
        if loop is None or news is None or links is None or loop.is_closed():
            return

        def wake() -> None:
            news.set()
            if tell:
                links.say(asks=False)
            # A turn may block on the bucket for long; who waits looks for itself meanwhile.
            with self._changed:
                self._changed.notify_all()

        loop.call_soon_threadsafe(wake)

    def _has_next(self) -> bool:
        return (
            self._crash is not None
            or self._participant.refusal is not None
            or self._next() is not None
            or self.leaving
        )

    def _next(self) -> Generation | Stop | None:
        view = self._log.view
        if view.stop is not None:
            return view.stop
        generation = view.generation
        if generation is None or generation.number <= self._participant.status.spent:
            return None
        return generation if generation.rank_of(self.member.incarnation) is not None else None

    def _connect(self, generation: Generation) -> TCPStore:
        own = self._participant.stores.get(generation.number)
        if isinstance(own, TCPStore):
            return own
        outcome: list[TCPStore | RuntimeError] = []

        def connect() -> None:
            try:
                with without_dns():
                    outcome.append(
                        TCPStore(
                            generation.store_address,
                            generation.store_port,
                            is_master=False,
                            timeout=_STORE_CONNECT,
                        )
                    )
            except (DistNetworkError, DistStoreError) as error:
                outcome.append(error)
            with self._changed:
                self._changed.notify_all()

        # Aside, because nothing ends a client's wait for a host that accepted and then stood still. The
        # others may have gone on without it already.
        threading.Thread(target=connect, name="store", daemon=True).start()
        self._await(
            lambda: bool(outcome) or self.must_reform(generation.number),
            _STORE_CONNECT.total_seconds(),
        )
        found = outcome[0] if outcome else DistNetworkError("it does not answer")
        if isinstance(found, RuntimeError):
            raise found
        return found

    def _bind_store(self) -> TCPStore:
        address = self._options.address
        try:
            with without_dns():
                return TCPStore(
                    address, 0, is_master=True, wait_for_workers=False, timeout=_STORE_CONNECT
                )
        except (DistNetworkError, DistStoreError) as error:
            raise StoreError(f"cannot listen at {address}: {str(error).splitlines()[0]}") from error

    def _raise_crash(self) -> None:
        if self._participant.refusal is not None:
            raise self._participant.refusal
        if isinstance(self._crash, ElasticPtError):
            raise self._crash
        if self._crash is not None:
            raise NodeFailure(f"membership stopped: {self._crash!r}") from self._crash

    # ---- the membership thread -----------------------------------------------------------------

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._crash = error
            log.error("membership_crashed", error=repr(error))
        finally:
            self._ready.set()
            with self._changed:
                self._changed.notify_all()

    async def _serve(self) -> None:
        token = await asyncio.to_thread(run_token, self._store)
        news = asyncio.Event()
        links = Links(self._participant, token, news.set)
        port = await links.serve(self._options.address)
        self._participant.say(member=replace(self.member, port=port))
        self._participant.begin()
        self._loop, self._news, self._links = asyncio.get_running_loop(), news, links
        await asyncio.to_thread(self._log.refresh)
        self._ready.set()
        pulse = asyncio.create_task(self._keep_pulse())
        try:
            while not self._leave.is_set() and not pulse.done():
                news.clear()
                turn = asyncio.create_task(self._turn(links))
                # A turn may block on the bucket for long; whoever leaves must not answer meanwhile.
                while not turn.done() and not self._leave.is_set():
                    await asyncio.wait({turn}, timeout=_LOOK_UP_S)
                if not turn.done():
                    break
                turn.result()
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._options.limits.heartbeat_interval_s):
                        await news.wait()
            if pulse.done():
                pulse.result()
        finally:
            pulse.cancel()
            self._loop = None
            await links.close()
            await asyncio.to_thread(self._participant.depart)

    async def _turn(self, links: Links) -> None:
        told = self._participant.status
        try:
            await asyncio.to_thread(self._participant.turn)
        except LogDamaged:
            raise
        except StoreError as error:
            log.warning("turn_failed", error=str(error))
        links.aim(self._participant.contacts.targets)
        asks = self._participant.wants_answers()
        if asks or is_news(self._participant.status, told):
            links.say(asks=asks)
        with self._changed:
            self._changed.notify_all()

    async def _keep_pulse(self) -> None:
        while True:
            broken = self._participant.broken
            await asyncio.to_thread(self._participant.feel_pulse)
            if self._participant.broken != broken:
                self._tell()
            await asyncio.sleep(self._options.limits.heartbeat_interval_s)
