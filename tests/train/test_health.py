"""A step that went wrong is judged the same way by everyone."""

import math

import pytest

from elastic_pt.train.health import Rung, judge


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (-math.inf, math.nan)]
)
def test_a_non_finite_step_is_skipped_and_then_stops_the_run(loss: float, norm: float) -> None:
    """A non-finite loss or gradient is skipped up to the limit, then the run stops with the reason."""
    rungs = [judge(loss, norm, skipped_in_a_row=row, skipped_max=2).rung for row in range(4)]
    assert rungs == [Rung.SKIP, Rung.SKIP, Rung.STOP, Rung.STOP]
    assert f"loss {loss}" in judge(loss, norm, skipped_in_a_row=0, skipped_max=2).reason


def test_a_finite_step_updates_after_skipped_steps() -> None:
    """Once loss and gradient are finite the step updates, whatever number of steps was skipped before."""
    assert judge(2.0, 1e30, skipped_in_a_row=99, skipped_max=0).rung is Rung.UPDATE
