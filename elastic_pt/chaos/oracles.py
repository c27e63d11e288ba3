"""The oracles: what must hold after every run, whatever struck it.

    Case: what was played, and the run's directory ─► each of ORACLES ─► Verdict

An oracle is a function that tells in one line what it found, or raises `Objection`. An error of the product's readers
(a log that is damaged, a checkpoint that cannot be read) is an objection, too. The process of a chaos run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from elastic_pt.chaos.costs import costs_of, lost_steps_of
from elastic_pt.chaos.directory import (
    Objection,
    check_checkpoints,
    check_digest,
    check_goodput,
    check_ledger,
    check_lineage,
    goodput_now,
)
from elastic_pt.chaos.evidence import check_evidence
from elastic_pt.chaos.leftovers import unfinished_in
from elastic_pt.chaos.play import Played
from elastic_pt.chaos.result import Cost, Verdict
from elastic_pt.chaos.watched import WatchedRun
from elastic_pt.errors import ElasticPtError
from elastic_pt.report.goodput import Goodput
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import COMPLETED, Generation, Record
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store

_READ_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True)
class Case:
    """What the oracles judge."""

    played: Played
    references: Mapping[int, str]
    """The digests of the undisturbed run, by step."""

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
    def goodput(self) -> Goodput:
        """What the node-seconds were spent on."""
        return goodput_now(self.store, self.records)

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
    """Every agent ends with code 0, except those that a fault ended, and all of a run that stops for a failure."""
    played = case.played
    if played.scenario.expect.outcome != "completes":
        return "not asked: the run does not complete"
    excused = {node for each in played.struck if each.ends_agent for node in each.nodes}
    wrong = {
        node: code
        for node, code in played.exit_codes.items()
        if code != 0 and not (code is not None and node in excused)
    }
    if wrong:
        raise Objection(f"{wrong}, expected 0")
    return ", ".join(f"{node}: {code}" for node, code in sorted(played.exit_codes.items()))


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
        f"fault {each.number}: {each.recovery_s:.1f} s until the next step, expected {expect.recovers_within_s:g}"
        for each in case.costs
        if each.recovery_s is not None and each.recovery_s > expect.recovers_within_s
    ]
    lost = {
        f"generation {each.body.number}": lost_steps_of(case.played, each)
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
    if slow:
        raise Objection("; ".join(slow))
    recoveries = [each.recovery_s for each in case.costs if each.recovery_s is not None]
    longest = f"training again within {max(recoveries):.1f} s, " if recoveries else ""
    return f"{longest}at most {max(lost.values(), default=0)} steps lost"


def _goodput(case: Case) -> str:
    told = check_goodput(case.goodput)
    if not case.played.timed_out:
        # All agents have ended: those that ended by themselves have said so.
        newest = {each.node: each for each in case.goodput.agents}
        codes = case.played.exit_codes
        running = [
            node
            for node, code in codes.items()
            if code == 0 and node in newest and newest[node].running
        ]
        if running:
            raise Objection(f"the accounts of {', '.join(running)} still count, expected their end")
    return told


def _leftovers(case: Case) -> str:
    played = case.played
    since_at_s = max(
        (each.time_s + (each.spec.for_s or 0.0) for each in played.struck), default=0.0
    )
    found = [*played.leftovers, *unfinished_in(case.store, played.directory, since_at_s)]
    if found:
        raise Objection(f"{len(found)} left: {', '.join(found[:8])}")
    return "not asked: agents still ran" if played.timed_out else "nothing"


ORACLES: Final = (
    Oracle("outcome", "Does the run end as the scenario expects?", _outcome),
    Oracle("exit codes", "Does each agent end as it should?", _exit_codes),
    Oracle("strikes", "Has every fault struck, and touched something?", _strikes),
    Oracle(
        "digest",
        "Are weights and optimizer state those of the undisturbed run, bit for bit?",
        lambda case: check_digest(case.store, case.log.view, case.references),
    ),
    Oracle(
        "ledger",
        "Does each row of the plan count once, in order?",
        lambda case: check_ledger(case.store, case.records, case.played.config.train),
    ),
    Oracle(
        "lineage",
        "Has the log one history, which only members of the newest generation have written?",
        lambda case: check_lineage(case.records),
    ),
    Oracle(
        "checkpoints",
        "Does every checkpoint that counts load and verify, with the undisturbed run's bits?",
        lambda case: check_checkpoints(case.store, case.log, case.references),
    ),
    Oracle("goodput", "Does each node-second count in exactly one bucket?", _goodput),
    Oracle("bounds", "Did training go on in time, and lose few steps?", _bounds),
    Oracle("leftovers", "Is nothing left of the run?", _leftovers),
    Oracle(
        "evidence",
        "Do log, events and metrics tell of every fault, with its cause?",
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
