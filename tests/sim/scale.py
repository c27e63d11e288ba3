"""A thousand agents on paper, made executable: how long until all of them know the world that goes on.

    python -m tests.sim.scale [--nodes 1000]

One fleet goes through everything in turn: it starts, all nodes at once; one node dies; one falls silent; a tenth
falls silent; a fifth more join; the first leader falls silent. Messages, turns and reading a record cost their agent
processor time, as measured (`COSTS`), so that a leader is as slow here as in reality.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from typing import Final

from elastic_pt.config import ElasticSection
from elastic_pt.membership.decision.status import Limits
from elastic_pt.runlog.records import Generation, Member
from tests.sim.agent import AgentProcess, Costs, Habits
from tests.sim.bucket import Pace
from tests.sim.hermetic import hermetic
from tests.sim.network import Latency
from tests.sim.simulation import Scenario, Simulation
from tests.sim.training import Plan

NODES: Final = 1000
LIMIT_S: Final = 3.0
"""For losses, and for joins once the last newcomer takes part."""
_START_LIMIT_S: Final = 5.0
"""A start includes the lobby and all first connections."""
_LEADERS_LIMIT_S: Final = 5.0
"""The loss of both leaders takes the others two timeouts, one after the other."""
COSTS: Final = Costs(receive_s=40e-6, send_s=35e-6, turn_s=5e-6, record_s=3e-6)
"""What `benchmarks/agent_costs.py` measured on 2 cores, and more: it found 42 us for a message (sent and received
over aiohttp's WebSocket), 3.6 us for a turn and each node that it knows of, 2.9 us for each member of a record."""
LATENCY: Final = Latency(low_s=0.0002, high_s=0.002, tail_share=0.01, tail_s=0.02)
PACE: Final = Pace(low_s=0.02, high_s=0.08, tail_share=0.02, tail_s=0.3)
_START_S: Final = 0.5
"""Within this time all nodes start."""
_REST_S: Final = 3.0
_GIVE_UP_S: Final = 30.0
_LOOK_S: Final = 0.01


@dataclass(frozen=True)
class Case:
    """What strikes the fleet."""

    name: str
    strike: Callable[["Fleet"], None]
    limit_s: float = LIMIT_S
    """Simulated seconds until all remaining nodes must know the new world."""


@dataclass(frozen=True)
class Measured:
    """What one case came to."""

    name: str
    members: int
    generations: int
    """How many it took."""
    begun_s: float
    """From the start of new nodes to the moment at which the last of them has opened the log; 0 for losses."""
    decided_s: float
    """From there, or from the fault, to the newest generation's record."""
    known_s: float
    """From there to the moment at which the last agent knows that generation; infinite if that never came."""
    messages: float
    """Messages sent per agent in that time."""
    messages_leader: int
    """Messages that the leader sent in that time."""
    requests: int
    """Requests of all agents to the bucket in that time."""
    rest_messages: float = 0.0
    """Messages sent per agent and second afterwards, while nothing happens."""
    rest_messages_leader: float = 0.0
    """Messages sent by the leader per second, while nothing happens."""
    rest_requests: float = 0.0
    """Requests of all agents to the bucket per second, while nothing happens."""


class Fleet(Simulation):
    """So many agents, and what strikes them one after the other.

    With `times`, a leader is as busy as in a fleet of so many times as many nodes: all costs are multiplied by it.
    """

    def __init__(self, nodes: int, seed: int = 0, *, times: int = 1) -> None:
        names = tuple(f"n{index:05d}" for index in range(nodes))
        super().__init__(
            seed,
            plan=Scenario(
                nodes=names,
                starts_s=(0.0,) * nodes,
                workers=(1,) * nodes,
                habits=Habits(
                    limits=Limits(
                        ElasticSection(nodes_min=nodes // 2, nodes_max=2 * nodes), slots=None
                    ),
                    store_deadline_s=120.0,
                    settle_timeout_s=600.0,
                    costs=Costs(*(times * cost_s for cost_s in astuple(COSTS))),
                ),
                plan=Plan(steps=10**9, step_s=0.3, checkpoint_every=10**9),
                faults_until_s=0.0,
                stranger=False,
                twin=False,
                reuse_ports=False,
                lost_for_good="",
                cut_for_good=(),
            ),
            latency=LATENCY,
            pace=PACE,
        )
        self.restarts = False
        self._awaited = 0
        """How many nodes should end up in the world."""

    @property
    def members(self) -> tuple[Member, ...]:
        """The newest generation."""
        return self._generation().members

    def measure(self, cases: tuple[Case, ...]) -> Iterator[Measured]:
        """Let all cases strike in turn, each once the fleet trains again. One fleet is measured once."""
        with hermetic(self._token_hex, lambda: 0.0, self._log_event if self.tracing else None):
            try:
                for case in cases:
                    measured = self._measure(case)
                    yield measured
                    if measured.known_s == float("inf"):
                        return
            finally:
                self.clear()

    def start_all(self) -> None:
        """Start all nodes, each at its moment."""
        for node in self.plan.nodes:
            self._add(node)
            after_s = _START_S * self.scheduler.random.random()
            self.scheduler.after(after_s, lambda node=node: self.start(node))
        self._awaited = len(self.plan.nodes)

    def join(self, count: int) -> None:
        """Start so many further nodes at once."""
        for index in range(count):
            self._add(f"x{index:05d}")
            self.start(f"x{index:05d}")
        self._awaited += count

    def lose(self, nodes: list[str]) -> None:
        """Machines go without a word."""
        for node in nodes:
            self.switch_off(node)
        self._awaited -= len(nodes)

    def crash(self, node: str) -> None:
        """An agent and its workers die, their machine stays."""
        agent = self.agent_of(node)
        assert agent is not None
        agent.exit("crash")
        self._awaited -= 1

    # ---- inside ------------------------------------------------------------------------------------

    def _measure(self, case: Case) -> Measured:
        scheduler = self.scheduler
        struck_s, sent, requests = scheduler.now_s, self._sent(), self._requests()
        number = self.witness.view.generation_number
        sent_before = {each.incarnation: each.links.sent for each in self.agents.values()}
        case.strike(self)
        begun_s = self._until(self._all_begun)
        known_s = self._until(self._all_know)
        newest = self._generation()
        agents = max(1, self._awaited)
        measured = Measured(
            name=case.name,
            members=len(newest.members),
            generations=newest.number - number,
            begun_s=begun_s,
            decided_s=self.witness.superseded_s[newest.number - 1] - struck_s - begun_s,
            known_s=known_s,
            messages=(self._sent() - sent) / agents,
            messages_leader=self._leader().links.sent
            - sent_before.get(self._leader().incarnation, 0),
            requests=self._requests() - requests,
        )
        self._until(self._trains)
        scheduler.run(scheduler.now_s + _REST_S)
        rested_s, sent, requests = scheduler.now_s, self._sent(), self._requests()
        sent_leader = self._leader().links.sent
        scheduler.run(scheduler.now_s + _REST_S)
        rest_s = scheduler.now_s - rested_s
        return replace(
            measured,
            rest_messages=(self._sent() - sent) / rest_s / agents,
            rest_messages_leader=(self._leader().links.sent - sent_leader) / rest_s,
            rest_requests=(self._requests() - requests) / rest_s,
        )

    def _until(self, holds: Callable[[], bool]) -> float:
        """Let time pass until that holds; how long it took, infinite if it never did."""
        began_s = self.scheduler.now_s
        while not holds():
            if self.scheduler.now_s - began_s > _GIVE_UP_S:
                return float("inf")
            self.scheduler.run(self.scheduler.now_s + _LOOK_S)
        return self.scheduler.now_s - began_s

    def _all_begun(self) -> bool:
        """Whether all remaining nodes take part: they answer others and have read the log."""
        agents = [agent for agent in self.nodes.values() if agent is not None]
        return len(agents) == self._awaited and all(agent.ready for agent in agents)

    def _all_know(self) -> bool:
        """Whether the newest generation has all remaining nodes, and each of them knows it."""
        generation = self.witness.view.generation
        agents = [agent for agent in self.nodes.values() if agent is not None]
        return (
            generation is not None
            and len(agents) == self._awaited
            and {each.incarnation for each in generation.members}
            == {agent.incarnation for agent in agents}
            and all(agent.log.view.generation_number == generation.number for agent in agents)
        )

    def _trains(self) -> bool:
        """Whether the newest generation has done its first step, and all agents have read how long that took."""
        view = self.witness.view
        agents = [agent for agent in self.nodes.values() if agent is not None]
        return (
            view.recovery is not None
            and view.recovery.number == view.generation_number
            and all(agent.log.view.length == view.length for agent in agents)
        )

    def _generation(self) -> Generation:
        generation = self.witness.view.generation
        assert generation is not None
        return generation

    def _leader(self) -> AgentProcess:
        return self.agents[self._generation().members[0].incarnation]

    def _sent(self) -> int:
        return sum(agent.links.sent for agent in self.agents.values())

    def _requests(self) -> int:
        return sum(self.bucket.requests.values())


def cases(nodes: int) -> tuple[Case, ...]:
    """What a fleet of so many nodes goes through."""

    def some(fleet: Fleet, count: int) -> list[str]:
        """Nodes that train, but for the first two."""
        members = [each.node for each in fleet.members[2:]]
        return fleet.scheduler.random.sample(members, count)

    return (
        Case("all nodes start", Fleet.start_all, _START_LIMIT_S),
        Case("one node dies", lambda fleet: fleet.crash(some(fleet, 1)[0])),
        Case("one node falls silent", lambda fleet: fleet.lose(some(fleet, 1))),
        Case("a tenth falls silent", lambda fleet: fleet.lose(some(fleet, nodes // 10))),
        Case("a fifth more nodes join", lambda fleet: fleet.join(nodes // 5)),
        Case("the first leader falls silent", lambda fleet: fleet.lose([fleet.members[0].node])),
        Case(
            "both leaders fall silent",
            lambda fleet: fleet.lose([each.node for each in fleet.members[:2]]),
            _LEADERS_LIMIT_S,
        ),
    )


def report(measured: Measured) -> str:
    """One line."""
    return (
        f"{measured.name:24} {measured.begun_s:4.2f} s to begin, {measured.decided_s:4.2f} s to the record, {measured.known_s:5.2f} s until all know"
        f" ({measured.members} members, {measured.generations} generation(s));"
        f" messages per agent {measured.messages:.1f}, leader {measured.messages_leader},"
        f" requests to the bucket {measured.requests};"
        f" then at rest {measured.rest_messages:.1f} messages a second and agent,"
        f" leader {measured.rest_messages_leader:.0f}, {measured.rest_requests:.1f} requests a second"
    )


def main() -> int:
    """Measure all cases; the exit code tells whether each was over within the limit."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.scale", description=__doc__)
    parser.add_argument("--nodes", type=int, default=NODES)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    began_s, all_cases, held = time.process_time(), cases(given.nodes), 0
    for case, measured in zip(
        all_cases, Fleet(given.nodes, given.seed).measure(all_cases), strict=False
    ):
        print(report(measured), flush=True)
        held += measured.known_s <= case.limit_s
    print(
        f"{held} of {len(all_cases)} were over in time; "
        f"{time.process_time() - began_s:.0f} s of processor time"
    )
    return int(held < len(all_cases))


if __name__ == "__main__":
    sys.exit(main())
