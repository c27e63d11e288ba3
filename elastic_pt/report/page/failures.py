"""Each failure explained phase by phase, the most expensive ones if there are many. Pure."""

from collections import Counter
from collections.abc import Sequence
from typing import Final

from elastic_pt.report.change import Change, End
from elastic_pt.report.goodput import PHASES, FailureCost
from elastic_pt.report.page.curves import step_of
from elastic_pt.report.page.facts import Facts
from elastic_pt.report.page.parts import Bar, Failure
from elastic_pt.report.page.units import duration, node_time, plural
from elastic_pt.runlog.records import CauseKind

FAILURES_MAX: Final = 20
"""Failures that are told one by one, the most expensive ones."""
_NO_FAILURE: Final = (CauseKind.JOINED, CauseKind.LEFT)
"""Causes that come along with a failure, but are none."""
PLANNED_MAX: Final = 40


def failures_of(facts: Facts) -> tuple[tuple[Failure, ...], tuple[str, ...]]:
    changes = [each for each in facts.changes if isinstance(each, Change) and not each.planned]
    costs = {each.generation: each for each in facts.goodput.failures}
    total = {each: sum(cost.cost_s.values()) for each, cost in costs.items()}
    shown = sorted(changes, key=lambda each: -total.get(each.generation, 0.0))[:FAILURES_MAX]
    most_s = max((total.get(each.generation, 0.0) for each in shown), default=0.0) or 1.0
    found = [
        _failure(each, costs.get(each.generation), most_s, facts)
        for each in sorted(shown, key=lambda each: each.index)
    ]
    notes = []
    if changes:
        causes = [
            cause.kind for each in changes for cause in each.causes if cause.kind not in _NO_FAILURE
        ]
        kinds = Counter(map(str, causes))
        kinds.update("no member left" for each in changes if each.resumed_by_new_nodes)
        phases = {phase: sum(each.cost_s[phase] for each in costs.values()) for phase in PHASES}
        by_kind = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        by_phase = ", ".join(
            f"{_words(phase)} {node_time(seconds)}" for phase, seconds in phases.items() if seconds
        )
        known = all(total.get(each.generation) and each.lost_steps is not None for each in changes)
        cost_text = f"{'' if known else 'at least '}{node_time(sum(total.values()))} of node time"
        notes.append(f"{plural(len(changes), 'failure')} ({by_kind}) cost {cost_text}: {by_phase}.")
    if len(changes) > len(shown):
        notes.append(
            f"The {FAILURES_MAX} most expensive of {len(changes):,} are below; `elastic-pt log --explain` tells all."
        )
    found_end = [str(each) for each in facts.changes if isinstance(each, End)]
    notes += [facts.redactor.text(f"{text[0].upper()}{text[1:]}.") for text in found_end]
    return tuple(found), tuple(notes)


def steps_again(failures: Sequence[Change]) -> str:
    """How many steps the failures lost, in words; what is unknown is not counted as 0."""
    lost = [each.lost_steps for each in failures]
    known = sum(each or 0 for each in lost)
    if None not in lost:
        return plural(known, "step")
    return f"{known:,} or more steps" if known else "an unknown number of steps"


def planned_of(facts: Facts) -> tuple[str, ...]:
    planned = [each for each in facts.changes if isinstance(each, Change) and each.planned]
    texts = [facts.redactor.text(str(each)) for each in planned[-PLANNED_MAX:]]
    left_out = len(planned) - len(texts)
    return tuple(
        [f"{plural(left_out, 'earlier change')} left out here"] if left_out else []
    ) + tuple(texts)


def _failure(change: Change, cost: FailureCost | None, most_s: float, facts: Facts) -> Failure:
    sentence = facts.redactor.text(str(change)).partition(": ")[2]
    bars, start_s = [], 0.0
    cost_s = {} if cost is None else cost.cost_s
    total_s = sum(cost_s.values())
    for phase, seconds in cost_s.items():
        if seconds > 0:
            bars.append(
                Bar(
                    phase,
                    _words(phase),
                    start_s / most_s,
                    seconds / most_s,
                    node_time(seconds),
                )
            )
            start_s += seconds
    least = "at least " if change.lost_steps is None else ""
    cost_text = f"{least}{node_time(total_s)}" if total_s else "an unknown amount"
    at_s = facts.timeline.generation_times_s.get(change.generation)
    when = "" if at_s is None else f", {duration(at_s)} after the first record"
    world = f"world size {change.world_size}"
    return Failure(
        title=f"Step {step_of(change):,}, generation {change.generation}",
        causes=facts.redactor.text("; ".join(map(str, change.causes)) or change.reason),
        sentences=tuple(_sentence(each) for each in sentence.split("; ")),
        cost=f"{cost_text} of node time, {steps_again([change])} done again, {world} after it{when}",
        bars=tuple(bars),
    )


def _words(phase: str) -> str:
    return phase.replace("_", " ")


def _sentence(clause: str) -> str:
    return f"{clause[:1].upper()}{clause[1:]}."
