"""Map row n of the plan to a row of a source: two closed forms, no state, O(1) seek.

**Mixture.** The weights become whole numbers W_i with a small period B = sum of W_i. Inside a period
every source must stay within one row of its share after *every* prefix: count_i(n) may differ from
n * W_i / B by less than 1. Row j of source i then has a window of places, from floor(j * B / W_i) to
ceil((j + 1) * B / W_i) - 1: any place inside keeps the bound, and taking the open window that closes
first (earliest deadline) fills every place without missing a window, for any number of sources. This
is Tijdeman's chairman assignment (1980), known to schedulers as P-fair (Baruah et al., 1996) on one
processor. The period is computed once as two tables; row n is then `divmod(n, B)` and a look-up.

**Permutation.** The rows of a source are visited in an order that is new in every epoch: a keyed
Feistel network permutes 0 .. 2^b - 1 (b: bits of the largest row), and an output beyond the last row
is permuted again until it is a row ("cycle walking", Black and Rogaway 2002), which keeps it a
bijection. Keys come from SHA-256 of (order version, seed, source, epoch).

The tests freeze some outputs: a change of any of them needs a new `ORDER_VERSION`.
"""

import hashlib
import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from elastic_pt.errors import DataError

ORDER_VERSION = 1
"""Part of every shuffle key: one version always gives the same order."""

PERIOD_MAX = 1_000_000
"""Largest period of a mixture; its inverse is the smallest weight."""

FEISTEL_ROUNDS = 8
FEISTEL_BITS_MIN = 4

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]


class Mixture:
    """A repeating sequence of sources that follows `weights` within one row after every prefix.

    `weights` are relative and positive. They are taken as fractions with the smallest common
    denominator up to `PERIOD_MAX`; weights that have none are rounded to millionths of their sum,
    and no source is rounded to 0. `shares` are the exact fractions that result.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.rows_per_period: tuple[int, ...] = whole_weights(weights)
        self.period: int = sum(self.rows_per_period)
        self.shares: tuple[Fraction, ...] = tuple(
            Fraction(rows, self.period) for rows in self.rows_per_period
        )
        self._source_of, self._rank_of = _one_period(self.rows_per_period)
        self._rows_per_period = np.array(self.rows_per_period, dtype=np.int64)

    def locate(self, plan_rows: Integers) -> tuple[Integers, Integers]:
        """For each row of the plan: its source, and how many rows of that source come before it.

        `plan_rows` is int64 of any shape, from 0; both results have that shape.
        """
        block, place = np.divmod(plan_rows, self.period)
        source = self._source_of[place].astype(np.int64)
        index: Integers = block * self._rows_per_period[source] + self._rank_of[place]
        return source, index


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in the proportion of `weights`, with a sum of at most `PERIOD_MAX`."""
    if not weights:
        raise DataError("weights = []: expected at least one source")
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise DataError(f"weight = {weight}: expected a positive, finite number")
    # str() gives the decimal that was meant: 0.1 is 1/10, not 3602879701896397/36028797018963968.
    meant = [Fraction(str(float(weight))) for weight in weights]
    total = sum(meant)
    shares = [weight / total for weight in meant]
    for weight, share in zip(weights, shares, strict=True):
        if share * PERIOD_MAX < 1:
            raise DataError(
                f"weight = {weight} is {float(share):.1e} of all weights: "
                f"expected at least 1/{PERIOD_MAX}"
            )
    simple = [share.limit_denominator(PERIOD_MAX) for share in shares]
    period = math.lcm(*(share.denominator for share in simple))
    if sum(simple) == 1 and period <= PERIOD_MAX:
        return tuple(int(share * period) for share in simple)
    return _largest_remainders(shares)


def _largest_remainders(shares: list[Fraction]) -> tuple[int, ...]:
    """Shares (each at least one millionth) as millionths that sum to exactly one million."""
    exact = [share * PERIOD_MAX for share in shares]
    whole = [math.floor(part) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
    for source in by_remainder[: PERIOD_MAX - sum(whole)]:
        whole[source] += 1
    return tuple(whole)


def _one_period(rows_per_period: tuple[int, ...]) -> tuple[NDArray[np.uint32], Integers]:
    """Per place of the period: the source, and its rank among that source's rows."""
    sources, period = len(rows_per_period), sum(rows_per_period)
    if sources == 1:
        return np.zeros(period, dtype=np.uint32), np.arange(period, dtype=np.int64)
    # One word per row of the period: the deadline in front, then the source. Comparing words compares
    # deadlines, and the source with the lower number wins a tie.
    opens, words = [], []
    for source, rows in enumerate(rows_per_period):
        rank = np.arange(rows, dtype=np.int64)
        opens.append(rank * period // rows)
        words.append((-(-(rank + 1) * period // rows) - 1) * sources + source)
    all_opens, all_words = np.concatenate(opens), np.concatenate(words)
    by_opening = np.argsort(all_opens, kind="stable")
    chosen = _earliest_deadline_first(
        all_words[by_opening].tolist(), np.bincount(all_opens, minlength=period).tolist()
    )
    source_of = (np.array(chosen, dtype=np.int64) % sources).astype(np.uint32)
    rank_of = np.empty(period, dtype=np.int64)
    rank_of[np.argsort(source_of, kind="stable")] = np.concatenate(
        [np.arange(rows, dtype=np.int64) for rows in rows_per_period]
    )
    return source_of, rank_of


def _earliest_deadline_first(words: list[int], opening_at: list[int]) -> list[int]:
    """Fill each place with the smallest word whose window is open; `words` are in order of opening."""
    chosen: list[int] = []
    open_words: list[int] = []
    push, pop, push_pop, choose = heapq.heappush, heapq.heappop, heapq.heappushpop, chosen.append
    upcoming = iter(words)
    for count in opening_at:
        if count == 1:
            choose(push_pop(open_words, next(upcoming)))
            continue
        for _ in range(count):
            push(open_words, next(upcoming))
        choose(pop(open_words))
    return chosen


def permute(offsets: Integers, rows: int, *, seed: int, source: int, epoch: int) -> Integers:
    """The rows at places `offsets` (int64 in [0, rows)) of this epoch's order: a bijection of [0, rows)."""
    if rows == 1:
        return np.zeros_like(offsets)
    bits = max(FEISTEL_BITS_MIN, (rows - 1).bit_length())
    keys = _round_keys(seed, source, epoch)
    values = _feistel(offsets.astype(np.uint64).ravel(), bits, keys)
    outside = np.flatnonzero(values >= rows)
    while outside.size:
        values[outside] = _feistel(values[outside], bits, keys)
        outside = outside[values[outside] >= rows]
    return values.astype(np.int64).reshape(offsets.shape)


@lru_cache(maxsize=4096)
def _round_keys(seed: int, source: int, epoch: int) -> tuple[np.uint64, ...]:
    digests = (
        hashlib.sha256(
            f"elastic_pt order {ORDER_VERSION}: {seed} {source} {epoch} {i}".encode()
        ).digest()
        for i in range(FEISTEL_ROUNDS)
    )
    return tuple(np.uint64(int.from_bytes(digest[:8], "little")) for digest in digests)


def _feistel(values: Words, bits: int, keys: tuple[np.uint64, ...]) -> Words:
    """A keyed bijection of [0, 2^bits): each round XORs one half with a hash of the other."""
    low_bits = np.uint64(bits // 2)
    high_bits = np.uint64(bits - bits // 2)
    low, high = values & ((np.uint64(1) << low_bits) - np.uint64(1)), values >> low_bits
    for round_number, key in enumerate(keys):
        if round_number % 2:
            high = high ^ (_mix(low, key) >> (np.uint64(64) - high_bits))
        else:
            low = low ^ (_mix(high, key) >> (np.uint64(64) - low_bits))
    return (high << low_bits) | low


def _mix(values: Words, key: np.uint64) -> Words:
    """SplitMix64's finaliser (Steele et al., 2014) of `values` under a key; its top bits are mixed best."""
    mixed = (values * np.uint64(0x9E3779B97F4A7C15)) ^ key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
