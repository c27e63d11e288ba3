"""The steps beside a commit: bounded in bytes, written in parts, as cheap with a million as with ten."""

import time
from pathlib import Path
from typing import Any

import pytest

from elastic_pt.errors import NotFound
from elastic_pt.step_history import StepHistory, read_steps
from elastic_pt.store.open import open_store

KEY = "history/0000000009-g1-abcd.jsonl"


def step(number: int, **more: Any) -> dict[str, Any]:
    """What a worker says of a step."""
    return {"step": number, "loss": float(number), **more}


def test_steps_come_back_in_order_whatever_their_number(tmp_path: Path) -> None:
    """Steps up to the committed one are written in parts of bounded size, and read as one sequence."""
    store = open_store(f"file://{tmp_path}")
    history = StepHistory(part_bytes=1000)
    for number in range(1, 201):
        history.note(1, step(number))
    assert history.write(store, KEY, 150) == 150.0
    assert [each["step"] for each in read_steps(store, KEY)] == list(range(1, 151))
    sizes = [store.size(key) or 0 for key in store.keys("history/")]
    assert len(sizes) > 5
    assert max(sizes) <= 1000 + len(b'{"parts": 99}\n')
    history.committed(150)
    history.write(store, "history/later.jsonl", 200)
    assert [each["step"] for each in read_steps(store, "history/later.jsonl")] == list(
        range(151, 201)
    )


def test_a_history_without_parts_is_read_as_ever(tmp_path: Path) -> None:
    """What earlier versions wrote, one object of lines, is read; so is an empty one; a missing one is named."""
    store = open_store(f"file://{tmp_path}")
    store.create(KEY, b'{"generation": 1, "step": 1, "loss": 2.0}\n')
    assert [each["step"] for each in read_steps(store, KEY)] == [1]
    StepHistory().write(store, "history/empty.jsonl", 5)
    assert list(read_steps(store, "history/empty.jsonl")) == []
    with pytest.raises(NotFound):
        list(read_steps(store, "history/missing.jsonl"))


def test_steps_that_are_done_again_replace_what_was_known(tmp_path: Path) -> None:
    """After a fall back the later report of a step counts, and those behind it are gone."""
    store = open_store(f"file://{tmp_path}")
    history = StepHistory()
    for number in (1, 2, 3, 4):
        history.note(1, step(number))
    history.note(2, step(3))
    history.write(store, KEY, 9)
    assert [(each["step"], each["generation"]) for each in read_steps(store, KEY)] == [
        (1, 1),
        (2, 1),
        (3, 2),
    ]


def test_what_waits_is_bounded(tmp_path: Path) -> None:
    """However long no commit comes, the newest steps are kept within the bound, and the next commit succeeds."""
    store = open_store(f"file://{tmp_path}")
    history = StepHistory(waiting_bytes_max=10_000)
    for number in range(1, 2001):
        history.note(1, step(number))
    assert history.write(store, KEY, 2000) == 2000.0
    steps = [each["step"] for each in read_steps(store, KEY)]
    assert steps == list(range(steps[0], 2001))
    assert 100 < len(steps) < 250


def test_a_step_costs_the_same_however_many_wait() -> None:
    """Noting a step does not look at the others: a hundred times as many take about a hundred times as long."""

    def seconds(count: int) -> float:
        history = StepHistory()
        began_s = time.process_time()
        for number in range(count):
            history.note(1, step(number))
        return time.process_time() - began_s

    few = max(seconds(500), 1e-3)
    assert seconds(50_000) < 100 * few * 10
