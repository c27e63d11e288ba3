"""Bugs planted in the protocol, one at a time: a simulator that does not find them proves nothing.

Each changes one thing of the production code (or of the little that drives it here), in a way in which an
engineer who has not understood the rule might write it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from elastic_pt.errors import AlreadyExists, FencedError
from elastic_pt.membership import appender, participant
from elastic_pt.membership.decision import decide
from elastic_pt.membership.decision.admission import newcomers
from elastic_pt.membership.decision.budgets import Moments
from elastic_pt.membership.decision.status import Limits, NodeStatus, Peer
from elastic_pt.membership.known_nodes import KnownNodes
from elastic_pt.membership.node import Node
from elastic_pt.membership.peers import Message, PeerTable
from elastic_pt.membership.pulse import Pulse
from elastic_pt.runlog import log
from elastic_pt.runlog.ignored import DamagedSpan, IgnoredSpan, ignored_next, still_damaged
from elastic_pt.runlog.log import RunLog, RunView
from elastic_pt.runlog.records import Body, Cause, CauseKind, Commit, Generation
from elastic_pt.store import s3
from elastic_pt.store.s3 import S3Store
from tests.sim import agent
from tests.sim.agent import AgentProcess, SimulatedStore
from tests.sim.memory_mutations import MEMORY_MUTATIONS
from tests.sim.mutation import Mutation

# ---- the planted bugs ------------------------------------------------------------------------------


def _ignored_next_as_recorded(
    ignored: Sequence[IgnoredSpan], found: Sequence[DamagedSpan], resume_step: int
) -> tuple[IgnoredSpan, ...]:
    new = still_damaged(ignored, found)
    return (*ignored, *(IgnoredSpan(span, resume_step + 1) for span in new))


def _append_unchecked(self: RunLog, make: Callable[[RunView], Body], *, generation: int) -> RunView:
    with self._lock:
        body = make(self._view)
        log.check_allowed(self._view, body, generation)
        while True:
            view = self._refresh()
            record = self._next_record(view, body)
            try:
                self._store.create(log.record_key(record.index), record.to_bytes())
            except AlreadyExists:
                continue
            self._view = log.fold(view, record)
            return self._view


_append = RunLog.append


class _AnyCommit:
    """A commit that is equal to every commit."""

    def __init__(self, commit: Commit | None) -> None:
        self.checkpoints = () if commit is None else commit.checkpoints
        self.request = -1 if commit is None else commit.request

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


def _append_behind_commits(
    self: RunLog, make: Callable[[RunView], Body], *, generation: int
) -> RunView:
    def make_anyway(view: RunView) -> Body:
        try:
            return make(view)
        except FencedError:
            return make(dataclasses.replace(view, commit=_AnyCommit(view.commit)))  # type: ignore[arg-type]

    return _append(self, make_anyway, generation=generation)


def _bind_again(self: AgentProcess) -> SimulatedStore:
    known = list(self.participant.appender.stores.values())
    if known:
        return SimulatedStore(known[-1].port)
    return _bind_store(self)


_bind_store = AgentProcess._bind_store


def _believe_last_heard(self: PeerTable, message: Message) -> bool:
    news = _received(self, message)
    incarnation = message.status.member.incarnation
    known = self.peers.get(incarnation)
    if known is not None:
        self.peers[incarnation] = dataclasses.replace(known, status=message.status)
    return news


def _hearing_is_proof(self: PeerTable, message: Message) -> bool:
    news = _received(self, message)
    incarnation = message.status.member.incarnation
    known = self.peers.get(incarnation)
    if known is not None:
        self.peers[incarnation] = dataclasses.replace(known, heard_s=self._clock_s())
    return news


_received = PeerTable.received


def _unprobed_newcomers(
    me: NodeStatus,
    generation: Generation | None,
    peers: Mapping[str, Peer],
    limits: Limits,
    now_s: float,
) -> tuple[NodeStatus, ...]:
    unprobed = {
        incarnation: dataclasses.replace(
            peer,
            reached=True,
            status=peer.status and dataclasses.replace(peer.status, unreachable=()),
        )
        for incarnation, peer in peers.items()
    }
    return newcomers(me, generation, unprobed, limits, now_s)


def _halt_after_three(
    view: RunView, moments: Moments, failures: Sequence[Cause], *_: object
) -> str:
    newest = view.generations[-2:]
    failed = [any(cause.kind is CauseKind.FAILED for cause in each.causes) for each in newest]
    return "three failures in a row" if failures and failed == [True, True] else ""


MUTATIONS: Final = (
    *MEMORY_MUTATIONS,
    Mutation(
        "no fence",
        "an append does not check whether the writer's generation is the newest",
        log,
        "check_allowed",
        lambda view, body, generation: None,
        9,
    ),
    Mutation(
        "fence checked before the log is read",
        "the fence is checked against the view before the log was read further",
        RunLog,
        "append",
        _append_unchecked,
        9,
    ),
    Mutation(
        "commit during a proposal ignored",
        "a generation resumes from the checkpoint that was the newest one when its proposal was made",
        RunLog,
        "append",
        _append_behind_commits,
        192,
    ),
    Mutation(
        "wall clock",
        "silence is measured by the time of day",
        AgentProcess,
        "liveness_clock_s",
        AgentProcess.wall_clock_s,
        0,
    ),
    Mutation(
        "store used again",
        "a new generation uses the store of the previous one",
        AgentProcess,
        "_bind_store",
        _bind_again,
        0,
    ),
    Mutation(
        "own record treated as another writer's",
        "a create without an answer counts as a lost race",
        s3,
        "holds",
        lambda store, key, data: False,
        32,
    ),
    Mutation(
        "another writer's record treated as its own",
        "a create that finds a record counts as won",
        s3,
        "holds",
        lambda store, key, data: True,
        9,
    ),
    Mutation(
        "last writer wins",
        "a create overwrites an existing record",
        S3Store,
        "create",
        S3Store.write,
        9,
    ),
    Mutation(
        "generation formed without new answers",
        "a node that answered before the failure was detected counts as alive",
        decide,
        "_answered",
        lambda view, member, since_s: True,
        88,
    ),
    Mutation(
        "smaller side does not wait",
        "any side of a partitioned network continues at once",
        decide,
        "_is_larger_side",
        lambda *_: True,
        157,
    ),
    Mutation(
        "no node parked",
        "nodes that cannot reach each other become members of one generation",
        decide,
        "park",
        lambda links, order: (),
        33,
    ),
    Mutation(
        "links not probed",
        "every node that asks is admitted, even if its address does not answer",
        participant,
        "newcomers",
        _unprobed_newcomers,
        94,
    ),
    Mutation(
        "pulse ignored",
        "newcomers take over without a check whether the generation trains",
        Pulse,
        "feel",
        lambda self: b"",
        404,
    ),
    Mutation(
        "arrived message treated as proof of life",
        "a node that sends messages counts as reachable, although it may not receive any",
        PeerTable,
        "received",
        _hearing_is_proof,
        244,
    ),
    Mutation(
        "old messages accepted",
        "an older message that arrives late replaces a newer one",
        PeerTable,
        "received",
        _believe_last_heard,
        0,
    ),
    Mutation(
        "workers of a broken generation keep running",
        "workers of a broken generation are not ended",
        Node,
        "must_reform",
        lambda self, generation: False,
        0,
    ),
    Mutation(
        "one node's failure ends the run",
        "one failed worker leads to a STOP",
        participant,
        "halt",
        lambda view, moments, failures, *_: f"failed: {failures}",
        2,
    ),
    Mutation(
        "failures of the surroundings end the run",
        "three failures in a row end the run, for any cause",
        participant,
        "halt",
        _halt_after_three,
        2,
    ),
    Mutation(
        "damage ends the run",
        "a damaged block counts as a failure of the program",
        agent,
        "still_damaged",
        lambda ignored, found: (),
        1,
    ),
    Mutation(
        "damage forgotten",
        "a generation leaves out only what was found in the one before",
        appender,
        "ignored_next",
        lambda ignored, found, resume_step: ignored_next((), found, resume_step),
        1,
    ),
    Mutation(
        "first step kept",
        "a generation that resumes earlier leaves a span out and names its old first step",
        appender,
        "ignored_next",
        _ignored_next_as_recorded,
        415,
    ),
    Mutation(
        "no rest",
        "a node retries at once after repeated failures of its workers",
        agent,
        "rest_s",
        lambda failures, draw: 0.0,
        31,
    ),
    Mutation(
        "pause not obeyed",
        "the members of a run that trains do not stop for a pause",
        decide,
        "_SUSPENDING",
        (),
        41,
    ),
    Mutation(
        "lone node gives up",
        "a node leaves after some failures, even if no other node can continue",
        KnownNodes,
        "others_can_go_on",
        lambda self: True,
        31,
    ),
)
