"""The facts for one node's decision: one immutable `View`, built once per turn by `Participant`."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from elastic_pt.membership.decision.assessment import Assessment
from elastic_pt.membership.decision.status import NodeStatus, Peer
from elastic_pt.runlog.records import Generation, Member, Request, Stop, Verb


@dataclass(frozen=True)
class View:
    """The facts for one node's decision. Moments are on its own monotonic clock."""

    me: NodeStatus
    generation: Generation | None
    """The newest one in the log."""
    stop: Stop | None
    found: Assessment | None
    """The state of the members; None if this node is no member of the newest generation."""
    peers: Mapping[str, Peer] = field(default_factory=dict)
    """By incarnation."""
    newcomers: tuple[NodeStatus, ...] = ()
    """Live nodes outside the generation that may join, by name."""
    newcomers_changed_s: float = 0.0
    """When a newcomer last appeared."""
    broken_since_s: float | None = None
    """When this node found that the newest generation is broken or over."""
    quiet_since_s: float = 0.0
    """Since when neither the log nor the pulse has changed."""
    quiet_until_s: float = math.inf
    """When log and pulse were last seen unchanged."""
    barred: Mapping[str, str] = field(default_factory=dict)
    """Nodes that are kept out, by name, each with the reason."""
    halt: str = ""
    """Why the run must end, by its failures; empty if it need not."""
    requests: tuple[Request, ...] = ()
    """The requests of operators that are in force."""
    committed_step: int = 0
    """The step of the newest checkpoint in the bucket; 0 if there is none."""

    def status_of(self, member: Member) -> NodeStatus | None:
        """The newest status of a node; None if there is none yet."""
        if member.incarnation == self.me.member.incarnation:
            return self.me
        peer = self.peers.get(member.incarnation)
        return None if peer is None else peer.status

    def statuses_of(self, members: Iterable[Member]) -> dict[str, NodeStatus]:
        """The newest statuses of these nodes, by incarnation."""
        told = {each.incarnation: self.status_of(each) for each in members}
        return {incarnation: said for incarnation, said in told.items() if said is not None}

    def asked(self, verb: Verb) -> Request | None:
        """The request of that verb, if there is one."""
        return next((each for each in self.requests if each.verb is verb), None)
