"""The data plan: which rows a step reads, as a pure function of (plan, step, slot).

Step s reads plan rows [s * global_batch, (s + 1) * global_batch); slot k of that step is
`micro_batch` consecutive rows of them. The order maps plan row n to a row of a source, and back. The world size is no
input, and nothing is replayed: the millionth step costs as much as the first.

A run keeps the order that it began with. **Version 1** permutes all rows of a source: the mixture maps plan row n to (source,
index), and the permutation of the epoch maps the index to a row. **Version 2** lets each slot walk through parts of the
corpus (`lanes`).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from elastic_pt.data.lanes import LaneOrder, Lanes
from elastic_pt.data.manifest import Manifest
from elastic_pt.data.order import Integers, Mixture, permute, places_of
from elastic_pt.errors import DataError

SOURCES_SHOWN_MAX = 64
"""Names of sources in reports. If there are more sources, the last name is `OTHER_SOURCES`."""

OTHER_SOURCES = "other"


@dataclass(frozen=True)
class RowSources:
    """The source of each row of one step, by the names that reports use."""

    names: tuple[str, ...]
    of_row: Integers
    """[global_batch]: for each row an index into `names`."""


@dataclass(frozen=True)
class DataPlan:
    """What a run reads, and in which order. Raises `DataError` if a source has no whole row."""

    manifest: Manifest
    sequence_length: int
    """Tokens that one row predicts; a row holds one more."""
    seed: int
    global_batch: int
    """Rows per step."""
    lanes: Lanes | None = None
    """None is order version 1."""

    def __post_init__(self) -> None:
        for name in ("sequence_length", "global_batch"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} = {getattr(self, name)}: expected a positive number")
        for source, rows in zip(self.manifest.sources, self.rows_per_source, strict=True):
            if rows < 1:
                raise DataError(
                    f"source {source.name}: {source.tokens('train')} tokens hold no row of "
                    f"data.sequence_length + 1 = {self.sequence_length + 1}; "
                    "expected more text or a shorter data.sequence_length"
                )
        if self.lanes and (
            self.lanes.micro_batch < 1 or self.global_batch % self.lanes.micro_batch
        ):
            raise DataError(
                f"micro_batch = {self.lanes.micro_batch}: expected a divisor of "
                f"global_batch = {self.global_batch}"
            )

    @cached_property
    def rows_per_source(self) -> tuple[int, ...]:
        """Whole rows of each source. The rest of its stream is not read."""
        return tuple(source.rows(self.sequence_length) for source in self.manifest.sources)

    @cached_property
    def mixture(self) -> Mixture:
        """The order of the sources. It takes up to a third of a second to build, for weights with a long period."""
        return Mixture(self.manifest.weights)

    @cached_property
    def _lane_order(self) -> LaneOrder | None:
        if self.lanes is None:
            return None
        return LaneOrder(
            self.mixture,
            self.rows_per_source,
            self.sequence_length,
            seed=self.seed,
            global_batch=self.global_batch,
            lanes=self.lanes,
        )

    @cached_property
    def chunk_rows(self) -> tuple[int, ...]:
        """For each source: each slot reads all of so many consecutive rows soon after one another, from a multiple of it on.

        Version 1 has no such chunks, so they have one row.
        """
        return self._lane_order.chunk_rows if self._lane_order else (1,) * len(self.rows_per_source)

    def open_tokens(self, slots: int) -> int:
        """Tokens that so many slots have begun to read and read on soon: the least that a cache should hold for them.

        With version 1 each slot reads all of the corpus.
        """
        if self._lane_order is None:
            return sum(self.rows_per_source) * self.sequence_length
        share = self._lane_order.open_rows * slots * self._lane_order.micro_batch
        return share * self.sequence_length // self.global_batch

    def row_sources(self, step: int) -> RowSources:
        """The source of each row of a step, in the order of the slots and their rows."""
        names, shown_as = self._shown
        first = step * (self.lanes.micro_batch if self.lanes else self.global_batch)
        source, _ = self.mixture.locate(np.arange(first, first + self.global_batch))
        return RowSources(names, shown_as[source])

    @property
    def names_shown(self) -> tuple[str, ...]:
        """For each source, the name that reports use."""
        names, shown_as = self._shown
        return tuple(names[each] for each in shown_as)

    @cached_property
    def _shown(self) -> tuple[tuple[str, ...], Integers]:
        """The names for reports, and for each source an index into them. The heaviest sources have their own."""
        sources = self.manifest.sources
        own = sorted(range(len(sources)), key=lambda source: (-sources[source].weight, source))
        if len(own) > SOURCES_SHOWN_MAX:
            own = [each for each in own if sources[each].name != OTHER_SOURCES]
            own = own[: SOURCES_SHOWN_MAX - 1]
        own.sort()
        shown_as = np.full(len(sources), len(own), dtype=np.int64)
        shown_as[own] = np.arange(len(own))
        names = tuple(sources[each].name for each in own)
        return names + (OTHER_SOURCES,) * (len(own) < len(sources)), shown_as

    def slot_rows(self, step: int, slots: range, micro_batch: int) -> list[tuple[int, int]]:
        """The `(source, row)` pairs of some slots of one step, slot after slot; steps and slots count from 0.

        Raises `ValueError` for a step or slot outside of the plan, which is a bug of the caller. So is another
        `micro_batch` than that of `lanes`.
        """
        return self.rows_of_steps(range(step, step + 1), slots, micro_batch)[0]

    def rows_of_steps(
        self, steps: range, slots: range, micro_batch: int
    ) -> list[list[tuple[int, int]]]:
        """As `slot_rows`, for each of consecutive steps. Many at once cost a tenth per row."""
        if self.lanes and micro_batch != self.lanes.micro_batch:
            raise ValueError(f"micro_batch = {micro_batch}: the plan has {self.lanes.micro_batch}")
        slot_count = self.global_batch // micro_batch
        if steps.start < 0 or any(not 0 <= slot < slot_count for slot in (*slots[:1], *slots[-1:])):
            raise ValueError(f"step {steps.start}, {slots}: a step has slots 0 to {slot_count - 1}")
        in_step = micro_batch * np.array(slots, dtype=np.int64)[:, None] + np.arange(micro_batch)
        first = self.global_batch * np.array(steps, dtype=np.int64)
        source, row = self.locate((first[:, None] + in_step.ravel()).ravel())
        pairs = list(zip(source.tolist(), row.tolist(), strict=True))
        count = in_step.size
        return [
            pairs[start : start + count] for start in range(0, count * len(steps), count or 1)
        ] or [[] for _ in steps]

    def locate(self, plan_rows: Integers) -> tuple[Integers, Integers]:
        """Source and row of each of `plan_rows` (int64 of one dimension, any values from 0)."""
        if self._lane_order is not None:
            return self._lane_order.locate(plan_rows)
        source, index = self.mixture.locate(plan_rows)
        rows = np.array(self.rows_per_source, dtype=np.int64)[source]
        epoch, offset = np.divmod(index, rows)
        return source, permute(offset, rows, seed=self.seed, source=source, epoch=epoch)

    def plan_rows_of(self, source: int, epoch: int, rows: Integers) -> Integers:
        """The inverse of `locate`: the plan row that is each of `rows` (int64 of one dimension) of a source in an epoch."""
        if self._lane_order is not None:
            return self._lane_order.plan_rows_of(source, epoch, rows)
        count = self.rows_per_source[source]
        place = places_of(rows, count, seed=self.seed, source=source, epoch=epoch)
        return self.mixture.place(np.full(rows.shape, source), epoch * count + place)

    def rows_read(self, step: int) -> Integers:
        """For each source, how many of its rows the plan reads before a step, counted over all epochs."""
        if self._lane_order is not None:
            return self._lane_order.rows_read(step)
        sources = np.arange(len(self.rows_per_source))
        return self.mixture.count(sources, np.full(sources.shape, step * self.global_batch))
