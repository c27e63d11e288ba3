"""Whether anybody could see a fault: nobody tells of what nobody could see. Only reads; any process.

There need be no cause

- if no struck node was a member of the generation that was struck, or of one that was just being made; a newcomer must
  have been there for the time of a join,
- if it passes before nodes give up a silent peer, or every member was struck by it or by another fault: nobody listened,
- if it struck in the last step, or in the last seconds (`_END_S`) of the run and training did not depend on it, and no
  generation followed,
- if it ends a worker, and its generation was known to end: the workers stop anyway.

An event needs an agent that no other fault ended or froze meanwhile, and time for it.
"""

from typing import Final

from elastic_pt.chaos.facts import Facts, is_silence, stops_agent, written_at_s
from elastic_pt.chaos.kinds import Need
from elastic_pt.chaos.play import Struck
from elastic_pt.runlog.records import CauseKind

_END_S: Final = 3.0
_NOTICED_S: Final = 1.0
"""So long after a process has ended its agent knows it."""
_READ_S: Final = 1.0
"""An agent reads its notices at least so often."""
_ANSWERED_S: Final = 10.0
"""So long an operator waits at least."""
_TRAINS: Final = "training"
"""The reason of a decision to change nothing."""
_WORKER_FAILED: Final = "worker_failed"


def cause_goes_unseen(facts: Facts, struck: Struck) -> bool:
    """Whether no later generation has to name a fault."""
    if struck.spec.of.starts_nodes:
        return not _could_join(facts, struck)
    if struck.spec.of.on_nodes and not _was_member(facts, struck):
        return True
    is_watched = _is_watched(facts, struck)
    if is_silence(struck) and (_passes_in_time(facts, struck) or not is_watched):
        return True
    if stops_agent(struck) and not is_watched and not list(facts.later(struck)):
        return True
    fails = struck.spec.of.on_nodes and CauseKind.FAILED in struck.spec.of.evidence.causes
    return (fails and _is_ending(facts, struck)) or _ended_meanwhile(facts, struck)


def _could_join(facts: Facts, struck: Struck) -> bool:
    """Whether a newcomer, whom no other fault struck, was there long enough to be taken in."""
    alone = set(struck.nodes).difference(*(each.nodes for each in facts.others(struck)))
    needed_s = facts.played.config.elastic.join_window_s + _END_S
    started = (event for node in alone for event in facts.events(node, {"agent_started"}))
    return any(facts.end_s - written_at_s(event) > needed_s for event in started)


def _was_member(facts: Facts, struck: Struck) -> bool:
    """Whether a struck node was a member, or became one at that moment."""
    members = set(struck.members)
    for record, _, after in facts.later(struck):
        if (
            after.number == struck.generation + 1
            and record.written_at_s < struck.time_s + _NOTICED_S
        ):
            members |= {each.node for each in after.members}
    return bool(members & set(struck.nodes))


def _passes_in_time(facts: Facts, struck: Struck) -> bool:
    """Whether it may be over before a peer is given up.

    The newest message is up to an interval old when it strikes. Members of a generation that begins before they have given
    up begin to wait anew.
    """
    elastic = facts.played.config.elastic
    given_up_s = struck.time_s + elastic.heartbeat_timeout_s
    begun = [
        record.written_at_s
        for record, _, _ in facts.later(struck)
        if record.written_at_s < given_up_s
    ]
    silence_s = struck.over_at_s - max([struck.time_s, *begun])
    return silence_s <= elastic.heartbeat_timeout_s + 2 * elastic.heartbeat_interval_s


def _is_watched(facts: Facts, struck: Struck) -> bool:
    """Whether a member runs that no fault silences: one that is cut off still listens, one that stands still does not."""
    listening = set(struck.members)
    if stops_agent(struck):
        listening -= set(struck.nodes)
    for each in facts.others(struck):
        if stops_agent(each) and _overlap(each, struck):
            listening -= set(each.nodes)
    return bool(listening) and len(struck.members) > 1


def _overlap(one: Struck, other: Struck) -> bool:
    """Whether two faults are there at the same time. Who was ended in an earlier generation has been replaced since."""
    first, second = sorted((one, other), key=lambda each: each.time_s)
    if first.spec.for_s is None:
        return first.generation == second.generation
    return second.time_s < first.over_at_s


def _ended_meanwhile(facts: Facts, struck: Struck) -> bool:
    """Whether the run was over before anybody had to see the fault."""
    if list(facts.later(struck)):
        return False
    if struck.step >= facts.played.config.train.steps - 1:
        return True
    breaking = {CauseKind.LOST, CauseKind.FAILED}
    if struck.spec.for_s is None and struck.spec.of.evidence.causes <= breaking:
        return False
    silence_s = facts.played.config.elastic.heartbeat_timeout_s if is_silence(struck) else 0.0
    return facts.end_s - struck.time_s < silence_s + _END_S


def _ends_worker(struck: Struck) -> bool:
    evidence = struck.spec.of.evidence
    return CauseKind.FAILED in evidence.causes and _WORKER_FAILED in evidence.events


def _is_ending(facts: Facts, struck: Struck) -> bool:
    """Whether a member knew that its generation ends, or a fault that nobody can miss had just struck it."""
    if any(
        0.0 <= struck.time_s - each.time_s < _NOTICED_S
        and each.generation == struck.generation
        and (_ends_worker(each) or (each.spec.for_s is None and stops_agent(each)))
        for each in facts.others(struck)
    ):
        return True
    decisions = [
        [each for each in facts.events(node, {"decision"}) if written_at_s(each) <= struck.time_s]
        for node in struck.members
    ]
    return any(
        each[-1]["kind"] != "save" and each[-1]["reason"] != _TRAINS for each in decisions if each
    )


def answer_goes_unseen(facts: Facts, struck: Struck) -> bool:
    """Whether the run had other work, or no time, until the end of the request."""
    until_s = facts.end_s if struck.spec.for_s is None else struck.over_at_s
    disturbed = any(
        each.time_s < until_s and each.over_at_s > struck.time_s - _ANSWERED_S
        for each in facts.others(struck)
        if each.spec.of.evidence.causes | each.spec.of.evidence.may
    )
    if struck.spec.of.evidence.names_node and _are_hindered(facts, struck):
        return True
    needed_s = facts.played.config.elastic.heartbeat_timeout_s
    return until_s - struck.time_s < (needed_s + _ANSWERED_S if disturbed else needed_s)


def events_go_unseen(facts: Facts, struck: Struck) -> bool:
    """Whether no agent has to write an event about a fault, or to count it."""
    kind = struck.spec.of
    if not kind.evidence.events | kind.evidence.metrics:
        return True
    if kind.evidence.at_start and not _anything_starts(facts, struck):
        return True
    if _ends_worker(struck) and cause_goes_unseen(facts, struck):
        return True
    # An agent writes why a worker ended before others act on it.
    is_acted_on = _ends_worker(struck) and bool(list(facts.later(struck)))
    if facts.end_s - struck.time_s < _END_S and not is_acted_on:
        return True
    if kind.on_nodes and kind.heal is not None and struck.over_at_s - struck.time_s < _READ_S:
        return True
    if Need.BUCKET in kind.needs and struck.spec.for_s is not None:
        # So often each run asks the bucket for something, also if no checkpoint is due.
        return struck.spec.for_s < facts.played.config.elastic.heartbeat_timeout_s
    return kind.evidence.names_node and _are_hindered(facts, struck)


def _anything_starts(facts: Facts, struck: Struck) -> bool:
    """Whether a node had to start workers while the fault was there, or an agent started after one that does not last."""
    if struck.spec.for_s is None:
        at = [each.at_s for each in facts.played.happenings if each.what == "started"]
        at += [each.at_s for each in facts.others(struck) if each.spec.of.starts_nodes]
        return any(each > struck.at_s for each in at)
    return any(
        struck.time_s < record.written_at_s < struck.over_at_s - _END_S
        and (
            not struck.spec.of.evidence.names_node
            or set(struck.nodes) & {each.node for each in after.members}
        )
        for record, _, after in facts.later(struck)
    )


def _are_hindered(facts: Facts, struck: Struck) -> bool:
    """Whether other faults end or stop the agents of all struck nodes before they have to have told of this one."""
    until_s = struck.time_s + facts.played.config.elastic.hang_timeout_s + _END_S
    stopped = {
        node
        for each in facts.others(struck)
        if stops_agent(each) and each.time_s < until_s and _overlap(each, struck)
        for node in each.nodes
    }
    return set(struck.nodes) <= stopped
