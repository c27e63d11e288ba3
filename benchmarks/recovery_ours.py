"""Disturbs our agents repeatedly: one long run per kind of disturbance.

    all nodes train ─► a random pause of some steps ─► disturb ─► first step of the new generation ─► Sample
         ▲                                                                                     │
         └──────────────────────── a replacement joins, a checkpoint is committed ◄────────────┘

A repetition that does not recover within its limit is recorded as a failure, and the next one gets a new run.
"""

import dataclasses
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Final

from benchmarks.recovery_report import Sample, Summary, summarize, unavailable
from benchmarks.recovery_run import CHECKPOINT_STEPS, POLL_S, OurRun, Plan, network_of, plan_of
from benchmarks.recovery_watch import (
    FirstStep,
    StepWatch,
    first_step_after,
    last_step_s,
    normal_step_s,
    noticed_s,
    phases_of,
)
from elastic_pt.errors import ElasticPtError
from elastic_pt.fleet.network import missing_for_networks
from elastic_pt.runlog.records import Generation, Member

_FINE_POLL_S: Final = 0.005
_FAILURES_MAX: Final = 3
_NORMAL_STEPS: Final = 8

Disturbance = Callable[[OurRun, Generation, Member, random.Random], Sample]


def recover(
    run: OurRun,
    generation: Generation,
    survivors: Sequence[Member],
    randomness: random.Random,
    disturb: Callable[[], None],
) -> Sample:
    """Disturb, and measure the seconds until all survivors have done the first step of the new generation."""
    nodes = [member.node for member in survivors]
    limit_s = run.plan.limit_s
    with run.watch(randomness.choice(survivors), POLL_S) as watch:
        run.pause(watch, randomness.randint(1, 2 * CHECKPOINT_STEPS))
        start_s = time.time()
        disturb()
        first = first_step_after(run.logs, nodes, generation.number, limit_s=limit_s)
        if first is None:
            return Sample(None, failure=f"> {limit_s:g} s")
        frontier, recomputed = steps_lost(watch, first)
        again_s = watch.until_beyond(frontier, limit_s)
    notice_s = noticed_s(run.logs.events, nodes, start_s)
    beside = {"lost_steps": recomputed}
    if again_s is not None:
        beside["new_progress_s"] = again_s - start_s
    if notice_s is not None:
        beside["detection_s"] = notice_s - start_s
    phases = phases_of(start_s, notice_s, first.generation_s, first.last)
    return Sample(first.last.time_s - start_s, phases, beside)


def steps_lost(watch: StepWatch, first: FirstStep) -> tuple[int, float]:
    """The last step of the old generation, and the number of its steps that the new one does again."""
    # Points before the node's report of its new first step belong to the old generation.
    report = first.reports[watch.node]
    frontier = max(point.step for point in watch.points if point.time_s < report.time_s)
    return frontier, float(frontier - report.content["step"] + 1)


def lose_worker(
    run: OurRun, generation: Generation, victim: Member, randomness: random.Random
) -> Sample:
    """SIGKILL to one worker. Its agent continues."""
    pid = run.worker(victim)
    return recover(
        run, generation, generation.members, randomness, lambda: os.kill(pid, signal.SIGKILL)
    )


def lose_node(
    run: OurRun, generation: Generation, victim: Member, randomness: random.Random
) -> Sample:
    """SIGKILL to an agent, its fork server and its workers at once."""
    survivors = [member for member in generation.members if member != victim]
    return recover(run, generation, survivors, randomness, lambda: run.fleet.kill(victim.node))


def lose_two_nodes(
    run: OurRun, generation: Generation, victim: Member, randomness: random.Random
) -> Sample:
    """SIGKILL to two nodes at once. Neither mirrors the other, so each row is still on a living node."""
    rank = generation.members.index(victim)
    other = unrelated(generation, rank)
    victims = [victim, generation.members[other]]
    survivors = [member for member in generation.members if member not in victims]

    def kill() -> None:
        for member in victims:
            os.killpg(run.fleet.pid(member.node), signal.SIGKILL)
        # `Fleet.kill` waits for the end of each.
        for member in victims:
            run.fleet.kill(member.node)

    sample = recover(run, generation, survivors, randomness, kill)
    return dataclasses.replace(sample, victim=f"ranks {rank} and {other}")


def unrelated(generation: Generation, rank: int) -> int:
    """The rank of a member that does not mirror the one of this rank, and is not mirrored by it."""
    for other in range(len(generation.members)):
        mirrors = other in generation.mirrors_of(rank) or rank in generation.mirrors_of(other)
        if other != rank and generation.mirrors and not mirrors:
            return other
    raise ElasticPtError(
        f"generation {generation.number}: mirrors {generation.mirrors}; expected two members that do not "
        "mirror each other"
    )


def silence_node(
    run: OurRun, generation: Generation, victim: Member, randomness: random.Random
) -> Sample:
    """A node's link goes down. The node can still reach the bucket. It is killed after the measurement."""
    survivors = [member for member in generation.members if member != victim]
    sample = recover(run, generation, survivors, randomness, lambda: run.cut(victim.node))
    run.fleet.kill(victim.node)
    return sample


def hang_worker(
    run: OurRun, generation: Generation, victim: Member, randomness: random.Random
) -> Sample:
    """SIGSTOP to one worker."""
    pid = run.worker(victim)
    return recover(
        run, generation, generation.members, randomness, lambda: os.kill(pid, signal.SIGSTOP)
    )


def join_node(run: OurRun, generation: Generation, _: Member, randomness: random.Random) -> Sample:
    """Another node is started, and killed after the measurement."""
    watched = randomness.choice(generation.members)
    with run.watch(watched, _FINE_POLL_S) as watch:
        run.pause(watch, max(_NORMAL_STEPS, randomness.randint(1, 2 * CHECKPOINT_STEPS)))
        start_s = time.time()
        joiner = run.start_node()
        nodes = [*(member.node for member in generation.members), joiner]
        limit_s = run.plan.limit_s
        first = first_step_after(
            run.logs, nodes, generation.number, limit_s=limit_s, including=joiner
        )
    if first is None:
        return Sample(None, failure=f"> {limit_s:g} s")
    run.fleet.kill(joiner)
    started_s = next(
        event.time_s
        for event in run.logs.events
        if (event.node, event.name) == (joiner, "agent_started")
    )
    done_s = first.reports[joiner].time_s
    beside = {
        "joiner_s": done_s - start_s,
        "joiner_agent_s": started_s - start_s,
        "joiner_agree_s": first.generation_s - started_s,
        "joiner_step_s": done_s - first.generation_s,
    }
    return stalled(run, watch, nodes, start_s, first, beside)


def ask_to_leave(
    run: OurRun, generation: Generation, victim: Member, randomness: random.Random
) -> Sample:
    """SIGTERM to an agent."""
    survivors = [member for member in generation.members if member != victim]
    nodes = [member.node for member in survivors]
    with run.watch(randomness.choice(survivors), _FINE_POLL_S) as watch:
        run.pause(watch, max(_NORMAL_STEPS, randomness.randint(1, 2 * CHECKPOINT_STEPS)))
        start_s = time.time()
        os.kill(victim.pid, signal.SIGTERM)
        limit_s = run.plan.limit_s
        first = first_step_after(run.logs, nodes, generation.number, limit_s=limit_s)
    if first is None:
        return Sample(None, failure=f"> {limit_s:g} s")
    deadline_s = time.monotonic() + limit_s
    while victim.node in run.fleet.running():
        if time.monotonic() > deadline_s:
            raise ElasticPtError(
                f"{victim.node} has not left {limit_s:g} s after SIGTERM; expected an end before that"
            )
        time.sleep(POLL_S)
    return stalled(run, watch, nodes, start_s, first, {})


def stalled(
    run: OurRun,
    watch: StepWatch,
    nodes: Sequence[str],
    start_s: float,
    first: FirstStep,
    beside: dict[str, float],
) -> Sample:
    """The time that a survivor waited for the first step of the new generation, minus a normal step."""
    report = first.reports[watch.node]
    last_s = last_step_s(watch.points, report.time_s)
    assert last_s is not None
    normal_s = normal_step_s(watch.points, start_s)
    # The change was detected before the old generation's last step, so the stall begins with the agreement.
    notice_s = noticed_s(run.logs.events, nodes, start_s)
    phases = phases_of(last_s, notice_s, first.generation_s, report)
    phases["first step"] -= normal_s
    _, recomputed = steps_lost(watch, first)
    beside = {**beside, "normal_step_s": normal_s, "lost_steps": recomputed}
    return Sample(report.time_s - last_s - normal_s, phases, beside)


DISTURBANCES: Final[dict[str, Disturbance]] = {
    "worker": lose_worker,
    "node": lose_node,
    "two_nodes": lose_two_nodes,
    "silent": silence_node,
    "hang": hang_worker,
    "join": join_node,
    "leave": ask_to_leave,
}


def measure_ours(kind: str, plan: Plan, data_url: str) -> Summary:
    """Measure all repetitions of one kind, in as few runs as possible. Main thread."""
    if kind == "silent" and (reason := missing_for_networks()):
        return unavailable(f"not measured: needs networks, {reason}")
    plan = plan_of(kind, plan)
    randomness = random.Random(f"{plan.seed} {kind}")
    samples: list[Sample] = []
    broken: list[str] = []
    runs = 0
    while len(samples) < plan.repeats and len(broken) < _FAILURES_MAX:
        runs += 1
        with ExitStack() as stack:
            network = stack.enter_context(network_of(plan.nodes)) if kind == "silent" else None
            nodes_max = plan.nodes + (kind == "join")
            directory = plan.directory / f"{kind}-{runs}"
            run = stack.enter_context(OurRun(plan, directory, data_url, nodes_max, network))
            try:
                repeat(kind, run, randomness, samples)
            except ElasticPtError as error:
                broken.append(str(error))
                plan.tell(f"{kind}: {error}")
                continue
        if samples[-1].seconds is None:
            broken.append(samples[-1].failure)
    if not samples:
        return unavailable("; ".join(broken))
    summary = summarize(samples) | {"nodes": plan.nodes}
    if broken:
        summary["fresh_runs_after"] = broken
    return summary


def repeat(kind: str, run: OurRun, randomness: random.Random, samples: list[Sample]) -> None:
    """Disturb one run until there are enough samples or it does not recover. The victim is another node each time."""
    plan = run.plan
    while len(samples) < plan.repeats:
        generation = run.make_whole()
        victim = generation.members[len(samples) % plan.nodes]
        sample = DISTURBANCES[kind](run, generation, victim, randomness)
        if kind != "join":
            place = sample.victim or f"rank {generation.members.index(victim)}"
            sample = dataclasses.replace(sample, victim=place)
        samples.append(sample)
        shown = sample.failure if sample.seconds is None else f"{sample.seconds:.3f} s"
        phases = " ".join(f"{name} {seconds:.3f}" for name, seconds in sample.phases.items())
        plan.tell(f"ours {kind} {len(samples)}/{plan.repeats} {sample.victim}: {shown}  {phases}")
        if sample.seconds is None:
            return
