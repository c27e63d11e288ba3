"""The reaction to a step with a non-finite loss or gradient: a pure function of values that all ranks have.

    finite loss and gradient         ─► UPDATE
    not finite, up to the limit      ─► SKIP    no update, the data of the step is skipped, on every rank
    not finite more often in a row   ─► STOP    the run ends with its last checkpoint and this cause

Every rank has the same bits of loss and gradient norm, so every rank decides the same.
"""

import math
from dataclasses import dataclass
from enum import StrEnum


class Rung(StrEnum):
    """What happens to the step."""

    UPDATE = "update"
    SKIP = "skip"
    STOP = "stop"


@dataclass(frozen=True)
class Verdict:
    """A rung and, unless it is UPDATE, the reason."""

    rung: Rung
    reason: str = ""


def judge(loss: float, gradient_norm: float, *, skipped_in_a_row: int, skipped_max: int) -> Verdict:
    """Judge one step. `skipped_in_a_row` counts the skipped steps just before it. Worker process."""
    if math.isfinite(loss) and math.isfinite(gradient_norm):
        return Verdict(Rung.UPDATE)
    reason = f"loss {loss} and gradient norm {gradient_norm}"
    if skipped_in_a_row >= skipped_max:
        return Verdict(Rung.STOP, f"{reason} after {skipped_in_a_row} skipped steps in a row")
    return Verdict(Rung.SKIP, reason)
