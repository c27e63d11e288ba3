"""Whether a run tells of each fault that struck it: in its log and events, and in metrics, with the right cause.

Nobody tells of what nobody could see. So a fault needs no evidence

- if no struck node was a member of the generation that it struck (it was still starting, or had gone before);
  newcomers are struck as they start: none of them had taken part for the time of a join when the run ended, or another
  fault struck them too,
- if it was healed before `elastic.heartbeat_timeout_s` had passed,
- if it passes and leaves no majority of the members: then either side may take the other one for lost,
- if it struck in the last step, or in the last seconds (`_END_S`) of the run and training did not depend on it,
- if it ends a worker, and struck while the next generation was made (the workers stop anyway),
- if its deed was done by an agent instead of a worker: then it may be an upload that fails, or the agent that ends,
- if an earlier fault had ended the same generation: then either is told.

A counter needs to show it only if the agent that counted answered a scrape afterwards: it may have been lost.
"""

import datetime
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from elastic_pt.agent.counting import label_of
from elastic_pt.chaos.directory import Objection
from elastic_pt.chaos.play import Played, Struck
from elastic_pt.chaos.scenario import Phase
from elastic_pt.chaos.watched import WatchedRun
from elastic_pt.runlog.records import CauseKind, Generation, Record
from elastic_pt.workers.failure import FailureCause

_END_S: Final = 3.0
_APPEND_S: Final = 1.0
"""A scrape that begins so long after the time of a record shows that it was appended."""
_CHANGES: Final = "elastic_pt_changes_total"
_FAILURES: Final = "elastic_pt_worker_failures_total"


def check_evidence(played: Played, run: WatchedRun, records: Sequence[Record]) -> str:
    """Every fault is told, by any of the ways that its kind names. Raises `Objection` with all that are not."""
    generations = [each for each in records if isinstance(each.body, Generation)]
    silent = [
        f"fault {struck.number} ({struck.spec.kind} {'+'.join(struck.nodes)}): {what}"
        for struck in played.struck
        if not _goes_unseen(played, run, struck)
        for what in _missing(played, run, generations, struck)
    ]
    if silent:
        raise Objection("; ".join(silent))
    wrong = list(_wrong_counters(played, run, generations))
    if wrong:
        raise Objection("; ".join(wrong))
    unseen = sum(_goes_unseen(played, run, each) for each in played.struck)
    return f"{len(played.struck) - unseen} faults told" + (
        f", {unseen} that nobody could see" if unseen else ""
    )


def _goes_unseen(played: Played, run: WatchedRun, struck: Struck) -> bool:
    evidence = struck.spec.of.evidence
    if not evidence.names_node:
        return False
    if struck.spec.of.starts_nodes:
        return not _could_join(played, run, struck)
    return (
        not set(struck.nodes) & set(struck.members)
        or (struck.spec.for_s or math.inf) <= played.config.elastic.heartbeat_timeout_s
        or (not _breaks(struck) and played.seconds - struck.at_s < _END_S)
        or (struck.spec.for_s is not None and _leaves_no_majority(struck))
        or struck.step >= played.config.train.steps - 1
        or (CauseKind.FAILED in evidence.causes and struck.spec.at.phase is Phase.RESIZE)
        or (bool(struck.spec.of.deed) and struck.ends_agent)
        or any(_ended_before(each, struck) for each in played.struck)
    )


def _could_join(played: Played, run: WatchedRun, struck: Struck) -> bool:
    """Whether a newcomer, whom no other fault struck, was there long enough to be taken in."""
    others = (each for each in played.struck if each.number != struck.number)
    alone = set(struck.nodes).difference(*(each.nodes for each in others))
    end_s = struck.time_s - struck.at_s + played.seconds
    needed_s = played.config.elastic.join_window_s + _END_S
    started = (event for node in alone for event in run.events(node, "agent_started"))
    return any(end_s - written_at_s(event) > needed_s for event in started)


def _breaks(struck: Struck) -> bool:
    """Whether no further step can be done unless the fault is noticed."""
    breaking = {CauseKind.LOST, CauseKind.FAILED}
    return struck.spec.for_s is None and bool(struck.spec.of.evidence.causes & breaking)


def _leaves_no_majority(struck: Struck) -> bool:
    return 2 * len(set(struck.members) - set(struck.nodes)) <= len(struck.members)


def _ended_before(earlier: Struck, struck: Struck) -> bool:
    """Whether a fault had ended the generation that a later one struck."""
    return (
        earlier.number != struck.number
        and earlier.at_s <= struck.at_s
        and earlier.generation == struck.generation
        and bool(earlier.spec.of.evidence.causes)
        and bool(set(earlier.nodes) & set(earlier.members))
    )


def _missing(
    played: Played, run: WatchedRun, generations: Sequence[Record], struck: Struck
) -> Iterator[str]:
    """What should tell of a fault and does not."""
    evidence = struck.spec.of.evidence
    if evidence.causes and not _is_cause(generations, struck):
        names = " or ".join(sorted(evidence.causes))
        yield f"no later generation has the cause {names} of it"
    nodes = struck.nodes if evidence.names_node else tuple(played.exit_codes)
    told = {
        node: [event for name in evidence.events for event in run.events(node, name)]
        for node in nodes
    }
    if evidence.events and not any(told.values()):
        yield f"no event {' or '.join(sorted(evidence.events))} of it"
    seen = [
        node
        for node, events in told.items()
        if events and played.counters.scraped_at_s.get(node, 0.0) > written_at_s(events[-1])
    ]
    samples = sorted(evidence.metrics)
    if (
        seen
        and samples
        and not any(played.counters.total(sample, node) for sample in samples for node in seen)
    ):
        yield f"no {' or '.join(samples)} of it in the metrics of {', '.join(seen)}"


def written_at_s(event: Mapping[str, Any]) -> float:
    """When an event was written, as Unix time."""
    return datetime.datetime.fromisoformat(event["timestamp"]).timestamp()


def _is_cause(generations: Sequence[Record], struck: Struck) -> bool:
    """Whether a later generation names the fault, or follows the loss of all members: then nobody knew why."""
    evidence = struck.spec.of.evidence
    for before, after in itertools.pairwise(each.body for each in generations):
        assert isinstance(before, Generation)
        assert isinstance(after, Generation)
        if after.number <= struck.generation:
            continue
        if after.follows_the_loss_of_all(before) or any(
            cause.kind in evidence.causes
            and (cause.node in struck.nodes or not evidence.names_node)
            for cause in after.causes
        ):
            return True
    return False


def _wrong_counters(
    played: Played, run: WatchedRun, generations: Sequence[Record]
) -> Iterator[str]:
    """Where the metrics of a node differ from the records that it appended, or from its own events."""
    for node, scraped_at_s in played.counters.scraped_at_s.items():
        # What an earlier agent has counted may never have been scraped.
        if len(run.events(node, "agent_started")) > 1:
            continue
        appended = [each for each in generations if each.writer == node]
        if all(each.written_at.timestamp() < scraped_at_s - _APPEND_S for each in appended):
            causes = [
                label_of(cause.kind)
                for each in appended
                if isinstance(each.body, Generation)
                for cause in each.body.causes
            ]
            yield from _differs(played, node, _CHANGES, [*map(label_of, CauseKind)], causes)
        failures = run.events(node, "worker_failed")
        if all(written_at_s(each) < scraped_at_s for each in failures):
            found = [str(each["kind"]) for each in failures]
            yield from _differs(played, node, _FAILURES, [*FailureCause], found)


def _differs(
    played: Played, node: str, metric: str, labels: Sequence[str], expected: Sequence[str]
) -> Iterator[str]:
    for label in labels:
        sample = f'{metric}{{cause="{label}"}}'
        found, count = played.counters.total(sample, node), expected.count(label)
        if found != count:
            yield f"{node} shows {sample} = {found:g}, expected {count}"
