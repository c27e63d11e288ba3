"""Damaged data in the simulator: when it is there, and what must hold of the tokens that are left out.

Step n of the plan reads the spans that `damaged_in` draws for it. Workers that read one of them fail, once the damage is
there and as long as their GENERATION does not leave it out.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from elastic_pt.runlog.ignored import DamagedSpan
from elastic_pt.runlog.records import Generation
from tests.sim.violation import Violation

_STEPS = 60
_UNTIL_S = 20.0


@dataclass(frozen=True)
class Damage:
    """A damaged span, and since when it is damaged."""

    span: DamagedSpan
    since_s: float


def damaged_in(source: random.Random) -> dict[int, tuple[Damage, ...]]:
    """What is damaged, by the step that reads it: nothing for most seeds."""
    if source.random() > 0.15:
        return {}
    steps = sorted(source.sample(range(1, _STEPS), source.randint(1, 4)))
    return {
        step: tuple(
            Damage(
                DamagedSpan("text", (2 * step + n, 2 * step + n + 1), "shard"),
                source.uniform(0.0, _UNTIL_S) * (source.random() < 0.5),
            )
            for n in range(source.randint(1, 2))
        )
        for step in steps
    }


def met(
    damage: Mapping[int, Sequence[Damage]], generation: Generation, step: int, now_s: float
) -> list[DamagedSpan]:
    """The damaged spans that the workers of a generation read in a step."""
    ignored = {each.span for each in generation.ignored}
    return [
        each.span
        for each in damage.get(step, ())
        if each.since_s <= now_s and each.span not in ignored
    ]


@dataclass
class DamageWitness:
    """Knows by which generations the steps of each lineage were trained."""

    generations: dict[int, Generation] = field(default_factory=dict)

    def begins(self, generation: Generation) -> None:
        """A GENERATION was appended."""
        self.generations[generation.number] = generation
        before = self.generations.get(generation.number - 1)
        now = {each.span for each in generation.ignored}
        if before is not None and not {each.span for each in before.ignored} <= now:
            raise Violation(
                "what is left out stays left out",
                f"generation {generation.number} leaves out {now}",
            )
        if not generation.ignored:
            return
        trained_by = self._trained_by(generation)
        for each in generation.ignored:
            for step, number in enumerate(trained_by, start=1):
                there = {other.span for other in self.generations[number].ignored}
                if (each.span in there) != (step >= each.first_step):
                    raise Violation(
                        "a span is left out from its recorded step on, and not before",
                        f"{each}, but generation {number} did step {step} and left out {there}",
                    )

    def _trained_by(self, generation: Generation) -> list[int]:
        """The generations that did the steps of the state from which this one resumes."""
        done: list[int] = []
        step, of = generation.resume_step, generation
        while step:
            assert of.memory is not None or of.resume is not None
            parent = of.memory.generation if of.memory is not None else of.resume.generation
            of = self.generations[parent]
            began = min(step, of.resume_step)
            done = [of.number] * (step - began) + done
            step = began
        return done
