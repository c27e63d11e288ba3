"""One node's part in the membership: a thread that hears its peers, decides, and acts on the log.

    heartbeats ─► PeerTable ─┐
    log.refresh ─► RunView ──┼─► decide(view, limits, now) ─► append GENERATION | ask for a drain | wait
    main thread ─► phase ────┘                                         │
                                    await_generation() ◄───────────────┘  (main thread, rendezvous)

Runs in the agent process. The main thread, which owns the workers, tells what became of them
(`running`, `settling`, `spend`) and asks what to do next (`await_generation`, `must_reform`,
`await_settled`). Nothing here touches a worker.
"""

import asyncio
import dataclasses
import datetime
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import aiohttp
import structlog
from torch.distributed import DistNetworkError, DistStoreError, TCPStore  # type: ignore[attr-defined]

from elastic_pt.elastic.lobby import Lobby
from elastic_pt.elastic.log import RunLog, RunView
from elastic_pt.elastic.membership import (
    Decision,
    Drain,
    Ended,
    Limits,
    NodeStatus,
    Phase,
    Propose,
    View,
    Wait,
    decide,
    is_lost,
    slots_per_member,
)
from elastic_pt.elastic.peers import PeerTable, run_token, serve, watch
from elastic_pt.elastic.records import Checkpoint, Generation, Member, Stop
from elastic_pt.errors import (
    ElasticPtError,
    FencedError,
    LogDamaged,
    NodeFailure,
    StoreError,
)
from elastic_pt.store.port import Store

_ALONE_INTERVAL_S: Final = 1.0
_STORE_CONNECT: Final = datetime.timedelta(seconds=20)

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
    fingerprint: str
    limits: Limits
    heartbeat_interval_s: float
    metrics_url: str = ""


class Node:
    """See the module. `choose_resume` picks where a new generation goes on; `on_drain` asks the workers to stop."""

    def __init__(
        self,
        options: NodeOptions,
        store: Store,
        run_log: RunLog,
        *,
        choose_resume: Callable[[RunView], Checkpoint | None],
        on_drain: Callable[[str], None],
    ) -> None:
        self._options = options
        self._store = store
        self._log = run_log
        self._choose_resume = choose_resume
        self._on_drain = on_drain
        self._table = PeerTable()
        self._changed = threading.Condition()
        self._status = NodeStatus(
            member=Member(
                options.name, secrets.token_hex(8), options.address, 0, os.getpid(), options.workers
            ),
            phase=Phase.WAITING,
            generation=0,
            log_length=0,
            spent=0,
            failure="",
            fingerprint=options.fingerprint,
            metrics_url=options.metrics_url,
        )
        self._newcomers: frozenset[str] = frozenset()
        self._newcomers_changed_s = time.monotonic()
        self._decision: Decision = Wait("starting")
        self._broken: int = 0
        self._alone = False
        self._refreshed_s = float("-inf")
        self._stores: dict[int, TCPStore] = {}
        self._crash: BaseException | None = None
        self._ready = threading.Event()
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._run, name="membership", daemon=True)

    # ---- called by the main thread -------------------------------------------------------------

    def start(self) -> None:
        """Answer peers and begin to look for them."""
        self._thread.start()
        self._ready.wait()
        self._raise_crash()

    def leave(self) -> None:
        """Stop answering; peers see at once that this node is gone."""
        self._leave.set()
        self._thread.join(timeout=10.0)

    @property
    def member(self) -> Member:
        """How this node introduces itself."""
        return self._status.member

    @property
    def view(self) -> RunView:
        """The log as this node last read it."""
        return self._log.view

    @property
    def reason(self) -> str:
        """What this node waits for or does, in words."""
        return self._decision.reason

    def running(self) -> None:
        """The workers of the newest generation have been started."""
        self._say(phase=Phase.RUNNING)

    def settling(self) -> None:
        """The workers have stopped as planned; their checkpoint is on its way."""
        self._say(phase=Phase.SETTLING)

    def spend(self, generation: int, failure: str) -> None:
        """The workers of `generation` are gone; `failure` is empty when that was planned."""
        if generation > self._status.spent:
            self._say(phase=Phase.WAITING, spent=generation, failure=failure)
        else:
            self._say(phase=Phase.WAITING)

    def progress(self, step: int, loss: float | None) -> None:
        """Where the workers are, for heartbeats and `status`."""
        self._say(step=step, loss=loss)

    def must_reform(self, generation: int) -> bool:
        """Whether workers of `generation` have no future: a member is lost, or the log says so."""
        self._raise_crash()
        view = self._log.view
        return (
            self._broken >= generation
            or view.generation_number > generation
            or view.stop is not None
        )

    def await_generation(self) -> Formed | Stop:
        """Block until the log has a generation with this node that it has not spent, or the end of the run."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._crash is not None or self._next() is not None)
                self._raise_crash()
                found = self._next()
            if isinstance(found, Stop):
                return found
            assert found is not None
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
                    f"cannot reach the store at {found.store_address}:{found.store_port}",
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
        with self._changed:
            self._changed.notify_all()

    # ---- shared --------------------------------------------------------------------------------

    def _await(self, condition: Callable[[], bool], deadline_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(condition, timeout=deadline_s)

    def _say(self, **changes: object) -> None:
        with self._changed:
            self._status = dataclasses.replace(self._status, **changes)  # type: ignore[arg-type]

    def _answer(self) -> NodeStatus:
        view = self._log.view
        return dataclasses.replace(
            self._status, log_length=view.length, generation=view.generation_number
        )

    def _next(self) -> Generation | Stop | None:
        view = self._log.view
        if view.stop is not None:
            return view.stop
        generation = view.generation
        if generation is None or generation.number <= self._status.spent:
            return None
        return generation if generation.rank_of(self.member.incarnation) is not None else None

    def _connect(self, generation: Generation) -> TCPStore:
        own = self._stores.get(generation.number)
        if own is not None:
            return own
        return TCPStore(
            generation.store_address,
            generation.store_port,
            is_master=False,
            timeout=_STORE_CONNECT,
        )

    def _raise_crash(self) -> None:
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
        runner, port = await serve(self._options.address, token, self._answer, self._table)
        self._say(member=dataclasses.replace(self._status.member, port=port))
        await asyncio.to_thread(self._log.refresh)
        self._ready.set()
        timeout = aiohttp.ClientTimeout(total=self._options.limits.heartbeat_timeout_s)
        headers = {"Authorization": f"Bearer {token}"}
        watchers: dict[str, asyncio.Task[None]] = {}
        lobby = Lobby(self._store, self._status.member)
        async with aiohttp.ClientSession(
            timeout=timeout, headers=headers, connector=aiohttp.TCPConnector(limit=0)
        ) as session:
            while not self._leave.is_set():
                targets = {each.incarnation: each for each in await self._targets(lobby)}
                for incarnation, member in targets.items():
                    if incarnation not in watchers:
                        watchers[incarnation] = asyncio.create_task(
                            watch(
                                member,
                                session,
                                self._answer,
                                self._table,
                                self._options.heartbeat_interval_s,
                                lobby.forget,
                            )
                        )
                for incarnation in set(watchers) - set(targets):
                    watchers.pop(incarnation).cancel()
                try:
                    await self._think()
                except LogDamaged:
                    raise
                except StoreError as error:
                    log.warning("store_unreachable", error=str(error))
                await asyncio.sleep(self._options.heartbeat_interval_s / 2)
            for task in watchers.values():
                task.cancel()
        await lobby.forget(self._status.member)
        await runner.cleanup()

    async def _targets(self, lobby: Lobby) -> list[Member]:
        """Whom to ask: the other members; for a newcomer with no live member also whoever waits in the lobby."""
        view = self._log.view
        members = () if view.generation is None else view.generation.members
        others = [each for each in members if each.incarnation != self.member.incarnation]
        if len(others) < len(members):
            await lobby.leave()
            self._alone = False
            return others
        now_s = time.monotonic()
        timeout_s = self._options.limits.heartbeat_timeout_s
        self._alone = all(
            is_lost(self._table.peers.get(each.incarnation), now_s, timeout_s) for each in members
        )
        return others + await lobby.waiting() if self._alone else others

    async def _think(self) -> None:
        known = max(
            (peer.status.log_length for peer in self._table.peers.values() if peer.status),
            default=0,
        )
        before = self._log.view
        # With no member left to tell it, a newcomer has to look for itself how the log goes on.
        looks = self._alone and time.monotonic() - self._refreshed_s >= _ALONE_INTERVAL_S
        if known > before.length or looks:
            self._refreshed_s = time.monotonic()
            await asyncio.to_thread(self._log.refresh)
        decision = self._decide()
        acts = isinstance(decision, Propose) or (isinstance(decision, Wait) and decision.broken)
        if acts and self._decision != decision:
            # Someone may have acted already; what the log says comes before what the peers seem to be.
            await asyncio.to_thread(self._log.refresh)
            decision = self._decide()
        if decision != self._decision:
            log.info("decision", kind=type(decision).__name__.lower(), reason=decision.reason)
        self._decision = decision
        await self._act(decision)
        with self._changed:
            self._changed.notify_all()

    def _decide(self) -> Decision:
        now_s = time.monotonic()
        run = self._log.view
        members = {each.incarnation for each in (run.generation.members if run.generation else ())}
        newcomers = frozenset(
            incarnation
            for incarnation, peer in self._table.peers.items()
            if peer.status is not None
            and peer.status.phase is Phase.WAITING
            and incarnation not in members
        )
        if newcomers - self._newcomers:
            self._newcomers_changed_s = now_s
        self._newcomers = newcomers
        view = View(
            self._answer(), run.generation, run.stop, self._table.peers, self._newcomers_changed_s
        )
        return decide(view, self._options.limits, now_s)

    async def _act(self, decision: Decision) -> None:
        number = self._log.view.generation_number
        match decision:
            case Propose():
                self._broken = number
                with self._changed:
                    self._changed.notify_all()
                await asyncio.to_thread(self._propose, decision, number + 1)
            case Wait(broken=True):
                self._broken = number
            case Drain():
                # Said again and again: workers that have not connected yet would miss a single word.
                self._on_drain(decision.reason)
            case Wait() | Ended():
                pass

    def _propose(self, proposal: Propose, number: int) -> None:
        """Bind the generation's store first, then let the log decide."""
        store = TCPStore(
            self._options.address, 0, is_master=True, wait_for_workers=False, timeout=_STORE_CONNECT
        )
        resume = self._choose_resume(self._log.refresh())
        generation = Generation(
            number=number,
            members=proposal.members,
            slots=slots_per_member(proposal.members, self._options.limits.slots),
            store_address=self._options.address,
            store_port=store.port,
            resume=resume,
            reason=proposal.reason,
        )
        try:
            self._stores = {number: store}
            self._log.append(lambda _: generation, generation=number - 1)
            log.info(
                "generation",
                number=number,
                members=[each.node for each in proposal.members],
                resume_step=0 if resume is None else resume.step,
                reason=proposal.reason,
            )
        except FencedError as error:
            self._stores = {}
            log.info("proposal_lost", number=number, reason=str(error))
