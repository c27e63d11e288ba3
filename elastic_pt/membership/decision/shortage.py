"""When people are told that too few nodes are left. Pure."""

from typing import Final

from elastic_pt.membership.decision.decide import Decision, Wait
from elastic_pt.membership.decision.status import Idle

TOLD_AFTER_S: Final = 300.0
"""Replacements of preempted machines usually arrive sooner."""


class Shortage:
    """How long the run has had too few nodes, as far as the node knows that tells of it."""

    def __init__(self) -> None:
        self._since_s: float | None = None
        self._told = False

    def due_s(self, decision: Decision, now_s: float) -> float | None:
        """The seconds since it began, once per shortage, `TOLD_AFTER_S` after its begin; else None."""
        idle = decision.idle if isinstance(decision, Wait) and decision.watching else None
        if idle is not Idle.BELOW_MINIMUM:
            self._since_s, self._told = None, False
            return None
        self._since_s = now_s if self._since_s is None else self._since_s
        lasted_s = now_s - self._since_s
        if self._told or lasted_s < TOLD_AFTER_S:
            return None
        self._told = True
        return lasted_s
