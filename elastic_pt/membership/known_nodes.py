"""What one node knows of itself and of the nodes that it hears: who is up, who stays, what they hold together."""

from collections.abc import Callable

from elastic_pt.membership.decision.settled import Settled, needed, settled, stays
from elastic_pt.membership.decision.status import (
    Limits,
    NodeStatus,
    difference,
    incarnations,
    is_lost,
)
from elastic_pt.membership.endpoints import Endpoint, endpoints_of, nodes_up
from elastic_pt.membership.own_status import OwnStatus
from elastic_pt.membership.peers import PeerTable
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import Generation


class KnownNodes:
    """The nodes that one node hears, and itself. Agent process; from any thread; never blocks."""

    def __init__(
        self,
        me: OwnStatus,
        table: PeerTable,
        log: RunLog,
        limits: Limits,
        clock_s: Callable[[], float],
    ) -> None:
        self._me, self._table, self._log = me, table, log
        self._limits = limits
        self._clock_s = clock_s

    @property
    def world(self) -> int:
        """The number of members of the newest generation; 1 before the first."""
        generation = self._log.view.generation
        return 1 if generation is None else len(generation.members)

    def silence_s(self) -> float:
        """Seconds without a proof of life after which a peer counts as silent."""
        return self._limits.silence_s(self.world)

    def others_can_go_on(self) -> bool:
        """Whether enough other nodes are alive and fit to continue the run without this one."""
        now_s, timeout_s = self._clock_s(), self.silence_s()
        fit = [
            peer.status
            for peer in list(self._table.peers.values())
            if peer.status is not None
            and peer.heard_s is not None
            # A former member is not asked any more, so `is_lost` alone says nothing about it.
            and now_s - peer.heard_s <= timeout_s
            and not is_lost(peer, now_s, timeout_s)
            and not (peer.status.leaving or peer.status.resting)
            and not difference(self._me.stated.fingerprint, peer.status.fingerprint)
        ]
        return len(fit) >= self._limits.elastic.nodes_min

    def settled(self, generation: Generation, step: int) -> Settled:
        """Where the state of `step` is safe, with which the workers of `generation` stopped as planned."""
        view, alive = self._log.view, self._live_statuses()
        gone = {
            each: peer.status
            for each, peer in dict(self._table.peers).items()
            if each not in alive and peer.status is not None
        }
        return settled(generation, step, alive, view.checkpoints, view.requests, gone)

    def staying(self) -> frozenset[str]:
        """The nodes that are not gone, this one included, and will be members of the next generation; by incarnation.

        Only those that this node knows: in a large fleet, the leaders.
        """
        return frozenset(each for each, said in self._live_statuses().items() if stays(said))

    def mirrors_leave(self) -> bool:
        """Whether all mirrors of this node are known to leave, or are gone. False if it has none."""
        generation = self._log.view.generation
        rank = (
            None if generation is None else generation.rank_of(self._me.stated.member.incarnation)
        )
        if generation is None or rank is None:
            return False
        mirrors = {generation.members[each].incarnation for each in generation.mirrors_of(rank)}
        known, stay = dict(self._table.peers), self.staying()
        return bool(mirrors) and all(
            each in known and known[each].status is not None and each not in stay
            for each in mirrors
        )

    def is_needed(self) -> bool:
        """Whether the other members cannot resume from the newest state without this node, which leaves."""
        generation, statuses = self._log.view.generation, self._live_statuses()
        if generation is None or generation.rank_of(self._me.stated.member.incarnation) is None:
            return False
        told = [(each, statuses.get(each.incarnation)) for each in generation.members]
        stay = [each for each, said in told if said is not None and stays(said)]
        leaving = [each for each, said in told if said is not None and said.leaving]
        required = needed(generation, stay, leaving, statuses, self._log.view.committed_step)
        return self._me.stated.member.incarnation in incarnations(required)

    def nodes_up(self) -> list[NodeStatus]:
        """The newest status of each node that this one hears, without its own."""
        return nodes_up(list(self._table.peers.values()), self._clock_s(), self.silence_s())

    def endpoints(self) -> list[Endpoint]:
        """Where this node, and those that it hears, serve metrics."""
        return endpoints_of([self._me.stated, *self.nodes_up()])

    def _live_statuses(self) -> dict[str, NodeStatus]:
        """The newest status of each node that is not gone, this one included, by incarnation."""
        now_s, silence_s = self._clock_s(), self.silence_s()
        me = self._me.now
        return {
            incarnation: peer.status
            for incarnation, peer in dict(self._table.peers).items()
            if peer.status is not None and not is_lost(peer, now_s, silence_s)
        } | {me.member.incarnation: me}
