"""The learning rate as a pure function of the step."""

import math

from elastic_pt.config import TrainSection


def learning_rate(step: int, train: TrainSection) -> float:
    """Learning rate of `step`, counted from 0.

    Warm-up rises linearly and reaches the peak at step `warmup_steps - 1` at the latest. `wsd` then stays there
    and falls linearly over the last `decay_share` of the run; `cosine` falls from the end of warm-up on. Both
    reach `min_learning_rate_ratio` of the peak at the last step, and stay there. If a run is so short that
    warm-up and decay overlap, the smaller of the two counts.
    """
    if step < 0:
        raise ValueError(f"step = {step}: steps are counted from 0")
    warm_up = min(1.0, (step + 1) / train.warmup_steps) if train.warmup_steps else 1.0
    floor = train.min_learning_rate_ratio
    if train.schedule == "wsd":
        decay_steps = round(train.steps * train.decay_share)
        share = 1.0 - _progress(step, train.steps - decay_steps, train.steps)
    else:
        done = _progress(step, min(train.warmup_steps, train.steps), train.steps)
        share = 0.5 * (1.0 + math.cos(math.pi * done))
    return train.learning_rate * min(warm_up, floor + (1.0 - floor) * share)


def _progress(step: int, first_step: int, end_step: int) -> float:
    """0 before `first_step`, then linear up to 1 at step `end_step - 1`."""
    if step < first_step or end_step <= first_step:
        return 0.0
    return min(1.0, (step - first_step + 1) / (end_step - first_step))
