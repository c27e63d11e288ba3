"""The facts that one node keeps between turns, because it cannot get them again from the log or its peers.

All moments are on this node's own monotonic clock:

    when it read each generation and each quarantine     `moments`, for the budgets
    when it found the newest generation broken           `broken_since_s`
    how long too few nodes were there since then         `below_minimum_s`
    when a newcomer last appeared                        `newcomers_changed_s`, for the join window
    how long log and pulse have not changed              `quiet_since_s` to `quiet_until_s`, for a takeover
"""

import math
from collections.abc import Iterable

from elastic_pt.membership.decision.budgets import Moments
from elastic_pt.membership.decision.progress import step_in_pulse
from elastic_pt.runlog.log import RunView
from elastic_pt.runlog.records import Verb


class Memory:
    """One node's memory. Agent process; the pulse's thread calls the methods about quiet, the turn all others."""

    def __init__(self, now_s: float) -> None:
        self.broken_since_s: float | None = None
        """When the newest generation was found broken or over; None while it is neither."""
        self.below_minimum_s = 0.0
        """Of the time since then: fewer nodes than `elastic.nodes_min` were there."""
        self._too_few_since_s: float | None = None
        self.newcomers_changed_s = now_s
        self.quiet_since_s = now_s
        self.quiet_until_s = -math.inf
        """When log and pulse were last seen unchanged."""
        self._newcomers: frozenset[str] = frozenset()
        self._generations: dict[int, float] = {}
        self._quarantines: dict[int, float] = {}
        self._length = 0
        self._paused = False
        self._pulse: bytes | None = None

    def begin(self, now_s: float) -> None:
        """This node takes part from now on. Nodes that start together find each other within the join window."""
        self.newcomers_changed_s = self.quiet_since_s = now_s

    # ---- the log -----------------------------------------------------------------------------------

    def log_read(self, view: RunView, now_s: float) -> None:
        """Note that this node has read the log to this length: a longer log ends the quiet.

        The moments of records that the view has dropped are forgotten. A trouble from before a pause counts from the
        resume, so that the time to agree does not include the pause.
        """
        paused = view.request(Verb.PAUSE) is not None
        if self._paused and not paused and self.broken_since_s is not None:
            self.broke(now_s)
        self._paused = paused
        if view.length != self._length:
            self._length, self.quiet_since_s = view.length, now_s
        known = self._generations
        self._generations = {
            each.number: known.get(each.number, now_s) for each in view.generations
        }
        bars = self._quarantines
        self._quarantines = {index: bars.get(index, now_s) for index, _ in view.bars}

    def broke(self, now_s: float) -> None:
        """The newest generation counts as broken or over from now on."""
        self.broken_since_s, self.below_minimum_s, self._too_few_since_s = now_s, 0.0, None

    def decided(self, now_s: float, *, too_few: bool) -> None:
        """Note what a turn found; the time up to now counts as the turn before found it."""
        if self._too_few_since_s is not None:
            self.below_minimum_s += now_s - self._too_few_since_s
        self._too_few_since_s = now_s if too_few else None

    @property
    def moments(self) -> Moments:
        """When this node read each generation and each quarantine."""
        return Moments(self._generations, self._quarantines)

    def read_at_s(self, generation: int) -> float | None:
        """When this node first read that generation's record; None if it has not."""
        return self._generations.get(generation)

    # ---- peers -------------------------------------------------------------------------------------

    def newcomers_seen(self, waiting: Iterable[str], known: Iterable[str], now_s: float) -> None:
        """Note which of the `known` peers wait to join; one that was not seen before starts the join window again."""
        found = frozenset(waiting)
        if found - self._newcomers:
            self.newcomers_changed_s = now_s
        self._newcomers = (self._newcomers | found) & frozenset(known)

    # ---- quiet: neither the log nor the pulse changes ----------------------------------------------

    def pulse_read(self, pulse: bytes, asked_s: float, now_s: float) -> None:
        """Note the pulse that was requested at `asked_s`. The quiet is known until then, not later."""
        if pulse != self._pulse:
            self._pulse, self.quiet_since_s = pulse, now_s
        self.quiet_until_s = asked_s

    def pulse_step(self, generation: int) -> int | None:
        """The step that a generation has reached, by the pulse that this node read last; None if it does not tell."""
        return step_in_pulse(self._pulse, generation)

    def bucket_failed(self, now_s: float) -> None:
        """The bucket did not answer. The run may have changed in this time, so the quiet starts again."""
        self.quiet_since_s = now_s
