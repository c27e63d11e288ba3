"""Order version 2: rows of each epoch once, locality per slot, and the way back from a row to its step."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from elastic_pt.data.lanes import CHUNK_TOKENS, Lanes, lanes_of
from elastic_pt.data.manifest import Manifest
from elastic_pt.data.plan import DataPlan
from elastic_pt.errors import DataError

Make = Callable[..., Manifest]
PLAN_ROWS_MAX = 20_000

FROZEN_STEP = [
    (0, 263),
    (0, 261),
    (1, 43),
    (0, 279),
    (1, 64),
    (0, 191),
    (0, 273),
    (1, 69),
]
FROZEN_FAR_STEP = [(0, 664053953), (1, 29673518), (0, 112895587), (0, 640735040)]


@dataclass(frozen=True)
class Case:
    """A plan of small or odd sizes."""

    rows: list[int]
    weights: list[int]
    slots: int
    micro_batch: int
    chunk_rows: int
    window_rows: int
    seed: int

    @property
    def batch(self) -> int:
        """Rows of a step."""
        return self.slots * self.micro_batch

    def plan(self, manifest_of: Make) -> DataPlan:
        """Chunks have at most `chunk_rows`, so the sequences are long. A manifest needs no files for it."""
        length = CHUNK_TOKENS // self.chunk_rows
        share = sum(self.weights)
        return DataPlan(
            manifest_of(
                [rows * length + 1 for rows in self.rows], [each / share for each in self.weights]
            ),
            length,
            self.seed,
            self.batch,
            Lanes(self.micro_batch, self.window_rows * length),
        )

    def steps(self, epochs: int) -> int:
        """Steps in which most sources are read `epochs` times, as far as the test has time for it."""
        pairs = zip(self.rows, self.weights, strict=True)
        needed = max(rows * sum(self.weights) / weight for rows, weight in pairs)
        return int(min(PLAN_ROWS_MAX, needed * epochs) // self.batch) + 2


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """1 to 30 sources with fewer rows than slots, than a group, or with many chunks per lane."""
    sources = draw(st.integers(1, 30))
    some = st.one_of(st.integers(1, 9), st.integers(1, 400), st.integers(1000, 9000))
    return Case(
        rows=draw(st.lists(some, min_size=sources, max_size=sources)),
        weights=draw(st.lists(st.integers(1, 40), min_size=sources, max_size=sources)),
        slots=draw(st.integers(1, 24)),
        micro_batch=draw(st.integers(1, 5)),
        chunk_rows=draw(st.sampled_from([1, 2, 3, 7, 64])),
        window_rows=draw(st.one_of(st.just(0), st.integers(1, 500), st.just(10**9))),
        seed=draw(st.integers(0, 2**63)),
    )


ODD = Case([7, 1, 1733], [1, 1, 30], 16, 3, 7, 200, 0)


@given(cases())
@settings(max_examples=40, deadline=None)
@example(ODD)
@example(Case([5000], [1], 1, 1, 7, 100, 1))
@example(Case([1], [1], 24, 5, 1, 1, 2))
def test_each_row_is_read_once_before_any_is_read_twice(manifest_of: Make, case: Case) -> None:
    """In plan order, each epoch of a source has every row once, for any sizes of sources, slots and windows."""
    plan = case.plan(manifest_of)
    source, row = plan.locate(np.arange(case.steps(3) * case.batch))
    for number, rows in enumerate(case.rows):
        read = row[source == number]
        for begin in range(0, len(read), rows):
            epoch = read[begin : begin + rows]
            assert len(np.unique(epoch)) == len(epoch)
            assert epoch.min() >= 0
            assert epoch.max() < rows


@pytest.mark.parametrize("version", [1, 2])
@given(cases())
@settings(max_examples=30, deadline=None)
@example(ODD)
def test_the_way_back_leads_to_the_same_plan_row(
    manifest_of: Make, version: int, case: Case
) -> None:
    """`plan_rows_of` is the inverse of `locate` in every epoch, for both versions of the order."""
    plan = case.plan(manifest_of)
    if version == 1:
        plan = DataPlan(plan.manifest, plan.sequence_length, plan.seed, plan.global_batch)
    plan_rows = np.arange(min(case.steps(3) * case.batch, 3000))
    source, row = plan.locate(plan_rows)
    for number, rows in enumerate(case.rows):
        mine = source == number
        for epoch in {0, 1, max(0, int(mine.sum()) // rows - 1)}:
            part = slice(epoch * rows, (epoch + 1) * rows)
            found = plan.plan_rows_of(number, epoch, row[mine][part])
            np.testing.assert_array_equal(found, plan_rows[mine][part])


@given(cases(), st.integers(0, 10**7), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_rows_do_not_depend_on_what_is_asked_together(
    manifest_of: Make, case: Case, step: int, seed: int
) -> None:
    """A slot's rows are the same alone, with other slots, and after other steps in any order."""
    plan, other = case.plan(manifest_of), case.plan(manifest_of)
    together = plan.slot_rows(step, range(case.slots), case.micro_batch)
    generator = np.random.default_rng(seed)
    for slot in generator.permutation(case.slots).tolist():
        other.slot_rows(int(generator.integers(10**7)), range(slot, case.slots), case.micro_batch)
        alone = other.slot_rows(step, range(slot, slot + 1), case.micro_batch)
        assert alone == together[slot * case.micro_batch : (slot + 1) * case.micro_batch]
    assert plan.slot_rows(step, range(0), case.micro_batch) == []


@given(cases(), st.integers(0, 10**9))
@settings(max_examples=60, deadline=None)
def test_each_step_has_the_weights(manifest_of: Make, case: Case, step: int) -> None:
    """In every step, each source is within two rows of its weight, and `row_sources` says the same."""
    plan = case.plan(manifest_of)
    rows = plan.slot_rows(step, range(case.slots), case.micro_batch)
    counts = np.bincount([source for source, _ in rows], minlength=len(case.rows))
    expected = np.array(case.weights) / sum(case.weights) * case.batch
    assert np.abs(counts - expected).max() < 2
    found = plan.row_sources(step)
    assert [found.names[each] for each in found.of_row] == [f"s{source}" for source, _ in rows]


@given(cases(), st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_rows_read_is_the_count_of_the_steps_before(
    manifest_of: Make, case: Case, step: int
) -> None:
    """`rows_read` counts what `locate` gives, for both versions of the order."""
    plan = case.plan(manifest_of)
    older = DataPlan(plan.manifest, plan.sequence_length, plan.seed, plan.global_batch)
    for each in (plan, older):
        source, _ = each.locate(np.arange(step * case.batch))
        expected = np.bincount(source, minlength=len(case.rows))
        np.testing.assert_array_equal(each.rows_read(step), expected)


def test_each_epoch_and_each_seed_has_its_own_order(manifest_of: Make) -> None:
    """Rows of one place differ between epochs and seeds, both those that a slot reads and their order."""
    case = Case([6000], [1], 8, 2, 32, 1000, 3)
    orders = []
    for seed in (3, 4):
        plan = Case(**{**vars(case), "seed": seed}).plan(manifest_of)
        orders += [*plan.locate(np.arange(3 * 6000))[1].reshape(3, 6000)]
    for index, one in enumerate(orders):
        for other in orders[:index]:
            assert (one == other).mean() < 0.01
            shared = np.intersect1d(one.reshape(-1, 8, 2)[:, 0], other.reshape(-1, 8, 2)[:, 0])
            assert len(shared) < 0.25 * 750


@pytest.mark.parametrize("nodes", [1, 4, 16])
@pytest.mark.parametrize("steps", [None, 2000])
def test_a_node_touches_about_the_chunks_that_its_slots_use(
    manifest_of: Make, nodes: int, steps: int | None
) -> None:
    """Over an epoch and over a part of it, chunks that a node touches have at most 1.2 of the rows that its slots use."""
    chunk_rows, slots, rows = 16, 32, 2**17
    case = Case([rows, rows // 2], [2, 1], slots, 1, chunk_rows, slots * 4 * chunk_rows, 5)
    plan = case.plan(manifest_of)
    count = (steps or rows * 3 // 2 // case.batch) * case.batch
    plan_rows = np.arange(count)
    source, row = plan.locate(plan_rows)
    for node in range(nodes):
        mine = plan_rows % slots % nodes == node
        touched = np.unique(np.stack([source[mine], row[mine] // chunk_rows]), axis=1).shape[1]
        assert touched * chunk_rows / mine.sum() < 1.2


@pytest.mark.parametrize(
    ("weights", "window", "chunks"),
    [([1], 2**30, [128]), ([6, 2], 2**24, [96, 64]), ([1] * 8, 2**10, [64] * 8)],
)
def test_chunks_follow_the_window(
    manifest_of: Make, weights: list[int], window: int, chunks: list[int]
) -> None:
    """A chunk is as large as a slot's part of the window for its source, within bounds, and `open_tokens` tells the sum."""
    slots, length = 64, 2048
    shares = [each / sum(weights) for each in weights]
    plan = DataPlan(
        manifest_of([2**20 * length + 1] * len(weights), shares),
        length,
        0,
        slots * 8,
        Lanes(8, window),
    )
    assert plan.chunk_rows == tuple(chunks)
    expected = max(window, slots * sum(chunks) * length)
    assert plan.open_tokens(slots) == pytest.approx(expected, rel=0.01)
    assert plan.open_tokens(slots // 4) == pytest.approx(expected / 4, rel=0.01)
    assert DataPlan(plan.manifest, length, 0, slots).open_tokens(1) == len(weights) * 2**20 * length


def test_open_tokens_are_those_of_chunks_that_are_read_on(manifest_of: Make) -> None:
    """At any step, the chunks that some steps before have begun and some after read on are about `open_tokens`."""
    case = Case([2**14, 2**13], [2, 1], 16, 2, 8, 1500, 3)
    plan = case.plan(manifest_of)
    plan_rows = np.arange(2**13)
    source, row = plan.locate(plan_rows)
    chunk = source * 2**20 + row // np.array(plan.chunk_rows)[source]
    _, first, owner = np.unique(chunk, return_index=True, return_inverse=True)
    last = np.zeros_like(first)
    np.maximum.at(last, owner, plan_rows)
    rows = np.array(plan.chunk_rows)[source[first]]
    begun, ended = (np.bincount(each, rows, minlength=2**13).cumsum() for each in (first, last))
    held_rows = (begun - ended)[2**12 : 2**13 - 4 * case.batch].mean()
    open_rows = plan.open_tokens(case.slots) / plan.sequence_length
    assert 0.5 * open_rows < held_rows < 1.2 * open_rows


def test_a_source_is_mixed_over_all_of_its_rows(manifest_of: Make) -> None:
    """The rows of each step come from all parts of the source: their mean is that of random rows."""
    case = Case([2**16], [1], 64, 1, 16, 4096, 6)
    row = case.plan(manifest_of).locate(np.arange(2**16))[1].reshape(-1, 64)
    deviation = row.mean(axis=1) - 2**15
    assert deviation.std() == pytest.approx(2**16 / 12**0.5 / 8, rel=0.1)
    assert (np.abs(np.diff(row, axis=1)) < 16).mean() < 0.005


def test_topics_of_a_batch_vary_as_in_a_full_permutation(manifest_of: Make) -> None:
    """On a corpus sorted by topic, the rows of a slot in one step come from different chunks, so batches are even."""
    case = Case([2**16], [1], 16, 8, 32, 16 * 8 * 32, 6)
    topic = case.plan(manifest_of).locate(np.arange(2**16))[1].reshape(-1, case.batch) // 2**11
    variance = sum((topic == each).sum(axis=1).var() for each in range(32))
    assert variance / (case.batch * (1 - 1 / 32)) < 1.1


def test_order_is_frozen(manifest_of: Make) -> None:
    """A run that began with an older release reads the same rows; any change needs a new version."""
    case = Case([300, 70, 3], [6, 3, 1], 4, 2, 4, 40, 42)
    plan = case.plan(manifest_of)
    assert plan.slot_rows(5, range(4), 2) == FROZEN_STEP
    far = Case([10**9 + 7, 10**8], [6, 3], 4, 1, 256, 10**6, 42).plan(manifest_of)
    assert far.slot_rows(10**9, range(4), 1) == FROZEN_FAR_STEP


@pytest.mark.parametrize("rows", [10**9, 10**6])
def test_any_step_is_found_at_once(manifest_of: Make, rows: int) -> None:
    """All rows of a far step of a large plan take milliseconds, without any step before it."""
    weights = np.random.default_rng(0).integers(1, 100, 64)
    plan = DataPlan(
        manifest_of([rows * 2048 + 1] * 64, (weights / weights.sum()).tolist()),
        2048,
        0,
        4096,
        Lanes(8, 2**30),
    )
    plan.locate(np.arange(4096))
    taken_s = []
    for step in (10**6, 10**7, 12_345_678, 10**8, 123_456_789):
        start = time.thread_time()
        plan.slot_rows(step, range(512), 8)
        taken_s.append(time.thread_time() - start)
    # About 5 ms on an idle machine; one of them may meet a collection of garbage.
    assert sorted(taken_s)[3] < 0.1


def test_many_short_epochs_need_little_memory(manifest_of: Make) -> None:
    """A step may have thousands of epochs of a source of one row."""
    case = Case([1, 9], [1, 1], 4096, 1, 1, 10**6, 0)
    rows = case.plan(manifest_of).slot_rows(10**6, range(4096), 1)
    assert rows.count((0, 0)) == 2048
    counts = np.bincount([row for source, row in rows if source == 1])
    assert counts.max() - counts.min() <= 2


def test_another_micro_batch_is_refused(manifest_of: Make) -> None:
    """The micro-batch decides the lanes: it must divide the batch, and a caller cannot use another one."""
    plan = Case([100], [1], 4, 2, 1, 1, 0).plan(manifest_of)
    with pytest.raises(ValueError, match="micro_batch = 4: the plan has 2"):
        plan.slot_rows(0, range(1), 4)
    with pytest.raises(DataError, match="micro_batch = 3: expected a divisor of global_batch = 8"):
        DataPlan(plan.manifest, plan.sequence_length, 0, 8, Lanes(3, 1))


def test_only_version_2_has_lanes() -> None:
    """The recorded version of a run selects its order."""
    assert lanes_of(1, 4, 2**30) is None
    assert lanes_of(2, 4, 2**30) == Lanes(4, 2**30)
