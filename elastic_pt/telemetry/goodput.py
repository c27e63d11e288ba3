"""How a node spends its time: each second since its agent's process began counts in exactly one bucket.

    process ─► start ─► agree ─► start ─► restore ─► steps ─┬─► draining ─────────────► agree …   a planned change
               begins   newcomer                            ├─► detect, recompute ────► agree …   the generation broke
                                                            └─► checkpoint_stall ─► draining      the end of the run

The time of a step is unknown until its report comes: then it is divided. How long it waited for a slower worker is
unknown until the report of the next step. The time of a step that was broken off is unknown until the next generation
says when the cause was noticed. Everything else counts at once.
"""

from collections.abc import Mapping
from enum import StrEnum


class Bucket(StrEnum):
    """What a second of a node was spent on."""

    PRODUCTIVE = "productive"
    """Steps that had not been done before."""
    RECOMPUTE = "recompute"
    """Steps that had been done and were lost, and a step that was broken off."""
    DATA_WAIT = "data_wait"
    """A step waited for its batch."""
    CHECKPOINT_STALL = "checkpoint_stall"
    """Training waited for a snapshot or a checkpoint, also for the last one of the run."""
    DETECT = "detect"
    """From a lost member's last sign of life until it was noticed."""
    AGREE = "agree"
    """From then, or from the end of a drain, until the next generation was known. A newcomer waits to be a member.
    Also the rest of a node that has failed, if the others cannot go on without it."""
    START = "start"
    """The process, imports, probe, fork, process group and model."""
    RESTORE = "restore"
    """Workers read the state, from memory, peers or the bucket."""
    PAUSED_BELOW_MINIMUM = "paused_below_minimum"
    """Fewer nodes than `elastic.nodes_min` can train."""
    PAUSED_ON_REQUEST = "paused_on_request"
    """An operator has paused the run."""
    IDLE_SPARE = "idle_spare"
    """A generation trains without this node, and this node will not be a member now."""
    DRAINING = "draining"
    """Workers have stopped as planned and their state is made safe, or this node leaves."""
    STRAGGLER_WAIT = "straggler_wait"
    """A step waited for a slower worker."""
    EVALUATION = "evaluation"
    """Training waited for the held-out loss."""
    OTHER = "other"
    """Nothing of the above."""


class NodeLedger:
    """Accounts for the time of one node. Pure: the clock comes in as an argument. Agent process.

    A moment before the last event counts as that event: the threads of an agent may report out of order.
    """

    def __init__(self, began_s: float) -> None:
        """The process began at `began_s`. Its time counts as `start` until the first event."""
        self.bucket = Bucket.START
        """Where time counts now; while steps are done, most of it."""
        self.steps = 0
        """How many steps this node has done, those that it did again included."""
        self._seconds = dict.fromkeys(Bucket, 0.0)
        self._since_s = began_s
        self._training = False
        self._last_s = 0.0
        """What is left of the last step, as `_last_kind`: its wait for a slower worker is not known yet."""
        self._last_kind = Bucket.PRODUCTIVE
        self._broken_off_s = 0.0
        self._frontier_step = 0

    def enter(self, bucket: Bucket, now_s: float) -> None:
        """Time counts in this bucket from now on; if steps were done, from the last step on."""
        if self._training:
            self._end_steps()
            self.bucket = bucket
        self._count(now_s)
        self.bucket = bucket

    def train(self, after_step: int, now_s: float) -> None:
        """Workers go on after this step: their time counts when they report the next one."""
        if not self._training:
            self._count(now_s)
            self._training = True
            self.bucket = self._kind_of(after_step + 1)

    def step_done(self, step: int, waits_s: Mapping[Bucket, float], now_s: float) -> Bucket:
        """A step has ended; returns its bucket. The time since the last event is divided: the waits, and the step itself.

        The wait for a slower worker is that of the step before.
        """
        kind = self._kind_of(step)
        self._frontier_step = max(self._frontier_step, step)
        self.steps += 1
        if not self._training:
            # The report of workers that have stopped: their time has been counted.
            return kind
        rest_s = max(0.0, now_s - self._since_s)
        self._since_s += rest_s
        for bucket, seconds in waits_s.items():
            if bucket is Bucket.STRAGGLER_WAIT:
                self._last_s -= self._count_wait(bucket, seconds, self._last_s)
            else:
                rest_s -= self._count_wait(bucket, seconds, rest_s)
        self._count_last()
        self._last_kind, self._last_s = kind, rest_s
        self.bucket = self._kind_of(step + 1)
        return kind

    def broke(self, noticed_s: float) -> None:
        """The generation is broken, noticed at this moment: the nodes agree on the next one from then on."""
        if self._training:
            self._end_steps()
            self._broken_off_s += max(0.0, noticed_s - self._since_s)
            self._since_s = max(self._since_s, noticed_s)
        self._count(noticed_s)
        self.bucket = Bucket.AGREE

    def formed(self, frontier_step: int, detect_s: float) -> None:
        """The next generation is known: steps up to `frontier_step` are done again.

        Its causes were noticed `detect_s` after the last sign of life; the time before that was a broken-off step.
        """
        detected_s = min(max(0.0, detect_s), self._broken_off_s)
        self._seconds[Bucket.DETECT] += detected_s
        self._seconds[Bucket.RECOMPUTE] += self._broken_off_s - detected_s
        self._broken_off_s = 0.0
        self._frontier_step = max(self._frontier_step, frontier_step)

    def counted(self, now_s: float) -> dict[Bucket, float]:
        """The seconds whose bucket is certain. They never fall, so counters can show them."""
        if not self._training:
            self._count(now_s)
        return dict(self._seconds)

    def total(self, now_s: float) -> dict[Bucket, float]:
        """All seconds up to now. What is not certain yet counts as the step that is being done, or was broken off."""
        seconds = self.counted(now_s)
        seconds[Bucket.RECOMPUTE] += self._broken_off_s
        seconds[self._last_kind] += self._last_s
        if self._training:
            seconds[self.bucket] += max(0.0, now_s - self._since_s)
        return seconds

    def _kind_of(self, step: int) -> Bucket:
        return Bucket.PRODUCTIVE if step > self._frontier_step else Bucket.RECOMPUTE

    def _end_steps(self) -> None:
        self._training = False
        self._count_last()

    def _count_last(self) -> None:
        self._seconds[self._last_kind] += self._last_s
        self._last_s = 0.0

    def _count_wait(self, bucket: Bucket, seconds: float, most_s: float) -> float:
        counted_s = min(max(0.0, seconds), most_s)
        self._seconds[bucket] += counted_s
        return counted_s

    def _count(self, now_s: float) -> None:
        passed_s = max(0.0, now_s - self._since_s)
        self._seconds[self.bucket] += passed_s
        self._since_s += passed_s
