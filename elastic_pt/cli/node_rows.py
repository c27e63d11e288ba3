"""The nodes of a run as the rows of a table: what each does, and how its phase is coloured."""

from typing import TYPE_CHECKING

from elastic_pt.cli.terminal_text import duration

if TYPE_CHECKING:
    from elastic_pt.report.live import Facts
    from elastic_pt.report.status import MemberReport

Row = tuple[str, ...]
"""Node, phase, slots, zone, the nodes that copy its state, and notes."""


def node_rows(facts: "Facts") -> list[tuple[Row, str]]:
    """A row with its style for each node: members, nodes that wait, nodes that are kept out."""
    found = [_node_row(facts, each, "member") for each in facts.status.members]
    found += [_node_row(facts, each, "waits") for each in facts.status.waiting]
    for each in facts.kept_out:
        left = duration((each.until - facts.now).total_seconds())
        # One row for a node: what it does now, if that is more than to wait or to rest.
        own = [row for row, _ in found if row[0] == each.node]
        trains = [row for row in own if row[1] in ("running", "leaves")]
        row = trains[0] if trains else (each.node, "kept out", "", "", "", "")
        told = f"for {left}: {each.why}"
        row = (*row[:5], f"kept out {told}" if trains else told)
        found = [(other, style) for other, style in found if other[0] != each.node]
        found.append((row, "yellow"))
    return found


def _node_row(facts: "Facts", member: "MemberReport", role: str) -> tuple[tuple[str, ...], str]:
    over = facts.status.state in ("completed", "failed")
    phase = "ended" if over and member.phase == "down" else member.phase
    style = {"running": "green", "down": "bold red", "ended": "dim"}.get(phase, "yellow")
    style = "dim" if facts.stale else style
    notes = []
    if member.resting:
        phase, style = "rests", "yellow"
        notes.append(member.resting)
    if member.leaving:
        phase, style = "leaves", "yellow"
        notes.append(member.leaving)
    if role == "waits" and not notes:
        notes.append("no member yet")
    if facts.beats and phase == "down":
        phase, style = "unseen", "yellow"
    slots = str(member.slots) if member.slots else ""
    mirrors = ", ".join(member.mirrors) if member.slots and not over else ""
    return (member.node, phase, slots, member.zone, mirrors, "; ".join(notes)), style
