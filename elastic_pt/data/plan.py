"""The data plan: which rows a step reads, as a pure function of (plan, step, slot).

Step s reads plan rows [s * global_batch, (s + 1) * global_batch); slot k of that step is
`micro_batch` consecutive rows of them. The mixture maps plan row n to (source, index). The permutation of
the epoch maps the index to a row of that source. The world size is no input, and nothing is replayed: the
millionth step costs as much as the first.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from elastic_pt.data.manifest import Manifest
from elastic_pt.data.order import Integers, Mixture, permute
from elastic_pt.errors import DataError


@dataclass(frozen=True)
class DataPlan:
    """What a run reads, and in which order. Raises `DataError` if a source has no whole row."""

    manifest: Manifest
    sequence_length: int
    """Tokens that one row predicts; a row holds one more."""
    seed: int
    global_batch: int
    """Rows per step."""

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

    @cached_property
    def rows_per_source(self) -> tuple[int, ...]:
        """Whole rows of each source. The rest of its stream is not read."""
        return tuple(
            max(0, source.tokens("train") - 1) // self.sequence_length
            for source in self.manifest.sources
        )

    @cached_property
    def mixture(self) -> Mixture:
        """The order of the sources. It takes up to a third of a second to build, for weights with a long period."""
        return Mixture(self.manifest.weights)

    def slot_rows(self, step: int, slots: range, micro_batch: int) -> list[tuple[int, int]]:
        """The `(source, row)` pairs of some slots of one step, slot after slot; steps and slots count from 0.

        Raises `ValueError` for a step or slot outside of the plan, which is a bug of the caller.
        """
        slot_count = self.global_batch // micro_batch
        if step < 0 or any(not 0 <= slot < slot_count for slot in (*slots[:1], *slots[-1:])):
            raise ValueError(f"step {step}, {slots}: a step has slots 0 to {slot_count - 1}")
        first_rows = step * self.global_batch + micro_batch * np.array(slots, dtype=np.int64)
        source, row = self.locate((first_rows[:, None] + np.arange(micro_batch)).ravel())
        return list(zip(source.tolist(), row.tolist(), strict=True))

    def locate(self, plan_rows: Integers) -> tuple[Integers, Integers]:
        """Source and row of each of `plan_rows` (int64 of one dimension, any values from 0)."""
        source, index = self.mixture.locate(plan_rows)
        epoch, offset = np.divmod(index, np.array(self.rows_per_source, dtype=np.int64)[source])
        row = np.empty_like(offset)
        for number, turn in sorted(set(zip(source.tolist(), epoch.tolist(), strict=True))):
            chosen = (source == number) & (epoch == turn)
            row[chosen] = permute(
                offset[chosen],
                self.rows_per_source[number],
                seed=self.seed,
                source=number,
                epoch=turn,
            )
        return source, row
