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
from functools import cached_property, lru_cache

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
        self._rows_per_period = np.array(self.rows_per_period, dtype=np.int64)
        self._source_of = _one_period(self.rows_per_period)
        self._places = np.argsort(self._source_of, kind="stable")
        """Of each source's rows in the period, source after source."""
        self._first = np.cumsum(self._rows_per_period) - self._rows_per_period
        """Where each source begins in it."""
        self._rank_of = np.empty(self.period, dtype=np.int64)
        self._rank_of[self._places] = np.arange(self.period) - np.repeat(
            self._first, self._rows_per_period
        )

    def locate(self, plan_rows: Integers) -> tuple[Integers, Integers]:
        """For each row of the plan: its source, and how many rows of that source come before it.

        `plan_rows` is int64 of any shape, from 0; both results have that shape.
        """
        block, place = np.divmod(plan_rows, self.period)
        source = self._source_of[place].astype(np.int64)
        index: Integers = block * self._rows_per_period[source] + self._rank_of[place]
        return source, index

    def count(self, source: Integers, plan_rows: Integers) -> Integers:
        """How many rows of each source come before each row of the plan."""
        block, place = np.divmod(plan_rows, self.period)
        rank = np.searchsorted(self._keys, source * self.period + place) - self._first[source]
        return block * self._rows_per_period[source] + rank

    def place(self, source: Integers, index: Integers) -> Integers:
        """The inverse of `locate`: the row of the plan that is row `index` of each source."""
        block, rank = np.divmod(index, self._rows_per_period[source])
        row: Integers = block * self.period + self._places[self._first[source] + rank]
        return row

    @cached_property
    def _keys(self) -> Integers:
        """`source * period + place` of each place of the period, in order."""
        sources = np.arange(len(self.rows_per_period))
        return np.repeat(sources * self.period, self._rows_per_period) + self._places


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


def _one_period(rows_per_period: tuple[int, ...]) -> NDArray[np.unsignedinteger]:
    """The source of each place of the period."""
    sources, period = len(rows_per_period), sum(rows_per_period)
    # The smallest type: small numbers are sorted faster.
    kind = np.min_scalar_type(sources)
    if sources == 1:
        return np.zeros(period, dtype=kind)
    # One word per row of the period: the deadline in front, then the source. Comparing words compares
    # deadlines, and the source with the lower number wins a tie.
    opens, words = [], []
    for source, rows in enumerate(rows_per_period):
        rank = np.arange(rows, dtype=np.int64)
        opens.append(rank * period // rows)
        words.append((-(-(rank + 1) * period // rows) - 1) * sources + source)
    all_opens, all_words = np.concatenate(opens), np.concatenate(words)
    by_opening = np.argsort(all_opens, kind="stable")
    opening_at = np.bincount(all_opens, minlength=period)
    chosen = _earliest_deadline_first(all_words[by_opening].tolist(), opening_at.tolist())
    return (np.array(chosen, dtype=np.int64) % sources).astype(kind)


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


def permute(
    offsets: Integers,
    rows: int | Integers,
    *,
    seed: int,
    source: int | Integers,
    epoch: int | Integers,
) -> Integers:
    """The rows at places `offsets` (int64 in [0, rows)) of an epoch's order: a bijection of [0, rows).

    `rows`, `source` and `epoch` are one number, or one for each of `offsets` (which then has one dimension).
    """
    sources = int(np.max(source, initial=0)) + 1
    pairs, owner = np.unique(np.atleast_1d(epoch * sources + source), return_inverse=True)
    keys = np.array(
        [_round_keys(seed, pair % sources, pair // sources) for pair in pairs.tolist()],
        dtype=np.uint64,
    ).reshape(-1, FEISTEL_ROUNDS)
    each = keys.T if len(pairs) == 1 else keys.T[:, owner]
    return shuffle(offsets.ravel(), np.atleast_1d(rows), each).reshape(offsets.shape)


def places_of(rows: Integers, count: int, *, seed: int, source: int, epoch: int) -> Integers:
    """The inverse of `permute`: the place of each of `rows` in this epoch's order of `count` rows."""
    keys = np.array(_round_keys(seed, source, epoch), dtype=np.uint64)[:, None]
    return shuffle(rows.ravel(), np.array([count]), keys, inverse=True).reshape(rows.shape)


@lru_cache(maxsize=4096)
def _round_keys(seed: int, source: int, epoch: int) -> list[int]:
    digests = (
        hashlib.sha256(
            f"elastic_pt order {ORDER_VERSION}: {seed} {source} {epoch} {i}".encode()
        ).digest()
        for i in range(FEISTEL_ROUNDS)
    )
    return [int.from_bytes(digest[:8], "little") for digest in digests]


def shuffle(values: Integers, sizes: Integers, keys: Words, *, inverse: bool = False) -> Integers:
    """Each value under a keyed bijection of [0, size), or under the inverse of that bijection.

    `values` is int64 [n], each below its size; `sizes` is int64 [n], `keys` is uint64 [FEISTEL_ROUNDS, n]. Either may
    have 1 instead of n: all values have the same.
    """
    bits = np.maximum(FEISTEL_BITS_MIN, np.frexp((sizes - 1).astype(np.float64))[1])
    low_bits = (bits // 2).astype(np.uint64)
    high_bits = (bits - bits // 2).astype(np.uint64)
    shuffled, limit = values.astype(np.uint64), sizes.astype(np.uint64)
    outside = np.flatnonzero(np.broadcast_to(sizes > 1, values.shape))
    chosen: Integers | slice = outside if outside.size < values.size else slice(None)
    while outside.size:
        low, high, key, below = (
            each if each.shape[-1] == 1 else each[..., chosen]
            for each in (low_bits, high_bits, keys, limit)
        )
        shuffled[chosen] = found = _feistel(shuffled[chosen], low, high, key, inverse=inverse)
        chosen = outside = outside[found >= below]
    return shuffled.astype(np.int64)


def _feistel(
    values: Words, low_bits: Words, high_bits: Words, keys: Words, *, inverse: bool
) -> Words:
    """A keyed bijection of [0, 2^bits): each round XORs one half with a hash of the other."""
    word, one = np.uint64(64), np.uint64(1)
    low, high = values & ((one << low_bits) - one), values >> low_bits
    low_shift, high_shift = word - low_bits, word - high_bits
    rounds = range(len(keys))
    for number in reversed(rounds) if inverse else rounds:
        if number % 2:
            high = high ^ (mix(low, keys[number]) >> high_shift)
        else:
            low = low ^ (mix(high, keys[number]) >> low_shift)
    return (high << low_bits) | low


def mix(values: Words, key: Words) -> Words:
    """SplitMix64's finaliser (Steele et al., 2014) of `values` under a key; its top bits are mixed best."""
    mixed = values * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= key
    shifted = mixed >> np.uint64(30)
    mixed ^= shifted
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= np.right_shift(mixed, np.uint64(27), out=shifted)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= np.right_shift(mixed, np.uint64(31), out=shifted)
    return mixed
