"""One simulated run from one seed: faults for a while, then none, and everything must come together.

0 s           nodes start, faults strike        every check holds at every event
quiet_from_s  the last fault has ended          ─► one running generation of all fit nodes, in time
converged     nothing happens any more          ─► no new generation, few requests to the bucket
"""

import dataclasses
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate, combinations
from typing import Any, Final

from elastic_pt.config import ElasticSection
from elastic_pt.membership.decision.status import Limits
from elastic_pt.runlog.records import Member, Quarantine, Record, Verb
from tests.sim import faults
from tests.sim.agent import AgentProcess, Habits, Operator, Surrounding
from tests.sim.bucket import Bucket, Pace
from tests.sim.buffers import draw_habits
from tests.sim.checks import Witness
from tests.sim.damage import damaged_in
from tests.sim.hermetic import hermetic
from tests.sim.network import Latency, Machine, Network
from tests.sim.scheduler import Scheduler
from tests.sim.training import Plan, State, Training
from tests.sim.violation import Violation

CONVERGENCE_S: Final = 40.0
"""Simulated seconds after the last fault within which all nodes train together, and what one request to the
bucket may take that was sent before it answered again. Half of it is the timeout of torch's store client."""
SETTLED_S: Final = 4.0
"""Simulated seconds that it takes to notice the last trouble: a node has converged only after it has trained for this long."""
QUIET_S: Final = 5.0
"""Simulated seconds that the world must then stay as it is."""
REQUESTS_PER_SECOND_MAX: Final = 3.0
"""Requests to the bucket, of all nodes together, while nothing changes."""
_TICK_S: Final = 0.1
_ENDLESS: Final = 10**9


@dataclass(frozen=True)
class Scenario:
    """What a seed simulates."""

    nodes: tuple[str, ...]
    starts_s: tuple[float, ...]
    workers: tuple[int, ...]
    habits: Habits
    plan: Plan
    faults_until_s: float
    stranger: bool
    """One more node runs other code."""
    twin: bool
    """One more agent calls itself by the first node's name."""
    reuse_ports: bool
    """A restarted agent answers where the one before did."""
    lost_for_good: str
    """A machine that does not come back; empty if all do."""
    cut_for_good: tuple[tuple[str, str], ...]
    """Directions that stay torn."""


@dataclass
class Outcome:
    """What a simulation came to."""

    seed: int
    violation: Violation | None
    simulated_s: float
    events: int
    generations: int
    steps: int
    messages: int
    converged_after_s: float
    requests_per_second: float
    faults: list[faults.Fault]
    stopped: str
    digest: int
    trace: list[str] = field(default_factory=list)


def scenario(scheduler: Scheduler) -> Scenario:
    """Draw what to simulate."""
    source = scheduler.random
    count = source.choice((1, 2, 2, 3, 3, 3, 4, 4, 5, 6))
    nodes = tuple(chr(ord("a") + index) for index in range(count))
    lasting = source.random()
    lost_for_good, cut_for_good = "", list[tuple[str, str]]()
    if lasting < 0.1 and count > 1:
        lost_for_good = source.choice(nodes)
    elif lasting < 0.2 and count > 2:
        one, other = source.sample(nodes, 2)
        cut_for_good = [(one, other), (other, one)][: source.randint(1, 2)]
    enough = count - (1 if lost_for_good or cut_for_good else 0)
    quick = source.random() < 0.2
    nodes_min = 1 if source.random() < 0.8 else source.randint(1, enough)
    nodes_max = 64 if source.random() < 0.8 else max(1, count - 1)
    slots = source.choice((8, 8, 12, 64))
    join_window_s = source.choice((0.0, 0.5, 0.5))
    starts_s = tuple(
        source.uniform(0.0, 1.0) if source.random() < 0.8 else source.uniform(0.0, 15.0)
        for _ in nodes
    )
    workers = tuple(source.choice((1, 1, 1, 2)) for _ in nodes)
    # However the nodes come together, so many fit into the slots.
    fitting = sum(total <= slots for total in accumulate(sorted(workers)[::-1]))
    elastic = ElasticSection(
        nodes_min=min(nodes_min, nodes_max, fitting),
        nodes_max=nodes_max,
        heartbeat_interval_s=0.2,
        heartbeat_timeout_s=1.0 if quick else 1.5,
        join_window_s=join_window_s,
        takeover_s=2.0 if quick else 3.0,
        quarantine_s=3.0,
    )
    return Scenario(
        nodes=nodes,
        starts_s=starts_s,
        workers=workers,
        habits=Habits(
            limits=Limits(elastic, slots),
            store_deadline_s=source.choice((5.0, 20.0, 120.0)),
            settle_timeout_s=10.0,
        ),
        plan=Plan(
            steps=_ENDLESS if source.random() < 0.85 else source.randint(20, 120),
            step_s=source.choice((0.1, 0.2, 0.4)),
            checkpoint_every=source.choice((3, 5, 10, 25, _ENDLESS)),
            poison_step=source.randint(5, 60) if source.random() < 0.05 else 0,
        ),
        faults_until_s=source.uniform(6.0, 22.0),
        stranger=source.random() < 0.1,
        twin=source.random() < 0.05,
        reuse_ports=source.random() < 0.3,
        lost_for_good=lost_for_good,
        cut_for_good=tuple(cut_for_good),
    )


class Simulation:
    """See the module."""

    def __init__(
        self,
        seed: int,
        *,
        tracing: bool = False,
        plan: Scenario | None = None,
        latency: Latency | None = None,
        pace: Pace | None = None,
    ) -> None:
        self.seed = seed
        self.scheduler = scheduler = Scheduler(seed)
        memory_random = random.Random(f"memory of {seed}")
        if plan is None:
            plan = scenario(scheduler)
            snapshots = draw_habits(memory_random, plan.nodes)
            habits = dataclasses.replace(plan.habits, snapshots=snapshots)
            damage = damaged_in(random.Random(f"damage of {seed}"))
            trained = dataclasses.replace(plan.plan, damage=damage)
            plan = dataclasses.replace(plan, habits=habits, plan=trained)
        self.plan = plan
        self.habits = self.plan.habits
        self.nodes: dict[str, AgentProcess | None] = {}
        """Which life of its agent a node runs, if any."""
        self.agents: dict[str, AgentProcess] = {}
        """Every agent there ever was, by incarnation."""
        self.died_s: dict[str, float] = {}
        self.born_s: dict[str, float] = {}
        self.strangers: set[str] = set()
        self.network = Network(scheduler, latency or Latency())
        self.bucket = Bucket(scheduler, pace or Pace())
        self.training = Training(scheduler, self.network, self.plan.plan, self.habits.snapshots)
        self.witness = Witness(self)
        self.around = Surrounding(
            scheduler,
            self.network,
            self.bucket,
            self.training,
            self.witness,
            self.habits,
            memory_random,
            self.agents,
        )
        self.operator = Operator(self.around)
        self.bucket.on_change = self.witness.changed
        self.training.on_step = self.witness.stepped
        self.training.on_agree = self.witness.memory.agrees
        if self.plan.plan.poison_step:
            # Ended by the count of the same failure, or by the job's budget where one node alone met it.
            what = f"ValueError at step {self.plan.plan.poison_step}"
            self.witness.expected_stop = lambda stop: what in stop.reason
        self.tracing = tracing
        self.trace_lines: list[str] = []
        self.generations = 0
        self._workers = dict(zip(self.plan.nodes, self.plan.workers, strict=True))
        self._ill: Counter[Any] = Counter()
        self._ill_until_s: dict[Any, float] = {}
        self._off: Counter[str] = Counter()
        self._outages = 0
        self._bars_until_s = 0.0
        self.restarts = True
        """Whether agents that end are started again."""

    # ---- one run -----------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Simulate; a violation is part of the outcome."""
        plan, scheduler = self.plan, self.scheduler
        source = scheduler.random
        violation: Violation | None = None
        converged_after_s = requests = 0.0
        injected: list[faults.Fault] = []
        with hermetic(
            self._token_hex,
            self._wall_clock_s,
            self._log_event if self.tracing else None,
        ):
            try:
                for node, start_s in zip(plan.nodes, plan.starts_s, strict=True):
                    self._add(node)
                    scheduler.at(start_s, lambda node=node: self.start(node))
                for extra in ["z"] * plan.stranger + ["y"] * plan.twin:
                    self._add(extra)
                    scheduler.at(source.uniform(0.0, 5.0), lambda extra=extra: self.start(extra))
                scheduler.at(source.uniform(1.0, plan.faults_until_s), self._begin_lasting)
                injected = faults.draw(self, 1.0, plan.faults_until_s)
                for fault in injected:
                    scheduler.at(fault.at_s, lambda fault=fault: self._inject(fault))
                scheduler.after(_TICK_S, self._tick)
                scheduler.run(plan.faults_until_s + 0.001)
                converged_after_s = self._converge()
                if self.witness.view.stop is None:
                    requests = self._stay()
            except Violation as found:
                violation = found
            finally:
                self.clear()
        return Outcome(
            seed=self.seed,
            violation=violation,
            simulated_s=scheduler.now_s,
            events=scheduler.events,
            generations=self.generations,
            steps=self.training.steps_done,
            messages=self.network.messages,
            converged_after_s=converged_after_s,
            requests_per_second=requests,
            faults=injected,
            stopped="" if self.witness.view.stop is None else self.witness.view.stop.reason,
            digest=scheduler.random.getrandbits(64),
            trace=self.trace_lines,
        )

    def clear(self) -> None:
        """End all threads that are left."""
        for each in (*self.agents.values(), self.operator):
            each.kill()
            each.unwind()

    def _converge(self) -> float:
        """Wait until all fit nodes have trained for a while; seconds from the last fault to the begin of that."""
        scheduler = self.scheduler
        began_s = since_s = scheduler.now_s
        generation = 0
        while scheduler.now_s < since_s + SETTLED_S:
            if not self._is_converged() or self.generations != generation:
                since_s, generation = scheduler.now_s, self.generations
                deadline_s = max(began_s, self._bars_until_s) + self._convergence_s
                # Quarantines that follow each other without end are no excuse.
                if since_s > min(deadline_s, began_s + 4 * self._convergence_s):
                    rule = "no healthy node is excluded permanently"
                    if self.plan.plan.poison_step:
                        rule = "the same failure again and again ends the run"
                    raise Violation(rule, self.describe())
            scheduler.run(scheduler.now_s + 0.5)
        return since_s - began_s

    @property
    def _convergence_s(self) -> float:
        return CONVERGENCE_S + min(60.0, self.habits.store_deadline_s / 2)

    def _begin_lasting(self) -> None:
        for source, target in self.plan.cut_for_good:
            self.note(f"cut for good: {source} to {target}")
            self.cut(source, target)
        if self.plan.lost_for_good:
            self.note(f"lost for good: {self.plan.lost_for_good}")
            self.switch_off(self.plan.lost_for_good)

    def _stay(self) -> float:
        """Nothing happens any more, so nothing may change; requests to the bucket per second."""
        scheduler, witness = self.scheduler, self.witness
        self.training.plan = dataclasses.replace(
            self.training.plan, checkpoint_every=_ENDLESS, damage={}
        )
        number, steps = witness.view.generation_number, self.training.steps_done
        until_s = scheduler.now_s + self._convergence_s
        # A checkpoint that is being copied into its buffers is not on its way yet.
        scheduler.run(scheduler.now_s + 0.5)
        while self._is_unfinished(number) and scheduler.now_s < until_s:
            scheduler.run(scheduler.now_s + 0.5)
        scheduler.run(scheduler.now_s + 1.0)
        if witness.view.stop is None and witness.view.request(Verb.CHECKPOINT) is not None:
            raise Violation("a checkpoint that is asked for is committed", self.describe())
        before = sum(self.bucket.requests.values())
        scheduler.run(scheduler.now_s + QUIET_S)
        if witness.view.stop is not None:
            return 0.0
        if witness.view.generation_number != number:
            raise Violation("a healthy world stays as it is", self.describe())
        if self.training.steps_done == steps:
            raise Violation("a healthy world makes steps", self.describe())
        workers = [agent.workers for agent in self.nodes.values() if agent is not None]
        if any(each is not None and each.state is State.FINISHED for each in workers):
            # The run is about to end.
            return 0.0
        requests = (sum(self.bucket.requests.values()) - before) / QUIET_S
        if requests > REQUESTS_PER_SECOND_MAX:
            raise Violation(
                "few requests while nothing changes", f"{requests:.1f} a second; {self.describe()}"
            )
        return requests

    def _is_unfinished(self, number: int) -> bool:
        """Whether the last checkpoint is still on its way, or a node has to read what was committed before."""
        length = self.witness.view.length
        agents = [agent for agent in self.nodes.values() if agent is not None and agent.ready]
        behind = any(agent.log.view.length < length for agent in agents)
        behind = behind or self.witness.view.request(Verb.CHECKPOINT) is not None
        pending = bool(self.training.worlds[number].pending)
        return behind or pending or any(agent.expects_commits for agent in agents)

    def _is_converged(self) -> bool:
        view = self.witness.view
        if view.stop is not None:
            return all(agent is None for agent in self.nodes.values())
        if self.plan.plan.poison_step:
            return False
        generation = view.generation
        if generation is None or self.scheduler.now_s < self._bars_until_s:
            return False
        members = {each.incarnation for each in generation.members}
        running = [agent for node, agent in self.nodes.items() if agent is not None and agent.ready]
        if len(running) < len(set(self.nodes) - {"z", self.plan.lost_for_good}):
            return False
        for agent in running:
            inside = agent.incarnation in members
            workers = agent.workers
            if inside and (workers is None or workers.state is not State.READY):
                return False
            if inside and agent.generation is not generation and agent.generation != generation:
                return False
            if not inside and self._fits(agent, generation.members):
                return False
        return len([each for each in running if each.incarnation in members]) == len(members)

    def _fits(self, agent: AgentProcess, members: tuple[Member, ...]) -> bool:
        limits = self.habits.limits
        machines = {self.agents[each.incarnation].machine.name for each in members}
        for one, other in self.plan.cut_for_good:
            if (agent.machine.name == one and other in machines) or (
                agent.machine.name == other and one in machines
            ):
                return False
        workers = sum(each.workers for each in members) + self._workers[agent.machine.name]
        return len(members) < limits.elastic.nodes_max and (
            limits.slots is None or workers <= limits.slots
        )

    def describe(self) -> str:
        """The state of every node, in one line."""
        view = self.witness.view
        members = [each.node for each in view.generation.members] if view.generation else []
        parts = [f"generation {view.generation_number} of {','.join(members)}"]
        for node, agent in self.nodes.items():
            if agent is None:
                parts.append(f"{node}: down")
            else:
                state = "none" if agent.workers is None else str(agent.workers.state)
                knows = agent.log.view.generation_number
                parts.append(
                    f"{node}: knows {knows}, workers {state}"
                    f" of {agent.generation.number if agent.generation else 0},"
                    f" {agent.participant.decision.reason!r}"
                )
        return "; ".join(parts)

    # ---- nodes -------------------------------------------------------------------------------------

    def _add(self, node: str) -> None:
        self.network.machines[node] = Machine(node)
        self.nodes[node] = None
        self._workers.setdefault(node, 1)

    def agent_of(self, node: str) -> AgentProcess | None:
        """The node's agent, if it runs."""
        return self.nodes[node]

    def start(self, node: str, *, incarnation: str | None = None, port: int | None = None) -> None:
        """Start a node's agent."""
        machine = self.network.machines[node]
        if self.nodes[node] is not None or not machine.up or self.witness.view.stop is not None:
            return
        source = self.scheduler.random
        incarnation = incarnation or f"{source.getrandbits(64):016x}"
        fingerprint = {"code": "other" if node == "z" else "same"}
        around = self.around
        if node == "z":
            # It must not be able to begin a run of its own.
            elastic = self.habits.limits.elastic.model_copy(
                update={"nodes_min": 2, "nodes_max": 64}
            )
            limits = dataclasses.replace(self.habits.limits, elastic=elastic)
            around = dataclasses.replace(
                around, habits=dataclasses.replace(self.habits, limits=limits)
            )
        agent = AgentProcess(
            around,
            machine,
            self.plan.nodes[0] if node == "y" else node,
            incarnation,
            fingerprint,
            self._workers[node],
            self._exited,
        )
        if node == "z":
            self.strangers.add(incarnation)
        self.nodes[node] = self.agents[incarnation] = agent
        self.born_s[incarnation] = self.scheduler.now_s
        if self.plan.reuse_ports and machine.next_port > 20000:
            port = machine.next_port
        agent.boot(None if port in machine.listeners else port)
        self.note(f"{agent.name} starts")

    def _exited(self, agent: AgentProcess, why: str) -> None:
        self.note(f"{agent.name} ends: {why}")
        self.died_s[agent.incarnation] = self.scheduler.now_s
        if self.nodes[agent.machine.name] is agent:
            self.nodes[agent.machine.name] = None
        if why.startswith("NodeFailure"):
            self.witness.gave_up(agent)
        refused = why.startswith("ConfigError")
        if refused and agent.machine.name != "z":
            raise Violation("no node is refused without a reason", why)
        if not refused and why != "run ended" and self.restarts:
            again_s = self.scheduler.random.uniform(0.1, 3.0)
            self.scheduler.after(again_s, lambda: self.start(agent.machine.name))

    def switch_off(self, node: str) -> None:
        """The node's machine goes."""
        machine = self.network.machines[node]
        self.ill(node)
        self._off[node] += 1
        self.network.switch_off(machine)
        agent = self.nodes[node]
        if agent is not None:
            agent.vanish()

    def switch_on(self, node: str) -> None:
        """The node's machine is back."""
        self.well(node)
        self._off[node] -= 1
        if not self._off[node]:
            self.network.switch_on(self.network.machines[node])
            self.start(node)

    # ---- fit nodes ---------------------------------------------------------------------------------

    def ill(self, what: Any) -> None:
        """A fault on a machine, a link or the bucket begins."""
        self._ill[what] += 1

    def well(self, what: Any) -> None:
        """It ends."""
        self._ill[what] -= 1
        self._ill_until_s[what] = self.scheduler.now_s

    def ill_link(self, source: str, target: str) -> None:
        """A fault between two machines begins."""
        self.ill((min(source, target), max(source, target)))

    def well_link(self, source: str, target: str) -> None:
        """It ends."""
        self.well((min(source, target), max(source, target)))

    def cut(self, source: str, target: str) -> None:
        """Stop packets from one machine to another."""
        self.ill_link(source, target)
        self.network.cut(source, target)

    def mend(self, source: str, target: str) -> None:
        """Take that back."""
        self.well_link(source, target)
        self.network.mend(source, target)

    def cut_bucket(self, node: str) -> None:
        """A node does not reach the bucket."""
        self.ill(node)
        self.bucket.unreachable[node] = self.bucket.unreachable.get(node, 0) + 1

    def mend_bucket(self, node: str) -> None:
        """Take that back."""
        self.well(node)
        self.bucket.unreachable[node] -= 1
        if not self.bucket.unreachable[node]:
            del self.bucket.unreachable[node]

    def outage(self, change: int) -> None:
        """The bucket goes away, or comes back."""
        self._outages += change
        self.bucket.weather.down = self._outages > 0
        (self.ill if change > 0 else self.well)("bucket")

    def _since_s(self, what: Any) -> float:
        if self._ill[what] > 0:
            return float("inf")
        return self._ill_until_s.get(what, float("-inf"))

    def untroubled_since_s(self, agent: AgentProcess) -> float:
        """Since when neither an agent's machine nor the bucket has had a trouble."""
        return max(self._since_s(agent.machine.name), self._since_s("bucket"))

    def well_since_s(self, agent: AgentProcess, now_s: float) -> float:
        """Since when an agent can run and reach the bucket; infinity if it cannot."""
        if agent.dead:
            return float("inf")
        return max(
            self.born_s[agent.incarnation],
            self._since_s(agent.machine.name),
            self._since_s("bucket"),
        )

    def largest_well_side(self, members: list[Member], since_s: float) -> list[Member]:
        """The most of these members that have been well, and connected to each other, since then."""
        well = [
            each
            for each in members
            if self.well_since_s(self.agents[each.incarnation], since_s) <= since_s
        ]
        for count in range(len(well), 0, -1):
            for side in combinations(well, count):
                if all(
                    self._since_s(
                        tuple(sorted(self.agents[each.incarnation].machine.name for each in pair))
                    )
                    <= since_s
                    for pair in combinations(side, 2)
                ):
                    return list(side)
        return []

    # ---- inside ------------------------------------------------------------------------------------

    def _inject(self, fault: faults.Fault) -> None:
        self.note(f"fault: {fault.kind} {' '.join(fault.nodes)} for {fault.seconds:.2f} s")
        undo = (faults.WISHES.get(fault.kind) or faults.KINDS[fault.kind][0])(self, fault)

        def end() -> None:
            self.note(f"over: {fault.kind} {' '.join(fault.nodes)}")
            undo()

        self.scheduler.after(fault.seconds, end)

    def _tick(self) -> None:
        self.witness.tick()
        self.scheduler.after(_TICK_S, self._tick)

    def appended(self, record: Record) -> None:
        """A record has been appended."""
        self.note(f"record {record.index}: {record.kind} {record.body}")
        self.generations = self.witness.view.generation_number
        if isinstance(record.body, Quarantine) and record.body.node:
            until_s = self.scheduler.now_s + record.body.seconds + 1.0
            self._bars_until_s = max(self._bars_until_s, until_s)

    def _token_hex(self, count: int) -> str:
        return f"{self.scheduler.random.getrandbits(8 * count):0{2 * count}x}"

    def _wall_clock_s(self) -> float:
        running = self.scheduler.running
        return running.wall_clock_s() if isinstance(running, AgentProcess) else 0.0

    def note(self, text: str) -> None:
        """Add a line to the trace of a replayed seed."""
        if self.tracing:
            self.trace_lines.append(f"{self.scheduler.now_s:9.3f}  {text}")

    def _log_event(self, event: str, fields: dict[str, Any]) -> None:
        running = self.scheduler.running
        name = "" if running is None else running.name
        self.note(f"{name} {event} {' '.join(f'{key}={value}' for key, value in fields.items())}")


def simulate(seed: int, *, tracing: bool = False) -> Outcome:
    """Simulate one seed."""
    return Simulation(seed, tracing=tracing).run()


Simulate = Callable[[int], Outcome]
