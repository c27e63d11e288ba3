"""How many failures of a node and of the run are accepted, counted over the newest generations of the log.

    a node    that broke the generation `flaps_max` times within `flap_window_s` is kept out for `quarantine_s`,
              and twice as long each further time; the others continue without it
              rests after repeated failures without a new step, longer each time; the others continue
    the run   ends only by failures of the program (a function of state, data and code; see `workers.failure`): the
              same one at the same step `same_failures_max` times, or `failures_max` in a row without a new step.
              They must have happened on two nodes, or on the only node over at least `SPACED_S`. Failures of the
              surroundings may be temporary, so they never end a run.

Pure functions over the log and the moments at which this node read it. No other node's clock counts: a node
counts from its own start on. Failures before a REOPEN record do not count.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from elastic_pt.config import ElasticSection
from elastic_pt.runlog.log import RunView
from elastic_pt.runlog.records import Cause, CauseKind, Generation, Quarantine

SPACED_S: Final = 10.0
"""Failures of a single node end the run only if they are spread over at least this many seconds."""
_REST_S: Final = 1.0
_REST_MAX_S: Final = 60.0
_REST_JITTER: Final = 0.25
_BAR_MAX_S: Final = 3600.0
_BLAMED: Final = frozenset({CauseKind.LOST, CauseKind.FAILED, CauseKind.PARKED})


@dataclass(frozen=True)
class Moments:
    """When this node read each record, on its own monotonic clock."""

    generations: Mapping[int, float]
    """By the generation's number."""
    bars: Mapping[int, float]
    """By index of the record."""


def flaps(view: RunView, moments: Moments, node: str, elastic: ElasticSection, now_s: float) -> int:
    """How often a node has broken the generation within `flap_window_s` and since it was last kept out."""
    since_s = max(
        [now_s - elastic.flap_window_s]
        + [moments.bars[index] for index, bar in view.bars if bar.node == node]
    )
    return sum(
        moments.generations.get(generation.number, since_s) > since_s
        for generation in view.generations
        if any(cause.node == node and cause.kind in _BLAMED for cause in generation.causes)
    )


def kept_out(
    view: RunView,
    moments: Moments,
    failures: Iterable[Cause],
    elastic: ElasticSection,
    now_s: float,
) -> dict[str, str]:
    """Nodes that must not be members now, by name, each with the reason. `failures` are not yet in the log."""
    found: dict[str, str] = {}
    for index, bar in view.bars:
        left_s = moments.bars[index] + bar.seconds - now_s
        if left_s > 0:
            found[bar.node] = f"{bar.why} (kept out for {bar.seconds:g} s)"
    for cause in failures:
        if cause.kind is not CauseKind.FAILED:
            continue
        count = flaps(view, moments, cause.node, elastic, now_s) + 1
        if count >= elastic.flaps_max:
            found.setdefault(cause.node, _why(count, elastic, cause))
    return found


def quarantines_due(
    view: RunView, moments: Moments, elastic: ElasticSection, now_s: float
) -> list[Quarantine]:
    """The QUARANTINE records that the newest generation's causes require."""
    if view.generation is None:
        return []
    due = []
    for cause in view.generation.causes:
        count = flaps(view, moments, cause.node, elastic, now_s)
        if cause.kind in _BLAMED and count >= elastic.flaps_max:
            remembered_s = now_s - 2 * _BAR_MAX_S
            earlier = sum(
                bar.node == cause.node and moments.bars[index] > remembered_s
                for index, bar in view.bars
            )
            seconds = min(_BAR_MAX_S, elastic.quarantine_s * 2.0**earlier)
            due.append(Quarantine("", _why(count, elastic, cause), cause.node, seconds))
    return due


def restarts_of(view: RunView, proposed: Generation) -> int:
    """`Generation.restarts` of the generation that is about to follow the newest one of the log."""
    before = view.generation
    if before is None or view.reopened_generation >= before.number:
        return 0
    # Without a cause it follows a pause, or the loss of all.
    unplanned = proposed.follows_the_loss_of_all(before) or not all(
        cause.kind.planned for cause in proposed.causes
    )
    went_on = (
        proposed.frontier_step > max(each.frontier_step for each in view.generations)
        or proposed.committed_step > before.committed_step
    )
    return (0 if went_on else before.restarts) + unplanned


def _why(count: int, elastic: ElasticSection, last: Cause) -> str:
    return f"{count} failures within {elastic.flap_window_s:g} s, last: {last}"


def rest_s(failures: int, draw: float) -> float:
    """Seconds that a node rests after this many own failures without a new step; `draw` is random in [0, 1).

    0 after the first failure, then 1, 2, 4, ... up to 60, with jitter of up to a quarter.
    """
    if failures < 2:
        return 0.0
    full_s = min(_REST_MAX_S, _REST_S * 2.0 ** min(failures - 2, 32))
    return full_s * (1.0 + _REST_JITTER * (2.0 * draw - 1.0))


@dataclass(frozen=True)
class _Attempts:
    """Consecutive failures of the program, the newest one included."""

    count: int
    nodes: frozenset[str]
    first_s: float
    """When this node learned of the first one."""

    def prove(self, count_min: int, others: int, noticed_s: float) -> bool:
        """Whether they happened on two nodes, or on the only node and spread over time."""
        alone = not others and noticed_s - self.first_s >= SPACED_S
        return self.count >= count_min and (len(self.nodes) > 1 or alone)


def halt(
    view: RunView,
    moments: Moments,
    failures: Iterable[Cause],
    others: int,
    frontier_step: int,
    elastic: ElasticSection,
    noticed_s: float,
) -> str:
    """Why the run must end instead of trying again; empty if it need not.

    `failures` broke the newest generation and were detected at `noticed_s`. `others` is the number of live nodes
    without a failure (0 if they are too few to continue). `frontier_step` is the newest step that was ever done.
    """
    generations = [each for each in view.generations if each.number > view.reopened_generation]
    for failure in failures:
        if not _is_program(failure):
            continue
        same = _same_attempts(generations, moments, failure, noticed_s)
        if failure.signature and same.prove(elastic.same_failures_max, others, noticed_s):
            return (
                f"the same failure {same.count} times at step {failure.step}, "
                f"on {', '.join(sorted(same.nodes))}: {failure.detail}"
            )
        in_a_row = _attempts_in_a_row(generations, moments, failure, frontier_step, noticed_s)
        if in_a_row.prove(elastic.failures_max, others, noticed_s):
            beyond = max((each.frontier_step for each in generations), default=frontier_step)
            return f"{in_a_row.count} failures in a row without a step beyond {beyond}; last: {failure}"
    return ""


def _is_program(cause: Cause) -> bool:
    return cause.kind is CauseKind.FAILED and not cause.surroundings


def _program_failures(generation: Generation) -> list[Cause]:
    return [cause for cause in generation.causes if _is_program(cause)]


def _same_attempts(
    generations: Sequence[Generation], moments: Moments, failure: Cause, noticed_s: float
) -> _Attempts:
    """How often the same failure has happened at the same step, with no other failure in between."""
    count, nodes, first_s = 1, {failure.node}, noticed_s
    for generation in reversed(generations):
        causes = _program_failures(generation)
        if not causes:
            # A generation for another reason (a node left or joined) is no other failure.
            continue
        again = [
            cause
            for cause in causes
            if (cause.signature, cause.step) == (failure.signature, failure.step)
        ]
        # After new steps, the earlier failure no longer counts.
        if not again or generation.frontier_step < generations[-1].frontier_step:
            break
        count, nodes = count + 1, nodes | {cause.node for cause in again}
        first_s = moments.generations.get(generation.number, first_s)
    return _Attempts(count, frozenset(nodes), first_s)


def _attempts_in_a_row(
    generations: Sequence[Generation],
    moments: Moments,
    failure: Cause,
    frontier_step: int,
    noticed_s: float,
) -> _Attempts:
    """How many failures, the newest one included, happened in a row without a new step in between."""
    reached = [generation.frontier_step for generation in generations] + [frontier_step]
    count, nodes, first_s = 1, {failure.node}, noticed_s
    for index, generation in enumerate(reversed(generations), start=1):
        if index < len(reached) and reached[-index] > max(reached[:-index]):
            break
        causes = _program_failures(generation)
        if causes:
            count, nodes = count + 1, nodes | {cause.node for cause in causes}
            first_s = moments.generations.get(generation.number, first_s)
    return _Attempts(count, frozenset(nodes), first_s)
