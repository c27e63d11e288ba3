"""Whether a run tells of each fault that struck it: in its log and events, and in metrics, with the right cause.

    faults ─► `unseen`: could anybody see it? ─► what its kind names (`Evidence`) is there
    causes ─► `causes`: has each of them a fault?

A cause of another fault that struck the same node in the same generation tells both: an agent that is killed as it leaves
is lost. A sample is asked of an agent that answered a scrape afterwards. Only reads; any process.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from elastic_pt.agent.counting import label_of
from elastic_pt.chaos.causes import unexplained
from elastic_pt.chaos.directory import Objection
from elastic_pt.chaos.facts import (
    Facts,
    may_name,
    stops_agent,
    written_at_s,
)
from elastic_pt.chaos.kinds import Evidence
from elastic_pt.chaos.play import Played, Struck
from elastic_pt.chaos.unseen import answer_goes_unseen, cause_goes_unseen, events_go_unseen
from elastic_pt.chaos.watched import WatchedRun
from elastic_pt.runlog.records import (
    COMPLETED,
    CauseKind,
    Commit,
    Control,
    Quarantine,
    Record,
    Recovery,
    Verb,
)
from elastic_pt.workers.failure import FailureCause

_SCRAPED_S: Final = 1.0
"""A scrape that begins so long after something happened shows it."""
_WARNED_S: Final = 5.0
"""A process warns of what it tries again at most once in so many seconds."""
_WORKER_FAILED: Final = "worker_failed"
_TROUBLE_LEVELS: Final = ("warning", "error")
_NO_TROUBLE: Final = ("failpoint", "failpoints_armed")
_QUIET_TROUBLE: Final = ("mirror_failed", "settle_failed")
"""Events of level `info` that tell of an error, too."""
_CHANGES: Final = "elastic_pt_changes_total"
_FAILURES: Final = "elastic_pt_worker_failures_total"
_LOST_STEPS: Final = "elastic_pt_lost_steps_total"
_COUNTED: Final = {
    Commit: "elastic_pt_checkpoint_commits_total",
    Quarantine: "elastic_pt_quarantines_total",
    Recovery: 'elastic_pt_recovery_seconds_bucket{le="+Inf"}',
}
"""What an agent counts of each kind of record that it appends."""


def check_evidence(played: Played, run: WatchedRun, records: Sequence[Record]) -> str:
    """Every fault is told, and nothing else is. Raises `Objection` with all that is wrong."""
    facts = Facts(played, run, tuple(records))
    told = {struck.number: list(_told(facts, struck)) for struck in played.struck}
    wrong = [
        f"fault {struck.number} ({struck.spec.kind} {'+'.join(struck.nodes)}): {missing}"
        for struck in played.struck
        for missing in told[struck.number]
        if missing
    ]
    wrong += unexplained(facts)
    wrong += _wrong_counters(facts)
    if wrong:
        raise Objection("; ".join(wrong))
    unseen = sum(not each for each in told.values())
    return f"{len(told) - unseen} faults told" + (
        f", {unseen} that nobody could see" if unseen else ""
    )


def _told(facts: Facts, struck: Struck) -> Iterator[str]:
    """For each way in which a fault has to be told: what is missing; empty if it is told."""
    evidence = struck.spec.of.evidence
    if struck.spec.of.deed and struck.ends_agent:
        if evidence.causes | evidence.events and not cause_goes_unseen(facts, struck):
            told = _is_cause(facts, struck, {CauseKind.LOST}) or _agent_told(facts, struck)
            yield "" if told else "its agent tells of no trouble, and is not lost"
        return
    if evidence.causes and not cause_goes_unseen(facts, struck):
        names = " or ".join(sorted(evidence.causes))
        told = _is_cause(facts, struck, evidence.causes)
        yield "" if told else f"no later generation has the cause {names} of it"
    if evidence.answers and not answer_goes_unseen(facts, struck):
        names = " or ".join(sorted(evidence.answers))
        yield "" if _is_answered(facts, struck) else f"no record that a {names} is carried out"
    if not events_go_unseen(facts, struck):
        yield from _told_by_events(facts, struck)


# ---- causes ------------------------------------------------------------------------------------------


def _is_cause(facts: Facts, struck: Struck, kinds: frozenset[CauseKind] | set[CauseKind]) -> bool:
    """Whether a later generation names the fault, or follows the loss of all members: then nobody knew why."""
    together = [
        each
        for each in facts.others(struck)
        if each.generation == struck.generation and set(each.nodes) & set(struck.nodes)
    ]
    for record, before, after in facts.later(struck):
        members = {each.node for each in before.members}
        if after.follows_the_loss_of_all(before) and members & set(struck.nodes):
            return True
        stays = stops_agent(struck) and bool(
            set(struck.nodes) & {each.node for each in after.members}
        )
        for cause in after.causes:
            # Members give up, and miss nobody, only if all of them answer again.
            passed = (
                record.written_at_s > struck.over_at_s or not struck.spec.of.evidence.names_node
            )
            if cause.kind is CauseKind.GAVE_UP and not passed:
                continue
            if cause.kind in kinds and may_name(struck, cause):
                return True
            tells_both = cause.node in struck.nodes and not stays
            if tells_both and any(_has(each, cause.kind) for each in together):
                return True
    if CauseKind.FAILED in kinds and facts.stop is not None:
        _, stop = facts.stop
        return stop.reason != COMPLETED and any(each in stop.reason for each in struck.nodes)
    return False


def _has(struck: Struck, kind: CauseKind) -> bool:
    lost = {CauseKind.LOST} if struck.ends_agent else set()
    return kind in struck.spec.of.evidence.causes | lost


# ---- answers to operators ----------------------------------------------------------------------------


def _is_answered(facts: Facts, struck: Struck) -> bool:
    """Whether an agent has appended that the request is carried out."""
    asked = -1
    for each in facts.records:
        match each.body:
            case Control(request) if request.done:
                # A pause commits everything, so it answers a request for a checkpoint.
                if asked >= 0 and request.verb in {*struck.spec.of.evidence.answers, Verb.PAUSE}:
                    return True
            case Control(request) if request.verb in struck.spec.of.evidence.answers:
                asked = each.index if asked < 0 and each.written_at_s >= struck.time_s else asked
            case Commit() if Verb.CHECKPOINT in struck.spec.of.evidence.answers:
                if 0 <= asked <= each.body.request:
                    return True
    return False


# ---- events and samples ------------------------------------------------------------------------------


def _agent_told(facts: Facts, struck: Struck) -> bool:
    """Whether an agent that met the fault itself has written an event about it."""
    return any(
        (each["level"] in _TROUBLE_LEVELS or each["event"] in _QUIET_TROUBLE)
        and each["event"] not in _NO_TROUBLE
        and written_at_s(each) >= struck.time_s
        for node in struck.nodes
        for each in facts.events(node)
    )


def _told_by_events(facts: Facts, struck: Struck) -> Iterator[str]:
    evidence = struck.spec.of.evidence
    since_s = struck.time_s - (0.0 if struck.spec.of.on_nodes else _WARNED_S)
    nodes = struck.nodes if evidence.names_node else facts.nodes
    told = {
        node: [
            each
            for each in facts.events(node, evidence.events)
            if written_at_s(each) >= since_s and _has_its_kind(each, evidence)
        ]
        for node in nodes
    }
    if evidence.events:
        missing = f"no event {' or '.join(sorted(evidence.events))} of it"
        yield "" if any(told.values()) else missing
    if evidence.metrics:
        yield from _told_by_metrics(facts, struck, told)


def _has_its_kind(event: Mapping[str, Any], evidence: Evidence) -> bool:
    """Whether the failure of a worker is told as what its counter has to show, where that is said."""
    shown = [each for each in evidence.metrics if each.startswith(_FAILURES)]
    return (
        event["event"] != _WORKER_FAILED
        or not shown
        or any(f'"{event["kind"]}"' in each for each in shown)
    )


def _told_by_metrics(
    facts: Facts, struck: Struck, told: dict[str, list[dict[str, Any]]]
) -> Iterator[str]:
    """A sample has risen, if an agent was scraped after its event, or, without events, after the end of the fault."""
    evidence, counters = struck.spec.of.evidence, facts.played.counters
    until_s = {node: written_at_s(events[0]) for node, events in told.items() if events}
    if not evidence.events or (struck.spec.for_s is not None and not evidence.names_node):
        # Also workers write such events, and only agents count.
        until_s = dict.fromkeys(told, struck.over_at_s + _SCRAPED_S)
    seen = [each for each, at in until_s.items() if counters.scraped_at_s.get(each, 0.0) > at]
    if seen:
        samples = sorted(evidence.metrics)
        rose = any(
            counters.rose_at_s(sample, node) > struck.time_s - _SCRAPED_S
            for sample in samples
            for node in seen
        )
        yield "" if rose else f"no {' or '.join(samples)} of it in the metrics of {', '.join(seen)}"


def _wrong_counters(facts: Facts) -> Iterator[str]:
    """Where the metrics of a node differ from the records that it appended, or from its own events."""
    for node, scraped_at_s in facts.played.counters.scraped_at_s.items():
        # What an earlier agent has counted may never have been scraped.
        if len(facts.events(node, {"agent_started"})) > 1:
            continue
        mine = [each for each in facts.records if each.writer == node]
        appended = [each for each in facts.generations if each[0].writer == node]
        if all(record.written_at_s < scraped_at_s - _SCRAPED_S for record, _ in appended):
            causes = [label_of(cause.kind) for _, each in appended for cause in each.causes]
            yield from _differs(facts, node, _CHANGES, [*map(label_of, CauseKind)], causes)
            lost = sum(each.lost_steps for _, each in appended)
            if (found := facts.played.counters.total(_LOST_STEPS, node)) != lost:
                yield f"{node} shows {_LOST_STEPS} = {found:g}, expected {lost}"
        # The bucket may be slow to answer: what it appended before its newest record is counted for sure.
        seen = [each for each in mine if each.written_at_s < scraped_at_s - _SCRAPED_S][:-1]
        for kind, sample in _COUNTED.items():
            least, most = (sum(isinstance(r.body, kind) for r in each) for each in (seen, mine))
            found = facts.played.counters.total(sample, node)
            if not least <= found <= most:
                yield f"{node} shows {sample} = {found:g}, expected {least} to {most}"
        failures = facts.events(node, {_WORKER_FAILED})
        if all(written_at_s(each) < scraped_at_s for each in failures):
            kinds = [str(each["kind"]) for each in failures]
            yield from _differs(facts, node, _FAILURES, [*FailureCause], kinds)


def _differs(
    facts: Facts, node: str, metric: str, labels: Sequence[str], expected: Sequence[str]
) -> Iterator[str]:
    for label in labels:
        sample = f'{metric}{{cause="{label}"}}'
        found, count = facts.played.counters.total(sample, node), expected.count(label)
        if found != count:
            yield f"{node} shows {sample} = {found:g}, expected {count}"
