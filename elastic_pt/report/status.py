"""Reads a run from its URL: state, records, checkpoints.

    log ─► RunView ───┐
    agents ─► answers ┼─► status      live from the agents; from the log if none answers
    lobby ─► cards ───┘

States of a run:

    new        no generation yet
    running    members train, or enough nodes are up and agree on the next generation
    paused     nodes are up, but fewer than elastic.nodes_min can train together; it continues by itself when more
               nodes come, or when nodes have rested. Or an operator has paused it, whichever nodes are up
    down       no agent answers and the log has no STOP; a new agent resumes from the last commit
    completed  the last step is done and committed
    failed     the log has a STOP for another reason (in `reason`)

Only reads, and imports no torch. Runs in the command line's process.
"""

import datetime
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from elastic_pt.config import Config
from elastic_pt.errors import AccessDenied, NoRun, NotFound
from elastic_pt.membership.asking import ask_status
from elastic_pt.membership.decision.at_risk import AtRisk, at_risk
from elastic_pt.membership.decision.decide import park
from elastic_pt.membership.decision.status import NodePhase, NodeStatus
from elastic_pt.membership.lobby import LOBBY, members_in
from elastic_pt.report.tiers import Tier, tiers
from elastic_pt.runlog.access import Access, read_access
from elastic_pt.runlog.identity import CONFIG_KEY, read_run_config
from elastic_pt.runlog.log import RunLog, RunView, record_key
from elastic_pt.runlog.records import (
    COMPLETED,
    Commit,
    Control,
    Generation,
    Kind,
    Member,
    Quarantine,
    Record,
    Recovery,
    Reopen,
    Stop,
    Verb,
)
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store

STORE_TIMEOUT_S: Final = 30.0
ANSWER_TIMEOUT_S: Final = 2.0
NO_ANSWER: Final = "no agent answers"


class State(StrEnum):
    """The state of a run, as the module defines it."""

    NEW = "new"
    RUNNING = "running"
    PAUSED = "paused"
    DOWN = "down"
    COMPLETED = "completed"
    FAILED = "failed"


@dataclass(frozen=True)
class MemberReport:
    """One node of the newest generation, or one that waits for the next."""

    node: str
    pid: int
    """Process id of its agent."""
    address: str
    port: int
    slots: int
    """Slots of each step that it computes; 0 for one that waits."""
    workers: int
    phase: str
    """The phase in its answer; "down" if it does not answer."""
    resting: str
    """Why it rests; empty if it does not."""
    leaving: str
    """Why it is about to leave, such as a notice of its platform; empty if it stays."""
    metrics_url: str
    zone: str
    mirrors: tuple[str, ...]
    """The nodes that copy its state into their memory; empty for one that waits."""


@dataclass(frozen=True)
class CommitReport:
    """The newest committed checkpoint."""

    step: int
    age_s: float
    """Seconds since it was committed, by this machine's clock."""
    directory: str


@dataclass(frozen=True)
class RunStatus:
    """A run at one moment."""

    url: str
    state: State
    reason: str
    generation: int
    world_size: int
    """Workers of the newest generation."""
    step: int
    steps: int | None
    """Steps of the whole run; None if the run directory has no configuration."""
    loss: float | None
    members: tuple[MemberReport, ...]
    waiting: tuple[MemberReport, ...]
    commit: CommitReport | None
    tiers: tuple[Tier, ...]
    at_risk_steps: AtRisk
    step_age_s: float | None
    """Seconds since an agent that answers reported its newest step; None if none has done one."""
    ignored_spans: int = 0
    """Damaged spans of the data that the run leaves out."""


@dataclass(frozen=True)
class Run:
    """A run that exists, open for reading."""

    store: Store
    log: RunLog
    config: Config | None
    """None for a run of stock torchrun, which has only a log."""

    def access(self) -> Access:
        """To its agents. Raises `NotFound` if it never had one, and `AccessDenied` if this process may not read its secret."""
        tls = self.config is None or self.config.elastic.tls
        return read_access(self.store, "operator", tls=tls)


def open_run(url: str, timeout_s: float = STORE_TIMEOUT_S) -> Run:
    """Open the run at an absolute URL. Raises `NoRun` if there is none.

    A request to the bucket is tried again for `timeout_s`.
    """
    store = open_store(url, timeout_s=timeout_s, patient=False)
    log = RunLog(store, writer="elastic-pt")
    view = log.refresh()
    config: Config | None = None
    if store.size(CONFIG_KEY) is not None:
        config = read_run_config(store, [])
    elif view.head is None:
        raise NoRun(
            f"{store.url}: no run there (neither {CONFIG_KEY} nor {record_key(0)}); "
            "expected the run.url of a run that was started"
        )
    return Run(store, log, config)


def read_status(run: Run, *, spares: bool = False) -> RunStatus:
    """The run as it is now. Asks agents at most three times, each time for at most `ANSWER_TIMEOUT_S`.

    Nodes that wait are asked if no member answers, or always with `spares`.
    """
    view = run.log.refresh()
    answers = _ask(run, _members(view))
    if any(answer.log_length > view.length for answer in answers.values()):
        view = run.log.refresh()
        answers = _ask(run, _members(view))
    waiting: dict[str, NodeStatus] = {}
    if view.stop is None and (spares or not answers):
        found = members_in(run.store.keys(LOBBY))
        waiting = _ask(run, [each for each in found if each.incarnation not in answers])
    nodes_min = 1 if run.config is None else run.config.elastic.nodes_min
    state, reason = judge(view, list(answers.values()), len(waiting), nodes_min)
    step, loss = _progress(view, answers)
    generation = view.generation
    commit = _commit_report(run.log, view)
    bucket = None if commit is None else Tier("bucket", commit.step, commit.age_s)
    return RunStatus(
        url=run.store.url,
        state=state,
        reason=reason,
        generation=view.generation_number,
        world_size=0 if generation is None else generation.world_size,
        step=step,
        steps=None if run.config is None else run.config.train.steps,
        loss=loss,
        members=() if generation is None else _member_reports(generation, answers),
        waiting=tuple(_member_report(each.member, 0, each) for each in waiting.values()),
        commit=commit,
        tiers=tiers(generation, answers, bucket),
        at_risk_steps=at_risk(generation, answers, step, 0 if commit is None else commit.step),
        step_age_s=min(
            (each.step_age_s for each in answers.values() if each.step_age_s is not None),
            default=None,
        ),
        ignored_spans=0 if generation is None else len(generation.ignored),
    )


def judge(
    view: RunView, answers: Sequence[NodeStatus], waiting: int, nodes_min: int
) -> tuple[State, str]:
    """The run's state and why. Pure.

    `answers` are those of the newest generation's members, `waiting` counts other nodes that are up.
    """
    if view.stop is not None:
        state = State.COMPLETED if view.stop.reason == COMPLETED else State.FAILED
        return state, view.stop.reason
    if any(answer.phase is not NodePhase.WAITING for answer in answers):
        if view.suspension is not None:
            return State.RUNNING, str(view.suspension)
        newest = view.generation
        return State.RUNNING, "" if newest is None else (
            f"generation {newest.number}: {newest.reason}"
        )
    if (pause := view.request(Verb.PAUSE)) is not None:
        clauses = [f"asked for {pause.origin}"]
        clauses += [] if pause.done else ["not reached yet"]
        clauses += [] if answers or waiting else [NO_ANSWER]
        return State.PAUSED, "; ".join(clauses)
    able, why_not = _able(view, answers)
    nodes = able + waiting
    if view.generation is None:
        return State.NEW, f"{nodes} of at least {nodes_min} nodes wait for the start"
    if not answers and not waiting:
        return State.DOWN, NO_ANSWER
    if nodes < nodes_min:
        return State.PAUSED, "; ".join((f"{nodes} of at least {nodes_min} nodes", *why_not))
    return State.RUNNING, f"{nodes} nodes agree on generation {view.generation_number + 1}"


def _able(view: RunView, answers: Sequence[NodeStatus]) -> tuple[int, list[str]]:
    """How many answering nodes could train together, and why the other members could not."""
    members = () if view.generation is None else view.generation.members
    there = {answer.member.incarnation: answer for answer in answers}
    stay = {
        incarnation
        for incarnation, answer in there.items()
        if not answer.leaving and not answer.resting
    }
    links = {
        (min(here, other), max(here, other))
        for here in stay
        for other in there[here].unreachable
        if other in stay and other != here
    }
    parked = park(sorted(links), members)
    troubles = {
        "no answer from": [each.node for each in members if each.incarnation not in there],
        "about to leave:": [each.member.node for each in there.values() if each.leaving],
        "resting:": [
            f"{each.member.node} ({each.resting})" for each in there.values() if each.resting
        ],
        "not linked to all others:": [there[each].member.node for each in parked],
    }
    why_not = [f"{trouble} {', '.join(nodes)}" for trouble, nodes in troubles.items() if nodes]
    return len(stay) - len(parked), why_not


def records(run: Run) -> Iterator[Record]:
    """Every record. Raises `LogDamaged` if the hash chain breaks or a record is missing."""
    yield from run.log.records()


def describe(record: Record) -> str:
    """A record as one readable line."""
    text = text_of(record)
    return f"{record.index:>5}  {record.time}  {record.kind:<10}  {text}  (by {record.writer})"


def text_of(record: Record) -> str:
    """What a record says, in words."""
    body = record.body
    match body:
        case Generation():
            names = ", ".join(each.node for each in body.members)
            resume = f"step {body.resume_step}" if body.resume_step else "the start"
            text = f"generation {body.number} from {resume}, world size {body.world_size}: {names} [{body.reason}]"
        case Commit():
            kept = ", ".join(
                f"{each.step} (permanent)" if each.permanent else str(each.step)
                for each in body.checkpoints
            )
            loss = "" if body.newest.loss is None else f" loss {body.newest.loss:.4f}"
            text = f"step {body.newest.step}{loss}, kept: {kept} ({body.newest.directory})"
        case Recovery():
            text = (
                f"generation {body.number} to its first step in {body.total_s:.2f} s: "
                f"start {body.start_s:.2f}, process group {body.group_s:.2f}, "
                f"restore {body.restore_s:.2f}, first step {body.step_s:.2f}"
            )
        case Quarantine(node=node) if node:
            text = f"node {node} kept out for {body.seconds:g} s: {body.why}"
        case Quarantine():
            text = f"{body.directory}: {body.why}"
        case Stop():
            text = f"{body.reason} at step {body.step}"
        case Reopen():
            platform = ", another platform is accepted" if body.platform else ""
            text = f"from step {body.step}{platform}: {body.why}"
        case Control():
            text = f"{'done: ' if body.request.done else ''}{body.request}"
    return text


def record_as_json(record: Record) -> dict[str, Any]:
    """A record as it is stored, and the SHA-256 of its stored bytes."""
    stored: dict[str, Any] = json.loads(record.to_bytes())
    return stored | {"sha256": record.sha256}


def _members(view: RunView) -> tuple[Member, ...]:
    over = view.stop is not None or view.generation is None
    return () if over or view.generation is None else view.generation.members


def _ask(run: Run, members: Iterable[Member]) -> dict[str, NodeStatus]:
    """The answers of agents, by incarnation. Asks all at once; leaves out agents that do not answer."""
    asked = list(members)
    if not asked:
        return {}
    try:
        access = run.access()
    except (NotFound, AccessDenied):
        return {}
    return ask_status(asked, access, ANSWER_TIMEOUT_S)


def _progress(view: RunView, answers: dict[str, NodeStatus]) -> tuple[int, float | None]:
    """Step and loss of the first member that has done a step, else of the log."""
    for member in () if view.generation is None else view.generation.members:
        answer = answers.get(member.incarnation)
        if answer is not None and answer.step > 0:
            return answer.step, answer.loss
    newest = view.checkpoints[0] if view.checkpoints else None
    step = 0 if newest is None else newest.step
    if view.stop is not None:
        step = max(step, view.stop.step)
    return step, None if newest is None else newest.loss


def _member_reports(
    generation: Generation, answers: dict[str, NodeStatus]
) -> tuple[MemberReport, ...]:
    members = generation.members
    slots = generation.slots or (0,) * len(members)
    return tuple(
        _member_report(
            member,
            slots[rank],
            answers.get(member.incarnation),
            tuple(members[index].node for index in generation.mirrors_of(rank)),
        )
        for rank, member in enumerate(members)
    )


def _member_report(
    member: Member, slots: int, answer: NodeStatus | None, mirrors: tuple[str, ...] = ()
) -> MemberReport:
    return MemberReport(
        node=member.node,
        pid=member.pid,
        address=member.address,
        port=member.port,
        slots=slots,
        workers=member.workers,
        phase="down" if answer is None else answer.phase,
        resting="" if answer is None else answer.resting,
        leaving="" if answer is None else _leaving(answer),
        metrics_url="" if answer is None else answer.metrics_url,
        zone=member.zone,
        mirrors=mirrors,
    )


def _leaving(answer: NodeStatus) -> str:
    return (answer.leave_reason or "asked to") if answer.leaving else ""


def _commit_report(log: RunLog, view: RunView) -> CommitReport | None:
    if view.head is None or view.commit is None:
        return None
    age_s = age_of(next(log.chain(view.head, Kind.COMMIT)), datetime.datetime.now(datetime.UTC))
    newest = view.commit.newest
    return CommitReport(newest.step, age_s, newest.directory)


def age_of(record: Record, now: datetime.datetime) -> float:
    """Seconds since a record was written, by the clocks of its writer and of this machine; never negative."""
    written = datetime.datetime.fromisoformat(record.time)
    return max(0.0, round((now - written).total_seconds(), 3))
