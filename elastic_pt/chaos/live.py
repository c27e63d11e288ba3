"""Disturbs a run on the user's own cluster: pauses it, drains or kills some of its members, and waits until it goes on.

    choose ─► Disturbance ─► strike (a CONTROL in the log, or an order in the bucket) ─► Recovered

Only the bucket is needed. Nobody but a member of the run is ever struck, never more nodes at a time than the caller
allows, and never so many that the run could not go on. Any process.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from elastic_pt.agent.chaos import kill_key
from elastic_pt.config import Config
from elastic_pt.errors import ConfigError, NotDone
from elastic_pt.report.change import Change
from elastic_pt.report.explanation import explain
from elastic_pt.report.status import Run
from elastic_pt.runlog.control import ask, is_done
from elastic_pt.runlog.log import RunView
from elastic_pt.runlog.records import Control, Generation, Member, Request, Verb

_POLL_S: Final = 0.3


class LiveKind(StrEnum):
    """What can be done to a run from outside."""

    PAUSE = "pause"
    """The run stops in good order and goes on after some seconds."""
    DRAIN = "drain"
    """Nodes leave in good order."""
    KILL = "kill"
    """Agents kill themselves, and their workers with them. Only where `elastic.chaos` is true."""


@dataclass(frozen=True)
class Disturbance:
    """What will be done next."""

    kind: LiveKind
    members: tuple[Member, ...]
    """Whom it strikes; empty for a pause."""
    generation: Generation
    """That of all who train when it was chosen."""

    def __str__(self) -> str:
        return f"{self.kind} {', '.join(each.node for each in self.members)}".strip()


@dataclass(frozen=True)
class Recovered:
    """How the run went on."""

    seconds: float
    """From the strike until the first step of the next generation is on record, as seen in the bucket."""
    generation: int
    nodes: tuple[str, ...]
    """Its members."""
    lost_steps: int | None
    """Steps that were done again because of it; None if the log does not tell."""


def choose(
    run: Run, kinds: Sequence[LiveKind], at_once: int, choices: random.Random
) -> Disturbance:
    """The next disturbance of a run that trains.

    Raises `ConfigError` if the run has ended, is paused or trains no more than `elastic.nodes_min` nodes and `at_once`,
    or if it does not allow to be killed and `kinds` has that.
    """
    config, generation = _training(run)
    if LiveKind.KILL in kinds and not config.elastic.chaos:
        raise ConfigError(
            f"{run.store.url}: elastic.chaos = false in its configuration; expected true, or no kill in --kinds"
        )
    kind = choices.choice(list(kinds))
    if kind is LiveKind.PAUSE:
        return Disturbance(kind, (), generation)
    members, least = generation.members, config.elastic.nodes_min
    if len(members) - at_once < least:
        raise ConfigError(
            f"{run.store.url}: {len(members)} nodes train; expected at least {least + at_once}, "
            f"as elastic.nodes_min = {least} must be left (--nodes-at-once {at_once})"
        )
    return Disturbance(kind, tuple(choices.sample(members, at_once)), generation)


def strike(
    run: Run, disturbance: Disturbance, *, by: str, pause_s: float, timeout_s: float
) -> Recovered:
    """Disturb a run and wait until it trains again. `by` is told to its operators.

    Raises `NotDone` if it does not train again within `timeout_s` (after a pause of `pause_s`), and, with nothing done, if
    its members have changed since the choice.
    """
    before = run.log.refresh()
    if before.generation_number != disturbance.generation.number or before.stop is not None:
        raise NotDone(
            f"{run.store.url}: {disturbance}: nothing done, as the members have changed meanwhile"
        )
    deadline_s = time.monotonic() + timeout_s
    match disturbance.kind:
        case LiveKind.PAUSE:
            try:
                _ask(run, Request(Verb.PAUSE, by=by, why="elastic-pt chaos live"), deadline_s)
                time.sleep(pause_s)
            finally:
                # Whoever ends this command must not leave a run that stands still.
                began_s = time.monotonic()
                at_pause, resume = _record(run, Request(Verb.RESUME, by=by))
            deadline_s = began_s + timeout_s
            _await(run, lambda view: is_done(view, resume, at_pause), deadline_s, "not resumed")
        case LiveKind.DRAIN:
            began_s = time.monotonic()
            for each in disturbance.members:
                _record(
                    run, Request(Verb.DRAIN, by=by, why="elastic-pt chaos live", node=each.node)
                )
        case LiveKind.KILL:
            began_s = time.monotonic()
            for each in disturbance.members:
                run.store.write(kill_key(each.incarnation), by.encode())
    struck = {each.incarnation for each in disturbance.members}

    def goes_on(view: RunView) -> bool:
        generation = view.generation
        if view.stop is not None:
            return True
        return (
            generation is not None
            and view.generation_number > before.generation_number
            and view.recovery is not None
            and view.recovery.number == view.generation_number
            and not struck & {each.incarnation for each in generation.members}
        )

    view = _await(run, goes_on, deadline_s, f"{disturbance}: the run does not train again")
    if view.stop is not None:
        raise NotDone(f"{run.store.url}: {disturbance}: the run has ended: {view.stop.reason}")
    generation = view.generation
    assert generation is not None
    changes = [each for each in explain(run.log.records()) if isinstance(each, Change)]
    lost = [each.lost_steps for each in changes if each.generation > before.generation_number]
    known = [each for each in lost if each is not None]
    return Recovered(
        time.monotonic() - began_s,
        generation.number,
        tuple(each.node for each in generation.members),
        sum(known) if known else None,
    )


def _training(run: Run) -> tuple[Config, Generation]:
    """Configuration and members of a run that trains."""
    view = run.log.refresh()
    generation = view.generation
    if run.config is None:
        raise ConfigError(f"{run.store.url}: a run of stock torchrun; expected one of elastic-pt")
    if view.stop is not None:
        raise ConfigError(
            f"{run.store.url}: has ended: {view.stop.reason}; expected a run that trains"
        )
    if view.suspension is not None:
        raise ConfigError(f"{run.store.url}: {view.suspension}; expected a run that trains")
    recovered = 0 if view.recovery is None else view.recovery.number
    if generation is None or recovered < generation.number:
        raise ConfigError(f"{run.store.url}: no step is done yet; expected a run that trains")
    return run.config, generation


def _ask(run: Run, request: Request, deadline_s: float) -> None:
    """Make a request and wait until it is carried out."""
    before, made = _record(run, request)
    _await(run, lambda view: is_done(view, made, before), deadline_s, f"{made}: not done")


def _record(run: Run, request: Request) -> tuple[RunView, Request]:
    """The view before a request, and the request as it is in the log."""
    made: list[tuple[RunView, Control]] = []

    def make(view: RunView) -> Control:
        made[:] = [(view, ask(view, request))]
        return made[0][1]

    run.log.append(make, generation=run.log.view.generation_number)
    before, control = made[0]
    return before, control.request


def _await(run: Run, done: Callable[[RunView], bool], deadline_s: float, what: str) -> RunView:
    while not done(view := run.log.refresh()):
        if time.monotonic() > deadline_s:
            raise NotDone(f"{run.store.url}: {what} in time (--timeout)")
        time.sleep(_POLL_S)
    return view
