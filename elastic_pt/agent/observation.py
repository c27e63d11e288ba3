"""What a node measures of its own workers: metrics, its account, and how long each start took. Agent process.

messages of workers ──────────► activity, step_done ─┐
main thread ─► starts, enter, broke, waits ──────────┼─► NodeLedger ─► metrics, account
membership thread ─► idle ───────────────────────────┘

The ledger counts by the age of the process, like the account: the time of a machine that was suspended counts too.
The membership's clock stands still meanwhile, so its moments are taken as seconds before now.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from elastic_pt.agent.estimates import Estimates
from elastic_pt.membership.decision.status import Idle, StartTimes
from elastic_pt.runlog.records import Generation
from elastic_pt.telemetry.account import Account, ProcessTime
from elastic_pt.telemetry.catalogue import Metrics
from elastic_pt.telemetry.goodput import Bucket, NodeLedger
from elastic_pt.workers.channel import Message

_ACTIVITIES: Final = {"start": Bucket.START, "restore": Bucket.RESTORE}
_IDLE: Final = {
    Idle.AGREES: Bucket.AGREE,
    Idle.STARTS: Bucket.START,
    Idle.DRAINS: Bucket.DRAINING,
    Idle.BELOW_MINIMUM: Bucket.PAUSED_BELOW_MINIMUM,
    Idle.PAUSED: Bucket.PAUSED_ON_REQUEST,
    Idle.SPARE: Bucket.IDLE_SPARE,
}
_WAITS: Final = {
    "data_wait_s": Bucket.DATA_WAIT,
    "checkpoint_stall_s": Bucket.CHECKPOINT_STALL,
    "straggler_wait_s": Bucket.STRAGGLER_WAIT,
    "evaluation_s": Bucket.EVALUATION,
}
"""Parts of the time of a step, by the key of its report. A worker of an earlier version leaves some out."""


class Observation:
    """Turns the messages of workers into numbers. Called from the channel's threads, the main and membership thread."""

    def __init__(
        self,
        metrics: Metrics,
        account: Account | None = None,
        clock_s: Callable[[], float] = time.monotonic,
        process: ProcessTime | None = None,
    ) -> None:
        """`account` has the values of the node that its time does not change; `clock_s` is the membership's clock."""
        self.metrics = metrics
        self.estimates = Estimates(clock_s)
        self._clock_s = clock_s
        self._process = process or ProcessTime()
        self._account = account or Account(node="")
        self._ledger = NodeLedger(0.0)
        self._lock = threading.Lock()
        self._generation = 0
        self._resume_step = 0
        self._waits = False
        self._entered_s: dict[str, float] = {}
        self._awaits_first_step = False
        metrics.before_scrape(self._show)

    def identify(self, *, incarnation: str = "", run_id: str = "") -> None:
        """Values of the account that are known later than its first ones."""
        with self._lock:
            self._account = replace(
                self._account,
                incarnation=incarnation or self._account.incarnation,
                run_id=run_id or self._account.run_id,
            )

    def account(self) -> Account:
        """How this agent has spent its time up to now."""
        with self._lock:
            age_s = self._process.age_s
            return replace(
                self._account,
                started_at=self._process.started_at,
                written_at=self._process.started_at + age_s,
                seconds=self._ledger.total(age_s),
                bucket=self._ledger.bucket,
                steps=self._ledger.steps,
            )

    def enter(self, bucket: Bucket) -> None:
        """Count this node's time in another bucket from now on; if steps were done, from the last step on."""
        # Read the clock inside the lock: a thread that waited for the lock would have an old time.
        with self._lock:
            self._waits = False
            self._ledger.enter(bucket, self._process.age_s)

    def broke(self, noticed_s: float) -> None:
        """The workers' generation is broken, which was noticed at this moment. Again for the same one: no change."""
        with self._lock:
            if not self._waits:
                self._ledger.broke(self._age_at(noticed_s))

    def waits(self) -> None:
        """This node has no workers from now on: what it waits for is `idle`."""
        with self._lock:
            self._waits = True

    def idle(self, why: Idle) -> None:
        """The membership has decided for what this node waits, if it has no workers. In each turn."""
        with self._lock:
            if self._waits:
                self._ledger.enter(_IDLE[why], self._process.age_s)

    def mirrored(self, step: int) -> None:
        """All mirrors of this node hold its state of this step."""
        self.estimates.held(step)
        self.metrics.mirror_step.set(step)
        self.metrics.mirror_timestamp_seconds.set(time.time())

    def starts(self, generation: Generation, known_s: float) -> None:
        """The workers of a generation, known to this node since `known_s`, are about to start."""
        detect_s = max((cause.detect_s for cause in generation.causes), default=0.0)
        with self._lock:
            self._generation, self._resume_step = generation.number, generation.resume_step
            self._entered_s = {"known": known_s}
            self._awaits_first_step = True
            self._waits = False
            self._ledger.formed(generation.frontier_step, detect_s)
            self._ledger.enter(Bucket.START, self._age_at(known_s))
        self.metrics.generation_starts(generation.number, generation.reason, generation.restarts)
        self.metrics.world_size.set(generation.world_size)

    def activity(self, name: str) -> None:
        """A worker has started to `start`, `restore` or `train`; of several workers the last one counts."""
        with self._lock:
            self._entered_s[name] = self._clock_s()
            if self._waits:
                return
            if name == "train":
                self._ledger.train(self._resume_step, self._process.age_s)
            else:
                self._ledger.enter(_ACTIVITIES[name], self._process.age_s)

    def step_done(self, message: Message) -> StartTimes | None:
        """A worker of this node has done a step; returns the times of the start after the first step."""
        step = int(message["step"])
        self.estimates.step_done(step, message["seconds"], message.get("evaluation_s"))
        waits_s = {bucket: float(message.get(name) or 0.0) for name, bucket in _WAITS.items()}
        with self._lock:
            now_s = self._clock_s()
            again = self._ledger.step_done(step, waits_s, self._process.age_s) is Bucket.RECOMPUTE
            self.metrics.step_done(message, again=again)
            if not self._awaits_first_step:
                return None
            self._awaits_first_step = False
            known_s, start_s, restore_s, train_s = (
                self._entered_s.get(each, now_s) for each in ("known", "start", "restore", "train")
            )
        return StartTimes(
            self._generation,
            start_s=start_s - known_s,
            group_s=restore_s - start_s,
            restore_s=train_s - restore_s,
            step_s=now_s - train_s,
        )

    def _age_at(self, moment_s: float) -> float:
        """The age of the process at a moment of the membership's clock."""
        return self._process.age_s - (self._clock_s() - moment_s)

    def _show(self) -> None:
        """Before a scrape, on its thread: the time up to now."""
        with self._lock:
            age_s = self._process.age_s
            seconds = self._ledger.counted(age_s)
        self.metrics.account(seconds, age_s)
