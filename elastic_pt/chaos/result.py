"""The result of a chaos run: what happened, the verdict of every oracle, and what the faults cost."""

from dataclasses import dataclass
from typing import Any

from elastic_pt.chaos.play import Played
from elastic_pt.report.goodput import Goodput


@dataclass(frozen=True)
class Verdict:
    """What one oracle says of a run."""

    oracle: str
    passed: bool
    told: str
    """One line: what was found, and if it failed, what was expected."""


@dataclass(frozen=True)
class Cost:
    """What one fault cost; None where it cannot be told."""

    number: int
    """Of the fault in its scenario, from 1."""
    recovery_s: float | None
    """From its strike to the next step that was done, if it ended a generation."""
    lost_steps: int | None
    """Steps that were reported as done and had to be done again."""
    waited_s: float = 0.0
    """Of `recovery_s`: in which processes of this machine waited for a processor."""


@dataclass(frozen=True)
class Result:
    """Everything about a run that was played and judged."""

    played: Played
    verdicts: tuple[Verdict, ...]
    costs: tuple[Cost, ...]
    goodput: Goodput | None
    """None if no agent left an account."""
    replay: str
    """The command that plays it again."""

    @property
    def passed(self) -> bool:
        """Whether every oracle is content."""
        return all(each.passed for each in self.verdicts)

    def as_json(self) -> dict[str, Any]:
        """For `result.json`: keys as the fields, durations in seconds."""
        played = self.played
        return {
            "name": played.scenario.name,
            "hypothesis": played.scenario.hypothesis,
            "rows": list(played.scenario.rows),
            "seed": played.seed,
            "passed": self.passed,
            "seconds": round(played.seconds, 3),
            "replay": self.replay,
            "verdicts": [
                {"oracle": each.oracle, "passed": each.passed, "told": each.told}
                for each in self.verdicts
            ],
            "faults": [
                {
                    "number": struck.number,
                    "kind": struck.spec.kind,
                    "nodes": list(struck.nodes),
                    "at_s": round(struck.at_s, 3),
                    "step": struck.step,
                    "recovery_s": cost.recovery_s,
                    "waited_s": round(cost.waited_s, 3),
                    "lost_steps": cost.lost_steps,
                }
                for struck, cost in zip(played.struck, self.costs, strict=True)
            ],
            "happenings": [
                {
                    "at_s": round(each.at_s, 3),
                    "what": each.what,
                    "node": each.node,
                    "text": each.text,
                }
                for each in played.happenings
            ],
        }
