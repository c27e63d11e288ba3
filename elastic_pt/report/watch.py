"""Looks from outside at what tells whether a run is healthy: `elastic-pt watch`.

    agents, log, accounts, pulse ─► HealthFacts ─► judge_health ─► Health   healthy, or sick for one or more reasons

It keeps no state between two looks. Two looks of a cron job may run in different containers, and a state file that
is lost or old would make it blind. None is needed: agents that answer say how long ago their last step was, and the
log has the time of each commit and each restart. Before the first generation the log is empty, and the accounts of
agents tell how they ended. Where no agent can be asked, two reads of the pulse in the bucket tell whether a generation
trains.
"""

import datetime
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Final

from elastic_pt.config import ElasticSection
from elastic_pt.report.change import Change, FirstStep
from elastic_pt.report.explanation import explain
from elastic_pt.report.goodput import AgentTime, goodput_of, read_accounts
from elastic_pt.report.health import AgentEnd, HealthFacts, Restart
from elastic_pt.report.live import (
    TAIL_RECORDS,
    first_step_awaited,
    newest_lines,
    read_pulse,
    read_records,
    usual_step_s,
)
from elastic_pt.report.status import Run, State, read_status
from elastic_pt.runlog.records import Commit, Control, Kind, Record, Verb
from elastic_pt.telemetry.account import LEFT

_PULSE_LOOKS: Final = 3
_ATTEMPTS_S: Final = 3600.0


def read_health(run: Run, sleep: Callable[[float], None] = time.sleep) -> HealthFacts:
    """The run as it is seen from here. Takes some seconds more if no agent answers."""
    status = read_status(run)
    view, config = run.log.view, run.config
    tail = _since_commit(run)
    lines = [] if view.commit is None else newest_lines(run.store, view.commit.history)
    newest_at = max((each.written_at for each in tail), default=None)
    nodes_up = sum(each.phase != "down" for each in (*status.members, *status.waiting))
    pause = view.request(Verb.PAUSE)
    unreached = pause is not None and not pause.done and not nodes_up
    agents = _agents(run) if status.state in (State.NEW, State.DOWN) else ()
    return HealthFacts(
        state=status.state,
        reason=status.reason,
        step=status.step,
        steps=status.steps,
        committed_step=0 if status.commit is None else status.commit.step,
        step_age_s=status.step_age_s,
        newest_at=newest_at,
        resumed_at=resumed_in(tail),
        up_since=up_since(agents, newest_at, time.time()),
        ends=ends_in(agents) if status.state is State.NEW else (),
        saved_at=_saved_at(run, tail),
        nodes_up=nodes_up,
        beats=(status.state is State.DOWN or unreached) and _beats(run, sleep),
        starts=status.state is State.RUNNING and first_step_awaited(view),
        startup_timeout_s=(
            ElasticSection() if config is None else config.elastic
        ).startup_timeout_s,
        pause_asked=pause is not None,
        pause_done=pause is not None and pause.done,
        restarts=restarts_in(tail),
        usual_step_s=usual_step_s(lines),
        checkpoint_every_steps=0 if config is None else config.checkpoint.every_steps,
    )


def resumed_in(records: Iterable[Record]) -> datetime.datetime | None:
    """When the newest RESUME that ended a pause was written. Pure; without a pause, a RESUME changes nothing."""
    paused, found = False, None
    for record in records:
        if isinstance(record.body, Control):
            if paused and record.body.request.verb is Verb.RESUME:
                found = record.written_at
            paused = any(each.verb is Verb.PAUSE for each in record.body.standing)
    return found


def restarts_in(records: Iterable[Record]) -> tuple[Restart, ...]:
    """The restarts after the last COMMIT of these records. Pure; the first GENERATION is none."""
    known = list(records)
    commits = [each.index for each in known if isinstance(each.body, Commit)]
    after = max(commits, default=-1)
    times = {each.index: each.written_at for each in known}
    changes = [each for each in explain(known) if isinstance(each, Change)]
    found = []
    for change, later in itertools.zip_longest(changes, changes[1:]):
        if change.planned or change.index <= after:
            continue
        took_s = (
            None if later is None else (times[later.index] - times[change.index]).total_seconds()
        )
        if change.first_step is FirstStep.DONE and change.recovery is not None:
            took_s = change.recovery.total_s
        elif change.first_step is FirstStep.NOT_MEASURED:
            took_s = 0.0
        found.append(
            Restart(
                change.generation,
                times[change.index],
                change.frontier_step,
                took_s,
                change.lost_steps or 0,
                change.short,
            )
        )
    return tuple(found)


def ends_in(agents: Sequence[AgentTime]) -> tuple[AgentEnd, ...]:
    """The ends among these agents of a run without a generation, without those that left. Pure.

    The oldest agent is first, here and there.
    """
    ended = [
        (each, " ".join(each.reason.split()) or "killed")
        for each in _one_per_node(agents)
        if not each.running
    ]
    return tuple(
        AgentEnd(each.node, _moment(each.ended_at_s), why) for each, why in ended if why != LEFT
    )


def up_since(
    agents: Sequence[AgentTime], newest_at: datetime.datetime | None, now_at_s: float
) -> datetime.datetime | None:
    """When the agents that are up, but in no generation yet, began to start. Pure.

    Such an agent was started after the newest record, and only its account tells of it. One that has ended counts for
    an hour if another is up: else a fleet whose agents fail at once, again and again, would always be a new one.
    """
    new = [
        each
        for each in _one_per_node(agents)
        if newest_at is None or each.started_at_s > newest_at.timestamp()
    ]
    if not any(each.running for each in new):
        return None
    started_s = (
        each.started_at_s
        for each in new
        if each.running or now_at_s - each.started_at_s <= _ATTEMPTS_S
    )
    return _moment(min(started_s))


def _one_per_node(agents: Sequence[AgentTime]) -> list[AgentTime]:
    """The agents, of which the newest of each node may run: one that was killed a moment ago only seems to."""
    newest_s = {each.node: each.started_at_s for each in agents}
    return [
        replace(each, running=False, ended_at_s=newest_s[each.node])
        if each.running and each.started_at_s < newest_s[each.node]
        else each
        for each in agents
    ]


def _agents(run: Run) -> tuple[AgentTime, ...]:
    """Only the accounts tell which agents are up that do not answer yet, and which have ended before a generation."""
    return goodput_of(read_accounts(run.store), [], time.time()).agents


def _moment(at_s: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(at_s, datetime.UTC)


def _saved_at(run: Run, tail: Sequence[Record]) -> datetime.datetime | None:
    """When the newest COMMIT was written, or the newest fleet of new nodes began, or the log."""
    head = run.log.view.head
    if head is None:
        return None
    index = head.latest.get(Kind.COMMIT, 0)
    known = {each.index: each for each in tail}
    times = [(known[index] if index in known else run.log.record(index)).written_at]
    anew = [
        each for each in explain(tail) if isinstance(each, Change) and each.resumed_by_new_nodes
    ]
    return max([*times, *(known[each.index].written_at for each in anew)])


def _since_commit(run: Run) -> list[Record]:
    """The records from the newest COMMIT on, at most `TAIL_RECORDS`, after the GENERATION and the CONTROL before it."""
    log, head = run.log, run.log.view.head
    if head is None:
        return []
    first = max(head.latest.get(Kind.COMMIT, 0), head.index + 1 - TAIL_RECORDS)
    latest = log.record(first).latest
    before = {latest.get(kind, first) for kind in (Kind.GENERATION, Kind.CONTROL)}
    return read_records(log, sorted(before | set(range(first, head.index + 1))))


def _beats(run: Run, sleep: Callable[[float], None]) -> bool:
    """Whether the pulse changes within the time after which other nodes would take over."""
    takeover_s = (
        ElasticSection().takeover_s if run.config is None else run.config.elastic.takeover_s
    )
    before = read_pulse(run.store)
    for _ in range(_PULSE_LOOKS):
        sleep(takeover_s / _PULSE_LOOKS)
        if before and read_pulse(run.store) != before:
            return True
    return False
