"""The history of steps: bounded, in order, in parts."""

import json

from elastic_pt.checkpoint.history import StepHistory, read_history, write_history
from tests.checkpoint.world import memory_store

KEY = "history/0000000009-g1-abcd.jsonl"


def history_of(steps: int, bytes_max: int = 1 << 20) -> StepHistory:
    """A history of `steps` steps."""
    history = StepHistory(bytes_max)
    for step in range(1, steps + 1):
        history.add({"step": step, "loss": 1.0})
    return history


def test_a_history_stays_below_its_limit() -> None:
    """Without commits, the history stays below its limit: it drops some old steps and keeps the newest one."""
    lines = history_of(20_000, bytes_max=10_000).through(20_000)
    assert sum(len(line.text) for line in lines) <= 10_000
    steps = [line.step for line in lines]
    assert steps == sorted(set(steps))
    assert steps[-50:] == list(range(19_951, 20_001))


def test_a_step_that_is_done_again_replaces_the_later_ones() -> None:
    """After a fall back the history has each step once. A commit removes the steps that it wrote."""
    history = history_of(10)
    history.add({"step": 6, "loss": 2.0})
    assert [line.step for line in history.through(99)] == [1, 2, 3, 4, 5, 6]
    history.forget(4)
    assert [line.step for line in history.through(5)] == [5]


def test_a_long_history_is_written_in_parts_and_read_whole() -> None:
    """No object is larger than a part and its pointer. A reader gets every line in order."""
    store = memory_store()
    write_history(store, KEY, history_of(1000).through(1000), part_bytes_max=4000)
    keys = store.keys("history/")
    assert len(keys) > 5
    assert all((store.size(key) or 0) < 4100 for key in keys)
    assert [entry["step"] for entry in read_history(store, KEY)] == list(range(1, 1001))


def test_a_history_in_one_object_has_only_lines_of_steps() -> None:
    """A history of one part has one object with its lines and nothing else. An empty history, too."""
    store = memory_store()
    store.create(KEY, b"".join(json.dumps({"step": step}).encode() + b"\n" for step in (1, 2)))
    assert read_history(store, KEY) == [{"step": 1}, {"step": 2}]
    write_history(store, KEY + "x", [])
    assert read_history(store, KEY + "x") == []
