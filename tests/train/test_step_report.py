"""What a worker reports of a step: where its time went, what it waited for, and the loss of each source."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic_pt.data.plan import RowSources
from elastic_pt.train.clock import Phase, StepClock
from elastic_pt.train.loop import losses_by_source
from elastic_pt.train.state import TrainState
from tests.train.world import Watched, config_for, watch_steps

SLOW_S: Final = 0.5


class Hand:
    """A clock that a test sets."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_phases_add_up_to_the_step() -> None:
    """Every moment of a step belongs to one phase; time in a collective belongs to no other phase."""
    hand = Hand()
    clock = StepClock(hand)
    hand.now_s = 10.0
    clock.begin()
    hand.now_s = 11.0
    clock.enter(Phase.COMPUTE)
    hand.now_s = 13.0
    with clock.communicating():
        hand.now_s = 17.0
    hand.now_s = 18.0
    clock.enter(Phase.OPTIMIZER)
    hand.now_s = 26.0
    first = clock.end()
    assert first.phases == {"data": 1.0, "compute": 3.0, "communicate": 4.0, "optimizer": 8.0}
    assert (first.seconds, first.stall_s, clock.last_communicate_s) == (16.0, 0.0, 4.0)
    hand.now_s = 31.0
    clock.begin()
    hand.now_s = 33.0
    second = clock.end()
    assert second.phases == {"data": 2.0, "compute": 0.0, "communicate": 0.0, "optimizer": 0.0}
    assert (second.seconds, second.stall_s, clock.last_communicate_s) == (2.0, 5.0, 0.0)


def sleep_in_forward(state: TrainState) -> None:
    """The worker computes the forward pass of its last block slowly."""
    state.model.blocks[-1].register_forward_pre_hook(lambda *_: time.sleep(SLOW_S))


def sleep_in_backward(state: TrainState) -> None:
    """The worker computes a backward pass slowly: others wait in the reduction of gradients."""

    def hook(_module: object, _inputs: object, output: torch.Tensor) -> None:
        output.register_hook(lambda _gradient: time.sleep(SLOW_S))

    state.model.blocks[0].register_forward_hook(hook)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("slow", "numerics"),
    [
        (sleep_in_forward, "exact"),
        (sleep_in_backward, "exact"),
        (sleep_in_backward, "native"),
    ],
)
def test_others_report_the_wait_for_a_slow_worker(
    tmp_path: Path, slow: Callable[[TrainState], None], numerics: str
) -> None:
    """The others wait about as long as the slow worker is slower, one step later; the slow one reports no wait."""
    config = config_for(tmp_path, f"train.numerics='{numerics}'", "train.global_batch=3")
    workers = watch_steps(config, 3, 5, slow)
    *others, slowed = [statistics.median(wait_s(each) for each in steps[1:]) for steps in workers]
    assert slowed < 0.4 * SLOW_S
    for wait in others:
        assert 0.6 * SLOW_S < wait < 2.0 * SLOW_S
    for steps in workers:
        assert steps[0].straggler_wait_s == 0.0
        for each in steps:
            assert sum(each.times.phases.values()) == pytest.approx(each.times.seconds, rel=1e-9)
            assert each.straggler_wait_s >= 0.0
    assert workers[-1][1].times.phases[Phase.COMPUTE] > SLOW_S
    assert workers[0][1].times.phases[Phase.COMPUTE] < 0.5 * SLOW_S


def wait_s(step: Watched) -> float:
    return step.straggler_wait_s


@pytest.mark.distributed
def test_rows_have_the_same_losses_in_any_world(tmp_path: Path) -> None:
    """The loss of each row has the same bits for any number of workers; the rows add up to the step's loss."""
    config = config_for(
        tmp_path, "train.global_batch=10", "train.micro_batch=2", "train.z_loss=0.01"
    )
    alone, *others = (watch_steps(config, world_size, 3) for world_size in (1, 2, 3))
    for workers in others:
        for steps in workers:
            assert [each.row_losses for each in steps] == [each.row_losses for each in alone[0]]
    tokens = 10 * config.data.sequence_length
    for each in alone[0]:
        assert len(each.row_losses) == 10
        assert len(set(each.row_losses)) == 10
        assert sum(each.row_losses) / tokens == pytest.approx(each.loss, rel=1e-12, abs=0.0)


@given(
    of_row=st.lists(st.integers(0, 4), min_size=1, max_size=50),
    seed=st.integers(0, 1000),
)
def test_sources_add_up_to_the_loss(of_row: list[int], seed: int) -> None:
    """Weighted with their rows, the means of the sources give the mean of all rows. A source without rows is left out."""
    losses = np.random.default_rng(seed).uniform(10.0, 1000.0, len(of_row))
    names = ("a", "b", "c", "d", "e")
    found = losses_by_source(RowSources(names, np.array(of_row)), losses, tokens_per_row=16)
    assert set(found) == {names[each] for each in of_row}
    assert {name: rows for name, (rows, _) in found.items()} == {
        name: of_row.count(names.index(name)) for name in found
    }
    mean = sum(rows * loss for rows, loss in found.values()) / len(of_row)
    assert mean == pytest.approx(losses.sum() / (16 * len(of_row)), rel=1e-12, abs=0.0)
    chosen = [loss for loss, source in zip(losses, of_row, strict=True) if source == of_row[0]]
    assert found[names[of_row[0]]][1] == pytest.approx(sum(chosen) / (16 * len(chosen)), rel=1e-12)
