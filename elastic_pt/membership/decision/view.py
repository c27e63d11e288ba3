"""The facts that one node decides from: one immutable `View`, built once per turn by `Participant`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from elastic_pt.membership.decision.assessment import Assessment
from elastic_pt.membership.decision.status import NodeStatus, Peer
from elastic_pt.runlog.records import Generation, Request, Stop, Verb


@dataclass(frozen=True)
class View:
    """The facts that one node decides from. Moments are on its own monotonic clock."""

    me: NodeStatus
    generation: Generation | None
    """The newest one in the log."""
    stop: Stop | None
    found: Assessment | None
    """The state of the members; None if this node is no member of the newest generation."""
    peers: Mapping[str, Peer] = field(default_factory=dict)
    """By incarnation."""
    newcomers: tuple[NodeStatus, ...] = ()
    """Live nodes outside the generation that could be taken in, by name."""
    newcomers_changed_s: float = 0.0
    """When a newcomer last appeared."""
    broken_since_s: float | None = None
    """When this node found that the newest generation has no future."""
    quiet_since_s: float = 0.0
    """Since when neither the log nor the pulse has changed."""
    quiet_until_s: float = math.inf
    """When that was last seen to be so."""
    barred: Mapping[str, str] = field(default_factory=dict)
    """Nodes that are kept out, by name, each with the reason."""
    halt: str = ""
    """Why the run must end, if its failures say so."""
    requests: tuple[Request, ...] = ()
    """What operators have asked of the run and still holds."""

    def asked(self, verb: Verb) -> Request | None:
        """The request of that verb, if there is one."""
        return next((each for each in self.requests if each.verb is verb), None)
