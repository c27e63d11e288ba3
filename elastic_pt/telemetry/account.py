"""The account of one agent in the bucket: `events/<node>-<hex>/account.json`, overwritten while the agent lives.

    Observation.account ─► AccountWriter ─► bucket ─► report.goodput

It is written at once, then whenever 1 % of the agent's age has passed (1 to 10 s), and at its end. So an agent that is
killed loses at most the last 1 % of its time, and at most 10 s while the bucket answers. The thread is the only one that
waits for the bucket.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import structlog
from pydantic_core import from_json

from elastic_pt.errors import one_line
from elastic_pt.store.port import Store
from elastic_pt.telemetry.goodput import Bucket
from elastic_pt.telemetry.redaction import Redactor, secrets_in

SCHEMA: Final = 1
ACCOUNT: Final = "account.json"
LEFT: Final = "left"
"""The reason of an agent that left in good order."""
WRITE_TIMEOUT_S: Final = 5.0
"""Deadline of one write: an older account must not keep a newer one waiting."""
_AGE_SHARE: Final = 0.01
_INTERVAL_MIN_S: Final = 1.0
_INTERVAL_MAX_S: Final = 10.0
_NUMBER_MAX: Final = 1e12
ACCOUNT_BYTES_MAX: Final = 1 << 20
"""Far more than an account has."""
_NAMES: Final = frozenset(map(str, Bucket))
_KINDS: Final[dict[str, type]] = {
    **dict.fromkeys(("node", "incarnation", "run_id", "reason"), str),
    **dict.fromkeys(("started_at", "written_at", "price_per_hour"), float),
    "ended": bool,
    "steps": int,
}
"""The types of stored values."""

log = structlog.get_logger("elastic_pt.account")


@dataclass(frozen=True)
class Account:
    """How one agent has spent its time, from the start of its process on."""

    node: str
    started_at: float = 0.0
    """Unix time of the start of the process, from the kernel."""
    price_per_hour: float = 0.0
    """`telemetry.price_per_hour`, in USD; 0 if unknown."""
    incarnation: str = ""
    """Empty until the agent may take part."""
    run_id: str = ""
    """Empty until the run has a log."""
    written_at: float = 0.0
    """`started_at` and the age of the process: a clock that is set meanwhile changes no duration."""
    ended: bool = False
    reason: str = ""
    """Why it ended."""
    seconds: Mapping[Bucket, float] = field(default_factory=dict)
    bucket: Bucket = Bucket.START
    """Where its time counts now."""
    steps: int = 0
    """How many steps it has done, those that it did again included; 0 in an account of an earlier version."""
    schema: int = SCHEMA

    def to_bytes(self) -> bytes:
        """The stored form."""
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Account":
        """Read the stored form; what a later version has added is left out. Raises `ValueError`."""
        try:
            stored: dict[str, Any] = from_json(data)
            if stored["schema"] != SCHEMA:
                raise ValueError(f"schema = {stored['schema']!r:.80}: expected {SCHEMA}")
            known = {name: stored[name] for name in cls.__dataclass_fields__ if name in stored}
            known["bucket"] = bucket_called(known["bucket"])
            known["seconds"] = seconds_of(known["seconds"])
            for name, kind in _KINDS.items():
                if not isinstance(known.get(name, kind()), float | int if kind is float else kind):
                    raise ValueError(f"{name} = {known[name]!r:.80}: expected {kind.__name__}")
                if kind is str and name in known:
                    known[name] = one_line(known[name])
            account = cls(**known)
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"not an account: {error!r:.200}") from error
        times = (account.started_at, account.written_at)
        numbers = (*times, account.price_per_hour, account.steps, *account.seconds.values())
        if not all(-_NUMBER_MAX < each < _NUMBER_MAX for each in numbers):
            raise ValueError("not an account: a number is not finite")
        return account


def bucket_called(name: str) -> Bucket:
    """The bucket of that name; `OTHER` for one that only a later version knows."""
    return Bucket(name) if name in _NAMES else Bucket.OTHER


def seconds_of(stored: Mapping[str, float]) -> dict[Bucket, float]:
    """Seconds by bucket, each bucket once."""
    seconds = dict.fromkeys(Bucket, 0.0)
    for name, value in stored.items():
        seconds[bucket_called(name)] += float(value)
    return seconds


class AccountWriter:
    """Writes an agent's account to the bucket, in a thread of its own. Agent process."""

    def __init__(self, store: Store, name: str, take: Callable[[], Account]) -> None:
        """`store` should have the deadline `WRITE_TIMEOUT_S`. `take()` returns the account now; called once a second."""
        self.reason = ""
        """Why the agent ends, unless it ends by an exception."""
        self._secrets = secrets_in(os.environ)
        self._store = store
        self._key = f"events/{name}/{ACCOUNT}"
        self._take = take
        self._failing = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="account", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Write the last account. Gives up after the time of two writes."""
        if error is not None:
            self.reason = f"{type(error).__name__}: {error}"
        self._closing.set()
        self._thread.join(2 * WRITE_TIMEOUT_S)

    def hide(self, secret: str) -> None:
        """From now on, no reason shows `secret` either."""
        self._secrets.append(secret)

    def _run(self) -> None:
        written_at = 0.0
        while True:
            written_at = self._write(written_at)
            if self._closing.wait(_INTERVAL_MIN_S):
                break
        self._write(written_at, ended=True)

    def _write(self, written_at: float, *, ended: bool = False) -> float:
        """Write the account of now if it is due; returns when the newest was written."""
        try:
            account = self._take()
            due_s = interval_s(account.written_at - account.started_at)
            if not ended and account.written_at - written_at < due_s:
                return written_at
            # Before the write: after a failed one the next is due as usual.
            written_at = account.written_at
            if ended:
                reason = Redactor(self._secrets).text(self.reason)
                account = replace(account, ended=True, reason=reason)
            self._store.write(self._key, account.to_bytes())
            self._failing = False
        except Exception as error:  # any error: the thread must go on
            # The next account has everything that this one has.
            if not self._failing:
                log.warning("account_not_written", cause=f"{type(error).__name__}: {error}")
            self._failing = True
        return written_at


def interval_s(age_s: float) -> float:
    """Seconds between two accounts of an agent of this age."""
    return min(max(_AGE_SHARE * age_s, _INTERVAL_MIN_S), _INTERVAL_MAX_S)


def boot_clock_s() -> float:
    """Seconds since the machine was booted, also those while it was suspended, where the kernel tells."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


class ProcessTime:
    """When this process began, and how old it is, by a clock that nobody sets."""

    def __init__(self, clock_s: Callable[[], float] = boot_clock_s) -> None:
        age_s = _age_by_kernel_s()
        self.started_at = time.time() - age_s
        """Unix time."""
        self._clock_s = clock_s
        self._began_s = clock_s() - age_s

    @property
    def age_s(self) -> float:
        """Seconds since the process began."""
        return self._clock_s() - self._began_s


def _age_by_kernel_s() -> float:
    """Seconds since the kernel started this process; 0 where there is no /proc, so that time counts from now on."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(") ")[2].split()
        # Field 22 of proc_pid_stat(5); the first one here is field 3.
        began_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0
    return max(0.0, boot_clock_s() - began_s)
