"""The run is a log in a bucket: `log/<20 digits>.json`, create-once, never overwritten, one total order.

The writer that creates record n decides what comes n-th. A writer that loses that race reads the winner's record
and follows it. This is the fence: before a writer of an old generation can create a record, it has to read the
GENERATION that replaced it, and then stops with `FencedError`. To find the end of the log, a reader reads the next
number until there is none. It never trusts a listing.
"""

import datetime
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, count
from typing import Final, Protocol

from elastic_pt.errors import AlreadyExists, FencedError, LogDamaged, NotFound, StoreError
from elastic_pt.failpoints import Failpoint, failpoint
from elastic_pt.runlog.records import (
    COMPLETED,
    ORIGIN,
    Body,
    Checkpoint,
    Commit,
    Control,
    Generation,
    Kind,
    Quarantine,
    Record,
    Recovery,
    Reopen,
    Request,
    Stop,
    Verb,
)
from elastic_pt.store.parallel import in_order
from elastic_pt.store.port import Store

_APPEND_ATTEMPTS_MAX: Final = 1000
_READS_AT_ONCE: Final = 16
GENERATIONS_KEPT: Final = 64
BARS_KEPT: Final = 64


@dataclass(frozen=True)
class RunView:
    """The state of the log up to `head`: a pure fold over its records."""

    head: Record | None = None
    run_id: str = ""
    """Nonce of the first record. Manifests carry it, so that no checkpoint of another run is accepted."""
    generations: tuple[Generation, ...] = ()
    """The newest ones that were read, oldest first, at most `GENERATIONS_KEPT`."""
    recovery: Recovery | None = None
    commit: Commit | None = None
    committed_at: str = ""
    """The time of that COMMIT, by its writer's clock."""
    quarantined: frozenset[str] = frozenset()
    bars: tuple[tuple[int, Quarantine], ...] = ()
    """Quarantines of nodes that were read, oldest first, each with the index of its record."""
    stop: Stop | None = None
    """The end of the run, unless a REOPEN has lifted it since."""
    reopened_generation: int = 0
    """The newest generation when the run was last reopened. Failures up to it no longer count."""
    waived_generation: int = -1
    """The newest generation when a REOPEN last accepted another platform; -1 if none did."""
    control: Control | None = None
    """The newest one since the last REOPEN."""

    @property
    def length(self) -> int:
        """The number of records, and so the index of the next one."""
        return 0 if self.head is None else self.head.index + 1

    @property
    def generation(self) -> Generation | None:
        """The newest generation."""
        return self.generations[-1] if self.generations else None

    @property
    def generation_number(self) -> int:
        """The newest generation; 0 before the first."""
        return 0 if self.generation is None else self.generation.number

    @property
    def platform(self) -> Mapping[str, str] | None:
        """The platform to which the run is bound; empty if `identity.json` has it, None if any is accepted."""
        generation = self.generation
        if self.waived_generation >= self.generation_number:
            return None
        return {} if generation is None else generation.platform

    @property
    def fenced_url(self) -> str:
        """The URL of this run directory under which its store was found to be fenced; empty if that was not checked."""
        return "" if self.generation is None else self.generation.fenced_url

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The newest checkpoints, newest first: committed, kept and not quarantined. `RunLog.usable` has older ones too."""
        kept = () if self.commit is None else self.commit.checkpoints
        return tuple(each for each in kept if each.directory not in self.quarantined)

    @property
    def committed_step(self) -> int:
        """The step of the newest of `checkpoints`; 0 if there is none."""
        return self.checkpoints[0].step if self.checkpoints else 0

    @property
    def committed_at_s(self) -> float:
        """`committed_at` as Unix time; 0 before the first commit."""
        at = self.committed_at
        return datetime.datetime.fromisoformat(at).timestamp() if at else 0.0

    @property
    def permanent_record(self) -> int | None:
        """Index of the newest COMMIT whose own checkpoint is permanent; None if there is none."""
        if self.head is None or self.commit is None:
            return None
        if self.commit.newest.permanent:
            return self.head.latest[Kind.COMMIT]
        return self.commit.permanent_before

    @property
    def requests(self) -> tuple[Request, ...]:
        """What operators have asked for and still holds, oldest first."""
        standing = () if self.control is None else self.control.standing
        met = -1 if self.commit is None else self.commit.request
        return tuple(
            each for each in standing if each.verb is not Verb.CHECKPOINT or each.index > met
        )

    def request(self, verb: Verb, node: str = "") -> Request | None:
        """The request of that verb (for a drain, of that node) that holds now."""
        found = (each for each in self.requests if (each.verb, each.node) == (verb, node))
        return next(found, None)

    @property
    def suspension(self) -> Request | None:
        """Why no generation may begin, except to make the promised commit: a stop or a pause that was asked for."""
        return self.request(Verb.STOP) or self.request(Verb.PAUSE)


def fold(view: RunView, record: Record) -> RunView:
    """The view after one more record."""
    seen = replace(view, head=record, run_id=view.run_id or record.nonce)
    match record.body:
        case Generation():
            return replace(seen, generations=(*view.generations, record.body)[-GENERATIONS_KEPT:])
        case Recovery():
            return replace(seen, recovery=record.body)
        case Commit():
            return replace(seen, commit=record.body, committed_at=record.time)
        case Quarantine(node=node) if node:
            return replace(seen, bars=(*view.bars, (record.index, record.body))[-BARS_KEPT:])
        case Quarantine(directory=directory):
            return replace(seen, quarantined=seen.quarantined | {directory})
        case Stop():
            return replace(seen, stop=record.body)
        case Control():
            return replace(seen, control=record.body)
        case Reopen(platform=platform):
            number = record.generation
            return replace(
                seen,
                stop=None,
                control=None,
                reopened_generation=number,
                waived_generation=number if platform else view.waived_generation,
            )


def check_allowed(view: RunView, body: Body, generation: int) -> None:
    """The fence: raises `FencedError` unless a writer of `generation` may append `body` after `view`."""
    if isinstance(body, Reopen):
        if view.stop is not None and view.stop.reason == COMPLETED:
            raise FencedError("the run is complete")
        if view.stop is None and not body.platform:
            raise FencedError("the run has not ended")
    elif view.stop is not None:
        raise FencedError(f"the run has ended: {view.stop.reason}")
    if isinstance(body, Control):
        # An operator belongs to no generation, and a request to all of them.
        return
    if isinstance(body, Generation):
        if view.suspension is not None and not _makes_promised_commit(view, body):
            raise FencedError(f"no generation may begin: {view.suspension}")
        if body.number != view.generation_number + 1:
            raise FencedError(
                f"generation {view.generation_number} is there already; {body.number} lost the race"
            )
    elif generation != view.generation_number:
        raise FencedError(
            f"generation {generation} has been replaced by generation {view.generation_number}; it may append nothing"
        )


def _makes_promised_commit(view: RunView, generation: Generation) -> bool:
    """Whether a generation resumes from steps that are in no commit, although a pause or a stop has promised one.

    It stops again after one step, and that step is committed. Once a pause is done, nothing begins.
    """
    pause = view.request(Verb.PAUSE)
    if generation.memory is None or (pause is not None and pause.done):
        return False
    committed_step = view.checkpoints[0].step if view.checkpoints else 0
    return generation.memory.step > committed_step


def record_key(index: int) -> str:
    """The key of record `index`."""
    return f"log/{index:020d}.json"


def _index_of(key: str) -> int:
    """The index of the record with this key; -1 for any other key."""
    digits = key.removeprefix("log/").removesuffix(".json")
    return int(digits) if digits.isdecimal() and key == record_key(int(digits)) else -1


class AppendListener(Protocol):
    """Learns what this process appends, in the thread that appends. Must return at once, and never raise."""

    def appended(self, body: Body, view: RunView) -> None:
        """A record was appended. `view` is the log with it."""

    def fenced(self) -> None:
        """The log refused a record, because a newer generation has begun."""


class RunLog:
    """Reads and appends the log of one run. Agent process (and the command line); safe to share between threads."""

    def __init__(self, store: Store, *, writer: str) -> None:
        self._store = store
        self._writer = writer
        self._view = RunView()
        self._lock = threading.Lock()
        self._permanent: dict[int, Record] = {}
        """A cache of COMMIT records of permanent checkpoints, by index. A record never changes."""
        self._listener: AppendListener | None = None

    def listen(self, listener: AppendListener) -> None:
        """Tell it each record that is appended from now on."""
        self._listener = listener

    @property
    def view(self) -> RunView:
        """The view after the last read; `refresh` reads new records."""
        return self._view

    def refresh(self, length: int | None = None) -> RunView:
        """Read the new records up to the end of the log, or only until `length` records are known.

        Takes one request for each new record. Without `length`, one more shows that there is no further record.
        """
        with self._lock:
            return self._refresh(length)

    def append(self, make: Callable[[RunView], Body], *, generation: int) -> RunView:
        """Append the record that `make` returns for the newest view, on behalf of a member of `generation`.

        `make` is called again whenever another writer was faster. Raises `FencedError` if the newest view no longer
        allows the record.
        """
        with self._lock:
            for _ in range(_APPEND_ATTEMPTS_MAX):
                view = self._refresh()
                body = make(view)
                self._check_allowed(view, body, generation)
                record = self._next_record(view, body)
                failpoint(Failpoint.LOG_APPENDING)
                try:
                    self._store.create(record_key(record.index), record.to_bytes())
                except AlreadyExists:
                    continue
                failpoint(Failpoint.LOG_APPENDED)
                self._view = fold(view, record)
                if self._listener is not None:
                    self._listener.appended(body, self._view)
                return self._view
        raise StoreError(
            f"{self._store.url}: lost {_APPEND_ATTEMPTS_MAX} races for the next record of the log"
        )

    def _check_allowed(self, view: RunView, body: Body, generation: int) -> None:
        try:
            check_allowed(view, body, generation)
        except FencedError:
            # Two members may propose the same generation: the one that comes second is not of an older one.
            late = not isinstance(body, Generation) and generation < view.generation_number
            if late and self._listener is not None:
                self._listener.fenced()
            raise

    def records(self, first: int = 0) -> Iterator[Record]:
        """Every record from `first` on, with the hash chain checked. Raises `LogDamaged` at a break or a gap.

        Those that are in the view are read ahead. To find the end, the others are read one by one.
        """
        previous = self._must_read(first - 1).sha256 if first > 0 else ORIGIN
        known = max(first, self._view.length)
        reads = chain(
            in_order(range(first, known), self._read, _READS_AT_ONCE), map(self._read, count(known))
        )
        for index, record in enumerate(reads, first):
            if record is None:
                self._require_no_gap(index)
                return
            _check_link(record, index, previous)
            yield record
            previous = record.sha256

    def _refresh(self, length: int | None = None) -> RunView:
        if self._view.head is None:
            self._view = self._open()
        while (length is None or self._view.length < length) and (
            record := self._read(self._view.length)
        ) is not None:
            head = self._view.head
            _check_link(record, self._view.length, ORIGIN if head is None else head.sha256)
            self._view = fold(self._view, record)
        return self._view

    def _require_no_gap(self, end: int) -> None:
        """Raise `LogDamaged` if a listing shows a record beyond the end: then the record in between is missing."""
        newest = max(map(_index_of, self._store.keys("log/")), default=-1)
        if newest > end and self._store.size(record_key(end)) is None:
            raise self._gap(end, newest)

    def _gap(self, index: int, later: int) -> LogDamaged:
        return LogDamaged(
            f"{self._store.url}/{record_key(index)}: missing from the middle of the log; expected it before {record_key(later)}"
        )

    def _open(self) -> RunView:
        """The view at the newest record that a listing shows, built from the records to which that one points back.

        A listing may be incomplete. So records that it lacks are requested one by one, and `_refresh` reads further from here.
        """
        listed = {_index_of(key) for key in self._store.keys("log/")} - {-1}
        newest = max(listed, default=0)
        if not listed and self._store.size(record_key(0)) is None:
            return RunView()
        for index in sorted(set(range(newest)) - listed):
            if self._store.size(record_key(index)) is None:
                raise self._gap(index, newest)
        head = self._must_read(newest)
        view = RunView(run_id=self._must_read(0).nonce)
        kinds = (Kind.GENERATION, Kind.RECOVERY, Kind.COMMIT, Kind.STOP, Kind.CONTROL)
        for index in sorted(head.latest[kind] for kind in kinds if kind in head.latest):
            view = fold(view, self._must_read(index))
        for reopened in reversed(list(self.chain(head, Kind.REOPEN))):
            stop = view.stop if head.latest.get(Kind.STOP, -1) > reopened.index else None
            control = view.control if head.latest.get(Kind.CONTROL, -1) > reopened.index else None
            view = replace(fold(view, reopened), stop=stop, control=control)
        for quarantine in reversed(list(self.chain(head, Kind.QUARANTINE))):
            view = fold(view, quarantine)
        return replace(view, head=head)

    def chain(self, head: Record, kind: Kind) -> Iterator[Record]:
        """Records of one kind, newest first, by following the pointers from `head` back."""
        index = head.latest.get(kind)
        while index is not None:
            record = self._must_read(index)
            yield record
            index = self._must_read(index - 1).latest.get(kind) if index > 0 else None

    def permanent(self, view: RunView) -> Iterator[tuple[Checkpoint, Record]]:
        """All permanent checkpoints with their COMMIT records, newest first, quarantined ones too.

        Each one that this `RunLog` has not read yet takes one request. Raises `LogDamaged` if the chain is broken.
        """
        index, limit = view.permanent_record, view.length
        while index is not None:
            record = self._permanent.get(index) or self._must_read(index)
            body = record.body
            # The limit stops at a cycle.
            if index >= limit or not isinstance(body, Commit) or not body.newest.permanent:
                raise LogDamaged(
                    f"{record_key(index)}: not the COMMIT of a permanent checkpoint, "
                    "expected the one that a later COMMIT names"
                )
            self._permanent[index] = record
            yield body.newest, record
            limit = index
            index = body.permanent_before

    def usable(self, view: RunView) -> Iterator[Checkpoint]:
        """Every checkpoint that may be used, newest commit first: those of `view.checkpoints`, then permanent ones.

        The permanent ones are read only when the caller iterates to them.
        """
        yield from view.checkpoints
        passed = view.quarantined.union(each.directory for each in view.checkpoints)
        for checkpoint, _ in self.permanent(view):
            if checkpoint.directory not in passed:
                yield checkpoint

    def record(self, index: int) -> Record:
        """The record of an index below the end of the log. Raises `LogDamaged` if it is missing."""
        return self._must_read(index)

    def _next_record(self, view: RunView, body: Body) -> Record:
        head = view.head
        record = Record(
            index=view.length,
            generation=body.number if isinstance(body, Generation) else view.generation_number,
            writer=self._writer,
            nonce=secrets.token_hex(16),
            time=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            previous=ORIGIN if head is None else head.sha256,
            latest={} if head is None else dict(head.latest),
            body=body,
        )
        record.latest[record.kind] = record.index
        return record.sealed()

    def _read(self, index: int) -> Record | None:
        key = record_key(index)
        try:
            return Record.from_bytes(self._store.read(key), key=key)
        except NotFound:
            return None

    def _must_read(self, index: int) -> Record:
        record = self._read(index)
        if record is None:
            raise LogDamaged(
                f"{self._store.url}/{record_key(index)}: missing from the middle of the log; "
                "expected a record of each index"
            )
        return record


def _check_link(record: Record, index: int, previous: str) -> None:
    if record.index != index:
        raise LogDamaged(f"{record_key(index)}: has index {record.index}; expected {index}")
    if record.previous != previous:
        raise LogDamaged(
            f"{record_key(index)}: does not follow from the record before it, so the log was altered; "
            "expected the hash of that record"
        )
