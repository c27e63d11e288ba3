"""What a worker reports of a damaged block, so that the next generation leaves its tokens out. Worker process.

Damage often comes in rows of blocks: a file that was cut, bad sectors. So the blocks next to it in the same file are read
too, in both directions up to the first intact one. Else each of them would cost a generation.
"""

import time
from collections.abc import Callable
from typing import Final

from elastic_pt.data.blocks import DamagedBlock
from elastic_pt.data.manifest import Manifest
from elastic_pt.data.shards import TokenReader
from elastic_pt.data.table import ShardTable
from elastic_pt.errors import StoreError
from elastic_pt.runlog.ignored import DamagedSpan, IgnoredSpan
from elastic_pt.store.port import Store

_SEARCH_S: Final = 5.0
"""The other workers wait meanwhile."""


def ignored_tokens(
    manifest: Manifest, ignored: tuple[IgnoredSpan, ...]
) -> tuple[tuple[int, range], ...]:
    """What a reader leaves out: sources by their number, and tokens."""
    numbers = {source.name: number for number, source in enumerate(manifest.sources)}
    return tuple((numbers[each.span.source], range(*each.span.tokens)) for each in ignored)


def damaged_span(
    error: DamagedBlock,
    reader: TokenReader,
    manifest: Manifest,
    store: Store,
    clock_s: Callable[[], float] = time.monotonic,
) -> DamagedSpan:
    """The damaged block of the train split that the reader has met, and the damaged ones next to it in its file."""
    source, start, end = error.source, error.tokens.start, error.tokens.stop
    placed = ShardTable(manifest, store).find(source, "train", start)
    deadline_s = clock_s() + _SEARCH_S

    def damaged_at(token: int) -> range | None:
        if token not in range(placed.start, placed.end) or clock_s() > deadline_s:
            return None
        try:
            reader.stream(source, "train", token, token + 1)
        except DamagedBlock as other:
            return other.tokens
        except StoreError:
            pass  # A later generation finds it.
        return None

    while (block := damaged_at(end)) is not None:
        end = block.stop
    while (block := damaged_at(start - 1)) is not None:
        start = block.start
    return DamagedSpan(manifest.sources[source].name, (start, end), placed.shard.key)
