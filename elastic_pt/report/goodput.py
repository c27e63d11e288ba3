"""What the node-seconds of a run were spent on, over all its agents, restarts and fleets.

    events/*/account.json ─► Account ─► AgentTime ─┐
    log ─► explain ─► Change ─► FailureCost ───────┴─► Goodput

An agent's time goes from the start of its process to its end, by its own clock. So `node_seconds` does not depend on the
buckets, and the buckets can be checked against it. An agent that was killed ends when its peers last heard it, if a
GENERATION that is newer than its last account names it as lost, else with that account. The clocks of machines differ:
an agent never ends later than the time until its next account, plus two writes. Only reads, and imports no torch.
"""

import itertools
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import structlog

from elastic_pt.checkpoint.history import read_history
from elastic_pt.errors import CheckpointError, NotFound, StoreError
from elastic_pt.report.change import Change
from elastic_pt.report.explanation import explain
from elastic_pt.report.status import Run
from elastic_pt.runlog.records import CauseKind, Commit, Generation, Record
from elastic_pt.store.port import Store
from elastic_pt.telemetry.account import (
    ACCOUNT,
    ACCOUNT_BYTES_MAX,
    WRITE_TIMEOUT_S,
    Account,
    interval_s,
)
from elastic_pt.telemetry.goodput import Bucket

PHASES: Final = ("detect", "agree", "paused_below_minimum", "start", "restore", "recompute")
"""The phases of a failure, in order."""
_READERS: Final = 8
_HISTORIES_MAX: Final = 64
"""Histories that are read for the time of lost steps, the newest ones. Steps of the others have the mean time."""
_HOUR_S: Final = 3600.0

log = structlog.get_logger("elastic_pt.goodput")


@dataclass(frozen=True)
class AgentTime:
    """The time of one agent, from the start of its process to its end."""

    node: str
    incarnation: str
    """Empty if it ended before it could take part."""
    started_at_s: float
    """Unix time."""
    ended_at_s: float
    """Unix time; the moment of reading for one that runs."""
    running: bool
    seconds: Mapping[Bucket, float]
    price_per_hour: float
    """In USD; 0 if unknown."""
    reason: str = ""
    """Why it ended; empty for one that runs or was killed."""


@dataclass(frozen=True)
class FailureCost:
    """What a broken generation cost, up to the first new step."""

    generation: int
    """The generation that followed it."""
    causes: tuple[str, ...]
    cost_s: Mapping[str, float]
    """Node-seconds by phase."""


@dataclass(frozen=True)
class Loss:
    """A generation names an incarnation as lost. Unix time by the clock of the node that appended it."""

    heard_at_s: float
    """When its peers last heard it."""
    declared_at_s: float
    """The time of the record. An agent that writes an account after it lives on."""


@dataclass(frozen=True)
class Goodput:
    """What the node-seconds of a run were spent on."""

    node_seconds: float
    buckets: Mapping[Bucket, float]
    goodput: float | None
    """The share of `node_seconds` that was productive; None if no agent has an account."""
    failures: tuple[FailureCost, ...]
    cost: float | None
    """In USD, of the agents with a price; None if none has one."""
    agents: tuple[AgentTime, ...]

    @property
    def unpriced(self) -> int:
        """Agents without a price: `cost` is too low by theirs."""
        return sum(not each.price_per_hour for each in self.agents)

    def cost_of(self, bucket: Bucket) -> float:
        """What the time in a bucket cost, in USD, at each agent's own price."""
        return sum(each.seconds[bucket] * (each.price_per_hour / _HOUR_S) for each in self.agents)


def read_goodput(run: Run, records: Sequence[Record]) -> Goodput:
    """The goodput of a run up to now, by all records of its log. Lists the events once, and reads the accounts."""
    changes = [each for each in explain(records) if isinstance(each, Change)]
    accounts = read_accounts(run.store)
    step_s = _usual_step_s(accounts) | _step_seconds(run.store, records, changes)
    failures = failure_costs(records, changes, step_s)
    return goodput_of(accounts, records, time.time(), failures)


def read_accounts(store: Store, ended: dict[str, Account] | None = None) -> list[Account]:
    """The newest account of each agent. One that cannot be read is left out, with a warning.

    A caller that reads again and again keeps `ended`, the accounts of agents that have ended, by key: they are not
    read again.
    """
    known = {} if ended is None else ended
    keys = [key for key in store.keys("events/") if key.endswith(f"/{ACCOUNT}")]
    with ThreadPoolExecutor(_READERS) as readers:
        accounts = readers.map(lambda key: known.get(key) or _read_account(store, key), keys)
        found = {key: each for key, each in zip(keys, accounts, strict=True) if each is not None}
    known |= {key: each for key, each in found.items() if each.ended}
    return list(found.values())


def _read_account(store: Store, key: str) -> Account | None:
    try:
        return Account.from_bytes(store.read(key, 0, ACCOUNT_BYTES_MAX))
    except NotFound:
        return None
    except ValueError as error:
        log.warning("account_unreadable", key=key, cause=str(error))
        return None


def goodput_of(
    accounts: Iterable[Account],
    records: Sequence[Record],
    now_at_s: float,
    failures: tuple[FailureCost, ...] = (),
) -> Goodput:
    """The goodput by these facts. Pure."""
    losses = dict(_losses(records))
    agents = tuple(
        sorted(
            (_time_of(each, losses.get(each.incarnation), now_at_s) for each in accounts),
            key=lambda agent: (agent.started_at_s, agent.node),
        )
    )
    node_seconds = sum((each.ended_at_s - each.started_at_s for each in agents), 0.0)
    buckets = {bucket: sum((each.seconds[bucket] for each in agents), 0.0) for bucket in Bucket}
    priced = [each for each in agents if each.price_per_hour]
    cost = sum((each.ended_at_s - each.started_at_s) * each.price_per_hour for each in priced)
    return Goodput(
        node_seconds=node_seconds,
        buckets=buckets,
        goodput=buckets[Bucket.PRODUCTIVE] / node_seconds if node_seconds else None,
        failures=failures,
        cost=cost / _HOUR_S if priced else None,
        agents=agents,
    )


def _losses(records: Sequence[Record]) -> Iterator[tuple[str, Loss]]:
    """The incarnations that generations name as lost, oldest first. One that lives on may be lost again."""
    members: Mapping[str, str] = {}
    for record in records:
        body = record.body
        if not isinstance(body, Generation):
            continue
        declared_at_s = record.written_at_s
        for cause in body.causes:
            if cause.kind is CauseKind.LOST and cause.node in members:
                heard_at_s = declared_at_s - body.agree_s - cause.detect_s
                yield members[cause.node], Loss(heard_at_s, declared_at_s)
        members = {each.node: each.incarnation for each in body.members}


def _time_of(account: Account, loss: Loss | None, now_at_s: float) -> AgentTime:
    """The time since its last account counts as what the agent did then."""
    ended_at_s, running = account.written_at, False
    if not account.ended:
        # The next account is late by one write that the bucket did not answer, and the clocks differ a little.
        patience_s = interval_s(account.written_at - account.started_at) + 2 * WRITE_TIMEOUT_S
        lost = loss is not None and account.written_at < loss.declared_at_s
        # An account from the future is that of a clock that is ahead: it would count as fresh until then.
        running = abs(now_at_s - account.written_at) <= patience_s and not lost
        if running:
            ended_at_s = max(ended_at_s, now_at_s)
        elif loss is not None and lost:
            # An agent that lived longer than that would have written.
            ended_at_s += min(max(0.0, loss.heard_at_s - ended_at_s), patience_s)
    seconds = {bucket: account.seconds.get(bucket, 0.0) for bucket in Bucket}
    seconds[account.bucket] += ended_at_s - account.written_at
    return AgentTime(
        node=account.node,
        incarnation=account.incarnation,
        started_at_s=account.started_at,
        ended_at_s=ended_at_s,
        running=running,
        seconds=seconds,
        price_per_hour=account.price_per_hour,
        reason=account.reason,
    )


def failure_costs(
    records: Sequence[Record], changes: Sequence[Change], step_s: Mapping[int, float]
) -> tuple[FailureCost, ...]:
    """What each broken generation cost, by the log and its `changes`. Pure.

    `step_s`: how long lost steps and the last steps before failures took; step 0 stands for all others.
    """
    generations = [each.body for each in records if isinstance(each.body, Generation)]
    again_s = _again_s(changes, step_s)
    found = []
    for (before, after), change in zip(itertools.pairwise(generations), changes, strict=True):
        if change.planned:
            continue
        stayed = len(before.incarnations & after.incarnations)
        if (change.reached_step or 0) > before.resume_step:
            # Those members did part of one more step. The log does not say how much: on average it is half of a step.
            reached_s = step_s.get(change.reached_step or 0, _usual_s(change, step_s))
            again_s[change.generation] += stayed * reached_s / 2
        cost_s = _cost_of(change, stayed, again_s[change.generation])
        found.append(FailureCost(change.generation, _causes_of(change), cost_s))
    return tuple(found)


def _again_s(changes: Sequence[Change], step_s: Mapping[int, float]) -> defaultdict[int, float]:
    """Node-seconds of steps that were done again, by the generation whose change lost them.

    So a step that is lost once costs once, whichever generation does it again. The newest does all that are left.
    """
    found: defaultdict[int, float] = defaultdict(float)
    lost_by: dict[int, int] = {}
    for change, later in itertools.zip_longest(changes, changes[1:]):
        first = change.resume_step + 1
        lost_by |= dict.fromkeys(range(first, first + (change.lost_steps or 0)), change.generation)
        until = None if later is None else later.reached_step
        last = change.frontier_step if until is None else min(until, change.frontier_step)
        for step in range(first, last + 1):
            if (generation := lost_by.pop(step, None)) is not None:
                seconds = step_s.get(step, _usual_s(change, step_s))
                found[generation] += len(change.nodes) * seconds
    return found


def _usual_s(change: Change, step_s: Mapping[int, float]) -> float:
    """The time of a step that is not on record: the mean, or that of the first step of a generation, which is slow."""
    return step_s.get(0, 0.0 if change.recovery is None else change.recovery.step_s)


def _causes_of(change: Change) -> tuple[str, ...]:
    if change.resumed_by_new_nodes:
        return (f"no member of generation {change.generation - 1} was left",)
    return tuple(map(str, change.causes))


def _cost_of(change: Change, stayed: int, again_s: float) -> dict[str, float]:
    """Node-seconds by phase. The members that stayed waited until the change was agreed on, then all members."""
    members, recovery = len(change.nodes), change.recovery
    detect_s = max((cause.detect_s for cause in change.causes), default=0.0)
    return {
        "detect": stayed * detect_s,
        "agree": stayed * (change.agree_s - change.below_minimum_s),
        "paused_below_minimum": stayed * change.below_minimum_s,
        "start": 0.0 if recovery is None else members * (recovery.start_s + recovery.group_s),
        "restore": 0.0 if recovery is None else members * recovery.restore_s,
        "recompute": again_s,
    }


def _step_seconds(
    store: Store, records: Sequence[Record], changes: Sequence[Change]
) -> dict[int, float]:
    """How long lost steps and the last steps before failures took, from the histories that have them; 0: the mean."""
    wanted = [
        range(min(each.resume_step + 1, each.reached_step), each.reached_step + 1)
        for each in changes
        if not each.planned and each.reached_step is not None
    ]
    found: dict[int, float] = {}
    for key in list(_histories_with(wanted, records))[-_HISTORIES_MAX:]:
        try:
            found |= {line["step"]: float(line["seconds"]) for line in read_history(store, key)}
        except NotFound:
            pass
        except (KeyError, CheckpointError, StoreError) as error:
            log.warning("history_unreadable", key=key, cause=str(error))
    if found:
        found[0] = sum(found.values()) / len(found)
    return found


def _usual_step_s(accounts: Sequence[Account]) -> dict[int, float]:
    """The mean time of a step by the accounts, for a run without a history; empty if none tells."""
    told = [each for each in accounts if each.steps]
    trained_s = sum(
        each.seconds[bucket] for each in told for bucket in (Bucket.PRODUCTIVE, Bucket.RECOMPUTE)
    )
    return {0: trained_s / sum(each.steps for each in told)} if told else {}


def _histories_with(wanted: Sequence[range], records: Sequence[Record]) -> Iterator[str]:
    """The keys of the histories that have some of the wanted steps."""
    first = 1
    for record in records:
        if isinstance(record.body, Commit):
            last = record.body.newest.step
            if any(steps.start <= last and first < steps.stop for steps in wanted):
                yield record.body.history
            first = last + 1
