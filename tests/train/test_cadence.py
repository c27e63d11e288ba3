"""How often workers take snapshots, and when one is due."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from elastic_pt.train.snapshots import COST_MAX, MemorySnapshots, adaptive_cadence
from elastic_pt.train.state import TrainState
from elastic_pt.train.step import Agreed, Control, Offer, _agreed, _head_of


@pytest.mark.parametrize(
    ("step_s", "copy_s", "every", "reason"),
    [
        (0.2, 0.0, 1, "no limit"),
        (0.2, 0.002, 1, "no limit"),
        (0.2, 0.02, 10, "copy cost"),
        (0.1, 0.001, 1, "no limit"),
        (0.01, 0.0, 40, "short steps"),
        (0.01, 0.02, 200, "copy cost"),
        (0.0, 1.0, 1, "no limit"),
    ],
)
def test_cadence_follows_from_cost(step_s: float, copy_s: float, every: int, reason: str) -> None:
    """Copies take at most a hundredth of the time; snapshots of short steps are 0.4 s apart."""
    assert adaptive_cadence(step_s, copy_s) == (every, reason)
    assert adaptive_cadence(0.2, 0.02, 11) == (11, "mirrors")
    if step_s:
        assert copy_s / (every * step_s) <= COST_MAX or math.isclose(copy_s / every, COST_MAX * step_s)  # fmt: skip


def snapshots(newest: int, began_at: int) -> MemorySnapshots:
    """The snapshots of a worker whose generation began at a step, without memory."""
    made = MemorySnapshots.__new__(MemorySnapshots)
    made._newest, made._began_at, made._taken_s = newest, began_at, None
    return made


def agreed(complete_step: int | None, every: int = 1) -> Agreed:
    """The workers' agreement after a step."""
    return Agreed(False, False, False, complete_step, every)


def test_older_buffer_is_overwritten_only_when_the_newer_one_is_complete_everywhere() -> None:
    """One step is always complete on all nodes and their mirrors."""
    taken = snapshots(newest=12, began_at=10)
    assert not taken.due(13, agreed(11))
    assert taken.due(13, agreed(12))


def test_no_snapshot_is_due_while_a_worker_has_no_memory() -> None:
    """A state without one worker's rows is useless, so no worker takes a snapshot."""
    assert not snapshots(newest=0, began_at=0).due(5, agreed(None))
    assert snapshots(newest=0, began_at=0).due(5, agreed(0))


def test_first_snapshot_comes_a_cadence_after_the_start() -> None:
    """A generation that resumed from step 100 already has that state in memory or in the bucket."""
    taken = snapshots(newest=0, began_at=100)
    assert not taken.due(103, agreed(0, every=4))
    assert taken.due(104, agreed(0, every=4))


def test_slow_link_makes_snapshots_rarer_and_a_fast_one_frequent_again(tmp_path: Path) -> None:
    """The mirrors need three steps for a copy: no more than every third step has a snapshot, and the event says so."""
    state = SimpleNamespace(rank=0, steps_done=0, slices=lambda: iter(()))
    agent = SimpleNamespace(complete_step=0, unmirrored_step=0, send=lambda *_, **__: None)
    taken = MemorySnapshots(0, 1, tmp_path, agent, cast("object", state), lambda _: None)  # type: ignore[arg-type]
    for newest, complete_after, every in ((10, 3, 3), (20, 3, 3), (30, 1, 1), (40, 3, 1)):
        taken._newest, taken._taken_s = newest, 0.0
        for step in range(newest + 1, newest + complete_after):
            taken.due(step, agreed(newest - 1))
        taken.due(newest + complete_after, agreed(newest))
        taken.due(newest + 5, agreed(newest))
        taken.measure(1.0)
        assert taken.offer().snapshot_every == every
        assert taken._complete_s > 0.0


def test_one_slow_copy_does_not_end_snapshots(tmp_path: Path) -> None:
    """A copy that was swapped or stopped for a second says nothing of the next one."""
    state = SimpleNamespace(rank=0, steps_done=0, slices=lambda: iter(()))
    agent = SimpleNamespace(complete_step=0, unmirrored_step=0, send=lambda *_, **__: None)
    taken = MemorySnapshots(0, 1, tmp_path, agent, cast("object", state), lambda _: None)  # type: ignore[arg-type]
    taken._copies_s.extend((0.001, 1.0))
    for _ in range(20):
        taken.measure(0.2)
    assert taken.offer().snapshot_every == 1


def test_configured_cadence_is_offered(tmp_path: Path) -> None:
    """A configured cadence does not change with the measurements."""
    state = SimpleNamespace(rank=0, steps_done=0, slices=lambda: iter(()))
    agent = SimpleNamespace(complete_step=0, unmirrored_step=0, send=lambda *_, **__: None)
    taken = MemorySnapshots(7, 1, tmp_path, agent, cast("object", state), lambda _: None)  # type: ignore[arg-type]
    for _ in range(20):
        taken.measure(0.001)
    assert taken.offer().snapshot_every == 7
    adaptive = MemorySnapshots(0, 2, tmp_path, agent, cast("object", state), lambda _: None)  # type: ignore[arg-type]
    for _ in range(20):
        adaptive.measure(0.001)
    assert adaptive.offer().snapshot_every == 400


def test_one_node_without_a_mirror_is_known_to_all_workers() -> None:
    """The oldest complete step counts, and one mirror without room means that an older state is still needed."""

    def agree(*offers: Offer) -> Agreed:
        heads = []
        for rank, offer in enumerate(offers):
            clock = SimpleNamespace(last_communicate_s=1.0)
            state = SimpleNamespace(rank=rank, world_size=len(offers), clock=clock)
            heads.append(_head_of(cast(TrainState, state), Control(False, False), offer))
        return _agreed([sum(each) for each in zip(*heads, strict=True)])

    found = agree(Offer(12), Offer(10, mirrors_have_room=False), Offer(11))
    assert (found.complete_step, found.mirrors_have_room) == (10, False)
    found = agree(Offer(12), Offer(10), Offer(11))
    assert (found.complete_step, found.mirrors_have_room) == (10, True)
    assert agree(Offer(0), Offer(5)).complete_step == 0
    assert agree(Offer(None), Offer(5, mirrors_have_room=False)).complete_step is None
