"""What goes wrong, drawn from the seed: each fault begins at a time, and ends at another one.

A seed first draws which kinds of faults it has at all, then as many of them as it likes. What a fault takes
away it gives back itself, so that faults may overlap in any way.
"""

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from elastic_pt.runlog.records import Request, Verb

if TYPE_CHECKING:
    from tests.sim.simulation import Simulation


@dataclass(frozen=True)
class Fault:
    """One fault, declared: what, when, for how long, on which nodes."""

    kind: str
    at_s: float
    seconds: float
    nodes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.at_s:6.2f} s  {self.kind} {' '.join(self.nodes)} for {self.seconds:.2f} s"


Undo = Callable[[], None]
Injection = Callable[["Simulation", Fault], Undo]


def crash(simulation: "Simulation", fault: Fault) -> Undo:
    """The agent and its workers die; the agent is started again."""
    for node in fault.nodes:
        agent = simulation.agent_of(node)
        if agent is not None:
            agent.exit("crash")
    return lambda: None


def machine_off(simulation: "Simulation", fault: Fault) -> Undo:
    """The machine goes without a word, and comes back with nothing running."""
    for node in fault.nodes:
        simulation.switch_off(node)

    def undo() -> None:
        for node in fault.nodes:
            simulation.switch_on(node)

    return undo


def crash_beside_silence(simulation: "Simulation", fault: Fault) -> Undo:
    """One node goes silent, and another one dies before that can be noticed."""
    silent, *dying = fault.nodes
    delay_s = 1.5 * simulation.scheduler.random.random()
    die = dataclasses.replace(fault, nodes=tuple(dying))
    simulation.scheduler.after(delay_s, lambda: crash(simulation, die) and None)
    return machine_off(simulation, dataclasses.replace(fault, nodes=(silent,)))


def pause_agent(simulation: "Simulation", fault: Fault) -> Undo:
    """SIGSTOP to the agent alone: its workers go on."""
    agents = [agent for node in fault.nodes if (agent := simulation.agent_of(node)) is not None]
    for agent in agents:
        simulation.ill(agent.machine.name)
        agent.pause()

    def undo() -> None:
        for agent in agents:
            simulation.well(agent.machine.name)
            agent.resume()

    return undo


def pause_machine(simulation: "Simulation", fault: Fault) -> Undo:
    """The whole machine stands still: agent and workers."""
    undo_agent = pause_agent(simulation, fault)
    stopped = [each for each in simulation.training.everyone() if each.machine.name in fault.nodes]
    for each in stopped:
        each.paused = True

    def undo() -> None:
        for each in stopped:
            each.paused = False
        undo_agent()

    return undo


def fail_worker(simulation: "Simulation", fault: Fault) -> Undo:
    """A worker of the node is killed."""
    for node in fault.nodes:
        agent = simulation.agent_of(node)
        if agent is not None and agent.workers is not None:
            simulation.training.fail(agent.workers, "killed by SIGKILL")
    return lambda: None


def unfit(simulation: "Simulation", fault: Fault) -> Undo:
    """Workers of the nodes fail, and cannot start, as long as it lasts: no space, no memory, no data."""
    unfit = simulation.training.unfit
    for node in fault.nodes:
        unfit[node] += 1
    fail_worker(simulation, fault)

    def undo() -> None:
        for node in fault.nodes:
            unfit[node] -= 1

    return undo


def unfit_everywhere(simulation: "Simulation", fault: Fault) -> Undo:
    """No node's workers can start as long as it lasts: what all of them read is away."""
    return unfit(simulation, dataclasses.replace(fault, nodes=tuple(simulation.nodes)))


def leave(simulation: "Simulation", fault: Fault) -> Undo:
    """The node is asked to leave (SIGTERM) and is started again."""
    for node in fault.nodes:
        agent = simulation.agent_of(node)
        if agent is not None and agent.ready:
            agent.node.request_leave()
            agent.node.changed()
    return lambda: None


def _cut(simulation: "Simulation", links: list[tuple[str, str]]) -> Undo:
    for source, target in links:
        simulation.cut(source, target)

    def undo() -> None:
        for source, target in links:
            simulation.mend(source, target)

    return undo


def cut_one_way(simulation: "Simulation", fault: Fault) -> Undo:
    """Packets of the first node do not reach the second one."""
    return _cut(simulation, [(fault.nodes[0], fault.nodes[1])])


def cut_pair(simulation: "Simulation", fault: Fault) -> Undo:
    """Two nodes cannot reach each other."""
    one, other = fault.nodes[:2]
    return _cut(simulation, [(one, other), (other, one)])


def _around(simulation: "Simulation", inside: tuple[str, ...]) -> list[tuple[str, str]]:
    outside = [node for node in simulation.nodes if node not in inside]
    return [link for one in inside for other in outside for link in ((one, other), (other, one))]


def cut_side(simulation: "Simulation", fault: Fault) -> Undo:
    """Some nodes cannot reach the others; all reach the bucket."""
    return _cut(simulation, _around(simulation, fault.nodes))


def cut_side_and_bucket(simulation: "Simulation", fault: Fault) -> Undo:
    """Some nodes reach neither the others nor the bucket; the bucket may come back first."""
    undo_links = cut_side(simulation, fault)
    undo_bucket = cut_bucket(simulation, fault)
    source = simulation.scheduler.random
    if source.random() < 0.5:
        simulation.scheduler.after(fault.seconds * source.random(), undo_bucket)
        return undo_links

    def undo() -> None:
        undo_links()
        undo_bucket()

    return undo


def cut_side_bucket_later(simulation: "Simulation", fault: Fault) -> Undo:
    """Some nodes cannot reach the others, and for a while in the middle of it not the bucket either."""
    schedule = simulation.scheduler.after
    undo: list[Undo] = []
    schedule(0.35 * fault.seconds, lambda: undo.append(cut_bucket(simulation, fault)))
    schedule(0.8 * fault.seconds, lambda: undo.pop()())
    return cut_side(simulation, fault)


def cut_bucket(simulation: "Simulation", fault: Fault) -> Undo:
    """Some nodes do not reach the bucket."""
    for node in fault.nodes:
        simulation.cut_bucket(node)

    def undo() -> None:
        for node in fault.nodes:
            simulation.mend_bucket(node)

    return undo


def clog(simulation: "Simulation", fault: Fault) -> Undo:
    """What two nodes say to each other takes long."""
    one, other = fault.nodes[:2]
    source = simulation.scheduler.random
    links = {link: source.choice((0.05, 0.3, 1.0, 2.5)) for link in ((one, other), (other, one))}
    clogs = simulation.network.clogs
    for link, delay_s in links.items():
        simulation.ill_link(*link)
        clogs[link] = clogs.get(link, 0.0) + delay_s

    def undo() -> None:
        for link, delay_s in links.items():
            simulation.well_link(*link)
            clogs[link] -= delay_s

    return undo


def last_words(simulation: "Simulation", fault: Fault) -> Undo:
    """A node dies at the moment another one's workers fail, while its last messages are still on their way."""
    dying, failing = fault.nodes
    clogs = simulation.network.clogs
    links = [(dying, other) for other in simulation.nodes if other != dying]
    for link in links:
        simulation.ill_link(*link)
        clogs[link] = clogs.get(link, 0.0) + _LAST_WORDS_S

    def die() -> None:
        crash(simulation, dataclasses.replace(fault, nodes=(dying,)))
        fail_worker(simulation, dataclasses.replace(fault, nodes=(failing,)))

    simulation.scheduler.after(_LAST_WORDS_S / 2, die)

    def undo() -> None:
        for link in links:
            simulation.well_link(*link)
            clogs[link] -= _LAST_WORDS_S

    return undo


def bucket_errors(simulation: "Simulation", fault: Fault) -> Undo:
    """Many requests are refused, or their answers get lost after they were carried out."""
    source, weather = simulation.scheduler.random, simulation.bucket.weather
    errors, lost = source.choice((0.1, 0.4)), source.choice((0.1, 0.4))
    weather.error_share += errors
    weather.lost_share += lost
    simulation.ill("bucket")

    def undo() -> None:
        weather.error_share -= errors
        weather.lost_share -= lost
        simulation.well("bucket")

    return undo


def bucket_slow(simulation: "Simulation", fault: Fault) -> Undo:
    """Requests take long."""
    factor = simulation.scheduler.random.choice((5.0, 20.0, 60.0))
    simulation.bucket.weather.slowness *= factor
    simulation.ill("bucket")

    def undo() -> None:
        simulation.bucket.weather.slowness /= factor
        simulation.well("bucket")

    return undo


def bucket_down(simulation: "Simulation", fault: Fault) -> Undo:
    """The bucket answers no node."""
    simulation.outage(1)
    return lambda: simulation.outage(-1)


def ask_pause(simulation: "Simulation", fault: Fault) -> Undo:
    """An operator pauses the run and lets it go on."""
    simulation.operator.ask(Request(Verb.PAUSE, by="operator"))
    return lambda: simulation.operator.ask(Request(Verb.RESUME, by="operator"))


def ask_checkpoint(simulation: "Simulation", fault: Fault) -> Undo:
    """An operator wants a checkpoint."""
    simulation.operator.ask(Request(Verb.CHECKPOINT, by="operator"))
    return lambda: None


def ask_drain(simulation: "Simulation", fault: Fault) -> Undo:
    """An operator has a node leave, whose agent is started again."""
    for node in fault.nodes:
        simulation.operator.ask(Request(Verb.DRAIN, by="operator", node=node))
    return lambda: None


KINDS: Final[dict[str, tuple[Injection, int, float]]] = {
    "crash": (crash, 1, 3.0),
    "crash of two": (crash, 2, 1.5),
    "crash beside silence": (crash_beside_silence, 2, 1.5),
    "machine off": (machine_off, 1, 2.0),
    "pause agent": (pause_agent, 1, 2.0),
    "pause machine": (pause_machine, 1, 2.0),
    "fail worker": (fail_worker, 1, 3.0),
    "unfit": (unfit, 1, 2.0),
    "unfit everywhere": (unfit_everywhere, 0, 1.5),
    "leave": (leave, 1, 1.5),
    "cut one way": (cut_one_way, 2, 2.0),
    "cut pair": (cut_pair, 2, 2.0),
    "cut side": (cut_side, 0, 2.5),
    "cut side and bucket": (cut_side_and_bucket, 0, 2.0),
    "cut side, bucket later": (cut_side_bucket_later, 0, 1.5),
    "cut bucket": (cut_bucket, 1, 1.5),
    "clog": (clog, 2, 2.0),
    "last words": (last_words, 2, 1.5),
    "bucket errors": (bucket_errors, 0, 3.0),
    "bucket slow": (bucket_slow, 0, 1.0),
    "bucket down": (bucket_down, 0, 1.0),
}
"""How it is done, to how many nodes (0: to any number), and how often it is drawn."""

WISHES: Final[dict[str, Injection]] = {
    "ask pause": ask_pause,
    "ask checkpoint": ask_checkpoint,
    "ask drain": ask_drain,
}
"""What operators ask for, beside the faults."""

_LAST_WORDS_S: Final = 0.8
_LENGTHS_S: Final = (0.3, 1.0, 2.0, 4.0, 8.0)
_OWN_LENGTHS_S: Final = {"cut side, bucket later": 10.0, "last words": 2.0}


def draw(simulation: "Simulation", from_s: float, until_s: float) -> list[Fault]:
    """The faults of a seed, all within the given time."""
    source = simulation.scheduler.random
    kinds = source.sample(sorted(KINDS), source.randint(1, 6))
    nodes = sorted(simulation.nodes)
    faults: list[Fault] = []
    for _ in range(source.randint(1, 10)):
        kind = source.choices(kinds, [KINDS[each][2] for each in kinds])[0]
        # Trouble likes company: many faults come right after another one.
        if faults and source.random() < 0.4:
            at_s = min(until_s, faults[-1].at_s + source.choice((0.05, 0.3, 1.0)) * source.random())
        else:
            at_s = source.uniform(from_s, until_s)
        wanted = KINDS[kind][1] or source.randint(1, max(1, len(nodes) - 1))
        if len(nodes) < min(2, wanted):
            continue
        chosen = tuple(source.sample(nodes, min(wanted, len(nodes))))
        seconds = _OWN_LENGTHS_S.get(kind, source.choice(_LENGTHS_S)) * (0.5 + source.random())
        faults.append(Fault(kind, at_s, min(seconds, until_s - at_s), chosen))
        if kind in ("fail worker", "crash") and source.random() < 0.25:
            # The same node again and again.
            faults += [
                Fault(kind, min(until_s, at_s + again * (1.0 + 2 * source.random())), 0.0, chosen)
                for again in range(1, 4)
            ]
    found = [each for each in faults if len(each.nodes) >= min(2, KINDS[each.kind][1])]
    return [*found, *_draw_wishes(source, nodes, from_s, until_s)]


def _draw_wishes(
    source: random.Random, nodes: list[str], from_s: float, until_s: float
) -> list[Fault]:
    """What operators ask for, in half of the seeds. A pause lasts long enough for all to notice."""
    wishes = []
    for _ in range(source.randint(1, 3) if source.random() < 0.5 else 0):
        kind = source.choice(("ask pause", "ask pause", "ask checkpoint", "ask drain"))
        at_s = source.uniform(from_s, max(from_s, until_s - 5.0))
        seconds = min(source.uniform(4.0, 12.0), until_s - at_s)
        wishes.append(Fault(kind, at_s, seconds, (source.choice(nodes),)))
    return wishes
