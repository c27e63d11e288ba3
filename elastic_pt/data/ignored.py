"""Tokens that training leaves out, because their blocks are damaged. Pure.

A reader gives the negative id `~token` in their place: the step's input is `token` (the end of a document), and its
target does not count. So no other row or token moves.
"""

from collections.abc import Iterable, Iterator

import torch


class IgnoredTokens:
    """Spans of train streams that are not read."""

    def __init__(self, spans: Iterable[tuple[int, range]]) -> None:
        """Each is a source and its tokens; they may overlap."""
        self._spans = sorted(spans, key=lambda each: each[1].start)

    def __bool__(self) -> bool:
        return bool(self._spans)

    def intact(self, source: int, tokens: range) -> Iterator[range]:
        """The parts of a range that are read, in order."""
        start = tokens.start
        for of, span in self._spans:
            if of != source or span.stop <= start or span.start >= tokens.stop:
                continue
            if start < span.start:
                yield range(start, span.start)
            start = span.stop
        if start < tokens.stop:
            yield range(start, tokens.stop)

    def touch(self, source: int, tokens: range) -> bool:
        """Whether a part of a range is not read."""
        return any(
            of == source and span.start < tokens.stop and tokens.start < span.stop
            for of, span in self._spans
        )


def inputs_and_targets(
    tokens_BT: torch.Tensor, *, ignored: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of rows of tokens; `ignored` is the target of a token that training leaves out."""
    inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    return (
        inputs_BT.where(inputs_BT >= 0, ~inputs_BT),
        targets_BT.where(targets_BT >= 0, ignored).contiguous(),
    )
