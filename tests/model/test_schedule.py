"""Learning rates."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_pt.config import TrainSection
from elastic_pt.train.schedule import learning_rate


def rates(**fields: object) -> list[float]:
    train = TrainSection.model_validate({"learning_rate": 1.0} | fields)
    return [learning_rate(step, train) for step in range(train.steps)]


def test_wsd() -> None:
    """wsd rises linearly, stays at the peak, and falls linearly to the minimum at the last step."""
    got = rates(
        steps=10, warmup_steps=2, decay_share=0.4, min_learning_rate_ratio=0.2, schedule="wsd"
    )
    assert got == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_cosine() -> None:
    """cosine rises linearly, then falls along half a cosine to the minimum at the last step."""
    got = rates(steps=6, warmup_steps=2, min_learning_rate_ratio=0.0, schedule="cosine")
    assert got == pytest.approx(
        [0.5, 1, *(0.5 + 0.5 * math.cos(math.pi * i / 4) for i in (1, 2, 3, 4))]
    )


@given(
    schedule=st.sampled_from(["wsd", "cosine"]),
    steps=st.integers(1, 60),
    warmup_steps=st.integers(0, 80),
    decay_share=st.floats(0, 1),
    floor=st.floats(0, 1),
)
def test_any_configuration_gives_usable_rates(
    schedule: str, steps: int, warmup_steps: int, decay_share: float, floor: float
) -> None:
    """For any configuration, rates are between zero and the peak. They rise first and then fall."""
    got = rates(
        steps=steps,
        schedule=schedule,
        warmup_steps=warmup_steps,
        decay_share=decay_share,
        min_learning_rate_ratio=floor,
    )
    assert all(0.0 <= rate <= 1.0 for rate in got)
    top = got.index(max(got))
    assert got[: top + 1] == sorted(got[: top + 1])
    assert got[top:] == sorted(got[top:], reverse=True)


def test_a_step_after_the_last_one_has_the_minimum_rate() -> None:
    """After the last step of the run the rate is the minimum. A negative step is a `ValueError`."""
    train = TrainSection(steps=10, warmup_steps=1, learning_rate=1.0)
    assert learning_rate(99, train) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="counted from 0"):
        learning_rate(-1, train)
