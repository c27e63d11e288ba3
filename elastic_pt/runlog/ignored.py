"""Tokens that a run leaves out, because their blocks are damaged (`data.on_damage = "skip"`). Pure.

    a worker meets a damaged block ─► DamagedSpan in its node's Cause ─► IgnoredSpan in the next GENERATION

Each GENERATION names all spans that its workers leave out, in all their steps. A new one is left out from the first step
of this generation on. If a later generation resumes from an earlier step, its own first step counts from then on: the
steps in between are done again without the span. So at all times a step of the run's lineage leaves a span out exactly
if it is not before the `first_step` that the newest GENERATION names.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

SPANS_MAX: Final = 256
"""A run leaves out at most so many spans. More damage stops it: its data is not what was prepared."""


@dataclass(frozen=True, order=True)
class DamagedSpan:
    """Tokens of a source's train stream: those of a damaged block, or of several in a row."""

    source: str
    tokens: tuple[int, int]
    """Its first token's place in the stream, and the place after its last token."""
    file: str
    """The shard, by its key in the data's directory."""

    def holds(self, other: "DamagedSpan") -> bool:
        """Whether it has all tokens of the other one."""
        (start, end), (other_start, other_end) = self.tokens, other.tokens
        return self.source == other.source and start <= other_start and other_end <= end


@dataclass(frozen=True, order=True)
class IgnoredSpan:
    """A span that training leaves out."""

    span: DamagedSpan
    first_step: int
    """The first step without it, counted from 1 as in the history."""


def still_damaged(
    ignored: Sequence[IgnoredSpan], found: Iterable[DamagedSpan]
) -> tuple[DamagedSpan, ...]:
    """The damaged spans that can be left out in addition to those that are; none if there would be too many."""
    new = tuple(
        span for span in sorted(set(found)) if not any(each.span.holds(span) for each in ignored)
    )
    return new if len(ignored) + len(new) <= SPANS_MAX else ()


def ignored_next(
    ignored: Sequence[IgnoredSpan], found: Iterable[DamagedSpan], resume_step: int
) -> tuple[IgnoredSpan, ...]:
    """What a generation leaves out that resumes from `resume_step`, after one that left out `ignored` and `found` more."""
    first_step = resume_step + 1
    new = [IgnoredSpan(span, first_step) for span in still_damaged(ignored, found)]
    old = [replace(each, first_step=min(each.first_step, first_step)) for each in ignored]
    return tuple(sorted([*old, *new]))
