"""Whether a run tells of nothing that did not happen: each cause of a GENERATION has a fault, each missing member a cause,
each QUARANTINE of a checkpoint a damage.

A fault that does not last has each cause at most once for each node. One that lasts has it until those who noticed could
not have noticed it any more: for the time of a silence after its end. Only reads; any process.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from elastic_pt.chaos.facts import Facts, may_name, removes
from elastic_pt.chaos.play import Struck
from elastic_pt.runlog.records import (
    Cause,
    CauseKind,
    Control,
    Generation,
    Quarantine,
    Record,
    Verb,
)

_GRACE_SHARE: Final = 1.25
"""Of `elastic.heartbeat_timeout_s`: so long after its last sign of life a node may be told as silent, or as parked."""
_GRACE_S: Final = 1.0
_BUGS: Final = frozenset(
    {"agent_crashed", "membership_crashed", "notices_crashed", "metrics_failed", "message_failed"}
)


def unexplained(facts: Facts) -> Iterator[str]:
    """What the log or an event tells that no fault explains, each as a sentence."""
    explanations = _Explanations(facts)
    for (_, before), (record, after) in pairwise(facts.generations):
        for cause in after.causes:
            if not explanations.has(cause, before, record, after):
                yield f"generation {after.number} has the cause {cause.kind} of {cause.node}, which no fault explains"
        yield from _missing(facts, before, record, after)
    for record in facts.records:
        match record.body:
            case Quarantine(directory=directory) if directory and not _may_damage(facts, record):
                yield f"record {record.index} quarantines {directory}, which no fault explains"
    for node in facts.nodes:
        # An error that a fault raises in an agent is a bug to it.
        if not any(each.ends_agent and node in each.nodes for each in facts.played.struck):
            for name in sorted({each["event"] for each in facts.events(node, _BUGS)}):
                yield f"{node} has the event {name}, which is a bug"


def _may_damage(facts: Facts, record: Record) -> bool:
    """Whether a fault before a record may have damaged what is read of a checkpoint."""
    evidences = [
        each.spec.of.evidence for each in facts.played.struck if each.time_s <= record.written_at_s
    ]
    return any(CauseKind.UNUSABLE in each.causes | each.may for each in evidences)


@dataclass
class _Explanations:
    """Finds a fault for each cause, and uses it up."""

    facts: Facts
    _used: set[tuple[int, str, CauseKind]] = field(default_factory=set)
    _failed: set[str] = field(default_factory=set)

    def has(self, cause: Cause, before: Generation, record: Record, after: Generation) -> bool:
        """Whether something explains a cause of `after`."""
        match cause.kind:
            case CauseKind.JOINED:
                return cause.node in {
                    each.node
                    for each in after.members
                    if each.incarnation not in before.incarnations
                }
            case CauseKind.BARRED:
                return cause.node in self._failed | {
                    each.node for each in after.causes if each.kind is CauseKind.FAILED
                }
            case CauseKind.FAILED if _read_from_the_lost(cause, before, after):
                return True
            case CauseKind.FAILED:
                self._failed.add(cause.node)
        return any(
            self._explains(each, cause, record, after) for each in self.facts.played.struck
        ) or self._gave_up(cause, record)

    def _explains(self, struck: Struck, cause: Cause, record: Record, after: Generation) -> bool:
        evidence = struck.spec.of.evidence
        kinds = evidence.causes | evidence.may
        if struck.ends_agent:
            kinds |= {CauseKind.LOST}
        if (
            cause.kind not in kinds
            or not may_name(struck, cause)
            or record.written_at_s < struck.time_s
        ):
            return False
        if struck.spec.for_s is None and evidence.names_node:
            key = struck.number, cause.node, cause.kind
            if key in self._used:
                return False
            self._used.add(key)
            return True
        if struck.spec.for_s is None:
            return True
        timeout_s = self.facts.played.config.elastic.heartbeat_timeout_s
        noticed_s = record.written_at_s - after.agree_s
        return noticed_s < struck.over_at_s + _GRACE_SHARE * timeout_s + _GRACE_S

    def _gave_up(self, cause: Cause, record: Record) -> bool:
        """Whether the agent had ended by itself, after failures of its own."""
        ended = self.facts.events(cause.node, {"agent_failed"})
        return (
            cause.kind in (CauseKind.LOST, CauseKind.LEFT)
            and cause.node in self._failed
            and bool(ended)
        )


def _read_from_the_lost(cause: Cause, before: Generation, after: Generation) -> bool:
    """Whether a worker failed as it read from the memory of a node that is told as lost beside it."""
    lost = {each.node for each in after.causes if each.kind is CauseKind.LOST}
    return any(
        each.node in lost and f"://{each.address}:{each.port}/" in cause.detail
        for each in before.members
    )


def _missing(facts: Facts, before: Generation, record: Record, after: Generation) -> Iterator[str]:
    """Members that are gone without a cause."""
    if after.follows_the_loss_of_all(before):
        gone = {
            node
            for each in facts.played.struck
            if removes(each) and each.time_s <= record.written_at_s
            for node in (each.nodes if each.spec.of.evidence.names_node else _nodes_of(before))
        }
        gone |= {node for node in facts.nodes if facts.events(node, {"agent_failed"})}
        if alive := sorted(_nodes_of(before) - gone):
            yield f"generation {after.number} has new members only, though no fault struck {', '.join(alive)}"
        return
    paused = any(
        isinstance(each.body, Control)
        and each.body.request.verb is Verb.PAUSE
        and each.generation == before.number
        for each in facts.records
    )
    if not after.causes and not paused:
        yield f"generation {after.number} has no cause"
    named = {each.node for each in after.causes}
    missing = {each.node for each in before.members if each.incarnation not in after.incarnations}
    if silent := sorted(missing - named):
        yield f"generation {after.number} is without {', '.join(silent)}, and has no cause for that"


def _nodes_of(generation: Generation) -> set[str]:
    return {each.node for each in generation.members}
