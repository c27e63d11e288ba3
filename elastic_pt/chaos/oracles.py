"""The oracles: what must hold after every run, whatever struck it.

    Case: what was played, and the run's directory ─► each of ORACLES ─► Verdict

An oracle is a function that tells in one line what it found, or raises `Objection`. An error of the product's readers
(a log that is damaged, a checkpoint that cannot be read) is an objection, too. The process of a chaos run.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from elastic_pt.chaos.costs import costs_of, hidden_losses, lost_steps_of
from elastic_pt.chaos.directory import (
    Objection,
    check_checkpoints,
    check_digest,
    check_goodput,
    check_ledger,
    check_lineage,
    completed_step,
    goodput_at,
)
from elastic_pt.chaos.evidence import check_evidence
from elastic_pt.chaos.leftovers import unfinished_in
from elastic_pt.chaos.node_time import (
    check_detection,
    check_lives,
    check_recoveries,
    check_search,
    check_steps,
    check_sums,
)
from elastic_pt.chaos.objects import CHECKPOINTS, check_kept, objects_of
from elastic_pt.chaos.play import Played
from elastic_pt.chaos.result import Cost, Verdict
from elastic_pt.chaos.watched import WatchedRun
from elastic_pt.chaos.workbench import Undisturbed
from elastic_pt.errors import ElasticPtError
from elastic_pt.report.goodput import Goodput, read_accounts
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import COMPLETED, Generation, Record
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store
from elastic_pt.telemetry.account import Account

_READ_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True)
class Case:
    """What the oracles judge."""

    played: Played
    undisturbed: Undisturbed
    """The run that it must equal."""

    @cached_property
    def run(self) -> WatchedRun:
        """What the agents wrote on their machines."""
        return WatchedRun(self.played.config, self.played.directory)

    @cached_property
    def store(self) -> Store:
        """The run's directory, through a store of its own: that of the run may retry for minutes."""
        return open_store(self.played.config.run.url, timeout_s=_READ_TIMEOUT_S, patient=False)

    @cached_property
    def log(self) -> RunLog:
        """The run's log up to its end."""
        log = RunLog(self.store, writer="chaos")
        log.refresh()
        return log

    @cached_property
    def records(self) -> list[Record]:
        """All records, with their hash chain checked."""
        return list(self.log.records())

    @cached_property
    def accounts(self) -> list[Account]:
        """What each agent has written of its time."""
        return read_accounts(self.store)

    @cached_property
    def goodput(self) -> Goodput:
        """What the node-seconds were spent on."""
        return goodput_at(math.inf, self.accounts, self.records)

    @cached_property
    def strays(self) -> list[str]:
        """Objects of the run's directory that belong to nothing; empty if the run has not completed."""
        if completed_step(self.log.view) is None:
            return []
        return list(objects_of(self.store, self.log, self.records, self.played).strays())

    @cached_property
    def costs(self) -> tuple[Cost, ...]:
        """What each fault cost."""
        return costs_of(self.played, self.records)


@dataclass(frozen=True)
class Oracle:
    """A question to every run."""

    name: str
    question: str
    answer: Callable[[Case], str]


def _outcome(case: Case) -> str:
    played, stop = case.played, case.log.view.stop
    expect = played.scenario.expect
    count = sum(isinstance(each.body, Generation) for each in case.records)
    if expect.generations not in (None, count):
        raise Objection(f"{count} generations, expected {expect.generations}")
    match expect.outcome:
        case "completes":
            if stop is None:
                state, why = played.state
                raise Objection(f"no STOP after {played.seconds:.1f} s; {state}: {why}")
            steps = played.config.train.steps
            if (stop.reason, stop.step) != (COMPLETED, steps):
                raise Objection(
                    f"{stop.reason} at step {stop.step}, expected {COMPLETED} at {steps}"
                )
        case "stops":
            if stop is None or stop.reason == COMPLETED or expect.reason not in stop.reason:
                told = "no STOP" if stop is None else f"STOP: {stop.reason}"
                raise Objection(f"{told}, expected one for {expect.reason or 'a failure'}")
        case "pauses":
            state, why = played.state
            if stop is not None or state != "paused" or expect.reason not in why:
                raise Objection(f"{state or 'unknown'}: {why}, expected paused: {expect.reason}")
            return f"paused: {why}"
    if played.timed_out:
        raise Objection(f"agents have not ended after {played.seconds:.1f} s")
    return f"{stop.reason} at step {stop.step} with {count} generations"


def _exit_codes(case: Case) -> str:
    """An agent ends with code 0, unless a fault has ended it; with another one if it is refused, or if its run has failed."""
    played = case.played
    outcome = played.scenario.expect.outcome
    if outcome == "pauses":
        return "not asked: the run does not end"
    hopeful = sorted(_must_fail(case) & {n for n, code in played.exit_codes.items() if code == 0})
    if hopeful:
        raise Objection(f"{', '.join(hopeful)}: 0, expected another code after a failure")
    excused = {node for each in played.struck if each.ends_agent for node in each.nodes}
    wrong = {
        node: code
        for node, code in played.exit_codes.items()
        if code != 0 and not (code is not None and node in excused)
    }
    if wrong and outcome == "completes":
        raise Objection(f"{wrong}, expected 0")
    return ", ".join(f"{node}: {code}" for node, code in sorted(played.exit_codes.items()))


def _must_fail(case: Case) -> set[str]:
    """The nodes that were refused, and the last members of a run that has failed."""
    refused = {
        node
        for each in case.played.struck
        if each.spec.of.starts_nodes and "agent_failed" in each.spec.of.evidence.events
        for node in each.nodes
    }
    if case.log.view.stop is None or completed_step(case.log.view) is not None:
        return refused
    bodies = [each.body for each in case.records if isinstance(each.body, Generation)]
    return refused | {each.node for body in bodies[-1:] for each in body.members}


def _strikes(case: Case) -> str:
    """Every fault has struck, and has met what it was meant for."""
    played = case.played
    missed = [f"never struck: {each}" for each in played.missed]
    wrong = [*missed, *(f"without effect: {each}" for each in played.without_effect)]
    if wrong:
        raise Objection("; ".join(wrong))
    return f"{len(played.struck)} faults struck"


def _bounds(case: Case) -> str:
    """Training went on in time, and no change of the members lost more steps than the scenario allows."""
    expect = case.played.scenario.expect
    struck = {each.number: each for each in case.played.struck}
    slow = [
        f"fault {each.number}: {each.recovery_s:.1f} s until the next step, {each.waited_s:.1f} s of them without a "
        f"free processor, expected {expect.recovers_within_s:g} beside those"
        for each in case.costs
        if each.recovery_s is not None
        and each.recovery_s - each.waited_s > expect.recovers_within_s
    ]
    lost = {
        f"generation {each.body.number}": lost_steps_of(case.played, case.records, each)
        for each in case.records
        if isinstance(each.body, Generation)
    } | {
        f"fault {each.number} ({struck[each.number].spec.kind})": each.lost_steps
        for each in case.costs
        if each.lost_steps is not None
    }
    slow += [
        f"{what} lost {steps} steps, expected at most {expect.lost_steps}"
        for what, steps in lost.items()
        if steps > expect.lost_steps
    ]
    slow += hidden_losses(case.played, case.records)
    if slow:
        raise Objection("; ".join(slow))
    recoveries = [each.recovery_s for each in case.costs if each.recovery_s is not None]
    longest = f"training again within {max(recoveries):.1f} s, " if recoveries else ""
    return f"{longest}at most {max(lost.values(), default=0)} steps lost"


def _goodput(case: Case) -> str:
    """Each node-second counts once, and as what was seen from outside."""
    told, played, agents = check_goodput(case.goodput), case.played, case.goodput.agents
    wrong = [
        *check_sums(case.accounts),
        *check_lives(played, case.records, case.accounts, agents),
        *check_steps(
            played, case.records, agents, {each.incarnation for each in case.accounts if each.ended}
        ),
        *check_search(played, case.records),
        *check_detection(played, case.records, agents),
        *check_recoveries(played, case.records),
    ]
    if wrong:
        raise Objection("; ".join(wrong))
    return told


def _retention(case: Case) -> str:
    """Of what was uploaded for checkpoints, that which should be kept is there, and nothing else."""
    told = check_kept(case.records, case.played.config.checkpoint.keep)
    _object_to([each for each in case.strays if each.startswith(CHECKPOINTS)])
    return told


def _leftovers(case: Case) -> str:
    played = case.played
    found = [*played.leftovers, *unfinished_in(case.store, played.directory, played.quiet_at_s)]
    _object_to([*found, *(each for each in case.strays if not each.startswith(CHECKPOINTS))])
    return "not asked: agents still ran" if played.timed_out else "nothing"


def _object_to(left: Sequence[str]) -> None:
    if left:
        raise Objection(f"{len(left)} left: {', '.join(left[:8])}")


ORACLES: Final = (
    Oracle("outcome", "Does the run end as the scenario expects?", _outcome),
    Oracle("exit codes", "Does each agent end as it should?", _exit_codes),
    Oracle("strikes", "Has every fault struck, and touched something?", _strikes),
    Oracle(
        "digest",
        "Are weights and optimizer state those of the undisturbed run, bit for bit?",
        lambda case: check_digest(case.store, case.log.view, case.undisturbed.digests),
    ),
    Oracle(
        "ledger",
        "Does each row of the plan count once, in order, and with the undisturbed run's loss?",
        lambda case: check_ledger(
            case.store, case.records, case.played.config.train, case.undisturbed.lines
        ),
    ),
    Oracle(
        "lineage",
        "Has the log one history, which only members of the newest generation have written?",
        lambda case: check_lineage(case.records),
    ),
    Oracle(
        "checkpoints",
        "Does every checkpoint that counts load and verify, with the undisturbed run's bits?",
        lambda case: check_checkpoints(case.store, case.log, case.undisturbed.digests),
    ),
    Oracle(
        "retention",
        "Are the newest checkpoints kept, and is all else gone that was uploaded?",
        _retention,
    ),
    Oracle(
        "goodput",
        "Does each node-second count in exactly one bucket, and as what was seen from outside?",
        _goodput,
    ),
    Oracle(
        "bounds", "Did training go on in time, and lose few steps, all of which are told?", _bounds
    ),
    Oracle("leftovers", "Is nothing left of the run?", _leftovers),
    Oracle(
        "evidence",
        "Do log, events and metrics tell of every fault with its cause, and of nothing else?",
        lambda case: check_evidence(case.played, case.run, case.records),
    ),
)
"""All oracles. Each is asked after every run."""


def judge(case: Case) -> tuple[Verdict, ...]:
    """The verdict of every oracle."""
    return tuple(_verdict(oracle, case) for oracle in ORACLES)


def _verdict(oracle: Oracle, case: Case) -> Verdict:
    try:
        return Verdict(oracle.name, True, oracle.answer(case))
    except Objection as objection:
        return Verdict(oracle.name, False, str(objection))
    except ElasticPtError as error:
        return Verdict(oracle.name, False, f"{type(error).__name__}: {error}")
