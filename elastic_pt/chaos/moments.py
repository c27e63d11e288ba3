"""When each fault of a scenario strikes, and whom. No process here: `play` tells what happens, and lets the faults strike.

    begins(step) ─┐
    sees(generation) ─┼─► Agenda ─► due_at(a point), due_by(a time) ─► whom(fault) ─► struck(fault)
    started(time) ─┘

All but `may_strike_at` and `begins` is for the one thread that lets faults strike.
"""

from collections.abc import Iterator, Sequence

from elastic_pt.chaos.scenario import Draw, FaultSpec
from elastic_pt.failpoints import Reached
from elastic_pt.runlog.records import Generation


class Agenda:
    """The faults of one scenario that have not struck yet."""

    def __init__(self, faults: Sequence[FaultSpec], draw: Draw) -> None:
        self.pending = dict(enumerate(faults, start=1))
        """By their number in the scenario."""
        self.step = -1
        """Steps that were done when the newest computation of a step began; -1 before the first."""
        self.generation: Generation | None = None
        """The newest one."""
        self._draw = draw
        self._struck_s: dict[int, float] = {}
        self._first_step_s: float | None = None

    def begins(self, step: int, now_s: float) -> None:
        """A worker is about to compute a step. All times are seconds since the nodes were started. Any thread."""
        self.step = max(self.step, step)
        if self._first_step_s is None:
            self._first_step_s = now_s

    def struck(self, number: int, now_s: float) -> None:
        """This fault has struck."""
        del self.pending[number]
        self._struck_s[number] = now_s

    def may_strike_at(self, reached: Reached) -> bool:
        """Whether a fault may strike whoever stands at this point. Any thread."""
        return any(self._is_at(each, reached) for each in list(self.pending.values()))

    def due_at(self, reached: Reached) -> Iterator[tuple[int, FaultSpec]]:
        """The faults that strike at this point, if `whom` has the node that stands there, each with its number."""
        for number, fault in list(self.pending.items()):
            if self._is_at(fault, reached) and self._is_after(fault):
                yield number, fault

    def due_by(self, now_s: float) -> Iterator[tuple[int, FaultSpec]]:
        """The faults whose time has come, each with its number."""
        for number, fault in list(self.pending.items()):
            due_s = self._due_s(fault)
            if due_s is not None and now_s >= due_s and self._is_after(fault):
                yield number, fault

    def waits_for_a_time(self) -> bool:
        """Whether a time is known at which a fault strikes, even if nothing runs any more."""
        return any(self._due_s(each) is not None for each in self.pending.values())

    def whom(self, number: int, fault: FaultSpec, running: list[str], here: str) -> tuple[str, ...]:
        """The nodes that a fault strikes now. `here` stands at its moment; empty if a time told it."""
        ranked = self.ranked(running)
        found: list[str] = []
        for name in fault.nodes:
            match name:
                case "any":
                    found += [here] if here else self._chosen(number, ranked)
                case "all":
                    found += running
                case "leader":
                    found += ranked[:1]
                case "last":
                    found += ranked[-1:]
                case "follower":
                    others = ranked[1:]
                    found += [here] if here in others else self._chosen(number, others)
                case "mirror-of-leader":
                    found += self._mirror_of_leader()
                case _:
                    found.append(name)
        return tuple(dict.fromkeys(found))

    def ranked(self, running: list[str]) -> list[str]:
        """The members that run, by rank; before the first generation, and after the loss of all, the nodes that run."""
        members = [] if self.generation is None else [m.node for m in self.generation.members]
        return [each for each in members if each in running] or running

    def _is_at(self, fault: FaultSpec, reached: Reached) -> bool:
        at = fault.at
        if at.point is None or at.point.label != reached.point:
            return False
        step = self.step if reached.step is None else reached.step
        return at.step is None or step >= at.step

    def _is_after(self, fault: FaultSpec) -> bool:
        at = fault.at
        if at.after is not None and at.after not in self._struck_s:
            return False
        if at.generation is None:
            return True
        return self.generation is not None and self.generation.number >= at.generation

    def _due_s(self, fault: FaultSpec) -> float | None:
        """When a fault strikes that a time tells; None if another moment tells it, or its time is not known yet."""
        if fault.at.seconds is None:
            return None
        after = fault.at.after
        since_s = self._first_step_s if after is None else self._struck_s.get(after)
        return None if since_s is None else since_s + fault.at.seconds

    def _chosen(self, number: int, nodes: list[str]) -> list[str]:
        return [self._draw.for_fault(number).choice(nodes)] if nodes else []

    def _mirror_of_leader(self) -> list[str]:
        if self.generation is None:
            return []
        members = self.generation.members
        return [members[rank].node for rank in self.generation.mirrors_of(0)][:1]
