"""Why members of a generation do not continue, as causes for the next one. Pure."""

from collections.abc import Sequence

from elastic_pt.membership.decision.assessment import Assessment
from elastic_pt.membership.decision.status import incarnations
from elastic_pt.membership.decision.view import View
from elastic_pt.runlog.records import Cause, CauseKind, Generation, Member


def losses(
    view: View,
    found: Assessment,
    parked: Sequence[str],
    generation: Generation,
    now_s: float,
) -> list[Cause]:
    """A cause for each member that does not continue, unless it left by itself."""
    noticed_s = view.broken_since_s if view.broken_since_s is not None else now_s

    def sign_of_life_s(member: Member) -> float:
        peer = view.peers.get(member.incarnation)
        return noticed_s if peer is None or peer.heard_s is None else peer.heard_s

    causes = []
    dead, silent, deaf = (incarnations(each) for each in (found.dead, found.silent, found.deaf))
    for member in generation.members:
        silence_s = max(0.0, noticed_s - sign_of_life_s(member))
        if member.incarnation in dead:
            detail = "its address refuses connections" + _noticed(view, member)
            causes.append(Cause(CauseKind.LOST, member.node, detail, detect_s=silence_s))
        elif member.incarnation in silent or member.incarnation in deaf:
            detail = f"silent for {silence_s:.1f} s" + _noticed(view, member)
            if member.incarnation in deaf:
                detail = "it does not read the log"
            causes.append(Cause(CauseKind.LOST, member.node, detail, detect_s=silence_s))
        elif member.incarnation in parked:
            mine = [link for link in found.broken_links if member.incarnation in link]
            ends = {end for link in mine for end in link} - {member.incarnation}
            names = [each.node for each in generation.members if each.incarnation in ends]
            detail = f"no link to {', '.join(names)}"
            causes.append(Cause(CauseKind.PARKED, member.node, detail, detect_s=silence_s))
    return causes


def leaves(view: View, member: Member) -> Cause:
    """The cause that a member leaves, with the reason in its status."""
    said = view.status_of(member)
    return Cause(CauseKind.LEFT, member.node, "" if said is None else said.leave_reason)


def rest_of(view: View, member: Member) -> str:
    """Why a member rests, as text."""
    said = view.status_of(member)
    return f"{member.node} rests: {said.resting}" if said is not None and said.resting else ""


def _noticed(view: View, member: Member) -> str:
    """What a lost member has said about its end."""
    said = view.status_of(member)
    return f" (it was to leave: {said.leave_reason})" if said is not None and said.leaving else ""
