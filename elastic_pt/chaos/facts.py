"""What is known of a chaos run that was played: its faults, its log, the events of its nodes. Only reads; any process.

`evidence` asks it whether a fault can be seen, `causes` whether a cause has a fault.
"""

import datetime
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Final

from elastic_pt.chaos.play import Played, Struck
from elastic_pt.chaos.watched import WatchedRun
from elastic_pt.runlog.records import Cause, CauseKind, Generation, Record, Stop

_SILENCES: Final = frozenset({CauseKind.LOST, CauseKind.GAVE_UP})
_GONE: Final = frozenset({CauseKind.LOST, CauseKind.LEFT})
_LOG: Final = "*.log"
_SHIPPED: Final = "events/"
_ENDS: Final = ("agent_failed", "agent_crashed")


@dataclass(frozen=True)
class Facts:
    """A run that was played."""

    played: Played
    run: WatchedRun
    records: tuple[Record, ...]

    @cached_property
    def generations(self) -> list[tuple[Record, Generation]]:
        """All GENERATION records, oldest first."""
        return [(each, each.body) for each in self.records if isinstance(each.body, Generation)]

    @cached_property
    def stop(self) -> tuple[float, Stop] | None:
        """The STOP, and when it was appended, as Unix time."""
        found = [
            (each.written_at_s, each.body) for each in self.records if isinstance(each.body, Stop)
        ]
        return found[-1] if found else None

    @cached_property
    def end_s(self) -> float:
        """When the run ended, as Unix time: its STOP, or else the end of what was watched."""
        if self.stop is not None:
            return self.stop[0]
        return max((each.time_s - each.at_s for each in self.played.struck), default=0.0) + (
            self.played.seconds
        )

    @cached_property
    def nodes(self) -> list[str]:
        """All nodes that were started."""
        return sorted(each.stem for each in self.played.directory.glob(_LOG))

    @cached_property
    def _events(self) -> dict[str, list[dict[str, Any]]]:
        found = {node: self.run.all_events(node) for node in self.nodes}
        # The command says in its own words why the agent ended: those events are in the run's directory only.
        store = self.run.store
        for key in store.keys(_SHIPPED):
            if key.endswith(".jsonl"):
                for event in map(json.loads, store.read(key).splitlines()):
                    if event["event"] in _ENDS:
                        found.setdefault(event["node"], []).append(event)
        return found

    def events(self, node: str, names: Collection[str] = ()) -> list[dict[str, Any]]:
        """The events of a node's agents and workers, in order; all, or those with one of these names."""
        return [each for each in self._events.get(node, []) if not names or each["event"] in names]

    def later(self, struck: Struck) -> Iterator[tuple[Record, Generation, Generation]]:
        """Each GENERATION after a fault, with the one before it."""
        for (_, before), (record, after) in pairwise(self.generations):
            if after.number > struck.generation:
                yield record, before, after

    def others(self, struck: Struck) -> Iterator[Struck]:
        """All other faults."""
        return (each for each in self.played.struck if each.number != struck.number)


def written_at_s(event: Mapping[str, Any]) -> float:
    """When an event was written, as Unix time."""
    return datetime.datetime.fromisoformat(event["timestamp"]).timestamp()


def is_silence(struck: Struck) -> bool:
    """Whether it is a fault that passes, in which nodes do not hear each other, and no connection ends."""
    causes = struck.spec.of.evidence.causes
    return struck.spec.for_s is not None and causes >= _SILENCES and CauseKind.FAILED not in causes


def leaves_no_majority(struck: Struck) -> bool:
    """Whether its nodes are as many members as the others: then either side may go on without the other."""
    return 2 * len(set(struck.members) - set(struck.nodes)) <= len(struck.members)


def may_name(struck: Struck, cause: Cause) -> bool:
    """Whether a cause of a fault may name this node. Members that gave up are not those that were silent."""
    return (
        not struck.spec.of.evidence.names_node
        or cause.node in struck.nodes
        or cause.kind is CauseKind.GAVE_UP
        or (is_silence(struck) and leaves_no_majority(struck))
    )


def stops_agent(struck: Struck) -> bool:
    """Whether the agents of its nodes end, or stand still. One that is cut off goes on."""
    by_agent = bool(struck.spec.of.deed) and struck.ends_agent
    return by_agent or bool(not struck.spec.of.needs and struck.spec.of.evidence.causes & _GONE)


def removes(struck: Struck) -> bool:
    """Whether a struck node may be gone from the members through it."""
    evidence = struck.spec.of.evidence
    return struck.ends_agent or bool((evidence.causes | evidence.may) & _GONE)
