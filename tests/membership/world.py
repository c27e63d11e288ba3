"""Facts about invented nodes, for the decisions in the tests of this folder."""

import dataclasses
import math
from collections.abc import Mapping

from elastic_pt.config import ElasticSection
from elastic_pt.membership.decision.admission import newcomers, slots_per_member
from elastic_pt.membership.decision.assessment import assess
from elastic_pt.membership.decision.decide import Decision, Propose, decide
from elastic_pt.membership.decision.status import Limits, NodePhase, NodeStatus, Peer
from elastic_pt.membership.decision.view import View
from elastic_pt.runlog.records import Cause, CauseKind, Generation, Member

NOW_S = 1000.0
NOTICED_S = NOW_S - 0.5
"""When the failure was detected, unless a test sets it: peers made by `peer` have answered since."""
LIMITS = Limits(
    ElasticSection(
        nodes_min=1,
        nodes_max=8,
        heartbeat_timeout_s=2.0,
        join_window_s=1.0,
        takeover_s=4.0,
        flaps_max=2,
        same_failures_max=2,
    ),
    slots=8,
)


def changed(limits: Limits, **changes: object) -> Limits:
    """Limits with another value of some keys of `[elastic]`, or of `slots`; bounds are not checked."""
    slots = changes.pop("slots", limits.slots)
    return Limits(limits.elastic.model_copy(update=changes), slots)  # type: ignore[arg-type]


def member(node: str, workers: int = 1) -> Member:
    """A node as a member."""
    return Member(node, f"{node}1", "127.0.0.1", 1, 1, workers)


def status(node: str, phase: NodePhase = NodePhase.RUNNING, **changes: object) -> NodeStatus:
    """The status of a healthy member of generation 1."""
    healthy = NodeStatus(
        member(node), phase, generation=1, log_length=1, spent=0, failure=None, fingerprint={}
    )
    return dataclasses.replace(healthy, **changes)  # type: ignore[arg-type]


def waiting(node: str, **changes: object) -> NodeStatus:
    """The status of a newcomer."""
    return status(node, NodePhase.WAITING, **changes)


def peer(
    says: NodeStatus, *, silent_s: float = 0.1, refused: bool = False, reached: bool = True
) -> Peer:
    """A peer with a recent proof of life."""
    return Peer(says, NOW_S - 100, NOW_S - silent_s, refused, reached)


def silent(says: NodeStatus) -> Peer:
    """A peer that has not answered for longer than the timeout."""
    return peer(says, silent_s=LIMITS.elastic.heartbeat_timeout_s + 0.1)


def refusing(says: NodeStatus) -> Peer:
    """A peer with an address that refuses connections."""
    return peer(says, refused=True)


def lives(*nodes: str) -> tuple[str, ...]:
    """The incarnations of nodes."""
    return tuple(member(node).incarnation for node in nodes)


def generation(*nodes: str) -> Generation:
    """Generation 1 of one-worker nodes."""
    members = tuple(member(node) for node in nodes)
    return Generation(1, members, slots_per_member(members, 8), "127.0.0.1", 1, None, "started")


def view_of(
    me: NodeStatus,
    peers: Mapping[str, Peer],
    *,
    of: Generation | None,
    limits: Limits = LIMITS,
    now_s: float = NOW_S,
    generation_since_s: float = math.inf,
    **facts: object,
) -> View:
    """The view of `me`; `peers` by node. Log and pulse have always been quiet, unless `facts` differs."""
    known = {member(node).incarnation: each for node, each in peers.items()}
    found = None
    if of is not None and of.rank_of(me.member.incarnation) is not None:
        found = assess(me, of, known, generation_since_s, limits, now_s)
    waits = newcomers(me, of, known, limits, now_s)
    view = View(me, of, None, found, known, waits, broken_since_s=NOTICED_S)
    return dataclasses.replace(view, **facts)  # type: ignore[arg-type]


def decision(
    me: NodeStatus,
    peers: Mapping[str, Peer],
    *,
    of: Generation | None,
    limits: Limits = LIMITS,
    now_s: float = NOW_S,
    **facts: object,
) -> Decision:
    """Decide as `me`."""
    view = view_of(me, peers, of=of, limits=limits, now_s=now_s, **facts)  # type: ignore[arg-type]
    return decide(view, limits, now_s)


def is_broken(me: NodeStatus, peers: Mapping[str, Peer], *, of: Generation) -> bool:
    """Whether `me` finds its generation broken."""
    found = view_of(me, peers, of=of).found
    return found is not None and found.broken


def nodes(proposal: Decision) -> list[str]:
    """The nodes that a proposal names."""
    assert isinstance(proposal, Propose), proposal
    return [each.node for each in proposal.members]


def causes(proposal: Decision) -> list[tuple[CauseKind, str]]:
    """The causes of a proposal: each kind with its node."""
    assert isinstance(proposal, Propose), proposal
    return [(cause.kind, cause.node) for cause in proposal.causes]


def failed(node: str, detail: str = "worker 0 killed by SIGKILL", **changes: object) -> Cause:
    """A failure of a node's own worker."""
    cause = Cause(CauseKind.FAILED, node, detail)
    return dataclasses.replace(cause, **changes)  # type: ignore[arg-type]
