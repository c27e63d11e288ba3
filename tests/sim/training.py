"""Workers as the agents see them: a world makes a step when the workers of all its members can take part.

    start ─► ready ─► step, step, ... ─┬─► finished   (all after the same step: a drain, or the last step)
                                       ├─► failed     (by itself, or because another member's workers are gone)
                                       └─► killed     (by its agent, or with it)

Workers are processes of their own: they stand still with their machine, and not with their agent.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from elastic_pt.runlog.ignored import DamagedSpan
from elastic_pt.runlog.records import Generation
from tests.sim.buffers import Buffers, Complete, SnapshotHabits
from tests.sim.damage import Damage, met
from tests.sim.network import Machine, Network
from tests.sim.scheduler import Process, Scheduler

_STALL_LOOK_S: Final = 0.1
_ROOM_LOOK_S: Final = 0.05


class State(StrEnum):
    """What becomes of one member's workers."""

    STARTING = "starting"
    READY = "ready"
    FINISHED = "finished"
    FAILED = "failed"
    KILLED = "killed"


@dataclass(frozen=True)
class Plan:
    """What is trained."""

    steps: int
    """The last one; then the run is completed."""
    step_s: float
    checkpoint_every: int
    poison_step: int = 0
    """The step at which always the same exception comes; 0 for none."""
    damage: Mapping[int, tuple[Damage, ...]] = field(default_factory=dict)
    """What is damaged of the data, by the step that reads it."""


@dataclass(eq=False)
class Workers:
    """One member's workers of one generation."""

    agent: Process
    machine: Machine
    incarnation: str
    on_change: Callable[[], None]
    on_step: Callable[[int], None]
    on_checkpoint: Callable[[int], None]
    on_snapshot: Callable[[int, Complete, bool], None] = lambda *_: None
    """Called with its step, with what was complete everywhere, and whether a checkpoint keeps it."""
    buffers: Buffers | None = None
    restore: Callable[[Callable[[str], None]], None] | None = None
    """Reads the state from the memory of nodes, before the first step; None if there is none."""
    state: State = State.STARTING
    detail: str = ""
    signature: str = ""
    damage: tuple[DamagedSpan, ...] = ()
    collateral: bool = False
    paused: bool = False
    doomed: bool = False
    """Whether the end of another member's workers is on its way to it."""
    step: int = 0

    @property
    def up(self) -> bool:
        """Whether the processes are there."""
        return self.state in (State.STARTING, State.READY)


@dataclass(eq=False)
class World:
    """The workers of one generation."""

    generation: Generation
    workers: dict[str, Workers] = field(default_factory=dict)
    step: int = 0
    drain_at: int = 0
    """The step after which all stop; 0 while none was asked for."""
    checkpoint_step: int = 0
    """The newest checkpoint."""
    pending: set[str] = field(default_factory=set)
    """Members that have not uploaded their part of it. The next one waits for them, and not for the COMMIT."""
    uploaded: dict[int, set[str]] = field(default_factory=dict)
    """Members whose shards of a step are in the bucket."""
    request: int = -1
    """The newest request for a checkpoint that the workers know of."""
    met: dict[int, int] = field(default_factory=dict)
    """The request that the checkpoint of a step meets."""
    snapshot_step: int = 0
    """The newest snapshot."""
    stopping: bool = False
    """Whether the last step has been done, before a drain or the end of the run."""


class Training:
    """All worlds there ever were."""

    def __init__(
        self,
        scheduler: Scheduler,
        network: Network,
        plan: Plan,
        snapshots: SnapshotHabits | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.network = network
        self.plan = plan
        self.snapshots = snapshots
        self.worlds: dict[int, World] = {}
        self.unfit: Counter[str] = Counter()
        """Machines whose workers cannot start now, through no fault of the program: how many troubles each has."""
        self.on_step: Callable[[World], None] = lambda _: None
        self.on_agree: Callable[[int, int], None] = lambda *_: None
        """Called with a generation and the step of which its workers know that it is complete everywhere."""
        self.steps_done = 0

    def world(self, generation: Generation) -> World:
        """The world of a generation."""
        if generation.number not in self.worlds:
            step, resume = generation.resume_step, generation.resume
            committed_step = 0 if resume is None else resume.step
            self.worlds[generation.number] = World(
                generation, step=step, checkpoint_step=committed_step
            )
        return self.worlds[generation.number]

    def start(self, generation: Generation, workers: Workers, start_s: float) -> None:
        """Fork a member's workers; they are ready `start_s` later."""
        world = self.world(generation)
        world.workers[workers.incarnation] = workers
        workers.step = world.step
        self.scheduler.after(start_s, lambda: self._ready(world, workers))

    def kill(self, generation: Generation, incarnation: str) -> None:
        """SIGKILL to a member's workers."""
        world = self.worlds.get(generation.number)
        workers = None if world is None else world.workers.get(incarnation)
        if world is not None and workers is not None and workers.up:
            self._end(world, workers, State.KILLED)

    def fail(self, workers: Workers, detail: str, signature: str = "") -> None:
        """A member's worker ends badly by itself."""
        for world in self.worlds.values():
            if world.workers.get(workers.incarnation) is workers and workers.up:
                workers.detail, workers.signature = detail, signature
                self._end(world, workers, State.FAILED)

    def drain(self, generation: Generation, incarnation: str) -> None:
        """A member's agent asks its workers to have all stop; unheard while they are not connected."""
        world = self.worlds.get(generation.number)
        workers = None if world is None else world.workers.get(incarnation)
        if world is not None and workers is not None and workers.state is State.READY:
            world.drain_at = world.drain_at or world.step + 1

    def checkpoint(self, generation: Generation, incarnation: str, request: int) -> None:
        """A member's agent asks its workers for a checkpoint; unheard while they are not connected."""
        world = self.worlds.get(generation.number)
        workers = None if world is None else world.workers.get(incarnation)
        if world is not None and workers is not None and workers.state is State.READY:
            world.request = max(world.request, request)

    def released(self, generation: Generation, incarnation: str, step: int) -> None:
        """A member's agent is done with its part of a checkpoint."""
        world = self.world(generation)
        if step == world.checkpoint_step:
            world.pending.discard(incarnation)

    # ---- inside ------------------------------------------------------------------------------------

    def _ready(self, world: World, workers: Workers) -> None:
        if workers.state is not State.STARTING:
            return
        if self.unfit[workers.machine.name]:
            self.fail(workers, "OSError: [Errno 28] No space left on device")
            return
        if workers.restore is not None:
            restore, workers.restore = workers.restore, None
            restore(lambda error: self._restored(world, workers, error))
            return
        workers.state = State.READY
        members = world.generation.members
        states = [world.workers.get(each.incarnation) for each in members]
        if any(each is not None and not each.up for each in states):
            self._reset_others(world, workers)
        if all(each is not None and each.state is State.READY for each in states):
            self._next_step(world)

    def _restored(self, world: World, workers: Workers, error: str) -> None:
        if not error:
            self._ready(world, workers)
        elif workers.state is State.STARTING:
            self.fail(workers, error)

    def _next_step(self, world: World) -> None:
        duration_s = self.plan.step_s * (0.8 + 0.4 * self.scheduler.random.random())
        self.scheduler.after(duration_s, lambda: self._step_done(world))

    def _step_done(self, world: World) -> None:
        members = [world.workers[each.incarnation] for each in world.generation.members]
        if any(each.state is not State.READY for each in members):
            return
        if not self._can_talk(members):
            self.scheduler.after(_STALL_LOOK_S, lambda: self._step_done(world))
            return
        step = world.step + 1
        if step == self.plan.poison_step:
            victim = members[step % len(members)]
            victim.detail, victim.signature = f"ValueError at step {step}", "ValueError"
            self._end(world, victim, State.FAILED)
            return
        now_s = self.scheduler.now_s
        if damaged := met(self.plan.damage, world.generation, step, now_s):
            for number, span in enumerate(damaged):
                victim = members[(step + number) % len(members)]
                victim.detail = victim.signature = "DamagedBlock"
                victim.damage = (*victim.damage, span)
                self._end(world, victim, State.FAILED)
            return
        world.step = step
        self.steps_done += 1
        self.on_step(world)
        for each in members:
            each.step = step
            each.agent.soon(lambda each=each: each.on_step(step))
        last = step >= self.plan.steps or step == world.drain_at
        due = step - world.checkpoint_step >= self.plan.checkpoint_every
        due = due or world.request > max(world.met.values(), default=-1)
        self._save(world, members, last=last, stage=last or (due and not world.pending))

    def _save(self, world: World, members: list[Workers], *, last: bool, stage: bool) -> None:
        """Take a snapshot of the step, if one is due and all nodes have room; a checkpoint is one whose buffer is kept."""
        step, habits, world.stopping = world.step, self.snapshots, last
        complete = complete_everywhere(members)
        if complete is None or habits is None:
            self._saved(world, members, last=last, stage=stage)
            return
        self.on_agree(world.generation.number, complete.step)
        room = all(each.buffers.has_room(complete.step) for each in members if each.buffers)
        if last and not room:
            # A worker that stops has no later step to save, so it waits.
            self.scheduler.after(_ROOM_LOOK_S, lambda: self._save_last(world, members, stage=stage))
            return
        since = step - max(world.snapshot_step, world.generation.resume_step)
        ready = room and complete.step >= world.snapshot_step
        stage = stage and room and may_checkpoint(world, complete, last=last)
        if not stage and not (ready and since >= habits.every_steps):
            self._saved(world, members, last=last, stage=False)
            return
        world.snapshot_step = step
        for each in members:
            assert each.buffers is not None
            each.buffers.begin(step, complete.step, keep=stage)

        def copied() -> None:
            for each in members:
                if each.state is State.READY and each.buffers is not None:
                    each.buffers.end()
                    each.agent.soon(lambda each=each: each.on_snapshot(step, complete, stage))
            self._saved(world, members, last=last, stage=stage)

        self.scheduler.after(habits.copy_s, copied)

    def _save_last(self, world: World, members: list[Workers], *, stage: bool) -> None:
        if all(each.state is State.READY for each in members):
            self._save(world, members, last=True, stage=stage)

    def _saved(self, world: World, members: list[Workers], *, last: bool, stage: bool) -> None:
        if any(each.state is not State.READY for each in members):
            return
        if stage:
            world.met[world.step] = world.request
            world.checkpoint_step = world.step
            world.pending = {each.incarnation for each in members}
            for each in members:
                each.agent.soon(lambda each=each, step=world.step: each.on_checkpoint(step))
        if last:
            for each in members:
                self._change(each, State.FINISHED)
        else:
            self._next_step(world)

    def _can_talk(self, members: list[Workers]) -> bool:
        network = self.network
        if any(each.paused for each in members):
            return False
        if not network.cuts and all(each.machine.up for each in members):
            return True
        return not any(
            network.is_cut(one.machine, other.machine)
            for one in members
            for other in members
            if one is not other
        )

    def _end(self, world: World, workers: Workers, state: State) -> None:
        self._change(workers, state)
        for other in world.workers.values():
            if other is not workers and other.up:
                self._reset(workers, other)

    def _reset_others(self, world: World, late: Workers) -> None:
        """A worker that starts in a world that another one has left fails at once."""
        for gone in world.workers.values():
            if not gone.up:
                self._reset(gone, late)

    def _reset(self, gone: Workers, other: Workers) -> None:
        """A collective operation fails where the connection to the others breaks, and hangs where it is silent."""
        if other.doomed or not gone.machine.up:
            return
        if self.network.is_torn(gone.machine, other.machine):
            return
        other.doomed = True

        def fail() -> None:
            other.doomed = False
            if other.state is State.READY and not other.paused:
                other.detail, other.collateral = "Connection closed by peer", True
                world = self._world_of(other)
                self._end(world, other, State.FAILED)

        self.scheduler.after(0.005 + 0.03 * self.scheduler.random.random(), fail)

    def _world_of(self, workers: Workers) -> World:
        return next(
            world
            for world in self.worlds.values()
            if world.workers.get(workers.incarnation) is workers
        )

    def _change(self, workers: Workers, state: State) -> None:
        workers.state = state
        workers.agent.soon(workers.on_change)

    def everyone(self) -> list[Workers]:
        """All workers that are there."""
        return [
            each for world in self.worlds.values() for each in world.workers.values() if each.up
        ]


def may_checkpoint(world: World, complete: Complete, *, last: bool) -> bool:
    """Whether a checkpoint's state may be written before the newest state is complete: only where no step follows.

    Else a mirror could skip the newest state, and a step would count as complete that some mirror has never had.
    """
    return last or complete.step >= world.snapshot_step


def complete_everywhere(members: list[Workers]) -> Complete | None:
    """What workers agree on in a step: the newest step that all nodes and their mirrors hold; None without snapshots."""
    if any(each.buffers is None for each in members):
        return None
    told = [each.buffers.complete for each in members if each.buffers is not None]
    return Complete(min(each.step for each in told), all(each.mirrored for each in told))


def checkpoint_of(world: World, step: int) -> dict[str, Any]:
    """What a checkpoint of a step is called."""
    generation = world.generation
    return {
        "step": step,
        "generation": generation.number,
        "directory": f"ckpt/{step:010d}-g{generation.number}-{generation.members[0].incarnation}",
    }
