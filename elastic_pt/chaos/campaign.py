"""A campaign: one random scenario after the other, each drawn from a seed that is a single number.

    seed = number * 1000 + mean seconds between faults      draw(seed) ─► Scenario

The number decides everything else, so `replay SEED` needs nothing but the seed. Numbers that follow each other strike
another kind in another phase each time: so many in a row as there are pairs strike all of them (`pairs`). Further faults
come at random times whose gaps are exponential. Pure: no process here.
"""

import math
import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Final

from elastic_pt.chaos.kinds import KINDS, Kind, Need
from elastic_pt.chaos.scenario import Phase, Scenario
from elastic_pt.errors import ConfigError

MEAN_SECONDS_MAX: Final = 999
_NUMBERS: Final = 10**9
STEPS: Final = 300
"""The same for all, so that one undisturbed run is enough for a campaign."""
_STEP_S: Final = 0.1
"""What each step takes at least."""
_USUAL_STEP_S: Final = 0.15
"""What a step takes on two cores."""
_LAST_STEP: Final = 240
"""No fault is drawn for a later step: the run must not be over before it."""
_PRIMARY_UNTIL_STEP: Final = 150
_FAULTS_MAX: Final = 5
_EVERY_STEPS: Final = 6
"""`checkpoint.every_steps` of the workbench."""
_COMMITS_AHEAD: Final = 3
"""Commits that may be missing when all nodes are lost: of the last steps, and two on their way."""
_RECOVERS_WITHIN_S: Final = 30.0
"""All nodes of a run may have to start anew, on two cores."""
_TWO_COMMITS_STEP: Final = 40
_REPLACE_AFTER_S: Final = 2.0
_WORKERS_MAX: Final = 8
"""Rows of a step, each for one worker."""

_AT_CHANGES: Final = (Phase.IMPORT, Phase.RENDEZVOUS, Phase.RESTORE, Phase.RESIZE)
"""Phases that a run comes to when its members change. All others come again and again."""
_OF_ONE_NODE: Final = (Phase.COMMIT, Phase.RETENTION, Phase.RESIZE, Phase.IMPORT)
"""Phases to which one node comes: the one that commits, that proposes, that starts."""
_OF_WORKERS: Final = (
    *(Phase.RENDEZVOUS, Phase.RESTORE, Phase.FORWARD, Phase.REDUCE, Phase.OPTIMIZER),
    Phase.SNAPSHOT,
)
"""Phases in which a worker stands; in the others it is an agent."""
_BREAKERS: Final = ("kill_node", "kill_agent")
"""Faults after which the pool starts a node anew, and the members change twice."""

_LEFT_OUT: Final = {
    "program_fails": "it ends the run, as it must",
    "record_altered": "it ends the run, as it must",
    "record_deleted": "it ends the run, as it must",
    "data_damaged": "the run leaves the damaged tokens out, so its weights are others",
    "corrupt_packets": "nothing detects a wrong gradient yet (F11)",
    "new_fleet": "the pool starts new nodes anyway",
    "same_name": "the pool would start whom the run refuses again and again",
    "other_config": "the pool would start whom the run refuses again and again",
    "other_code": "the pool would start whom the run refuses again and again",
}
"""Kinds that a campaign does not draw, and why."""
_NEED_WORKERS: Final = {
    "kill_worker": (Phase.IMPORT, Phase.RESIZE),
    "worker_stops": (Phase.IMPORT, Phase.RESIZE),
    "kill_fork_server": (Phase.IMPORT,),
}
"""Kinds that strike a process below the agent, and the phases in which there may be none."""
_NEED_PEERS: Final = frozenset(
    {
        *("partition", "one_way", "halves", "link_down", "narrow_link", "reset_connections"),
        "shards_swapped",
    }
)
_NEED_A_RUN: Final = frozenset(
    {"operator_pauses", "operator_checkpoints", "operator_drains", "foreign_files"}
)
"""Kinds that write to a run that has begun."""


def why_not(kind: Kind, phase: Phase) -> str:
    """Why a campaign strikes no fault of this kind in this phase; empty if it does. The one place where this is said.

    What a process does itself (`deed`) is done by whoever is in the phase: by a worker in `rendezvous`, `restore`, `forward`,
    `reduce`, `optimizer` and `snapshot`, by the agent in the others.
    """
    if kind.name in _LEFT_OUT:
        return _LEFT_OUT[kind.name]
    if phase in _NEED_WORKERS.get(kind.name, ()):
        return "no such process may be there"
    if kind.name == "disk_stays_full" and phase in (*_OF_WORKERS, Phase.IMPORT):
        return "a node that fails again and again leaves for good"
    return ""


def pairs() -> list[tuple[Kind, Phase]]:
    """All pairs of a kind and a phase that make sense, in an order in which neighbours differ. The same each time."""
    found = [(kind, each) for kind in KINDS.values() for each in Phase if not why_not(kind, each)]
    random.Random(len(found)).shuffle(found)
    return found


def seeds(first: int | None, mean_seconds: int) -> Iterator[int]:
    """The seeds of a campaign, without end. `first` decides where it begins; None: anywhere."""
    begin = random.Random(first).randrange(_NUMBERS)
    return ((begin + each) * (MEAN_SECONDS_MAX + 1) + mean_seconds for each in count())


def check_seed(seed: int) -> None:
    """Raise `ConfigError` unless a campaign can have printed it."""
    if seed < 0 or seed % (MEAN_SECONDS_MAX + 1) == 0:
        raise ConfigError(f"SEED {seed}: expected a number that a campaign has printed")


def draw(seed: int) -> Scenario:
    """The scenario of a seed. Raises `ConfigError` for a number that no campaign prints."""
    check_seed(seed)
    number, mean_seconds = divmod(seed, MEAN_SECONDS_MAX + 1)
    choices = random.Random(seed)
    all_pairs = pairs()
    kind, phase = all_pairs[number % len(all_pairs)]
    return _Drawing(choices, float(mean_seconds), kind, phase).scenario(seed)


@dataclass
class _Drawing:
    """One scenario while it is drawn."""

    choices: random.Random
    mean_s: float
    kind: Kind
    phase: Phase
    nodes: int = 0
    faults: list[dict[str, Any]] = field(default_factory=list)

    def scenario(self, seed: int) -> Scenario:
        with_peers = self.kind.name in _NEED_PEERS or self.phase is Phase.MIRROR
        self.nodes = self.choices.randint(2 if with_peers else 1, 4)
        # So that there are scenarios for machines that cannot do everything.
        needs = set(self.kind.needs) | {each for each in Need if self.choices.random() < 0.5}
        at_s = self.choices.expovariate(1 / self.mean_s)
        self._strike_in_phase(self.kind, self.phase, _step_at(at_s, _PRIMARY_UNTIL_STEP))
        while len(self.faults) < _FAULTS_MAX:
            at_s += self.choices.expovariate(1 / self.mean_s)
            if at_s / _USUAL_STEP_S > _LAST_STEP or not (others := self._others(needs)):
                break
            self._strike_sometime(self.choices.choice(others), at_s)
        used = set().union(*(KINDS[each["kind"]].needs for each in self.faults))
        in_bucket = Need.BUCKET in used or (Need.BUCKET in needs and self.choices.random() < 0.5)
        nodes = self.nodes + sum(each["kind"] == "join" for each in self.faults)
        lasting_s = sum(each.get("for_s", 0.0) for each in self.faults)
        return Scenario.model_validate(
            {
                "name": f"seed-{seed}",
                "hypothesis": f"A run survives {', '.join(each['kind'] for each in self.faults)}.",
                "nodes": self.nodes,
                "workers_per_node": min(self.choices.randint(1, 2), _WORKERS_MAX // nodes),
                "steps": STEPS,
                "step_s": _STEP_S,
                "store": "bucket" if in_bucket else "directory",
                "replace_after_s": _REPLACE_AFTER_S,
                "longest_s": 240.0 + lasting_s,
                "faults": self.faults,
                "expect": {
                    "recovers_within_s": _RECOVERS_WITHIN_S + lasting_s,
                    "lost_steps": self._lost_steps(lasting_s),
                },
            }
        )

    def _lost_steps(self, lasting_s: float) -> int:
        """Two, if a copy of each state survives. Else those since the newest commit that can be read.

        Two commits may be on their way, each damaged checkpoint is one more, and no commit may come while a fault lasts.
        """
        alone = len(self.faults) == 1 and self.nodes > 1 and self.faults[0]["node"] != "all"
        if alone and not self.kind.needs:
            return 2
        damaged = sum(_changes_checkpoint(KINDS[each["kind"]]) for each in self.faults)
        return (_COMMITS_AHEAD + damaged) * _EVERY_STEPS + math.ceil(lasting_s / _STEP_S)

    def _others(self, needs: Collection[Need]) -> list[Kind]:
        """Kinds for one more fault: each at most once, since a program that fails the same way twice ends its run."""
        drawn = {each["kind"] for each in self.faults}
        return [
            each
            for each in KINDS.values()
            if each.name not in {*drawn, *_LEFT_OUT}
            and each.needs <= set(needs)
            and not (self.nodes == 1 and each.name in _NEED_PEERS)
        ]

    def _strike_in_phase(self, kind: Kind, phase: Phase, step: int) -> None:
        """A fault in a phase, after one that leads to it if the run does not come there by itself."""
        at: dict[str, Any] = {"phase": str(phase)}
        if phase not in _AT_CHANGES:
            at["step"] = step
        elif _comes_later(kind, phase) or self.choices.random() < 0.7:
            others = [each for each in _BREAKERS if each != kind.name]
            self._add(
                KINDS[self.choices.choice(others)],
                self._anyone(),
                {"step": max(_TWO_COMMITS_STEP, step)},
            )
            at["after"] = len(self.faults)
        node = "any"
        if phase not in _OF_ONE_NODE and self.choices.random() < 0.5:
            node = self._anyone()
        self._add(kind, node, at)

    def _strike_sometime(self, kind: Kind, at_s: float) -> None:
        """A fault at a step, in a phase that comes again and again, or at a time."""
        step = _step_at(at_s, _LAST_STEP)
        phases = [
            each
            for each in Phase
            if each not in _AT_CHANGES
            and not why_not(kind, each)
            and not (each is Phase.MIRROR and self.nodes == 1)
        ]
        ways = ["phase"] if phases else []
        ways += [] if why_not(kind, Phase.FORWARD) else ["step"]
        if not kind.deed and not _changes_checkpoint(kind) and at_s < _LAST_STEP * _STEP_S:
            ways.append("seconds")
        match self.choices.choice(ways):
            case "phase":
                self._strike_in_phase(kind, self.choices.choice(phases), step)
            case "step":
                self._add(kind, self._anyone(), {"step": step})
            case _:
                all_of_them = kind.ends_node and self.choices.random() < 0.2
                node = "all" if all_of_them else self._anyone()
                self._add(kind, node, {"seconds": round(at_s, 1)})

    def _anyone(self) -> str:
        names = ["any", "leader", "last"] + (["follower"] if self.nodes > 1 else [])
        return self.choices.choice(names)

    def _add(self, kind: Kind, node: str, at: dict[str, Any]) -> None:
        if "step" in at and (kind.name in _NEED_A_RUN or _changes_checkpoint(kind)):
            at = {**at, "step": max(at["step"], _TWO_COMMITS_STEP)}
        fault: dict[str, Any] = {"kind": kind.name, "node": node, "at": at}
        if kind.lasts:
            # Some are over before nodes give up a silent peer, some are not.
            fault["for_s"] = round(self.choices.uniform(1.0, 12.0), 1)
        self.faults.append(fault)
        if _changes_checkpoint(kind):
            # Nobody reads it as long as a state is in memory.
            everyone = {"kind": "kill_node", "node": "all"}
            self.faults.append({**everyone, "at": {**at, "after": len(self.faults)}})


def _comes_later(kind: Kind, phase: Phase) -> bool:
    """Whether it cannot strike when the run begins."""
    return phase is Phase.RESTORE or kind.name in _NEED_A_RUN or _changes_checkpoint(kind)


def _changes_checkpoint(kind: Kind) -> bool:
    return "checkpoint_quarantined" in kind.evidence.events


def _step_at(at_s: float, last: int) -> int:
    return min(last, 1 + int(at_s / _USUAL_STEP_S))
