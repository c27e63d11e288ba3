"""The held-out rows of an evaluation: which they are, their tokens, and the mean of their losses.

    manifest ─► held_out_rows ─► read_held_out ─► (model) ─► the loss of each row ─► mean_loss

The held-out stream of a source is cut into consecutive rows of `sequence_length` targets; the last one may be shorter.
All rows together give every held-out token, end tokens included, as a target exactly once. The context of a row is its
own: its first input is the token before its first target.

Training and `elastic-pt eval` both use this module, so they measure the same thing.
"""

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch

from elastic_pt.data.manifest import Manifest
from elastic_pt.data.shards import TokenReader


class HeldOutRow(NamedTuple):
    """Targets `[start, end)` of the held-out stream of one source."""

    source: int
    start: int
    end: int


class HeldOutBatch(NamedTuple):
    """Rows in one shape. B: batch, T: sequence_length."""

    inputs_BT: torch.Tensor
    """int64; the end token where there is only padding."""
    targets_BT: torch.Tensor
    """int64; `ignored` where there is only padding."""


@dataclass(frozen=True)
class HeldOutLoss:
    """The result of an evaluation."""

    loss: float
    """Mean cross-entropy per token, in nats."""
    by_source: dict[str, tuple[int, float]]
    """For each source: how many rows, and their mean cross-entropy per token."""


def held_out_rows(manifest: Manifest, sequence_length: int, count: int = 0) -> list[HeldOutRow]:
    """`count` of all rows, spread evenly over them, in their order; all of them for 0 or if there are fewer.

    So a source has about its share of the held-out tokens. A pure function: each evaluation of a run reads the same rows.
    """
    tokens = [source.tokens("held_out") for source in manifest.sources]
    ends = list(accumulate(-(-each // sequence_length) for each in tokens))
    total = ends[-1]
    count = min(count or total, total)
    rows = []
    for index in (number * total // count for number in range(count)):
        source = bisect_right(ends, index)
        start = (index - (ends[source - 1] if source else 0)) * sequence_length
        rows.append(HeldOutRow(source, start, min(start + sequence_length, tokens[source])))
    return rows


def read_held_out(
    manifest: Manifest,
    reader: TokenReader,
    rows: Sequence[HeldOutRow],
    shape: tuple[int, int],
    *,
    ignored: int,
) -> HeldOutBatch:
    """The tokens of some rows, at most as many as `shape` [B, T] has, padded to this shape.

    The first input of a stream is an end token. Raises `DataError` for a damaged shard and `StoreError` for one that
    cannot be read now, as for training data.
    """
    inputs_BT = torch.full(shape, manifest.end_token_id, dtype=torch.int64)
    targets_BT = torch.full(shape, ignored, dtype=torch.int64)
    for place, (source, start, end) in enumerate(rows):
        tokens = reader.stream(source, "held_out", max(0, start - 1), end)
        length, first = end - start, int(start == 0)
        targets_BT[place, :length] = tokens[-length:]
        inputs_BT[place, first:length] = tokens[: length - first]
    return HeldOutBatch(inputs_BT, targets_BT)


def mean_loss(
    rows: Sequence[HeldOutRow], nats: Sequence[float], names: Sequence[str]
) -> HeldOutLoss:
    """The result, from the cross-entropy in nats of each row, summed over its tokens.

    `names` has a name for each source of the manifest. Sums are rounded once, so their order does not matter.
    """
    of_name: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        of_name[names[row.source]].append(place)
    return HeldOutLoss(
        _mean(rows, nats),
        {
            name: (len(places), _mean([rows[i] for i in places], [nats[i] for i in places]))
            for name, places in of_name.items()
        },
    )


def _mean(rows: Sequence[HeldOutRow], nats: Sequence[float]) -> float:
    return math.fsum(nats) / sum(row.end - row.start for row in rows)
