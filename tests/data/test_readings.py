"""Rows that hold a document, and the steps that read these rows."""

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_pt.data import readings as readings_module
from elastic_pt.data.lanes import Lanes
from elastic_pt.data.manifest import Manifest
from elastic_pt.data.plan import DataPlan
from elastic_pt.data.readings import readings, rows_holding, times_read

STEPS = 40


@given(st.integers(0, 50), st.integers(1, 20), st.integers(1, 7), st.integers(1, 12))
def test_rows_with_a_document_are_all_that_have_one_of_its_tokens(
    start: int, length: int, sequence_length: int, rows: int
) -> None:
    """A text that crosses rows gives all of them, also the row whose last target is its first token."""
    tokens = range(start, start + length)
    expected = [
        row
        for row in range(rows)
        if set(tokens) & set(range(row * sequence_length, (row + 1) * sequence_length + 1))
    ]
    assert list(rows_holding(tokens, sequence_length, rows)) == expected


@pytest.fixture(params=[None, Lanes(2, 40)], ids=["version 1", "version 2"])
def plan(request: pytest.FixtureRequest, manifest_of: Callable[..., Manifest]) -> DataPlan:
    """A plan of a large source, a small one, and one with fewer rows than a step has slots."""
    manifest = manifest_of([211, 64, 9], [0.6, 0.3, 0.1])
    return DataPlan(manifest, sequence_length=4, seed=5, global_batch=8, lanes=request.param)


def read_by(plan: DataPlan, steps: range) -> Counter[tuple[int, int, int, int]]:
    """Source, row, step and slot of everything that some steps (from 1) read, from the loader's side of the plan."""
    return Counter(
        (source, row, step, place // 2)
        for step in steps
        for place, (source, row) in enumerate(plan.slot_rows(step - 1, range(4), 2))
    )


@pytest.mark.parametrize("steps", [range(1, STEPS + 1), range(1, 1), range(7, 12)])
def test_readings_are_those_of_the_loader(plan: DataPlan, steps: range) -> None:
    """`readings`, which goes from rows to steps, agrees with the plan, which goes from steps to rows."""
    found: Counter[tuple[int, int, int, int]] = Counter()
    for source, rows in enumerate(plan.rows_per_source):
        here = readings(plan, 2, source, range(rows), steps)
        assert [each.step for each in here] == sorted(each.step for each in here)
        found.update((source, each.row, each.step, each.slot) for each in here)
        # Each epoch has each row once.
        epochs = Counter((each.row, each.epoch) for each in here)
        assert set(epochs.values()) <= {1}
    assert found == read_by(plan, steps)


def test_readings_of_some_rows_are_counted_also_if_too_many_to_list(
    plan: DataPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small source is read in very many epochs: the list has an end, the count has not."""
    monkeypatch.setattr(readings_module, "READINGS_MAX", 5)
    for source, rows in enumerate(plan.rows_per_source):
        some = range(rows // 3, rows)
        every = read_by(plan, range(1, STEPS + 1))
        expected = sorted(
            (s, slot, row) for of, row, s, slot in every if of == source and row in some
        )
        assert times_read(plan, source, some, STEPS) == len(expected)
        listed = readings(plan, 2, source, some, range(1, STEPS + 1))
        assert [each.step for each in listed] == [step for step, _, _ in expected[:5]]
        listed = readings(plan, 2, source, some, range(1, STEPS + 1), last=True)
        assert [each.step for each in listed] == [step for step, _, _ in expected[-5:]]
    assert times_read(plan, 0, range(0), STEPS) == 0
    assert readings(plan, 2, 0, range(0), range(1, STEPS)) == []
