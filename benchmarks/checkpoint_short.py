"""What adaptive snapshots cost if steps are short, and how much time a kill could cost. Part of `checkpoint.py`.

    blocks in turn: steps without snapshots ◄─► steps with those of the adaptive cadence (`snapshot_every_steps = 0`)

One worker, and the agent's part in a process of its own: there is no mirror, so a snapshot is complete when the agent has
hashed it. `lost_s` is the worst time that a kill of the worker could have cost at the end of any step: from the end of the
newest complete state's step until then.
"""

import statistics
import time
from typing import Any, Final

from benchmarks.checkpoint_sides import Trainer
from benchmarks.summary import spread
from elastic_pt.train.snapshots import SHORT_STEP_S

STATE_BYTES: Final = 10e6
TOKENS: Final = 64
SLOWER_MAX: Final = 1.03
LOST_S_MAX: Final = 0.5
_BLOCK_S: Final = 2.0
"""Several snapshots in each block: they are at least 0.4 s apart."""


def measure_short(trainer: Trainer, repeats: int) -> dict[str, Any]:
    """Blocks in turn, in another order in each repetition. The first one warms up, and lets the cadence settle."""
    warm_up = quiet_steps(trainer, 1.0)
    count = max(8, round(_BLOCK_S / statistics.median(warm_up)))
    ratios, lost, every, step_s = [], [], [], []
    for repeat in range(repeats + 1):
        quiet: list[float] = []
        if repeat % 2:
            quiet = trainer.seconds(count)
        seconds, lost_s, cadence = adaptive_steps(trainer, count)
        if not repeat % 2:
            quiet = trainer.seconds(count)
        if repeat:
            ratios.append(sum(seconds) / sum(quiet))
            lost.append(lost_s)
            every.append(cadence)
            step_s.append(statistics.median(quiet))
    return {
        **spread("step_ms", [1e3 * each for each in step_s], 2),
        **spread("slower_steps_ratio", ratios, 4),
        **spread("lost_s", lost, 3),
        "every_steps": statistics.median_low(every),
    }


def quiet_steps(trainer: Trainer, for_s: float) -> list[float]:
    """Steps for some seconds."""
    found: list[float] = []
    while sum(found) < for_s:
        found.append(trainer.step())
    return found


def adaptive_steps(trainer: Trainer, count: int) -> tuple[list[float], float, int]:
    """Steps with snapshots: the seconds of each with its snapshot, the worst loss in seconds, the last cadence."""
    snapshots, state = trainer.snapshots, trainer.state
    assert snapshots is not None
    found: list[float] = []
    done_at_s: dict[int, float] = {}
    """When each step of this block was done."""
    lost_s, cadence = 0.0, 0
    for _ in range(count):
        seconds = trainer.step()
        done_at_s[state.steps_done] = time.monotonic()
        snapshots.measure(seconds)
        agreed = trainer.agreed
        assert agreed is not None
        cadence = agreed.snapshot_every
        newest = agreed.complete_step or 0
        # The states of a block before say nothing: no snapshots were taken in between.
        if newest in done_at_s:
            lost_s = max(lost_s, done_at_s[state.steps_done] - done_at_s[newest])
        started_s = time.perf_counter()
        if snapshots.due(state.steps_done, agreed):
            snapshots.take(state, agreed)
        found.append(seconds + time.perf_counter() - started_s)
    return found, lost_s, cadence


def judge_short(short: dict[str, Any]) -> dict[str, bool]:
    """Whether each target is met: both need steps shorter than `SHORT_STEP_S`."""
    is_short = short["step_ms"] < 1e3 * SHORT_STEP_S
    return {
        f"short steps at most {SLOWER_MAX - 1:.0%} slower by adaptive snapshots": is_short
        and short["slower_steps_ratio"] <= SLOWER_MAX,
        f"short steps: a kill costs at most {LOST_S_MAX:g} s": is_short
        and short["lost_s"] <= LOST_S_MAX,
    }


def print_short(short: dict[str, Any]) -> None:
    """One line."""
    print(
        f"short steps of {short['step_ms']:.1f} ms: a snapshot every {short['every_steps']} steps, steps take "
        f"{short['slower_steps_ratio']:.3f} x ({short['slower_steps_ratio_worst']:.3f} at worst); a kill costs at most "
        f"{short['lost_s']:.2f} s ({short['lost_s_worst']:.2f} at worst)"
    )
