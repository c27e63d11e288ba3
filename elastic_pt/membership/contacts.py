"""Which nodes this one keeps asking, and of which nodes silence counts.

    members ───────────┐                       ┌─► targets: `Links` keeps a connection to each
    lobby, if no member├─► aim, at every turn ─┼─► silence clocks of the PeerTable, started and stopped
      answers          │                       └─► unreachable: nodes that should answer and do not
    nodes that ask     ┘

In a small fleet every member asks every other one. In a large fleet all members ask the first two that answer
(the leaders). The leaders know every member from the messages that all members send them.
"""

from collections.abc import Callable, Mapping, Sequence

from elastic_pt.membership.decision.status import (
    LEADERS,
    MESH_NODES_MAX,
    Limits,
    NodePhase,
    Peer,
    incarnations,
    is_lost,
)
from elastic_pt.membership.lobby import Lobby
from elastic_pt.membership.peers import PeerTable
from elastic_pt.runlog.log import RunView
from elastic_pt.runlog.records import Member


class Contacts:
    """The nodes that one node asks. Agent process; call `aim` from one thread; it may block on the bucket."""

    def __init__(
        self, table: PeerTable, lobby: Lobby, limits: Limits, clock_s: Callable[[], float]
    ) -> None:
        self._table = table
        self._lobby = lobby
        self._limits = limits
        self._clock_s = clock_s
        self.targets: tuple[Member, ...] = ()
        """The nodes to keep asking."""
        self.no_member_answers = False
        """True if this node is not a member and no member answers it."""
        self._generation = 0
        """The generation with the members among which this node chose last."""
        self._suspects: dict[str, float] = {}
        """Peers that closed a connection, and when."""

    def hung_up(self, incarnation: str) -> None:
        """A peer's connection to this node has ended. The peer may be gone."""
        self._suspects[incarnation] = self._clock_s()

    def leave_lobby(self) -> None:
        """Remove this node's card from the lobby."""
        self._lobby.leave()

    def aim(self, view: RunView, me: Member) -> tuple[str, ...]:
        """Choose the targets again. Returns the incarnations of targets that should answer and do not, in order."""
        now_s = self._clock_s()
        members = () if view.generation is None else view.generation.members
        silence_s = self._limits.silence_s(max(1, len(members)))
        inside = view.generation is not None and view.generation.rank_of(me.incarnation) is not None
        leads = inside and len(members) > MESH_NODES_MAX and self._leads(members, me, silence_s)
        targets = whom_to_ask(members, me.incarnation, self._table.peers, now_s, silence_s)
        if inside:
            self._lobby.leave()
            self.no_member_answers = False
        else:
            self.no_member_answers = all(
                is_lost(self._table.peers.get(each.incarnation), now_s, silence_s)
                for each in members
            )
            # Members that were not reachable before may answer again. Only asking shows it.
            targets += members[:LEADERS]
            if self.no_member_answers and view.stop is None:
                targets += self._waiting(me)
        if leads:
            targets += self._suspected(members)
        else:
            self._suspects.clear()
        targets += self._applicants(me, incarnations(targets) | _members(view), silence_s)
        chosen = {each.incarnation: each for each in targets}
        self._set_clocks(view, me, set(chosen), leads, silence_s)
        self.targets = tuple(chosen.values())
        return tuple(
            sorted(
                each for each in chosen if is_lost(self._table.peers.get(each), now_s, silence_s)
            )
        )

    # ---- which nodes to ask -----------------------------------------------------------------------------

    def _leads(self, members: tuple[Member, ...], me: Member, silence_s: float) -> bool:
        """Whether this node is one of the first members that still answer."""
        ahead, now_s = 0, self._clock_s()
        for member in members:
            if ahead == LEADERS or member.incarnation == me.incarnation:
                break
            ahead += not is_lost(self._table.peers.get(member.incarnation), now_s, silence_s)
        return ahead < LEADERS

    def _waiting(self, me: Member) -> list[Member]:
        """The nodes of the lobby to ask, with this node in it."""
        now_s, silence_s = self._clock_s(), self._limits.elastic.heartbeat_timeout_s
        peers = self._table.peers
        waiting = self._lobby.waiting(me)
        for each in waiting:
            peer = peers.get(each.incarnation)
            if peer is not None and is_lost(peer, now_s, 2 * silence_s):
                self._lobby.forget(each)
        order = sorted([*waiting, me], key=lambda each: (each.node, each.incarnation))
        return whom_to_ask(order, me.incarnation, peers, now_s, silence_s)

    def _suspected(self, members: tuple[Member, ...]) -> list[Member]:
        """Members of a large fleet that closed their connection to this leader and have sent nothing since.

        Only leaders probe them. If every member probed, each probe's end would trigger another probe.
        """
        for incarnation, since_s in list(self._suspects.items()):
            peer = self._table.peers.get(incarnation)
            if peer is None or (peer.heard_s is not None and peer.heard_s > since_s):
                self._suspects.pop(incarnation, None)
        if not self._suspects:
            return []
        return [member for member in members if member.incarnation in self._suspects]

    def _applicants(self, me: Member, known: frozenset[str], silence_s: float) -> list[Member]:
        """Nodes that want to join: they are asked, because their address must work for others."""
        return [
            peer.status.member
            for incarnation, peer in list(self._table.peers.items())
            if peer.status is not None
            and incarnation not in known
            and incarnation != me.incarnation
            and peer.status.phase is NodePhase.WAITING
            and not self._is_forgotten(incarnation, silence_s)
        ]

    # ---- silence clocks --------------------------------------------------------------------------

    def _set_clocks(
        self, view: RunView, me: Member, chosen: set[str], leads: bool, silence_s: float
    ) -> None:
        table, now_s = self._table, self._clock_s()
        inside = _members(view)
        before = incarnations(self.targets)
        new_world = view.generation_number != self._generation
        self._generation = view.generation_number
        for incarnation in chosen:
            # A leader has expected answers of its members before, too.
            waited = incarnation in before or (leads and incarnation in inside and not new_world)
            table.watch(incarnation, anew=not waited)
        for incarnation in (before | inside) - chosen - {me.incarnation}:
            peer = table.peers.get(incarnation)
            if leads and incarnation in inside:
                table.watch(incarnation, anew=new_world)
            elif peer is None or peer.watched_since_s is None:
                continue
            elif new_world or not is_lost(peer, now_s, silence_s):
                # This node no longer asks it, so its silence proves nothing from now on.
                table.rest(incarnation)
        for incarnation in table.peers.keys() - chosen - inside:
            if self._is_forgotten(incarnation, silence_s):
                table.unwatch(incarnation)

    def _is_forgotten(self, incarnation: str, silence_s: float) -> bool:
        """Whether a node that is no member has been silent for so long that it is dropped."""
        peer = self._table.peers.get(incarnation)
        if peer is None or peer.refused:
            return True
        moments = (peer.watched_since_s, peer.heard_s, peer.spoke_s)
        last_s = max((each for each in moments if each is not None), default=float("-inf"))
        return self._clock_s() - last_s > 4 * silence_s


def _members(view: RunView) -> frozenset[str]:
    return frozenset() if view.generation is None else view.generation.incarnations


def whom_to_ask(
    order: Sequence[Member], me: str, peers: Mapping[str, Peer], now_s: float, timeout_s: float
) -> list[Member]:
    """The nodes in `order` that this one asks: all of a small fleet, the first two that answer of a large fleet."""
    others = (member for member in order if member.incarnation != me)
    if len(order) <= MESH_NODES_MAX:
        return list(others)
    chosen, gone = [], 0
    for member in others:
        if is_lost(peers.get(member.incarnation), now_s, timeout_s):
            gone += 1
            continue
        chosen.append(member)
        # If the first ones are gone, ask as many as are gone: a whole rack may be gone.
        if len(chosen) >= max(LEADERS, gone):
            break
    return chosen
