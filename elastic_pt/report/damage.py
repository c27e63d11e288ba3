"""Whether the bytes of prepared data are right, and which rows have those that are not."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from elastic_pt.data.manifest import Split
from elastic_pt.data.stored import Damage
from elastic_pt.errors import StoreError
from elastic_pt.report.reads import Reads

OnProgress = Callable[[int], None]
"""Is called with the number of bytes that have been read since its last call."""


@dataclass(frozen=True)
class Problem:
    """What `verify` has found."""

    file: str
    block: int | None
    """The first one's number in the file; null if it is the whole file."""
    blocks: int
    """How many damaged blocks follow each other."""
    problem: str
    source: str | None
    split: Split | None
    tokens: tuple[int, int] | None
    """The tokens that cannot be read: the first one's place in the stream, and the place after the last one."""
    rows: tuple[int, int] | None
    """The first and the last row that have such tokens."""


def verify(reads: Reads, on_progress: OnProgress) -> Iterator[Problem]:
    """Read every byte of the data and compare it with its hash; neighbouring damaged blocks are one problem.

    Raises `StoreError` if the store cannot be read now.
    """
    last: Damage | None = None
    try:
        for part in reads.tokens.verify():
            on_progress(part.bytes)
            for damage in part.damages:
                joined = None if last is None else last.joined(damage)
                if last is not None and joined is None:
                    yield problem_of(reads, last)
                last = joined or damage
            if last is not None and not part.damages:
                yield problem_of(reads, last)
                last = None
    except (StoreError, KeyboardInterrupt):
        if last is not None:
            yield problem_of(reads, last)
        raise
    if last is not None:
        yield problem_of(reads, last)


def problem_of(reads: Reads, damage: Damage) -> Problem:
    """The damage with the names of its source and rows."""
    if damage.source is None:
        return Problem(damage.file, None, 1, damage.problem, None, None, None, None)
    rows = reads.rows_holding(damage.source, damage.split, damage.tokens)
    return Problem(
        damage.file,
        damage.block,
        damage.blocks,
        damage.problem,
        reads.manifest.sources[damage.source].name,
        damage.split,
        (damage.tokens.start, damage.tokens.stop),
        (rows[0], rows[-1]) if rows else None,
    )
