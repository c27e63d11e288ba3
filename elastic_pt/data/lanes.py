"""Order version 2: each slot walks through chunks of its own, so that a node reads about what its slots use.

    plan row ─► step, slot ─► place of the mixture ─► source, epoch ─► lane, place in it ─► group ─► chunk ─► row

**Mixture.** Slot k reads at step s the places (s + k) * micro_batch + b of the mixture. So a slot reads the mixture
without gaps, and a step reads `global_batch` consecutive places: each source is within two rows of its share of every
step.

**Epoch.** Epoch e of a source with R rows is what the plan reads, in the order of steps and slots, from its e * R-th row of the
source on. So each row is read once before any is read twice. How many rows the plan has read before a step
is a sum over the slots; the step in which an epoch begins is found by bisection on it.

**Lane.** In each epoch the rows of a source are cut into chunks of consecutive rows, and the chunks are permuted: the
line. What is left of the rows comes last. Slot k has the lane of its own on this line, as long as what it reads in the
epoch, after the lanes of the slots before it. So its chunks come from all of the corpus, and no other slot
needs them, except at the ends of its lane. A source with fewer rows than a step has slots is one lane, which all slots read in
turn.

**Group.** A slot reads some consecutive chunks of its lane together: one row of each in turn, and the rows of each chunk in a permuted
order. So the rows of a slot in one step come from different chunks. The groups of all lanes and sources together have about
`window_tokens`. Their borders are staggered, so that not all slots begin new chunks in the same step.

Each part is a bijection in closed form, so the way back from a row to its step costs the same. The tests freeze some outputs: a
change of any of them needs a new version.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np

from elastic_pt.data.order import FEISTEL_ROUNDS, Integers, Mixture, Words, mix, shuffle

LANES_VERSION: Final = 2
"""Part of every shuffle key: one version always gives the same order."""

CHUNK_TOKENS: Final = 2**18
"""Tokens of a chunk at most. With twice as many, batches of 512 slots of 8 rows are mixed worse than by a full permutation; with half
as many, nodes fetch more (`benchmarks/order.py`)."""

CHUNK_TOKENS_MIN: Final = CHUNK_TOKENS // 2
"""Chunks are as small as a slot's part of the window for a source, but not smaller: each node would fetch half as much again as it
uses."""

LANE_CHUNKS_MIN: Final = 8
"""Chunks are smaller if the lanes of a source would have fewer of them than this."""

_EPOCHS_KEPT: Final = 64
"""Epochs in memory, besides two for each source; one has two tables of a number per slot."""

_KEYS: Final = 2 * FEISTEL_ROUNDS + 1
_NO_TABLE: Final = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Lanes:
    """What order version 2 needs to know of a run, in addition to the plan."""

    micro_batch: int
    """Rows of a slot."""
    window_tokens: int
    """`data.shuffle_window_tokens`."""


def lanes_of(order_version: int, micro_batch: int, window_tokens: int) -> Lanes | None:
    """The `lanes` of a `DataPlan` by the version of a run's order; version 1 has none."""
    return Lanes(micro_batch, window_tokens) if order_version == LANES_VERSION else None


class _Epoch(NamedTuple):
    """The lanes of one epoch of one source."""

    first: Integers
    """[slots]: how many rows of the source the mixture has before the first one that each slot reads in this epoch."""
    start: Integers
    """[slots + 1]: where each lane begins on the line."""
    keys: Words
    """Of the chunks, of the rows in them, and one to mix lane, group and chunk into the latter."""


class _Run(NamedTuple):
    """The rows of some sources in one step each. Row r belongs to pair `pair[r]` of source and step."""

    before: Integers
    """Per pair: rows of the source that the mixture has before the step's first place."""
    end: Integers
    """Per pair: where its rows end in the following."""
    pair: Integers
    slot: Integers


class LaneOrder:
    """Maps plan rows to rows of sources, and back. Safe to share between threads."""

    def __init__(
        self,
        mixture: Mixture,
        rows_per_source: Sequence[int],
        sequence_length: int,
        *,
        seed: int,
        global_batch: int,
        lanes: Lanes,
    ) -> None:
        self._mixture, self._seed = mixture, seed
        self._batch, self.micro_batch = global_batch, lanes.micro_batch
        self._slots = slots = global_batch // lanes.micro_batch
        self._rows = np.array(rows_per_source, dtype=np.int64)
        # Of the window, in rows, as far as a source has them.
        part = np.array(
            [
                min(lanes.window_tokens * share // (mixture.period * sequence_length * slots), rows)
                for share, rows in zip(mixture.rows_per_period, rows_per_source, strict=True)
            ],
            dtype=np.int64,
        )
        chunk_max = np.clip(
            part, CHUNK_TOKENS_MIN // sequence_length, CHUNK_TOKENS // sequence_length
        )
        self._chunk = np.clip(self._rows // (LANE_CHUNKS_MIN * slots), 1, np.maximum(1, chunk_max))
        self._chunks = self._rows // self._chunk
        self._group = np.clip(part // self._chunk, 1, self._chunks) * self._chunk
        self._laned = self._rows >= slots
        """The others are one lane."""
        self.open_rows = int(np.minimum(self._rows, slots * self._group).sum())
        """Rows of all groups, of which the steps read some now and the others soon."""
        self._epochs: dict[tuple[int, int], _Epoch] = {}
        self._epochs_kept = _EPOCHS_KEPT + 2 * len(self._rows)

    def locate(self, plan_rows: Integers) -> tuple[Integers, Integers]:
        """Source and row of each of `plan_rows` (int64 of one dimension, any values from 0)."""
        step, within = np.divmod(plan_rows, self._batch)
        source, count = self._mixture.locate(step * self.micro_batch + within)
        epoch, line = self._epoch_and_offset(source, step, count)
        sources = len(self._rows)
        numbers, owner = np.unique(epoch * sources + source, return_inverse=True)
        epochs = self._epochs_of(numbers % sources, numbers // sources)
        keys = np.array([each.keys for each in epochs], dtype=np.uint64).reshape(-1, _KEYS).T
        if len(epochs) > 1:
            keys = keys[:, owner]
        laned = np.flatnonzero(self._laned[source])
        if laned.size:
            # Epochs of a source that is one lane have no tables, and there may be very many of them in a step.
            has_lanes = self._laned[numbers % sources]
            tables = [each for each, has in zip(epochs, has_lanes.tolist(), strict=True) if has]
            mine, slot = owner[laned], within[laned] // self.micro_batch
            row = (np.cumsum(has_lanes) - 1)[mine]
            first = np.array([each.first for each in tables])[row, slot]
            starts = np.array([each.start for each in tables])
            start, end = starts[row, slot], starts[row, slot + 1]
            line[laned] = self._in_group(
                source[laned],
                slot,
                start + count[laned] - first,
                (start, end),
                keys if keys.shape[1] in (1, laned.size) else keys[:, laned],
            )
        return source, self._in_chunks(source, line, keys[:FEISTEL_ROUNDS])

    def plan_rows_of(self, source: int, epoch: int, rows: Integers) -> Integers:
        """The inverse of `locate`: the plan row that is each row (int64 of one dimension) of a source in an epoch."""
        sources = np.full(rows.shape, source)
        (found,) = self._epochs_of(np.array([source]), np.array([epoch]))
        keys = found.keys[:, None]
        line = self._in_chunks(sources, rows, keys[:FEISTEL_ROUNDS], inverse=True)
        if not self._laned[source]:
            number = epoch * self._rows[source] + line
            step = self._step_of(sources, number)
            before = self._rows_before(sources, step)
            rank = self._mixture.count(sources, step * self.micro_batch) + number - before
            place = self._mixture.place(sources, rank)
        else:
            # Of lanes with the same start, all but the last are empty.
            slot = np.searchsorted(found.start, line, side="right") - 1
            start, end = found.start[slot], found.start[slot + 1]
            line = self._in_group(sources, slot, line, (start, end), keys, inverse=True)
            place = self._mixture.place(sources, found.first[slot] + line - start)
            step = place // self.micro_batch - slot
        return step * (self._batch - self.micro_batch) + place

    @property
    def chunk_rows(self) -> tuple[int, ...]:
        """For each source, the rows of a chunk."""
        return tuple(self._chunk.tolist())

    def rows_read(self, step: int) -> Integers:
        """[sources]: the rows of each source that the plan reads before a step."""
        sources = np.arange(len(self._rows))
        return self._rows_before(sources, np.full(sources.shape, step))

    def _in_group(
        self,
        source: Integers,
        slot: Integers,
        line: Integers,
        lane: tuple[Integers, Integers],
        keys: Words,
        *,
        inverse: bool = False,
    ) -> Integers:
        """Places on the line, permuted within the groups of their lanes; `lane` is begin and end of each place's lane."""
        size, chunk = self._group[source], self._chunk[source]
        stagger = slot * (size // chunk) // self._slots * chunk
        number = (line + stagger) // size
        begin = np.maximum(lane[0], number * size - stagger)
        rows = np.minimum(lane[1], (number + 1) * size - stagger) - begin
        # A lane's first and last group may have parts of chunks. There the parts that take turns are not quite chunks.
        parts = np.maximum(1, rows // chunk)
        length = rows // parts
        place = line - begin
        if inverse:
            part, turn = np.divmod(place, length)
        else:
            turn, part = np.divmod(place, parts)
        taking_turns = place < parts * length
        group = (slot << 40 | number).astype(np.uint64)
        keys = keys[FEISTEL_ROUNDS:-1] ^ mix(
            mix(group, keys[-1]) + part.astype(np.uint64), keys[-1]
        )
        turn = shuffle(
            np.where(taking_turns, turn, 0),
            np.where(taking_turns, length, 1),
            keys,
            inverse=inverse,
        )
        moved = turn * parts + part if inverse else part * length + turn
        return np.where(taking_turns, begin + moved, line)

    def _in_chunks(
        self, source: Integers, places: Integers, keys: Words, *, inverse: bool = False
    ) -> Integers:
        """The row at each place of the line, or the inverse."""
        size = self._chunk[source]
        chunk, within = np.divmod(places, size)
        whole = chunk < self._chunks[source]
        # The rest after the whole chunks stays where it is.
        chunks = np.where(whole, self._chunks[source], 1)
        moved = shuffle(np.where(whole, chunk, 0), chunks, keys, inverse=inverse)
        return np.where(whole, moved * size + within, places)

    def _epoch_and_offset(
        self, source: Integers, step: Integers, count: Integers
    ) -> tuple[Integers, Integers]:
        """Of each row: the epoch, and how many rows of its source the plan has read in it before."""
        sources = len(self._rows)
        numbers, pair = np.unique(step * sources + source, return_inverse=True)
        steps, sources_of = numbers // sources, numbers % sources
        # In one step, the order of the plan is that of the mixture.
        begin = self._mixture.count(sources_of, steps * self.micro_batch)
        read = (self._rows_before(sources_of, steps) - begin)[pair] + count
        epoch, offset = np.divmod(read, self._rows[source])
        return epoch, offset

    def _epochs_of(self, source: Integers, epoch: Integers) -> list[_Epoch]:
        pairs = list(zip(source.tolist(), epoch.tolist(), strict=True))
        known = self._epochs
        if any(pair not in known for pair in pairs):
            # A new dictionary, so that another thread keeps the one that it reads from.
            known = dict(known) if len(known) < self._epochs_kept else {}
            missing = [pair for pair in pairs if pair not in known]
            known |= zip(missing, self._new_epochs(missing), strict=True)
            self._epochs = known
        return [known[pair] for pair in pairs]

    def _new_epochs(self, pairs: list[tuple[int, int]]) -> list[_Epoch]:
        laned = [pair for pair in pairs if self._laned[pair[0]]]
        ends = sorted({*laned, *((source, epoch + 1) for source, epoch in laned)})
        at = {end: index for index, end in enumerate(ends)}
        firsts = self._first_of_slots(np.array(ends, dtype=np.int64).reshape(-1, 2))
        epochs = []
        for source, epoch in pairs:
            first = start = _NO_TABLE
            if self._laned[source]:
                first = firsts[at[source, epoch]]
                start = np.zeros(self._slots + 1, dtype=np.int64)
                np.cumsum(firsts[at[source, epoch + 1]] - first, out=start[1:])
            epochs.append(_Epoch(first, start, self._keys(source, epoch)))
        return epochs

    def _keys(self, source: int, epoch: int) -> Words:
        name = f"elastic_pt order {LANES_VERSION}: {self._seed} {source} {epoch}"
        digest = hashlib.shake_256(name.encode()).digest(8 * _KEYS)
        return np.frombuffer(digest, dtype="<u8")

    def _first_of_slots(self, pairs: Integers) -> Integers:
        """[pairs, slots]: `_Epoch.first` of pairs of source and epoch."""
        source, epoch = pairs.T
        target = epoch * self._rows[source]
        step = self._step_of(source, target)
        done = target - self._rows_before(source, step)
        run = self._run(source, step)
        place = run.pair * self._slots + run.slot
        shape = (len(pairs), self._slots)
        of_step = np.bincount(place, minlength=shape[0] * shape[1]).reshape(shape)
        begins = np.concatenate(([0], run.end[:-1]))
        number = np.arange(len(run.pair)) - begins[run.pair]
        of_epoch_before = np.bincount(
            place[number < done[run.pair]], minlength=shape[0] * shape[1]
        ).reshape(shape)
        slots_before = np.cumsum(of_step, axis=1) - of_step
        return run.before[:, None] + slots_before + of_epoch_before

    def _step_of(self, source: Integers, number: Integers) -> Integers:
        """The step in which the plan reads row `number` of each source, counted over all epochs."""
        # The plan is less than two rows per slot away from the share of the source.
        slack, period = 2 * self._slots, self._mixture.period
        per_step = [self._batch * each for each in self._mixture.rows_per_period]
        pairs = list(zip(source.tolist(), number.tolist(), strict=True))
        low = np.array(
            [max(0, (n - slack) * period // per_step[i]) for i, n in pairs], dtype=np.int64
        )
        high = np.array([(n + slack) * period // per_step[i] + 2 for i, n in pairs], dtype=np.int64)
        steps_per_row = period / np.array(per_step, dtype=np.float64)
        left = np.arange(len(source))
        probe, rounds = (low + high) // 2, 0
        while left.size:
            missing = number[left] - self._rows_before(source[left], probe)
            low[left] = np.where(missing >= 0, probe, low[left])
            high[left] = np.where(missing >= 0, high[left], probe)
            left = left[open_ := (high - low)[left] > 1]
            # By the share of the source, which is about right; by halves, which is sure to end.
            rounds += 1
            if rounds % 2:
                guess = (missing[open_] * steps_per_row[source[left]]).astype(np.int64) + probe[
                    open_
                ]
                probe = np.clip(guess, low[left] + 1, high[left] - 1)
            else:
                probe = (low[left] + high[left]) // 2
        return low

    def _rows_before(self, source: Integers, step: Integers) -> Integers:
        """How many rows of each source the plan reads before a step."""
        return self._sum_over_slots(source, step) - self._sum_at_start[source]

    @cached_property
    def _sum_at_start(self) -> Integers:
        sources = np.arange(len(self._rows))
        return self._sum_over_slots(sources, np.zeros_like(sources))

    def _sum_over_slots(self, source: Integers, step: Integers) -> Integers:
        """The sum of `Mixture.count` at the places where the slots begin in a step."""
        run = self._run(source, step)
        # Each row of the step counts for the slots after its own.
        summed = np.concatenate(([0], np.cumsum(self._slots - 1 - run.slot)))[
            np.concatenate(([0], run.end))
        ]
        return self._slots * run.before + np.diff(summed)

    def _run(self, source: Integers, step: Integers) -> _Run:
        begin = step * self.micro_batch
        before = self._mixture.count(source, begin)
        rows = self._mixture.count(source, begin + self._batch) - before
        end = np.cumsum(rows)
        pair = np.repeat(np.arange(len(source)), rows)
        index = np.arange(len(pair)) + (before - end + rows)[pair]
        place = self._mixture.place(source[pair], index)
        return _Run(before, end, pair, (place - begin[pair]) // self.micro_batch)
