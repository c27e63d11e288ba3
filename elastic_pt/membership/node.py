"""One node as its agent's main thread sees it: state its own phase, wait for the next generation.

    main thread ─► running, settling, spend, progress ─► OwnStatus ─► (membership thread) ─► peers
                   await_generation, must_reform      ◄─ RunLog.view ◄─ (membership thread) ◄─ log

The main thread owns the workers. Nothing here touches them. The blocking calls wait on `Driver.changed`, which
the membership thread (`membership.thread`) notifies after every turn.
"""

import os
import secrets
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import structlog
from torch.distributed import DistNetworkError, DistStoreError, TCPStore  # type: ignore[attr-defined]

from elastic_pt.errors import ElasticPtError, NodeFailure
from elastic_pt.membership.decision.node_states import NodeState
from elastic_pt.membership.decision.settled import Settled
from elastic_pt.membership.decision.status import Limits, NodePhase, NodeStatus, StartTimes
from elastic_pt.membership.decision.view import View
from elastic_pt.membership.discovery import Discovery
from elastic_pt.membership.participant import Participant
from elastic_pt.membership.resources import Resources
from elastic_pt.membership.tcp_store import connect_store
from elastic_pt.membership.thread import Driver, MembershipThread
from elastic_pt.runlog.access import Access
from elastic_pt.runlog.ignored import DamagedSpan
from elastic_pt.runlog.log import RunView
from elastic_pt.runlog.records import Cause, CauseKind, Generation, Member, Stop

log = structlog.get_logger("elastic_pt.node")


@dataclass(frozen=True)
class Formed:
    """A generation that this node belongs to, with its store connected."""

    generation: Generation
    node_rank: int
    store: TCPStore


class Left(Exception):
    """This node has left the run in good order."""


def new_member(name: str, address: str, workers: int, zone: str = "") -> Member:
    """This process as a member, with a new incarnation. Its port is 0 until it listens."""
    return Member(name, secrets.token_hex(8), address, 0, os.getpid(), workers, zone)


def new_node(first: NodeStatus, limits: Limits, resources: Resources, access: Access) -> "Node":
    """A node of the run whose agents share this access. It does nothing before `Node.start`."""
    participant = Participant(first, limits, resources)
    return Node(participant, MembershipThread(participant, access, limits.elastic))


class Node:
    """One node, for its agent's main thread."""

    def __init__(self, participant: Participant, driver: Driver) -> None:
        self._participant = participant
        self._driver = driver
        self._changed = driver.changed
        self._left = False
        self.latest: Formed | None = None
        """The generation that `await_generation` has returned last."""

    # ---- start and end -----------------------------------------------------------------------------

    def start(self) -> None:
        """Answer peers and start to look for them."""
        self._driver.start()
        self._raise_crash()

    def request_leave(self, reason: str = "") -> None:
        """Ask to leave in good order; safe to call from a signal handler. The other nodes receive the `reason`."""
        me = self._participant.me
        me.leave_reason = reason or me.leave_reason
        me.leaving = True
        self._driver.wake()

    def cancel_leave(self) -> bool:
        """Take back the request to leave; False if this node has left already.

        Workers that have been asked to stop do stop. The node is then a member of the next generation too.
        """
        with self._changed:
            if not self._left:
                self._participant.me.leaving = False
                self._participant.me.leave_reason = ""
        self._driver.wake()
        return not self._left

    def leave(self) -> None:
        """Stop answering; peers see at once that this node is gone."""
        self._driver.stop()

    @property
    def leaving(self) -> bool:
        """Whether this node has asked to leave."""
        return self._participant.me.leaving

    @property
    def leave_reason(self) -> str:
        """Why this node has asked to leave; empty if nothing more is known."""
        return self._participant.me.leave_reason

    # ---- state -------------------------------------------------------------------------------------

    @property
    def member(self) -> Member:
        """This node as a member, for its messages."""
        return self._participant.member

    @property
    def formed(self) -> Formed:
        """The generation that `await_generation` has returned last. There must be one."""
        assert self.latest is not None
        return self.latest

    @property
    def view(self) -> RunView:
        """The log as this node last read it."""
        return self._participant.log.view

    @property
    def reason(self) -> str:
        """The reason of this node's last decision."""
        return self._participant.decision.reason

    @property
    def facts(self) -> View | None:
        """The facts of this node's last decision; None before the first."""
        return self._participant.view

    def node_states(self) -> dict[NodeState, int]:
        """The number of nodes by state; empty while this node is no member."""
        return self._participant.node_states()

    def read_at_s(self, generation: int) -> float:
        """When this node first read that generation's record, on its monotonic clock."""
        return self._participant.read_at_s(generation)

    def noticed_at_s(self, generation: int) -> float:
        """When this node noticed that a generation is broken, over or replaced; now if it is none of these."""
        return self._participant.noticed_at_s(generation)

    @property
    def alone(self) -> bool:
        """Whether no other node waits for this one: it is no member of the newest generation, or its only member."""
        generation = self.view.generation
        if generation is None or generation.rank_of(self.member.incarnation) is None:
            return True
        return len(generation.members) < 2

    @property
    def mirrors_leave(self) -> bool:
        """Whether all nodes that copy this one's state are known to leave, or are gone."""
        return self._participant.known.mirrors_leave()

    def discovery(self, access: Access) -> Discovery:
        """Finds the metrics endpoints of all nodes that are up."""
        return Discovery(self._participant, access, time.monotonic)

    def others_can_go_on(self) -> bool:
        """Whether enough other nodes are alive and fit to continue the run without this one."""
        return self._participant.known.others_can_go_on()

    # ---- reports to the others ---------------------------------------------------------------------

    def running(self) -> None:
        """The workers of the newest generation have been started."""
        self._say(phase=NodePhase.RUNNING)

    def settling(self) -> None:
        """The workers have stopped as planned; their last state is being mirrored and uploaded."""
        self._say(phase=NodePhase.SETTLING)

    def spend(self, generation: int, failure: Cause | None) -> None:
        """The workers of `generation` are gone; `failure` is None after a planned stop."""
        if generation > self._participant.me.stated.spent:
            self._say(phase=NodePhase.WAITING, spent=generation, failure=failure)
        else:
            self._say(phase=NodePhase.WAITING)

    def failure(
        self,
        detail: str,
        *,
        kind: CauseKind = CauseKind.FAILED,
        step: int = 0,
        signature: str = "",
        surroundings: bool = False,
        damage: tuple[DamagedSpan, ...] = (),
    ) -> Cause:
        """A failure of this node's own workers, in the form for messages and records."""
        # A path in an error may contain bytes that are not UTF-8. Messages and records are UTF-8.
        detail = detail.encode("utf-8", "backslashreplace").decode()
        return Cause(
            kind,
            self.member.node,
            detail,
            step,
            signature,
            surroundings=surroundings,
            damage=damage,
        )

    def rest(self, why: str, seconds: float) -> None:
        """Take no part in the run for so many seconds; the others continue without this node."""
        self._participant.me.rest(why, seconds)
        self._driver.wake()

    def progress(self, step: int, loss: float | None) -> None:
        """The workers' progress, for heartbeats and `status`."""
        self._participant.me.step_done(step, loss)

    def first_step(self, times: StartTimes) -> None:
        """The workers of a generation have done their first step."""
        self._say(start_times=times)

    def states_changed(self) -> None:
        """This node holds more in memory, or its mirrors do. Peers get it at once if they wait for it."""
        if self._participant.me.stated.phase is NodePhase.SETTLING:
            self._driver.wake()

    def notice_log(self) -> None:
        """Another thread of this process has appended to the log: take a turn now."""
        self._driver.wake()

    def _say(self, **changes: object) -> None:
        self._participant.me.say(**changes)
        self._driver.wake()

    # ---- waiting -----------------------------------------------------------------------------------

    def must_reform(self, generation: int) -> bool:
        """Whether workers of `generation` must end: this node found it broken, or the log has a newer one."""
        self._raise_crash()
        view = self.view
        return (
            self._participant.broken >= generation
            or view.generation_number > generation
            or view.stop is not None
        )

    def await_generation(self) -> Formed | Stop:
        """Block until the log has a generation with this node that it has not spent, or the end of the run.

        Raises `Left` when this node has asked to leave and the others can resume from the newest state without it, and
        `ConfigError` when the run refuses it.
        """
        while True:
            with self._changed:
                self._changed.wait_for(self._can_go_on)
                self._raise_crash()
                found = self._next()
                self._left = found is None
            if isinstance(found, Stop):
                return found
            if found is None:
                raise Left
            rank = found.rank_of(self.member.incarnation)
            assert rank is not None
            try:
                self.latest = Formed(found, rank, self._connect(found))
                return self.latest
            except (DistNetworkError, DistStoreError) as error:
                reason = str(error).splitlines()[0]
                log.warning("store_unreachable", generation=found.number, error=reason)
                detail = f"cannot reach the store at {found.store_address}:{found.store_port}"
                self.spend(found.number, self.failure(detail, kind=CauseKind.GAVE_UP))

    def await_settled(
        self,
        generation: Generation,
        step: int,
        timeout_s: float,
        given_up: Callable[[], bool],
        mirrors_have_step: Callable[[Collection[str]], bool],
    ) -> Settled:
        """Block until the state of `step` is safe in memory or in the bucket, or the checkpoint is given up.

        In memory it is safe if the members that stay hold it, and the mirrors of this node among them have its share:
        `mirrors_have_step(incarnations of the nodes that stay)`. A mirror that leaves may be gone before it has copied anything.
        Returns where it is safe. In neither if `generation` is broken, if the checkpoint is given up, or in the end.
        """

        def settled() -> Settled:
            found = self._participant.known.settled(generation, step)
            if found.tier == "memory" and not mirrors_have_step(self._participant.known.staying()):
                return Settled("", f"step {step} is neither committed nor mirrored")
            return found

        self._await(
            lambda: bool(settled()) or self.must_reform(generation.number) or given_up(), timeout_s
        )
        return settled()

    def await_end(self, generation: int, timeout_s: float, given_up: Callable[[], bool]) -> bool:
        """Block until the log has a STOP; False if `generation` is broken or its last checkpoint is given up."""
        self._await(lambda: self.must_reform(generation) or given_up(), timeout_s)
        return self.view.stop is not None

    def await_reform(self, generation: int, timeout_s: float) -> bool:
        """Block until workers of `generation` must end (True), at most `timeout_s`."""
        return self._await(lambda: self.must_reform(generation), timeout_s)

    def _await(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(condition, timeout=timeout_s)

    def _can_go_on(self) -> bool:
        return (
            self._driver.crash is not None
            or self._participant.refusal is not None
            or self._next() is not None
            or (self.leaving and not self._participant.known.is_needed())
        )

    def _next(self) -> Generation | Stop | None:
        view = self.view
        if view.stop is not None:
            return view.stop
        generation = view.generation
        if generation is None or generation.number <= self._participant.me.stated.spent:
            return None
        return generation if generation.rank_of(self.member.incarnation) is not None else None

    def _connect(self, generation: Generation) -> TCPStore:
        own = self._participant.appender.stores.get(generation.number)
        if isinstance(own, TCPStore):
            return own
        return connect_store(generation, self._changed, lambda: self.must_reform(generation.number))

    def _raise_crash(self) -> None:
        crash = self._driver.crash
        if self._participant.refusal is not None:
            raise self._participant.refusal
        if isinstance(crash, ElasticPtError):
            raise crash
        if crash is not None:
            raise NodeFailure(f"membership stopped: {crash!r}") from crash
