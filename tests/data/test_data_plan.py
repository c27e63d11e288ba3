"""The plan: every world reads the same batches, and every row once per epoch, despite kills."""

import dataclasses
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_pt.data.lanes import Lanes
from elastic_pt.data.manifest import Manifest
from elastic_pt.data.plan import OTHER_SOURCES, SOURCES_SHOWN_MAX, DataPlan
from elastic_pt.errors import DataError

SLOTS, MICRO_BATCH, STEPS = 16, 2, 12
BATCH = SLOTS * MICRO_BATCH

Rows = list[tuple[int, int]]
Make = Callable[..., Manifest]


def read_step(plan: DataPlan, step: int, world_size: int, *, strided: bool) -> Rows:
    """The global batch of a step, read by the workers of one world and sorted by slot."""
    by_slot: dict[int, Rows] = {}
    for rank in range(world_size):
        if strided:
            slots = range(rank, SLOTS, world_size)
        else:
            slots = range(rank * SLOTS // world_size, (rank + 1) * SLOTS // world_size)
        rows = plan.slot_rows(step, slots, MICRO_BATCH)
        for place, slot in enumerate(slots):
            assert slot not in by_slot
            by_slot[slot] = rows[place * MICRO_BATCH : (place + 1) * MICRO_BATCH]
    return [row for slot in range(SLOTS) for row in by_slot[slot]]


# One world: its size, whether slots are strided, the steps that it does before it is killed, and how many
# of its last steps are in no checkpoint.
lives = st.lists(
    st.tuples(st.integers(1, 16), st.booleans(), st.integers(0, 6), st.integers(0, 6)), max_size=8
)


@pytest.mark.parametrize("lanes", [None, Lanes(MICRO_BATCH, 2000)])
@given(lives=lives, seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_batches_do_not_depend_on_world_sizes_and_kills(
    lives: list[tuple[int, bool, int, int]], seed: int, manifest_of: Make, lanes: Lanes | None
) -> None:
    """The rows of the committed steps do not depend on the world sizes and on when workers were killed."""
    # A little more than one epoch of the first source and two epochs of the second.
    plan = DataPlan(manifest_of([2561, 1281], [0.5, 0.5]), 16, seed, BATCH, lanes)
    undisturbed = [
        plan.slot_rows(step, range(slot, slot + 1), MICRO_BATCH)
        for step in range(STEPS)
        for slot in range(SLOTS)
    ]
    committed: list[Rows] = []
    for world_size, strided, steps, lost_steps in [*lives, (1, False, STEPS, 0)]:
        end = min(STEPS, len(committed) + steps)
        done = [
            read_step(plan, step, world_size, strided=strided)
            for step in range(len(committed), end)
        ]
        committed += done[: max(0, len(done) - lost_steps)]
    assert [row for batch in committed for row in batch] == [
        row for slot in undisturbed for row in slot
    ]
    times_read = Counter(row for batch in committed for row in batch)
    assert len(times_read) == sum(plan.rows_per_source)
    assert {times_read[0, row] for row in range(160)} == {1, 2}
    assert {times_read[1, row] for row in range(80)} == {2, 3}
    assert sum(times_read.values()) == STEPS * BATCH


@given(rows=st.integers(1, 300), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_every_epoch_has_a_new_order_of_all_rows(rows: int, seed: int, manifest_of: Make) -> None:
    """Each epoch, as many plan rows as the source has rows, holds every row once."""
    plan = DataPlan(manifest_of([rows * 8 + 1]), 8, seed, 4)
    assert plan.rows_per_source == (rows,)
    epochs = plan.locate(np.arange(3 * rows, dtype=np.int64))[1].reshape(3, rows)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(rows))
    if rows > 20:
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3


def test_far_step_needs_no_earlier_step(manifest_of: Make) -> None:
    """A step depends only on its number: no earlier step is computed."""
    plan = DataPlan(manifest_of([10**12, 10**9], [0.9, 0.1]), 2048, 7, 1024)
    near, far = (plan.slot_rows(step, range(3, 4), 4) for step in (0, 10**9))
    assert near != far
    assert far == plan.slot_rows(10**9, range(8), 4)[12:16]
    assert all(0 <= row < plan.rows_per_source[source] for source, row in far)


def test_source_without_a_whole_row_is_refused(manifest_of: Make) -> None:
    """A row needs one token more than it predicts; the error names source, tokens and field."""
    assert DataPlan(manifest_of([100, 17]), 16, 0, 4).rows_per_source == (6, 1)
    with pytest.raises(
        DataError, match=r"source s1: 16 tokens hold no row of data.sequence_length"
    ):
        DataPlan(manifest_of([100, 16]), 16, 0, 4)


@pytest.mark.parametrize(("sequence_length", "global_batch"), [(0, 1), (1, 0), (-3, 1)])
def test_plan_without_length_or_batch_is_refused(
    sequence_length: int, global_batch: int, manifest_of: Make
) -> None:
    """The sequence length and the global batch must be positive."""
    with pytest.raises(DataError, match="expected a positive number"):
        DataPlan(manifest_of([100]), sequence_length, 0, global_batch)


@pytest.mark.parametrize(("step", "slots"), [(-1, range(1)), (0, range(8, 9)), (0, range(-1, 2))])
def test_step_or_slot_outside_of_the_plan_raises(
    step: int, slots: range, manifest_of: Make
) -> None:
    """A slot beyond the step raises; it does not read the rows of the next step."""
    with pytest.raises(ValueError, match="a step has slots 0 to 7"):
        DataPlan(manifest_of([1000]), 16, 0, 16).slot_rows(step, slots, 2)


def test_row_sources_name_the_source_of_every_row(manifest_of: Make) -> None:
    """The sources of a step's rows are those of its slots, in the order of the slots."""
    plan = DataPlan(manifest_of([2561, 1281, 700], [0.5, 0.3, 0.2]), 16, 3, BATCH)
    for step in (0, 1, 1_000_000):
        found = plan.row_sources(step)
        rows = plan.slot_rows(step, range(SLOTS), MICRO_BATCH)
        assert found.names == ("s0", "s1", "s2")
        assert [found.names[each] for each in found.of_row] == [f"s{source}" for source, _ in rows]


def test_only_the_heaviest_sources_are_named(manifest_of: Make) -> None:
    """Reports of a run with thousands of sources stay short: the light ones are one source, `other`."""
    sources = SOURCES_SHOWN_MAX + 6
    weights = np.array([1.0] * 4 + [2.0] * (sources - 4))
    weights /= weights.sum()
    manifest = manifest_of([1000] * sources, weights.tolist())
    called_other = dataclasses.replace(manifest.sources[10], name=OTHER_SOURCES)
    manifest = dataclasses.replace(
        manifest, sources=(*manifest.sources[:10], called_other, *manifest.sources[11:])
    )
    plan = DataPlan(manifest, 16, 0, BATCH)
    found = plan.row_sources(5)
    assert len(found.names) == len(set(found.names)) == SOURCES_SHOWN_MAX
    own = [f"s{each}" for each in range(4, sources) if each != 10]
    assert found.names == (*own[: SOURCES_SHOWN_MAX - 1], OTHER_SOURCES)
    rows = plan.slot_rows(5, range(SLOTS), MICRO_BATCH)
    names = [f"s{source}" if f"s{source}" in found.names else OTHER_SOURCES for source, _ in rows]
    assert [found.names[each] for each in found.of_row] == names
