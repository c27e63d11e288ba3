"""What the newest generations say about nodes and failures that come back: budgets, kept apart.

    a node    that brought the world down `flaps_max` times within `flap_window_s` is kept out for `bar_s`,
              twice as long each further time; the others go on without it
    the run   ends when the same exception came at the same step `same_failures_max` times, on two nodes or
              with no other node to try, or after `failures_max` failures in a row without a new step

Pure functions over the log and the moments at which this node read it. Nobody else's clock matters: a
node that has just come starts counting then.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from elastic_pt.elastic.log import RunView
from elastic_pt.elastic.records import Cause, CauseKind, Generation, Quarantine

_BAR_MAX_S: Final = 3600.0
_BLAMED: Final = frozenset({CauseKind.LOST, CauseKind.FAILED, CauseKind.PARKED})


@dataclass(frozen=True)
class Budgets:
    """How much is borne."""

    flaps_max: int = 3
    flap_window_s: float = 600.0
    bar_s: float = 30.0
    same_failures_max: int = 3
    failures_max: int = 20


@dataclass(frozen=True)
class Moments:
    """When this node read what, by its own monotonic clock."""

    generations: Mapping[int, float]
    """By number."""
    bars: Mapping[int, float]
    """By index of the record."""


def flaps(view: RunView, moments: Moments, node: str, budgets: Budgets, now_s: float) -> int:
    """How often a node has brought the world down lately, since it was last kept out."""
    since_s = max(
        [now_s - budgets.flap_window_s]
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
    budgets: Budgets,
    now_s: float,
) -> dict[str, str]:
    """Nodes that must not be members now, by name, with the reason. `failures` are not in the log yet."""
    found: dict[str, str] = {}
    for index, bar in view.bars:
        left_s = moments.bars[index] + bar.seconds - now_s
        if left_s > 0:
            found[bar.node] = f"{bar.why} (kept out for {bar.seconds:g} s)"
    for cause in failures:
        if cause.kind is not CauseKind.FAILED:
            continue
        count = flaps(view, moments, cause.node, budgets, now_s) + 1
        if count >= budgets.flaps_max:
            found.setdefault(cause.node, _why(count, budgets, cause))
    return found


def quarantines_due(
    view: RunView, moments: Moments, budgets: Budgets, now_s: float
) -> list[Quarantine]:
    """What the newest generation's causes make it time to append."""
    if view.generation is None:
        return []
    due = []
    for cause in view.generation.causes:
        count = flaps(view, moments, cause.node, budgets, now_s)
        if cause.kind in _BLAMED and count >= budgets.flaps_max:
            remembered_s = now_s - 2 * _BAR_MAX_S
            earlier = sum(
                bar.node == cause.node and moments.bars[index] > remembered_s
                for index, bar in view.bars
            )
            seconds = min(_BAR_MAX_S, budgets.bar_s * 2.0**earlier)
            due.append(Quarantine("", _why(count, budgets, cause), cause.node, seconds))
    return due


def _why(count: int, budgets: Budgets, last: Cause) -> str:
    return f"{count} failures within {budgets.flap_window_s:g} s, last: {last}"


def halt(
    generations: tuple[Generation, ...],
    failures: Iterable[Cause],
    others: int,
    frontier_step: int,
    budgets: Budgets,
) -> str:
    """Why the run must end rather than try again; empty while it need not.

    `failures` broke the newest generation, `others` is how many live nodes had none, and `frontier_step`
    the newest step that any node is known to have done.
    """
    for failure in failures:
        if failure.kind is not CauseKind.FAILED:
            continue
        same, nodes = 1, {failure.node}
        for causes in _failures_backwards(generations):
            if not causes:
                # Who failed may have left and come back since: that is no other failure.
                continue
            again = [
                cause
                for cause in causes
                if (cause.signature, cause.step) == (failure.signature, failure.step)
            ]
            if not again:
                break
            same, nodes = same + 1, nodes | {cause.node for cause in again}
        tried = len(nodes) > 1 or not others
        if failure.signature and same >= budgets.same_failures_max and tried:
            return (
                f"the same failure {same} times at step {failure.step}, on {', '.join(sorted(nodes))}: "
                f"{failure.detail}"
            )
        in_a_row = _failures_in_a_row(generations, frontier_step)
        if in_a_row >= budgets.failures_max:
            beyond = max(generation.frontier_step for generation in generations)
            return f"{in_a_row} failures in a row without a step beyond {beyond}; last: {failure}"
    return ""


def _failures_backwards(generations: tuple[Generation, ...]) -> Iterable[list[Cause]]:
    for generation in reversed(generations):
        yield [cause for cause in generation.causes if cause.kind is CauseKind.FAILED]


def _failures_in_a_row(generations: tuple[Generation, ...], frontier_step: int) -> int:
    """How many failures, up to the one that has just come, followed each other without a new step between."""
    reached = [generation.frontier_step for generation in generations] + [frontier_step]
    count = 1
    for index, causes in enumerate(_failures_backwards(generations), start=1):
        if reached[-index] > max(reached[:-index]):
            break
        count += bool(causes)
    return count
