"""One agent: the production `Participant`, `RunLog`, `Lobby`, `Pulse` and `Node`, on simulated threads.

Greenlets do the work of `MembershipThread`, of `Agent`'s main thread, of `Uploads` and of `Committer`, in the same order
and with the same waits. `checkpoint.in_flight` (what may be committed, and by which node) and `choose_resume` are the
production code.

    membership   log.refresh ─► [ turn ─► aim ─► say ─► wait for news ] ...
    pulse        [ step_pulse ─► sleep ] ...
    main         [ await_generation ─► start workers ─► watch ─► settle | fail | give up ─► spend ] ...
    upload       kept buffers, or copies of those of a lost node ─► bucket
    commit       parts of all members uploaded ─► append COMMIT (STOP after the last step)
"""

import dataclasses
import random
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from torch.distributed import DistNetworkError  # type: ignore[attr-defined]

from elastic_pt.agent.checkpointing import choose_resume
from elastic_pt.agent.holdings import State
from elastic_pt.checkpoint import in_flight
from elastic_pt.errors import (
    AlreadyExists,
    ElasticPtError,
    FencedError,
    LogDamaged,
    NodeFailure,
    StoreError,
)
from elastic_pt.membership.decision.budgets import rest_s
from elastic_pt.membership.decision.mirrors import mirrored_by
from elastic_pt.membership.decision.status import Limits, NodeStatus, StartTimes, is_news
from elastic_pt.membership.node import Formed, Left, Node
from elastic_pt.membership.participant import Participant
from elastic_pt.membership.resources import Resources
from elastic_pt.runlog.control import ask, carried_out
from elastic_pt.runlog.ignored import still_damaged
from elastic_pt.runlog.log import RunLog, RunView
from elastic_pt.runlog.records import (
    COMPLETED,
    Body,
    CauseKind,
    Checkpoint,
    Commit,
    Generation,
    Member,
    Record,
    Request,
    Stop,
    Verb,
)
from tests.sim.bucket import Bucket
from tests.sim.buffers import BufferFile, SnapshotHabits
from tests.sim.checks import Witness
from tests.sim.links import SimulatedLinks
from tests.sim.memory import Memory
from tests.sim.network import Machine, Network
from tests.sim.scheduler import Condition, Event, Lock, Process, Scheduler
from tests.sim.training import State as WorkerState
from tests.sim.training import Training, Workers, checkpoint_of

_HINTS_DEADLINE_S: Final = 2.0
_MONITOR_INTERVAL_S: Final = 0.1
_STORE_CONNECT_S: Final = 20.0
_STORE_AGAIN_S: Final = 1.0
_POLL_S: Final = 0.05
_POLL_MAX_S: Final = 0.5
_RETRIES_WITHOUT_PROGRESS: Final = 3
_ASK_AGAIN_S: Final = 0.5


@dataclass(frozen=True)
class Costs:
    """Processor time of an agent, which does one thing after the other. Zero, except in simulations of large fleets."""

    receive_s: float = 0.0
    """For each message that it receives."""
    send_s: float = 0.0
    """For each message that it sends."""
    turn_s: float = 0.0
    """For each turn, and each node that it knows of."""
    record_s: float = 0.0
    """For each member of a generation whose record it reads."""


@dataclass(frozen=True)
class Habits:
    """What all nodes of a simulated run have in common."""

    limits: Limits
    store_deadline_s: float
    settle_timeout_s: float
    costs: Costs = field(default_factory=Costs)
    snapshots: SnapshotHabits | None = None


@dataclass
class Surrounding:
    """What all agents of a simulation share."""

    scheduler: Scheduler
    network: Network
    bucket: Bucket
    training: Training
    witness: Witness
    habits: Habits
    memory_random: random.Random
    """For what the states in memory draw."""
    agents: dict[str, "AgentProcess"]
    """Every agent there ever was, by incarnation."""


@dataclass(frozen=True)
class Due:
    """A checkpoint of which this node has a part."""

    step: int
    generation: Generation
    since_s: float
    """When this node's workers saved it, on its clock."""

    @property
    def state(self) -> State:
        """Its generation and step."""
        return self.generation.number, self.step


@dataclass(eq=False)
class SimulatedStore:
    """A TCPStore: an address, as long as its process lives."""

    port: int


class WitnessedLog(RunLog):
    """The production log; the witness hears which agent appends what on whose behalf, and what came of it."""

    def __init__(self, store: Any, process: "AgentProcess | Operator") -> None:
        super().__init__(store, writer=process.name)
        self._lock = Lock(process)  # type: ignore[assignment]
        self._process = process
        self._witness = process.around.witness

    def append(self, make: Callable[[RunView], Body], *, generation: int) -> RunView:
        attempt = self._witness.appending(self._process, generation)

        def made(view: RunView) -> Body:
            # The lock is held from here to the end of the append.
            self._attempt = attempt
            return make(view)

        try:
            view = super().append(made, generation=generation)
        except FencedError:
            attempt.lost()
            raise
        attempt.won()
        return view

    def _next_record(self, view: RunView, body: Body) -> Record:
        record = super()._next_record(view, body)
        self._attempt.tries(record)
        return record


class Operator(Process):
    """Who asks something of the run, from a machine that reaches only the bucket."""

    def __init__(self, around: Surrounding) -> None:
        super().__init__(around.scheduler, "operator")
        self.around = around
        store = around.bucket.store_for(self, self.name, _HINTS_DEADLINE_S)
        self.log = WitnessedLog(store, self)
        self._due: deque[Request] = deque()
        self._asking = False

    def ask(self, request: Request) -> None:
        """Append the request, after those before it and as often as the bucket fails."""
        self._due.append(request)
        if not self._asking:
            self._asking = True
            self.spawn(self._ask_all)

    def _ask_all(self) -> None:
        while self._due:
            request = self._due[0]
            try:
                number = self.log.view.generation_number
                self.log.append(lambda view, request=request: ask(view, request), generation=number)  # type: ignore[misc]
            except FencedError:
                # The run has ended.
                self._due.clear()
            except StoreError:
                self.sleep(_ASK_AGAIN_S)
            else:
                self._due.popleft()
        self._asking = False


class SimulatedDriver:
    """What the membership thread is to a `Node`; `AgentProcess` runs the simulated one."""

    crash: BaseException | None = None

    def __init__(self, process: "AgentProcess") -> None:
        self._process = process
        self.changed: Any = Condition(process)

    def start(self) -> None:
        """Nothing: `AgentProcess.boot` starts the threads."""

    def stop(self) -> None:
        """Nothing: `AgentProcess.exit` ends them."""

    def wake(self, *, tell: bool = True) -> None:
        """Take a turn soon, and tell peers the own status."""

        def wake() -> None:
            self._process.news.set()
            if tell:
                self._process.links.say(asks=False)

        self._process.soon(wake)


class SimulatedNode(Node):
    """The production node, as its main thread uses it; connecting to a store takes simulated time."""

    def __init__(self, process: "AgentProcess", driver: SimulatedDriver) -> None:
        super().__init__(process.participant, driver)
        self._process = process

    def changed(self) -> None:
        """The waiters should look again."""
        self._changed.notify_all()

    def _connect(self, generation: Generation) -> Any:
        own = self._participant.appender.stores.get(generation.number)
        if own is not None:
            return own
        process = self._process
        answered: list[bool] = []

        def opened(end: Any) -> None:
            end.close()
            answered.append(True)
            self.changed()

        def dial() -> None:
            """Torch's client asks again until its time is over, also when it is refused."""
            if not answered and not self.must_reform(generation.number):
                process.around.network.connect(
                    process,
                    process.machine,
                    generation.store_address,
                    generation.store_port,
                    timeout_s=_STORE_CONNECT_S,
                    on_open=opened,
                    on_refused=lambda: process.after(_STORE_AGAIN_S, dial),
                    on_failed=lambda: None,
                )

        dial()
        self._await(lambda: bool(answered) or self.must_reform(generation.number), _STORE_CONNECT_S)
        if not answered:
            raise DistNetworkError("timed out")
        return SimulatedStore(generation.store_port)


class _StoreListener:
    """The port of a TCPStore; it lives in its agent's process, on a thread of its own."""

    def __init__(self, process: Process) -> None:
        self.process = process

    def accept(self, end: Any) -> None:
        """Anyone may connect."""


class AgentProcess(Process):
    """One life of one node's agent."""

    def __init__(
        self,
        around: Surrounding,
        machine: Machine,
        node: str,
        incarnation: str,
        fingerprint: dict[str, str],
        workers: int,
        on_exit: Callable[["AgentProcess", str], None],
    ) -> None:
        super().__init__(around.scheduler, f"{machine.name}/{incarnation[:4]}")
        self.around = around
        self.machine = machine
        self.incarnation = incarnation
        self._on_exit = on_exit
        source = around.scheduler.random
        self.clock_offset_s = source.uniform(0.0, 1e5)
        self.clock_rate = source.uniform(0.995, 1.005)
        self._wall_offset_s = source.uniform(-1e5, 1e5)
        self._member = Member(node, incarnation, machine.address, 0, 1, workers)
        self._fingerprint = fingerprint
        self.store = around.bucket.store_for(self, machine.name, around.habits.store_deadline_s)
        hints = around.bucket.store_for(self, machine.name, _HINTS_DEADLINE_S)
        self.log = WitnessedLog(self.store, self)
        self.news = Event(self)
        self.ready = False
        self.workers: Workers | None = None
        self.memory = Memory(self, around.habits.snapshots)
        self.generation: Generation | None = None
        """Whose workers this agent has started last."""
        self.participant = Participant(
            NodeStatus.first(self._member, fingerprint),
            around.habits.limits,
            Resources(
                log=self.log,
                hints=hints,
                clock_s=self.liveness_clock_s,
                bind_store=self._bind_store,
                choose_resume=self._choose_resume,
                choose_mirrors=partial(
                    mirrored_by,
                    copies=0 if around.habits.snapshots is None else around.habits.snapshots.copies,
                    across_zones=False,
                ),
                states=self.memory,
                on_drain=self._drain,
                on_checkpoint=self._checkpoint,
                on_leave=lambda _: self.node.request_leave(),
            ),
        )
        self.node = SimulatedNode(self, SimulatedDriver(self))
        self.links = SimulatedLinks(
            self,
            machine,
            around.network,
            self.participant,
            self.news.set,
            lambda message: around.witness.heard(self, message),
        )
        self.links.receive_s = around.habits.costs.receive_s
        self.links.send_s = around.habits.costs.send_s
        self._parsed = 0
        self._due: list[Due] = []
        """Oldest first."""
        self._committing = False
        self._commit_news = Event(self)
        self._store_fails = False
        """Whether a request of the last look failed."""
        self._uncommitted = (0, 0)
        self._staged_step = 0
        self._finish: Generation | None = None
        """The generation whose workers have done the last step, until the run has ended."""
        self._frontier_step = 0
        self._failures_at_frontier = 0
        self.rested = False
        """Whether this life of the node has rested."""

    def liveness_clock_s(self) -> float:
        """What the membership takes for its clock."""
        return self.clock_s()

    def wall_clock_s(self) -> float:
        """The time of day of this machine. It is set back and forth, also while nothing else is wrong."""
        hours = round(self._wall_offset_s + self.scheduler.now_s / 5.0) % 3
        return self.scheduler.now_s + self._wall_offset_s + 3600.0 * hours

    def boot(self, port: int | None = None) -> None:
        """Begin. `port` is where to answer; None takes a free one."""
        self._port = port
        self.spawn(self._guarded(self._membership))

    # ---- how it ends -------------------------------------------------------------------------------

    def exit(self, why: str) -> None:
        """The process ends, and its workers with it; its machine closes its connections."""
        if self.dead:
            return
        self.around.network.process_ended(self, self.machine)
        self._end(why)

    def vanish(self) -> None:
        """The machine is gone, without a word."""
        if not self.dead:
            self._end("machine gone")

    def _end(self, why: str) -> None:
        if self.generation is not None:
            self.around.training.kill(self.generation, self.incarnation)
        self.kill()
        self.around.witness.memory.lost(self.memory)
        self._on_exit(self, why)

    def _guarded(self, run: Callable[[], None]) -> Callable[[], None]:
        def guarded() -> None:
            try:
                run()
            except ElasticPtError as error:
                self.exit(f"{type(error).__name__}: {error}")

        return guarded

    # ---- membership thread -------------------------------------------------------------------------

    def _membership(self) -> None:
        # Production crashes here if the bucket does not answer, and is started again.
        port = self._port if self._port is not None else self.machine.free_port()
        self.machine.listeners[port] = _Answering(self)
        self.participant.begin(dataclasses.replace(self._member, port=port))
        self.log.refresh()
        self.ready = True
        self.spawn(self._guarded(self._keep_pulse))
        self.spawn(self._guarded(self._main))
        while True:
            self.news.clear()
            self._turn()
            self.news.wait(self.around.habits.limits.elastic.heartbeat_interval_s)

    def _turn(self) -> None:
        participant, links = self.participant, self.links
        told = participant.me.now
        self._work()
        try:
            participant.turn()
        except LogDamaged as error:
            self.around.witness.damaged(self, error)
        except StoreError:
            pass
        links.aim(participant.contacts.targets)
        asks = participant.wants_answers()
        if asks or is_news(participant.me.now, told):
            links.say(asks=asks)
        self.node.changed()

    def _work(self) -> None:
        """What a turn, and reading what is new in the log, costs; messages wait meanwhile."""
        costs = self.around.habits.costs
        known, number = len(self.participant.table.peers), self.log.view.generation_number
        cost_s = costs.turn_s * known
        if number != self._parsed:
            generation = self.log.view.generation
            self._parsed = number
            cost_s += costs.record_s * len(generation.members if generation else ())
        if cost_s:
            self.sleep(self.links.busy(cost_s))

    def _keep_pulse(self) -> None:
        while True:
            self.participant.step_pulse()
            self.sleep(self.around.habits.limits.elastic.heartbeat_interval_s)

    def _bind_store(self) -> SimulatedStore:
        port = self.machine.free_port()
        self.machine.listeners[port] = _StoreListener(self)
        return SimulatedStore(port)

    def _choose_resume(self, view: RunView) -> Checkpoint | None:
        return choose_resume(self.store, self.log, view, self.incarnation)

    def _drain(self, reason: str) -> None:
        if self.generation is not None:
            self.around.training.drain(self.generation, self.incarnation)

    def _checkpoint(self, request: int) -> None:
        if self.generation is not None:
            self.around.training.checkpoint(self.generation, self.incarnation, request)

    # ---- main thread -------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            while True:
                found = self.node.await_generation()
                if isinstance(found, Stop):
                    break
                self._train(found)
        except Left:
            self._answer_drain()
            self.participant.depart()
            self.exit("left")
            return
        self.participant.depart()
        self.exit("run ended")

    def _answer_drain(self) -> None:
        request = self.log.view.request(Verb.DRAIN, self._member.node)
        if request is None:
            return
        number = self.log.view.generation_number
        with suppress(FencedError, StoreError):
            self.log.append(lambda view: carried_out(view, request), generation=number)

    def _train(self, formed: Formed) -> None:
        generation, number = formed.generation, formed.generation.number
        self.node.running()
        self.generation = generation
        self.around.witness.starts(self, generation)
        source = self.scheduler.random
        start_s = 0.03 + 0.2 * source.random()
        self._started_s, self._start_s, self._told = self.clock_s(), start_s, False
        workers = self.workers = Workers(
            self,
            self.machine,
            self.incarnation,
            on_change=self.node.changed,
            on_step=lambda step: self._step_done(step, number),
            on_checkpoint=lambda step: self._stage(step, generation),
        )
        buffers = workers.buffers = self.memory.starts(formed)
        if buffers is not None:
            workers.on_snapshot = partial(self.memory.written, buffers)
        if generation.memory is not None:
            workers.restore = lambda done: self.memory.restore(formed, done)
        self._adopt(generation)
        self.around.training.start(generation, workers, start_s)
        while workers.up:
            # A short timeout: a membership thread that waits for the bucket notifies no waiter.
            self.node._await(
                lambda: not workers.up or self.node.must_reform(number), _MONITOR_INTERVAL_S
            )
            if self.node.must_reform(number):
                break
        if workers.state is WorkerState.FAILED:
            self._worker_failed(workers, number)
        elif workers.state is WorkerState.FINISHED:
            self._settle(formed, workers)
        else:
            self.around.training.kill(generation, self.incarnation)
            self.sleep(0.01)
            self.node.spend(number, None)

    def _step_done(self, step: int, number: int) -> None:
        self.node.progress(step, None)
        checkpoints = self.log.view.checkpoints
        self.memory.committed(checkpoints[0].step if checkpoints else 0)
        if not self._told:
            self._told = True
            self.node.first_step(
                StartTimes(number, self._start_s, 0.0, 0.0, self.clock_s() - self._started_s)
            )
        if step > self._frontier_step:
            self._frontier_step, self._failures_at_frontier = step, 0

    def _worker_failed(self, workers: Workers, number: int) -> None:
        node, limits = self.node, self.around.habits.limits
        collateral = workers.collateral and node.await_reform(
            number, 2 * limits.elastic.heartbeat_timeout_s
        )
        kind = CauseKind.FAILED
        damage = still_damaged(self.generation.ignored if self.generation else (), workers.damage)
        if workers.detail.startswith("CheckpointError"):
            kind = CauseKind.UNUSABLE
        elif damage:
            kind = CauseKind.DAMAGED
        own = node.failure(
            workers.detail,
            kind=kind,
            step=workers.step,
            signature=workers.signature,
            surroundings=not workers.signature,
            damage=damage,
        )
        at_fault = kind is CauseKind.FAILED and not collateral
        own_fault = at_fault and not node.must_reform(number)
        if own_fault:
            self._rest_after(workers.detail)
        node.spend(number, None if collateral else own)
        too_often = self._failures_at_frontier > _RETRIES_WITHOUT_PROGRESS
        if own_fault and too_often and node.others_can_go_on():
            raise NodeFailure(f"workers failed {self._failures_at_frontier} times")

    def _rest_after(self, trouble: str) -> None:
        self._failures_at_frontier += 1
        self.around.witness.failed(self, self._failures_at_frontier)
        seconds = rest_s(self._failures_at_frontier, self.scheduler.random.random())
        if seconds:
            self.rested = True
            self.node.rest(trouble, seconds)

    def _settle(self, formed: Formed, workers: Workers) -> None:
        node, number = self.node, formed.generation.number
        node.settling()
        timeout_s, step = self.around.habits.settle_timeout_s, workers.step
        if step >= self.around.training.plan.steps:
            if formed.node_rank == 0:
                self._finish = formed.generation
                self._commit_soon()
            settled = node.await_end(number, timeout_s, self._given_up)
        else:
            found = node.await_settled(
                formed.generation,
                step,
                timeout_s,
                self._given_up,
                lambda stay: self.memory.holdings.is_complete(step, stay),
            )
            settled = bool(found)
        failure = None
        trouble = f"the checkpoint of step {step} was not committed"
        if not settled and not node.must_reform(number):
            failure = node.failure(trouble, kind=CauseKind.GAVE_UP)
            self._rest_after(trouble)
        node.spend(number, failure)

    def _given_up(self) -> bool:
        return self.generation is not None and self._uncommitted == (
            self.generation.number,
            self._staged_step,
        )

    # ---- upload and commit threads -------------------------------------------------------------------

    @property
    def expects_commits(self) -> bool:
        """Whether a checkpoint of which this node has a part is neither committed nor given up."""
        return bool(self._due)

    def _stage(self, step: int, generation: Generation) -> None:
        due = Due(step, generation, self.clock_s())
        self._staged_step = step
        self._due.append(due)
        files = self.memory.kept(due.state)
        self.spawn(lambda: self._upload(due, self.incarnation, files))
        self._commit_soon()

    def _adopt(self, newest: Generation) -> None:
        """Upload the parts of nodes that are no members any more, if this node has copies of all their shards."""
        for due in self._due:
            ranks = due.generation.worker_ranks()
            for index, member in enumerate(due.generation.members):
                files = self.memory.adoptable(due.state, ranks[index])
                if newest.rank_of(member.incarnation) is None and files:
                    owner = member.incarnation
                    self.spawn(
                        lambda due=due, owner=owner, files=files: self._upload(due, owner, files)
                    )

    def _upload(self, due: Due, owner: str, files: list[BufferFile]) -> None:
        """Upload a node's part: this node's, or the copies of one that is no member any more."""
        world = self.around.training.world(due.generation)
        directory = checkpoint_of(world, due.step)["directory"]
        own, snapshots = owner == self.incarnation, self.around.habits.snapshots
        try:
            if snapshots is not None:
                self.sleep(snapshots.upload_s)
            self.store.write(f"{directory}/{owner}", b"shard")
            if due not in self._due:
                # Over meanwhile: its buffers are free.
                return
            if own:
                self.around.witness.memory.uploaded(self.memory, files, due.state)
            elif any((each.generation, each.step) != due.state for each in files):
                return
        except StoreError:
            return
        finally:
            if own:
                self._release(due)
        if not own:
            self.around.witness.memory.adopted += 1
        world.uploaded.setdefault(due.step, set()).add(owner)

    def _release(self, due: Due) -> None:
        self.memory.release(due.state)
        self.around.training.released(due.generation, self.incarnation, due.step)

    def _commit_soon(self) -> None:
        self._commit_news.set()
        if not self._committing:
            self._committing = True
            self.spawn(self._commit_all)

    def _commit_all(self) -> None:
        while self._due or self._finish is not None:
            self._commit_news.clear()
            self._store_fails = False
            # The newest first: once it is committed, the others are over.
            for due in reversed(self._due[:]):
                self._look_at(due)
            self._end_run()
            view = self.log.view
            acts = self._finish is not None or any(self._is_mine(view, due) for due in self._due)
            self._commit_news.wait(_POLL_S if acts and not self._store_fails else _POLL_MAX_S)
        self._committing = False

    def _look_at(self, due: Due) -> None:
        """Commit a checkpoint if it is complete and this node's turn, and drop it when it is over."""
        view = self.log.view
        over, committed, failed = self._over(view, due), False, False
        try:
            committed = not over and self._commit(view, due)
        except FencedError:
            # Another record came first. The next look decides again.
            pass
        except StoreError as error:
            self._store_fails = True
            failed = isinstance(error, AlreadyExists | LogDamaged) or self._is_late(due)
        if not (over or committed or failed):
            return
        if failed:
            self._uncommitted = due.state
        self._due.remove(due)
        self._release(due)
        self.node.notice_log()

    def _over(self, view: RunView, due: Due) -> bool:
        late = self._is_late(due) and not self._is_mine(view, due)
        return bool(in_flight.over(view, due.generation.number, due.step)) or late

    def _is_mine(self, view: RunView, due: Due) -> bool:
        member = in_flight.committer(view, due.generation.number)
        return member is not None and member.incarnation == self.incarnation

    def _is_late(self, due: Due) -> bool:
        return self.clock_s() - due.since_s >= self.around.habits.settle_timeout_s

    def _commit(self, view: RunView, due: Due) -> bool:
        """Append the COMMIT if it is this node's turn and all parts are there. Whether it did."""
        if not self._is_mine(view, due):
            return False
        world = self.around.training.world(due.generation)
        members = {each.incarnation for each in due.generation.members}
        if not members <= world.uploaded.get(due.step, set()):
            if self._is_late(due):
                raise StoreError(f"shards of step {due.step} are missing")
            return False
        named = checkpoint_of(world, due.step)
        self.store.write(f"{named['directory']}/manifest.json", b"manifest")
        before = self.log.refresh()
        if self._over(before, due) or not self._is_mine(before, due):
            return False
        checkpoint = Checkpoint(manifest_size=1, manifest_sha256="0" * 64, loss=None, **named)
        request = world.met[due.step]

        def commit(view: RunView) -> Commit:
            if view.commit != before.commit:
                raise FencedError("another checkpoint was committed first")
            met = -1 if view.commit is None else view.commit.request
            return Commit((checkpoint, *view.checkpoints)[:3], "history", request=max(request, met))

        self.log.append(commit, generation=before.generation_number)
        return True

    def _end_run(self) -> None:
        """Append STOP once the checkpoint of the last step is committed."""
        generation, last_step = self._finish, self.around.training.plan.steps
        if generation is None:
            return
        view = self.log.view
        if view.stop is None and view.generation_number == generation.number:
            if not view.checkpoints or view.checkpoints[0].step < last_step:
                return
            try:
                self.log.append(lambda _: Stop(COMPLETED, last_step), generation=generation.number)
            except FencedError:
                pass
            except StoreError:
                self._store_fails = True
                return
        self._finish = None
        self.node.notice_log()


class _Answering:
    """An agent's own port."""

    def __init__(self, process: AgentProcess) -> None:
        self.process = process

    def accept(self, end: Any) -> None:
        """Another agent dials."""
        self.process.links.accept(end)
