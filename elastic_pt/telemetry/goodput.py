"""How a node spends its time: each second counts as exactly one activity, and the sums add up to the total.

form        no generation: the node looks for peers and agrees with them on the members
start       workers start, connect and build the model
restore     workers read the state, from memory, peers or the bucket
productive  steps beyond the last step that was done before
recompute   steps that were done before and lost
settle      workers have stopped as planned; their last step is being mirrored and uploaded
paused      no generation, because an operator has paused the run
"""

from enum import StrEnum


class Activity(StrEnum):
    """The activities."""

    FORM = "form"
    START = "start"
    RESTORE = "restore"
    PRODUCTIVE = "productive"
    RECOMPUTE = "recompute"
    SETTLE = "settle"
    PAUSED = "paused"


class GoodputLedger:
    """Accounts for time by activity. Pure: the clock comes in as `now_s`. Agent process."""

    def __init__(self, now_s: float) -> None:
        self.seconds: dict[Activity, float] = dict.fromkeys(Activity, 0.0)
        self._activity = Activity.FORM
        self._since_s = now_s
        self._frontier_step = 0

    def enter(self, activity: Activity, now_s: float) -> None:
        """From now on, time counts as this activity."""
        self._account(now_s)
        self._activity = activity

    def step_done(self, step: int, now_s: float) -> None:
        """A step has ended: the time since the last event was productive, or recomputed a step that was lost."""
        new = step > self._frontier_step
        self._activity = Activity.PRODUCTIVE if new else Activity.RECOMPUTE
        self._account(now_s)
        self._frontier_step = max(self._frontier_step, step)

    def snapshot(self, now_s: float) -> dict[Activity, float]:
        """Seconds per activity up to now."""
        self._account(now_s)
        return dict(self.seconds)

    def _account(self, now_s: float) -> None:
        assert now_s >= self._since_s
        self.seconds[self._activity] += now_s - self._since_s
        self._since_s = now_s
