"""The records of the run's log, and their stored form.

    GENERATION   the new members, their slots, the checkpoint to resume from, and why
    RECOVERY     how long the generation took to its first step, phase by phase
    COMMIT       a checkpoint counts; names the newest kept checkpoints, and points to the COMMIT of the newest
                 permanent one before it
    QUARANTINE   a committed checkpoint turned out unusable, or a node is kept out for a while
    STOP         the run has ended
    REOPEN       an operator lifted a STOP other than completion, or accepted another platform
    CONTROL      an operator's request, or an agent's answer that it is done; names all requests in force

A record is one JSON object: an envelope (schema, index, kind, generation, writer, nonce, time, the SHA-256
of the record before, and the index of the newest record of each kind) around a body. With the pointers in
`latest` a reader opens a log of any length with one listing and a few requests. `time` is for people only.
"""

import dataclasses
import datetime
import hashlib
import ipaddress
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from itertools import accumulate
from typing import Annotated, Any, Final, Self

from pydantic import AfterValidator, Field, FiniteFloat, TypeAdapter
from pydantic_core import from_json

from elastic_pt import __version__
from elastic_pt.errors import LogDamaged, one_line
from elastic_pt.runlog.ignored import DamagedSpan, IgnoredSpan
from elastic_pt.store.port import checked_key

SCHEMA: Final = 1
NEWER_SCHEMA: Final = 2
"""The schema of a COMMIT after which permanent checkpoints exist, of CONTROL records, and of all later ones in the same
log. A version that reads only schema 1 would delete permanent checkpoints and miss requests, so it must refuse the log."""
IGNORING_SCHEMA: Final = 3
"""The schema of a GENERATION that leaves tokens out, as all later ones do. Every reader reads the newest one, so a version
that would train on these tokens refuses the log."""
ORIGIN: Final = "0" * 64
"""The `previous` of the first record, which has no record before it."""
COMPLETED: Final = "completed"
"""The reason of the STOP after the last step; any other one is a failure."""


def _ip_address(text: str) -> str:
    ipaddress.ip_address(text)
    return text


def _utc(text: str) -> str:
    if datetime.datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("expected a time with its zone")
    return text


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("expected text without control characters")
    return text


# What a record and a message of another node may hold. They are read as data, whoever wrote them.
Number = Annotated[int, Field(ge=0, le=1 << 53)]
Seconds = Annotated[FiniteFloat, Field(ge=-1e12, le=1e12)]
Text = Annotated[str, AfterValidator(one_line)]
"""For people. It is shown, so a reader takes out what would steer a terminal or begin a line of its own."""
NodeName = Annotated[str, Field(min_length=1, max_length=255), AfterValidator(_printable)]
Incarnation = Annotated[str, Field(pattern=r"^[^/?#&=%\\\s]{1,300}$"), AfterValidator(_printable)]
"""It is a part of keys and of paths of requests."""
Address = Annotated[str, Field(max_length=64), AfterValidator(_ip_address)]
Port = Annotated[int, Field(ge=0, le=65535)]
Key = Annotated[str, AfterValidator(checked_key)]


class Kind(StrEnum):
    """The kinds of records."""

    GENERATION = "GENERATION"
    RECOVERY = "RECOVERY"
    COMMIT = "COMMIT"
    QUARANTINE = "QUARANTINE"
    STOP = "STOP"
    REOPEN = "REOPEN"
    CONTROL = "CONTROL"


class Verb(StrEnum):
    """What an operator may ask of a run."""

    CHECKPOINT = "checkpoint"
    """Commit a checkpoint as soon as a step is done, and train on."""
    PAUSE = "pause"
    """Commit a checkpoint and train no more until a RESUME. The agents stay."""
    RESUME = "resume"
    DRAIN = "drain"
    """One node leaves in good order; the others go on."""
    STOP = "stop"
    """Commit a checkpoint and end the run."""


@dataclass(frozen=True)
class Member:
    """One node of a generation, as it described itself."""

    node: NodeName
    incarnation: Incarnation
    """Random name of this process of the node's agent; a restarted agent is another member."""
    address: Address
    port: Port
    """Where its agent answers peers."""
    pid: Number
    """Process id of its agent."""
    workers: Annotated[int, Field(ge=1, le=99_999)]
    zone: Text = ""
    """`elastic.zone` of the node; empty if unknown, and in older records."""


@dataclass(frozen=True)
class Checkpoint:
    """One committed checkpoint: its directory, and the size and SHA-256 that its manifest must have."""

    step: Number
    generation: Number
    directory: Key
    manifest_size: Number
    manifest_sha256: str
    loss: FiniteFloat | None
    permanent: bool = False
    """Whether it is never removed (`checkpoint.keep_every_steps`); False in older records."""


class CauseKind(StrEnum):
    """Why the members change."""

    LOST = "lost"
    """A member is gone: its address refuses connections, or it is silent."""
    FAILED = "failed"
    """A member's own worker failed."""
    UNUSABLE = "unusable"
    """A member could not read the checkpoint to resume from. The next generation takes another one."""
    DAMAGED = "damaged"
    """A member found a damaged block of the data. The next generation leaves its tokens out."""
    PARKED = "parked"
    """A member answers, but not all others can reach it."""
    GAVE_UP = "gave up"
    """A member found the generation broken, but then all members answered again."""
    LEFT = "left"
    """A member left in good order."""
    JOINED = "joined"
    """A newcomer joined."""
    BARRED = "barred"
    """A member broke the generation too often and is kept out for some seconds."""

    @property
    def planned(self) -> bool:
        """Whether it breaks no generation: the workers stop after the same step, and nothing is lost."""
        return self in (CauseKind.LEFT, CauseKind.JOINED, CauseKind.BARRED)


@dataclass(frozen=True)
class Cause:
    """One reason for a new generation."""

    kind: CauseKind
    node: NodeName
    detail: Text = ""
    """How it was noticed, why the worker ended, or which notice made the node leave, in one line."""
    step: Number = 0
    """The step in which the worker failed; 0 if unknown."""
    signature: Text = ""
    """Equal for the same Python exception at the same place of the code; empty for other causes."""
    detect_s: Seconds = 0.0
    """Seconds from the last sign of life to the moment the cause was noticed."""
    surroundings: bool = False
    """Whether a worker failed through its surroundings (space, I/O, store, memory, device, network, a signal), which
    may pass. If not, it failed through the program: a function of state, data and code."""
    damage: tuple[DamagedSpan, ...] = ()
    """What the next generation leaves out. Empty for other causes, and in older records."""

    def __str__(self) -> str:
        match self.kind:
            case CauseKind.LOST:
                return f"lost {self.node}"
            case CauseKind.FAILED | CauseKind.UNUSABLE | CauseKind.DAMAGED:
                return f"{self.node}: {self.detail}"
            case CauseKind.PARKED:
                return f"{self.node} parked: {self.detail}"
            case CauseKind.GAVE_UP:
                return f"{self.node} gave up: {self.detail}"
            case CauseKind.LEFT:
                return f"{self.node} leaves" + (f": {self.detail}" if self.detail else "")
            case CauseKind.JOINED:
                return f"{self.node} joins"
            case CauseKind.BARRED:
                return f"{self.node} kept out: {self.detail}"


@dataclass(frozen=True)
class InMemory:
    """The state of a step that the members of a new generation hold together in memory."""

    generation: Number
    """Whose workers wrote it."""
    step: Number
    sources: tuple[Number, ...]
    """For each of those workers, by rank: the member of the new generation that holds its rows."""
    others: tuple[tuple[Number, ...], ...] = ()
    """For each of those workers, by rank: further members that hold its rows. Empty in older records."""

    def holders(self, rank: int) -> tuple[int, ...]:
        """The members that hold the rows of a worker, in the order in which to read from them."""
        return (self.sources[rank], *(self.others[rank] if self.others else ()))


@dataclass(frozen=True)
class Generation:
    """Who trains. Ranks follow the order of `members`; the workers of one member have consecutive ranks."""

    number: Number
    members: tuple[Member, ...]
    slots: tuple[Number, ...]
    """Slots per member and step; empty for a run of stock torchrun."""
    store_address: Address
    store_port: Port
    """The TCPStore made for this generation only. It listens before the record is written."""
    resume: Checkpoint | None
    """The newest usable checkpoint. Training resumes from it unless there is `memory`; None is the start of the run."""
    reason: Text
    causes: tuple[Cause, ...] = ()
    """The reason, for programs."""
    frontier_step: Number = 0
    """The newest step that any generation had done before. Steps up to it are done again."""
    agree_s: Seconds = 0.0
    """Seconds from when the proposer noticed the cause to this record."""
    platform: Mapping[str, Text] = field(default_factory=dict)
    """The members' platform: values that decide the bits, by name. Empty in older records."""
    fenced_url: Text = ""
    """The URL of the run directory under which an agent of this run tested the store's create-once with success. Empty if
    no agent has, and in older records."""
    memory: InMemory | None = None
    """The state from which training resumes, if the members hold one that is as new as `resume` or newer."""
    mirrors: tuple[tuple[Number, ...], ...] = ()
    """For each member, by rank: the members that copy its state into their memory. Empty in older records."""

    why_not_memory: Text = ""
    """Why the members hold no state for `memory`. Empty if they do, in the first generation, and in older records."""
    reached_step: Number | None = None
    """The newest step that the generation before had done. None if unknown, and in older records: there `frontier_step` is
    that step, and 0 if no member was left."""
    below_minimum_s: Seconds = 0.0
    """Part of `agree_s`: the proposer saw fewer nodes than `elastic.nodes_min`. 0 in older records."""
    restarts: Number = 0
    """Generations that nobody planned, up to this one, since a step was last done that had not been done before, or a
    checkpoint committed. 0 in older records."""
    ignored: tuple[IgnoredSpan, ...] = ()
    """The tokens that its workers leave out. Empty in older records."""
    release: str = ""
    """The version of elastic_pt of its members. Empty in older records."""

    @property
    def lost_steps(self) -> int:
        """The number of steps that the generation before had done and that are done again; 0 if unknown."""
        return 0 if self.reached_step is None else self.reached_step - self.resume_step

    def mirrors_of(self, rank: int) -> tuple[int, ...]:
        """The members that copy the state of the member of this rank."""
        return self.mirrors[rank] if self.mirrors else ()

    def follows_the_loss_of_all(self, before: "Generation") -> bool:
        """Whether no member of the generation before is left, so that nobody knows the cause."""
        members = {each.incarnation for each in before.members}
        return not self.causes and members.isdisjoint(each.incarnation for each in self.members)

    @property
    def resume_step(self) -> int:
        """Steps that are done in the state from which training resumes."""
        return self.committed_step if self.memory is None else self.memory.step

    @property
    def committed_step(self) -> int:
        """The step of the newest usable checkpoint; 0 is the start of the run."""
        return 0 if self.resume is None else self.resume.step

    @property
    def restored_from(self) -> str:
        """Where that state is: `memory`, `bucket`, or `start` (made from the seed)."""
        if self.memory is not None:
            return "memory"
        return "start" if self.resume is None else "bucket"

    @property
    def world_size(self) -> int:
        """Workers over all members."""
        return sum(member.workers for member in self.members)

    def rank_of(self, incarnation: str) -> int | None:
        """Rank of this incarnation among the members, or None."""
        return self._ranks.get(incarnation)

    @cached_property
    def incarnations(self) -> frozenset[str]:
        """The incarnations of all members."""
        return frozenset(self._ranks)

    @cached_property
    def _ranks(self) -> dict[str, int]:
        return {member.incarnation: rank for rank, member in enumerate(self.members)}

    def worker_ranks(self) -> list[range]:
        """Global ranks of the workers of each member."""
        ends = list(accumulate(member.workers for member in self.members))
        return [
            range(end - each.workers, end) for end, each in zip(ends, self.members, strict=True)
        ]

    def first_worker_rank(self, node_rank: int) -> int:
        """Global rank of the first worker of a member."""
        return sum(member.workers for member in self.members[:node_rank])


@dataclass(frozen=True)
class Commit:
    """A checkpoint counts from here on. `checkpoints` names all that are kept, newest (this one) first."""

    checkpoints: tuple[Checkpoint, ...]
    history: Key
    """Key of the JSON lines about each step since the commit before."""
    permanent_before: Number | None = field(default=None, kw_only=True)
    """Index of the newest COMMIT before this one whose own checkpoint is permanent; None if there is none. So
    permanent checkpoints form a chain and need not be in `checkpoints`."""
    request: int = field(default=-1, kw_only=True)
    """Index of the newest CONTROL record whose request for a checkpoint has been met; -1 if none has."""

    @property
    def newest(self) -> Checkpoint:
        """The checkpoint that this record commits."""
        return self.checkpoints[0]


@dataclass(frozen=True)
class Recovery:
    """The generation has done its first step. Seconds are the slowest member's, each on its own clock."""

    number: Number
    start_s: Seconds
    """From the record until the new workers are connected to their agents."""
    group_s: Seconds
    """Process group, model and mesh."""
    restore_s: Seconds
    """Weights and optimizer state read, or initialised."""
    step_s: Seconds
    """Data and the first step."""
    total_s: Seconds
    """From noticing the cause to the end of the first step, on the clock of the node that proposed."""


@dataclass(frozen=True)
class Quarantine:
    """A committed checkpoint must not be used any more, or a node is kept out for some seconds.

    Every node counts the seconds from the moment it reads the record, so no wall clock matters.
    """

    directory: Text
    """The checkpoint; empty for a node."""
    why: Text
    node: Text = ""
    seconds: Seconds = 0.0


@dataclass(frozen=True)
class Stop:
    """The run has ended."""

    reason: Text
    step: Number


@dataclass(frozen=True)
class Reopen:
    """An operator lifted a STOP other than completion, or accepted another platform (`elastic-pt reopen`)."""

    why: Text
    platform: bool
    """Whether the next generation may run on another platform."""
    step: Number
    """Steps done in the newest checkpoint. Up to it the bits are those of one platform."""


@dataclass(frozen=True)
class Request:
    """What an operator asks of a run."""

    verb: Verb
    by: Text
    """Who asked: user@host, for people."""
    why: Text = ""
    node: Text = ""
    """The node to drain; empty for other verbs."""
    seconds: Seconds = 0.0
    """How long that node may take; 0 leaves it to its configuration. It counts from when it reads the record."""
    index: int = -1
    """Of the CONTROL record that made the request; -1 before it is made."""
    done: bool = False
    """Whether it has been carried out. A pause that is done still holds."""

    @property
    def origin(self) -> str:
        """Who asked, and why."""
        return f"by {self.by}" + (f": {self.why}" if self.why else "")

    def __str__(self) -> str:
        node = f" of node {self.node}" if self.node else ""
        limit = f" within {self.seconds:g} s" if self.seconds else ""
        return f"{self.verb}{node}{limit} asked for {self.origin}"


@dataclass(frozen=True)
class Control:
    """An operator asks something of the run, or an agent says that it is done (`request.done`)."""

    request: Request
    standing: tuple[Request, ...]
    """All requests that hold from here on, oldest first. So the newest CONTROL tells everything."""
    step: Number
    """Of the newest checkpoint."""


Body = Generation | Recovery | Commit | Quarantine | Stop | Reopen | Control

_KIND_OF: Final[dict[type, Kind]] = {
    Generation: Kind.GENERATION,
    Recovery: Kind.RECOVERY,
    Commit: Kind.COMMIT,
    Quarantine: Kind.QUARANTINE,
    Stop: Kind.STOP,
    Reopen: Kind.REOPEN,
    Control: Kind.CONTROL,
}
_BODIES: Final[dict[Kind, TypeAdapter[Any]]] = {
    kind: TypeAdapter(body) for body, kind in _KIND_OF.items()
}


@dataclass(frozen=True)
class Record:
    """An envelope with its body. `sha256` is that of the stored bytes."""

    index: int
    generation: int
    writer: str
    nonce: str
    time: str
    previous: str
    latest: dict[Kind, int]
    """Index of the newest record of each kind, this one included."""
    body: Body
    sha256: str = field(default="", compare=False)

    @property
    def kind(self) -> Kind:
        """The body's kind."""
        return _KIND_OF[type(self.body)]

    @property
    def written_at(self) -> datetime.datetime:
        """When it was written, by its writer's clock."""
        return datetime.datetime.fromisoformat(self.time)

    @property
    def written_at_s(self) -> float:
        """`written_at` as Unix time."""
        return self.written_at.timestamp()

    @property
    def schema(self) -> int:
        """The schema of the stored form."""
        body = self.body
        if isinstance(body, Generation) and body.ignored:
            return IGNORING_SCHEMA
        permanent = isinstance(body, Commit) and (
            body.permanent_before is not None or any(each.permanent for each in body.checkpoints)
        )
        knows_control = Kind.CONTROL in (self.kind, *self.latest)
        return NEWER_SCHEMA if permanent or knows_control else SCHEMA

    def to_bytes(self) -> bytes:
        """The stored form."""
        document = {
            "schema": self.schema,
            "index": self.index,
            "kind": self.kind,
            "generation": self.generation,
            "writer": self.writer,
            "nonce": self.nonce,
            "time": self.time,
            "previous": self.previous,
            "latest": self.latest,
            "body": dataclasses.asdict(self.body),
        }
        return json.dumps(document, indent=1, allow_nan=False).encode() + b"\n"

    def sealed(self) -> Self:
        """This record with its own SHA-256."""
        return dataclasses.replace(self, sha256=hashlib.sha256(self.to_bytes()).hexdigest())

    @classmethod
    def from_bytes(cls, data: bytes, *, key: str) -> "Record":
        """Read a stored record. Raises `LogDamaged` with `key` if it is not one."""
        try:
            document = from_json(data)
            if document["schema"] not in (SCHEMA, NEWER_SCHEMA, IGNORING_SCHEMA):
                raise LogDamaged(
                    f"{key}: schema {document['schema']!r:.80}; expected {SCHEMA}, {NEWER_SCHEMA} or {IGNORING_SCHEMA}, "
                    f"which elastic_pt {__version__} reads: use the version that wrote it, or a later one"
                )
            # Not strict: the envelope is checked as it is, the body with what its kind allows.
            envelope = _ENVELOPE.validate_python(
                {name: document[name] for name in _Envelope.__dataclass_fields__}
            )
            return Record(
                **vars(envelope),
                body=_body_from(Kind(document["kind"]), document["body"]),
                sha256=hashlib.sha256(data).hexdigest(),
            )
        except (ValueError, KeyError, TypeError) as error:
            why = " ".join(repr(error).split())
            raise LogDamaged(
                f"{key}: not a record of a run's log: {why:.300}; expected an unchanged record"
            ) from error


@dataclass(frozen=True)
class _Envelope:
    """The fields of a record beside its body."""

    index: Number
    generation: Number
    writer: Text
    nonce: Text
    time: Annotated[str, AfterValidator(_utc)]
    previous: Text
    latest: dict[Kind, Number]

    def __post_init__(self) -> None:
        # Readers follow these pointers, so they must not lead around in a circle.
        if any(each > self.index for each in self.latest.values()):
            raise ValueError(f"latest = {self.latest}: expected no index beyond {self.index}")


_ENVELOPE: Final = TypeAdapter(_Envelope)


def _body_from(kind: Kind, body: dict[str, Any]) -> Body:
    found: Body = _BODIES[kind].validate_python(body)
    if isinstance(found, Commit) and not found.checkpoints:
        raise ValueError("a COMMIT without a checkpoint")
    if isinstance(found, Generation):
        _require_whole(found)
    return found


def _require_whole(generation: Generation) -> None:
    """Raise `ValueError` unless each member, and each reference to one, is there."""
    count, memory = len(generation.members), generation.memory
    lists = {"slots": generation.slots, "mirrors": generation.mirrors}
    ranks = [rank for mirrors in generation.mirrors for rank in mirrors]
    if memory is not None:
        ranks += [*memory.sources, *(rank for holders in memory.others for rank in holders)]
        if memory.others and len(memory.others) != len(memory.sources):
            raise ValueError("memory.others: expected as many as memory.sources")
    if not count or len(generation.incarnations) != count:
        raise ValueError("members: expected at least one, and each incarnation once")
    for name, values in lists.items():
        if values and len(values) != count:
            raise ValueError(f"{name}: {len(values)}; expected one for each of {count} members")
    if any(rank >= count for rank in ranks):
        raise ValueError(f"a member beyond the last of {count}; expected ranks of members")
