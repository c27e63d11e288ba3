"""Whether a run is healthy: facts, a time and limits in, a verdict with its reasons out. Pure.

Where an alert of `deploy/monitoring` asks the same, the limits are the same: NoProgress and `no progress`, CommitTooOld
and `steps at risk`, CrashLoop and `restarts without progress`, ClockSkew and `clocks differ`.
"""

import datetime
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from elastic_pt.report.status import NO_ANSWER, State

_STEPS_OF_STALL: Final = 10
_STALL_S: Final = 300.0
"""Without `--stall`, a run may be so long without a new step, and agents that are up without a first generation."""
_STARTUP_SHARE: Final = 1.2
"""Workers that take longer than `elastic.startup_timeout_s` are killed. So the limit for a start is a bit more."""
_COMMITS_AT_RISK: Final = 2
"""Without `--at-risk`, so many intervals between checkpoints may be at risk."""
_COMMIT_S: Final = 600.0
"""Steps are at risk only if there was no commit for so long. Else a fast run with slow uploads would always be sick."""
_STORM_SHARE: Final = 0.5
"""Restarts are a storm if they take more than this share of the window."""
_CLOCKS_DIFFER_S: Final = 5.0


class ReasonKind(StrEnum):
    """Why a run is sick."""

    FAILED = "failed"
    DOWN = "down"
    WAITS_FOR_NODES = "waits for nodes"
    NO_PROGRESS = "no progress"
    RESTART_STORM = "restart storm"
    RESTARTS_WITHOUT_PROGRESS = "restarts without progress"
    AT_RISK = "steps at risk"
    CLOCKS_DIFFER = "clocks differ"


@dataclass(frozen=True)
class Reason:
    """One thing that is wrong, in one line."""

    kind: ReasonKind
    text: str


@dataclass(frozen=True)
class Health:
    """The verdict: healthy if there is no reason against it."""

    sick: tuple[Reason, ...]
    text: str
    """The run's state in one line."""


@dataclass(frozen=True)
class Restart:
    """A generation that no one planned: a node was lost, or workers failed."""

    generation: int
    at: datetime.datetime
    frontier_step: int
    """The newest step done before it."""
    took_s: float | None
    """From when it was noticed to its first step, or to the next generation; None if that is still to come."""
    lost_steps: int
    """Steps that are done again, as far as the log knows."""
    text: str
    """What happened, in one line."""


@dataclass(frozen=True)
class AgentEnd:
    """An agent that ended while there was no generation yet, and did not leave in good order."""

    node: str
    at: datetime.datetime
    """By the agent's clock."""
    why: str
    """In one line."""


@dataclass(frozen=True)
class HealthFacts:
    """What is known of a run from outside."""

    state: State
    reason: str
    step: int
    steps: int | None
    committed_step: int
    step_age_s: float | None
    """Since the newest step, by an agent's clock; None if no agent answers that has done one."""
    newest_at: datetime.datetime | None
    """When the newest record was written, by its writer's clock; None in an empty log."""
    resumed_at: datetime.datetime | None
    """When the newest RESUME that ended a pause was written; None if the end of the log has none."""
    up_since: datetime.datetime | None
    """When the agents that are up, but in no generation yet, began to start, by their clocks; None if there are none."""
    ends: tuple[AgentEnd, ...]
    """Oldest first; none once there is a generation."""
    saved_at: datetime.datetime | None
    """When a checkpoint was committed last, or a fleet of new nodes began later; None before the first record."""
    nodes_up: int
    """Nodes that answer."""
    beats: bool
    """No agent answers, but the pulse shows that a generation trains."""
    starts: bool
    """The newest generation has not done its first step."""
    startup_timeout_s: float
    """`elastic.startup_timeout_s`."""
    pause_asked: bool
    pause_done: bool
    """All workers have stopped for the pause."""
    restarts: tuple[Restart, ...]
    """Since the newest commit, oldest first, as far as the end of the log has them."""
    usual_step_s: float | None
    """None before the first commit."""
    checkpoint_every_steps: int


@dataclass(frozen=True)
class HealthLimits:
    """The operator's limits; 0 chooses one from the run's own pace."""

    stall_s: float = 0.0
    """Seconds without a new step."""
    at_risk_steps: int = 0
    """Steps that would be done again if all nodes were lost."""
    restarts: int = 3
    """Restarts without a commit."""
    window_s: float = 600.0
    """Seconds within which so many restarts are a storm."""


def judge_health(facts: HealthFacts, now: datetime.datetime, limits: HealthLimits) -> Health:
    """Whether the run is healthy at `now`, and every reason why not. Pure."""
    text = _text(facts)
    if facts.state is State.COMPLETED:
        return Health((), text)
    if facts.state is State.FAILED:
        return Health((Reason(ReasonKind.FAILED, f"the run has failed: {facts.reason}"),), text)
    found = [*_clocks(facts, now), *_down(facts, now, limits), *_waits(facts, now, limits)]
    found += _ends(facts, now, limits)
    found += [*_no_progress(facts, now, limits), *_restarts(facts, now, limits)]
    return Health((*found, *_at_risk(facts, now, limits)), text)


def _clocks(facts: HealthFacts, now: datetime.datetime) -> list[Reason]:
    # The ages below come from such times. A record from the future would make a run healthy until then.
    if facts.newest_at is None:
        return []
    ahead_s = (facts.newest_at - now).total_seconds()
    if ahead_s <= _CLOCKS_DIFFER_S:
        return []
    text = f"the newest record was written {ahead_s:.0f} s after the time of this machine"
    return [Reason(ReasonKind.CLOCKS_DIFFER, f"{text}, the limit is {_CLOCKS_DIFFER_S:.0f} s")]


def _down(facts: HealthFacts, now: datetime.datetime, limits: HealthLimits) -> list[Reason]:
    ended = facts.state in (State.DOWN, State.NEW) and not _starting(facts, now, limits)
    # A pause that is done needs no agent. One that is not reached does.
    unreached = facts.state is State.PAUSED and facts.pause_asked and not facts.pause_done
    if not (ended or unreached) or facts.nodes_up or facts.beats:
        return []
    more = facts.reason.removesuffix(NO_ANSWER).rstrip("; ")
    text = f"{NO_ANSWER}, and the run has not ended"
    text = f"{text}: {more}" if more else text
    if facts.ends:
        text += (
            f"; the newest agent, of node {facts.ends[-1].node}, has ended: {facts.ends[-1].why}"
        )
    return [Reason(ReasonKind.DOWN, text)]


def _starting(facts: HealthFacts, now: datetime.datetime, limits: HealthLimits) -> bool:
    """Whether agents are up that do not answer yet, and not for too long."""
    since = facts.up_since
    return since is not None and (now - since).total_seconds() <= stall_limit_s(facts, limits)


def _ends(facts: HealthFacts, now: datetime.datetime, limits: HealthLimits) -> list[Reason]:
    # Without a generation the log has no restarts, and the next agent of a node looks like one that waits.
    found = []
    for node in dict.fromkeys(each.node for each in facts.ends):
        ends = [each for each in facts.ends if each.node == node]
        number = sum((now - each.at).total_seconds() <= limits.window_s for each in ends)
        if number >= limits.restarts:
            text = (
                f"{number} agents of node {node} have ended within {limits.window_s:.0f} s, "
                f"and there is no generation yet; the newest: {ends[-1].why}"
            )
            found.append(Reason(ReasonKind.RESTART_STORM, text))
    return found


def _waits(facts: HealthFacts, now: datetime.datetime, limits: HealthLimits) -> list[Reason]:
    if facts.state is not State.NEW or facts.up_since is None:
        return []
    limit_s, age_s = stall_limit_s(facts, limits), (now - facts.up_since).total_seconds()
    if age_s <= limit_s:
        return []
    text = f"no generation for {age_s:.0f} s, the limit is {limit_s:.0f} s; {facts.reason}"
    return [Reason(ReasonKind.WAITS_FOR_NODES, text)]


def stall_limit_s(facts: HealthFacts, limits: HealthLimits) -> float:
    """Seconds without a new step after which the run makes no progress."""
    own_s = max(_STALL_S, _STEPS_OF_STALL * (facts.usual_step_s or 0.0))
    if facts.starts:
        own_s = max(own_s, _STARTUP_SHARE * facts.startup_timeout_s)
    return limits.stall_s or own_s


def _no_progress(facts: HealthFacts, now: datetime.datetime, limits: HealthLimits) -> list[Reason]:
    # A run of stock torchrun reports no steps.
    if facts.pause_done or facts.newest_at is None or facts.steps is None:
        return []
    if facts.state is State.NEW or _down(facts, now, limits) or _starting(facts, now, limits):
        return []
    limit_s = stall_limit_s(facts, limits)
    age_s = (now - facts.newest_at).total_seconds()
    what = "no new step"
    if facts.step_age_s is not None:
        # After a pause the last step is old, but its end is not.
        resumed_s = [] if facts.resumed_at is None else [(now - facts.resumed_at).total_seconds()]
        age_s = min([facts.step_age_s, *resumed_s])
    elif facts.beats:
        # Steps cannot be seen from here, commits can. They come at most this far apart.
        interval_s = facts.checkpoint_every_steps * (facts.usual_step_s or 0.0)
        limit_s += _COMMITS_AT_RISK * interval_s
        what = "no new commit and no restart"
    if age_s <= limit_s:
        return []
    text = f"{what} for {age_s:.0f} s after step {facts.step}, the limit is {limit_s:.0f} s"
    return [Reason(ReasonKind.NO_PROGRESS, f"{text}; {facts.state}: {facts.reason}")]


def _restarts(facts: HealthFacts, now: datetime.datetime, limits: HealthLimits) -> list[Reason]:
    restarts = facts.restarts
    if len(restarts) < limits.restarts:
        return []
    newest = restarts[-1]
    since = (
        f"since the commit of step {facts.committed_step}"
        if facts.committed_step
        else "and no commit yet"
    )
    recent = [each for each in restarts if (now - each.at).total_seconds() <= limits.window_s]
    took_s = sum(_took_s(each, now, facts.usual_step_s or 0.0) for each in recent)
    # A run of stock torchrun reports no steps, so its restarts alone must tell.
    blind = facts.steps is None
    before = restarts[-limits.restarts].frontier_step
    stuck = not blind and max(newest.frontier_step, facts.step) <= before
    found = []
    # Preemptions that cost little, each with new steps after it, are what elastic training is for.
    if len(recent) >= limits.restarts and (
        blind or stuck or took_s > _STORM_SHARE * limits.window_s
    ):
        text = (
            f"{len(recent)} restarts within {limits.window_s:.0f} s {since}, "
            f"which took {took_s:.0f} s; the newest: {newest.text}"
        )
        found.append(Reason(ReasonKind.RESTART_STORM, text))
    if stuck:
        text = (
            f"{len(restarts)} restarts {since}, and none got beyond step {newest.frontier_step}; "
            f"the newest: {newest.text}"
        )
        found.append(Reason(ReasonKind.RESTARTS_WITHOUT_PROGRESS, text))
    return found


def _took_s(restart: Restart, now: datetime.datetime, step_s: float) -> float:
    """Seconds that a restart cost until the run was as far as before."""
    if restart.took_s is None:
        return max(0.0, (now - restart.at).total_seconds())
    return restart.took_s + restart.lost_steps * step_s


def _at_risk(facts: HealthFacts, now: datetime.datetime, limits: HealthLimits) -> list[Reason]:
    limit = limits.at_risk_steps or _COMMITS_AT_RISK * facts.checkpoint_every_steps
    steps = facts.step - facts.committed_step
    if steps <= limit or not limit or facts.saved_at is None:
        return []
    age_s = (now - facts.saved_at).total_seconds()
    if not limits.at_risk_steps and age_s <= _COMMIT_S:
        return []
    text = (
        f"{steps} steps are in no commit (step {facts.step}, commit {facts.committed_step}), "
        f"the limit is {limit}; no commit for {age_s:.0f} s"
    )
    return [Reason(ReasonKind.AT_RISK, text)]


def _text(facts: HealthFacts) -> str:
    state = str(facts.state)
    if facts.beats:
        state = "running, its agents cannot be reached from here"
    elif facts.state is State.DOWN and facts.up_since is not None:
        state = "down, new agents are starting"
    step = f"step {facts.step}" + ("" if facts.steps is None else f" of {facts.steps}")
    pause = f" ({facts.reason})" if facts.pause_asked else ""
    return f"{state}{pause}, {step}, commit {facts.committed_step}"
