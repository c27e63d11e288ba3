"""How many steps would be done again if nodes were lost now. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from elastic_pt.membership.decision.resume import newest_without_each
from elastic_pt.membership.decision.status import NodeStatus
from elastic_pt.runlog.records import Generation


@dataclass(frozen=True)
class AtRisk:
    """Steps that would be done again if this was lost now."""

    node: int
    """The node of rank 0."""
    any_node: int
    """The node whose loss would cost most."""
    all: int
    """All nodes."""


def at_risk(
    generation: Generation | None,
    answers: Mapping[str, NodeStatus],
    step: int,
    committed_step: int,
) -> AtRisk:
    """Steps that are done, but not in a state that would be left."""
    left = [committed_step]
    if generation is not None:
        left = newest_without_each(generation, generation.members, answers, committed_step)
    lost = [max(0, step - each) for each in left]
    return AtRisk(lost[0], max(lost), max(0, step - committed_step))
