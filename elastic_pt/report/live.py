"""Reads what `elastic-pt status --watch` shows, one look after another.

    agents, log ─► RunStatus ─────────────────┐
    end of the log ─► events in words ────────┼─► Facts ─► cli.live_screen
    COMMITs, newest history, answers ─► losses┤
    accounts of the agents ─► goodput, cost ──┘

A look takes a few requests, whatever the age of the run. Only the first one takes more, and a bounded number: the
end of the log, and some COMMITs from all over it for the curve of the loss. After that, a look reads the records that
are new, and the history of a commit that is new.

The accounts are one object for each agent that ever was, and their keys are among those of all events. So a thread of
its own reads them, and only the look at a run that has ended waits for it.
"""

import datetime
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final

from elastic_pt.checkpoint.history import PART_BYTES_MAX, step_line
from elastic_pt.config import Config
from elastic_pt.errors import NotFound
from elastic_pt.membership.decision.status import NodePhase
from elastic_pt.membership.pulse import KEY as PULSE
from elastic_pt.membership.pulse import PULSE_BYTES_MAX
from elastic_pt.report.change import Change
from elastic_pt.report.events import Event, KeptOut, events_of, kept_out
from elastic_pt.report.explanation import explain
from elastic_pt.report.goodput import Goodput, goodput_of, read_accounts
from elastic_pt.report.losses import Losses, LossPoint, curve_of
from elastic_pt.report.status import Run, RunStatus, State, read_status
from elastic_pt.runlog.log import RunLog, RunView
from elastic_pt.runlog.records import Record
from elastic_pt.store.port import Store
from elastic_pt.telemetry.account import Account as AgentAccount

TAIL_RECORDS: Final = 96
"""Records at the end of the log of which the events are made."""
_READERS: Final = 8
_PACE_S: Final = 30.0
"""The pace is that of the steps of so many seconds."""
_SPARES_S: Final = 10.0
_ACCOUNT_S: Final = 20.0
_ACCOUNT_SHARE: Final = 0.05
"""Share of the time that may be spent on reading the accounts of all agents."""
_LAST_ACCOUNT_S: Final = 30.0
"""The last look waits for the accounts for so long."""
_STEPS_OF_PACE: Final = 50
_STALE_S: Final = 15.0


@dataclass(frozen=True)
class Account:
    """What the run's time was spent on so far."""

    goodput: float
    """Productive share of all node-seconds."""
    cost: float | None
    """In USD; None without `telemetry.price_per_hour`."""
    price_per_hour: float
    """Of all nodes that are up, in USD."""
    unpriced: int = 0
    """Agents without a price, which `cost` leaves out."""


@dataclass(frozen=True)
class Facts:
    """All that the live view shows. `read_at` and what is in `status` are of the last look that succeeded."""

    status: RunStatus
    now: datetime.datetime
    read_at: datetime.datetime
    started: datetime.datetime | None
    """When the first record was written."""
    starts: bool
    """The newest generation has not done its first step, or the next one is being agreed on."""
    planned: bool
    """The newest generation began because nodes joined or left: no step was lost."""
    beats: bool
    """No agent can be asked from here, but the pulse in the bucket says that a generation trains."""
    losses: tuple[LossPoint, ...]
    """By step: the whole run, more of them for the newest steps."""
    step_s: float | None
    """Seconds of a step: of the last half minute, else of the newest history."""
    tokens_per_step: int | None
    account: Account | None
    kept_out: tuple[KeptOut, ...]
    events: tuple[Event, ...]
    """Oldest first."""
    trouble: str = ""
    """Why the newest look failed; empty if it did not."""
    interval_s: float = 0.0
    """Seconds between two looks."""

    @property
    def age_s(self) -> float:
        """Seconds since the last look that succeeded."""
        return max(0.0, (self.now - self.read_at).total_seconds())

    @property
    def stale(self) -> bool:
        """Whether looks have failed for so long that the state of now is unknown. The end of a run stays known."""
        over = self.status.state in (State.COMPLETED, State.FAILED)
        return not over and self.age_s > self.interval_s + _STALE_S

    @property
    def trains(self) -> bool:
        """Whether steps are being done, as far as is known."""
        return not self.stale and (self.status.state is State.RUNNING or self.beats)

    @property
    def eta_s(self) -> float | None:
        """Seconds to the last step at this pace; None if it is not known."""
        if self.status.steps is None or self.step_s is None or not self.trains:
            return None
        return max(0.0, (self.status.steps - self.status.step) * self.step_s)

    @property
    def projected_cost(self) -> float | None:
        """The cost at the end, at this pace and with these nodes; None if it is not known."""
        if self.account is None or self.account.cost is None or self.eta_s is None:
            return None
        return self.account.cost + self.eta_s / 3600 * self.account.price_per_hour


class LiveReader:
    """Reads a run again and again. `look` raises `ElasticPtError` when it fails, and the next one goes on."""

    def __init__(
        self,
        run: Run,
        clock_s: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC),
    ) -> None:
        self._run = run
        self._clock_s, self._now = clock_s, now
        self._records: deque[Record] = deque(maxlen=TAIL_RECORDS)
        self._length = 0
        self._started: datetime.datetime | None = None
        self._losses = Losses()
        self._history = ""
        self._history_step_s: float | None = None
        self._pace: deque[tuple[float, int, int]] = deque()
        self._pulse = b""
        self._spares_s = float("-inf")
        self._waiting: tuple[Any, ...] = ()
        self._account = _AccountReader(run.store, clock_s, now)

    def look(self) -> Facts:
        """The run as it is now."""
        run, now_s = self._run, self._clock_s()
        spares = now_s - self._spares_s >= _SPARES_S
        status = read_status(run, spares=spares)
        if spares:
            self._spares_s, self._waiting = now_s, status.waiting
        elif status.state is State.RUNNING:
            members = {each.node for each in status.members}
            waiting = tuple(each for each in self._waiting if each.node not in members)
            status = replace(status, waiting=waiting)
        self._read_log()
        self._read_losses(status)
        now = self._now()
        return Facts(
            status=status,
            now=now,
            read_at=now,
            started=self._started,
            starts=status.state is State.RUNNING and _starts(status, run.log.view),
            planned=_planned(self._records),
            beats=status.state is State.DOWN and self._beats(),
            losses=self._losses.points,
            step_s=self._step_s(status, now_s),
            tokens_per_step=_tokens_per_step(run.config),
            account=self._account.newest(
                list(self._records), over=status.state in (State.COMPLETED, State.FAILED)
            ),
            kept_out=kept_out(self._records, now),
            events=events_of(self._records, status.step),
        )

    def _read_log(self) -> None:
        """Take the records that are new, at most `TAIL_RECORDS`."""
        log = self._run.log
        length = log.view.length
        new = range(max(self._length, length - TAIL_RECORDS), length)
        if self._started is None and length:
            self._started = log.record(0).written_at
        self._records += read_records(log, new)
        self._length = length

    def _read_losses(self, status: RunStatus) -> None:
        view = self._run.log.view
        if not self._losses.points and view.commit is not None:
            self._losses.add(curve_of(self._run.log))
        if view.generation is not None and view.stop is None:
            self._losses.resume(view.generation.number, view.generation.resume_step)
        if view.commit is not None and view.commit.history != self._history:
            lines = newest_lines(self._run.store, view.commit.history)
            self._losses.add((line["step"], line["loss"]) for line in lines)
            self._history = view.commit.history
            self._history_step_s = usual_step_s(lines) or self._history_step_s
        if status.step:
            self._losses.add([(status.step, status.loss)])

    def _beats(self) -> bool:
        before, self._pulse = self._pulse, read_pulse(self._run.store)
        return bool(before) and self._pulse != before

    def _step_s(self, status: RunStatus, now_s: float) -> float | None:
        """Seconds of a step of this generation, from the looks of the last seconds."""
        pace = self._pace
        if status.state is not State.RUNNING or (pace and pace[-1][2] != status.generation):
            pace.clear()
        if (
            status.state is State.RUNNING
            and status.step
            and (not pace or status.step >= pace[-1][1])
        ):
            pace.append((now_s, status.step, status.generation))
        while len(pace) > 2 and now_s - pace[1][0] >= _PACE_S:
            pace.popleft()
        if len(pace) < 2 or pace[-1][1] == pace[0][1]:
            return self._history_step_s
        return (pace[-1][0] - pace[0][0]) / (pace[-1][1] - pace[0][1])


class _AccountReader:
    """Reads goodput and cost, rarely, in a thread that ends with the process."""

    def __init__(
        self, store: Store, clock_s: Callable[[], float], now: Callable[[], datetime.datetime]
    ) -> None:
        self._store, self._clock_s, self._now = store, clock_s, now
        self._due_s = float("-inf")
        self._thread: threading.Thread | None = None
        self._found: Account | None = None
        self._error: Exception | None = None
        self._ended: dict[str, AgentAccount] = {}
        """Accounts of agents that have ended: they are not read again."""

    def newest(self, records: Sequence[Record], *, over: bool) -> Account | None:
        """What was read last; None before. If the run is over, it is read once more, and waited for.

        Without the whole log, an agent that was lost long ago ends with its last account. Raises the error of a
        reading that failed, once.
        """
        if over and self._thread is not None:
            self._thread.join(_LAST_ACCOUNT_S)
        reads = self._thread is not None and self._thread.is_alive()
        if not reads and (over or self._clock_s() >= self._due_s):
            self._thread = threading.Thread(
                target=self._read, args=(records,), name="accounts", daemon=True
            )
            self._thread.start()
            if over:
                self._thread.join(_LAST_ACCOUNT_S)
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._found

    def _read(self, records: Sequence[Record]) -> None:
        begin_s = self._clock_s()
        try:
            accounts = read_accounts(self._store, self._ended)
            self._found = account_of(goodput_of(accounts, records, self._now().timestamp()))
        except Exception as error:
            # Raised by the next look: a thread that ends silently would leave old figures.
            self._error = error
        end_s = self._clock_s()
        self._due_s = end_s + max(_ACCOUNT_S, (end_s - begin_s) / _ACCOUNT_SHARE)


def read_records(log: RunLog, indexes: Sequence[int]) -> list[Record]:
    """The records of these indexes, several at a time."""
    if len(indexes) < 2:
        return [log.record(each) for each in indexes]
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(log.record, indexes))


def read_pulse(store: Store) -> bytes:
    """The pulse, which changes while a generation trains; empty before the first one."""
    with suppress(NotFound):
        return store.read(PULSE, 0, PULSE_BYTES_MAX)
    return b""


def newest_lines(store: Store, key: str) -> list[dict[str, Any]]:
    """The lines of a history's first part, which is all of it unless the commit was days after the one before."""
    with suppress(NotFound):
        text = store.read(key, 0, 2 * PART_BYTES_MAX)
        origin = f"{store.url}/{key}"
        lines = [step_line(line, origin) for line in text.splitlines()]
        return [line for line in lines if "next" not in line]
    return []


def usual_step_s(lines: Sequence[dict[str, Any]]) -> float | None:
    """The median time of the newest steps; None without a step."""
    return (
        statistics.median([line["seconds"] for line in lines[-_STEPS_OF_PACE:]]) if lines else None
    )


def account_of(goodput: Goodput) -> Account | None:
    """Goodput and cost in short; None if no agent has an account."""
    if goodput.goodput is None:
        return None
    price_per_hour = sum(each.price_per_hour for each in goodput.agents if each.running)
    return Account(goodput.goodput, goodput.cost, price_per_hour, goodput.unpriced)


def _starts(status: RunStatus, view: RunView) -> bool:
    return first_step_awaited(view) or all(
        each.phase in (NodePhase.WAITING, "down") for each in status.members
    )


def _planned(records: Iterable[Record]) -> bool:
    changes = [each for each in explain(records) if isinstance(each, Change)]
    return bool(changes) and changes[-1].planned


def first_step_awaited(view: RunView) -> bool:
    """Whether the newest generation has no first step on record. False for a run of stock torchrun."""
    generation, recovery, commit = view.generation, view.recovery, view.commit
    if generation is None or not generation.slots:
        return False
    started = recovery is not None and recovery.number == generation.number
    return not started and (commit is None or commit.newest.generation != generation.number)


def _tokens_per_step(config: Config | None) -> int | None:
    return None if config is None else config.train.global_batch * config.data.sequence_length
