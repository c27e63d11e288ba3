"""The metrics endpoints of all nodes that are up, as one agent finds them out.

    this node knows all (a member of a small fleet)      ─► from memory
    else ─► ask the nodes that it asks anyway (leaders)  ─► /v1/endpoints of two of them, together with its own

A member of a large fleet knows only the leaders, and a node that waits knows only members. The leaders know every
node from the messages that all nodes send them. Agent process; any thread.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Any, Final

from elastic_pt.membership.address import own_addresses
from elastic_pt.membership.asking import ask_endpoints
from elastic_pt.membership.decision.status import LEADERS, MESH_NODES_MAX
from elastic_pt.membership.endpoints import Endpoint, as_targets, reachable
from elastic_pt.membership.participant import Participant
from elastic_pt.runlog.access import Access

_ANSWER_TIMEOUT_S: Final = 1.0
_KEEP_S: Final = 3.0
"""Seconds for which the answers of other agents are kept, however often this agent is asked."""


class Discovery:
    """Finds the endpoints. At most one thread asks other agents at a time; the others wait for its result."""

    def __init__(
        self, participant: Participant, access: Access, clock_s: Callable[[], float]
    ) -> None:
        self._participant = participant
        self._access = access
        self._clock_s = clock_s
        self._lock = threading.Lock()
        self._found: frozenset[Endpoint] | None = None
        self._found_s = float("-inf")

    def targets(self, asker: str) -> list[Mapping[str, Any]] | None:
        """The endpoints that an asker at this address can reach, as targets; None as in `endpoints`."""
        found = self.endpoints()
        return None if found is None else as_targets(reachable(found, asker, own_addresses()))

    def endpoints(self) -> frozenset[Endpoint] | None:
        """The endpoints of all nodes that are up, this one included; None if no node that knows all has answered."""
        own = frozenset(self._participant.known.endpoints())
        if self._knows_all():
            return own
        with self._lock:
            if self._clock_s() - self._found_s > _KEEP_S:
                self._found = self._ask()
                self._found_s = self._clock_s()
            return None if self._found is None else own | self._found

    def _knows_all(self) -> bool:
        """Whether this node exchanges messages with every other one."""
        generation = self._participant.log.view.generation
        return (
            generation is not None
            and generation.rank_of(self._participant.member.incarnation) is not None
            and len(generation.members) <= MESH_NODES_MAX
        )

    def _ask(self) -> frozenset[Endpoint] | None:
        up = {each.member.incarnation for each in self._participant.known.nodes_up()}
        asked = [each for each in self._participant.contacts.targets if each.incarnation in up][
            :LEADERS
        ]
        answers = ask_endpoints(asked, self._access, _ANSWER_TIMEOUT_S)
        # A node that hears nobody knows only itself, and that is the answer.
        if asked and not answers:
            return None
        return frozenset(each for told in answers.values() for each in told)
