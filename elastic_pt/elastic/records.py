"""What a record of the run's log can say, and how it is written down.

    GENERATION   who trains from here on, with which slots, resuming from which checkpoint, and why
    COMMIT       a checkpoint counts from here on; names every checkpoint that is kept
    QUARANTINE   a checkpoint that was committed turned out unusable
    STOP         the run has ended

A record is one JSON object: an envelope (schema, index, kind, generation, writer, nonce, time, the SHA-256
of the record before, and where the newest record of each kind lies) around a body. The pointers in
`latest` let a reader open a log of any length with a handful of requests. `time` is for people only.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Self

from elastic_pt.errors import LogDamaged

SCHEMA: Final = 1
ORIGIN: Final = "0" * 64
"""What the first record names as the SHA-256 of the record before it."""
COMPLETED: Final = "completed"
"""The reason of the STOP after the last step; any other one is a failure."""


class Kind(StrEnum):
    """The kinds of records."""

    GENERATION = "GENERATION"
    COMMIT = "COMMIT"
    QUARANTINE = "QUARANTINE"
    STOP = "STOP"


@dataclass(frozen=True)
class Member:
    """One node of a generation, as it introduced itself."""

    node: str
    incarnation: str
    """Random name of this life of the node's agent; a restarted agent is another member."""
    address: str
    port: int
    """Where its agent answers peers."""
    pid: int
    """Process id of its agent."""
    workers: int


@dataclass(frozen=True)
class Checkpoint:
    """One committed checkpoint: the directory, and what its manifest must hash to."""

    step: int
    generation: int
    directory: str
    manifest_size: int
    manifest_sha256: str
    loss: float | None


@dataclass(frozen=True)
class Generation:
    """Who trains. Ranks follow the order of `members`, each member's workers side by side."""

    number: int
    members: tuple[Member, ...]
    slots: tuple[int, ...]
    """Slots per member and step; empty when stock torchrun trains something of its own."""
    store_address: str
    store_port: int
    """The TCPStore made for this generation alone, already listening when the record is written."""
    resume: Checkpoint | None
    """Where training goes on; None is the start."""
    reason: str

    @property
    def world_size(self) -> int:
        """Workers over all members."""
        return sum(member.workers for member in self.members)

    def rank_of(self, incarnation: str) -> int | None:
        """Position of this life of a node among the members, or None."""
        for rank, member in enumerate(self.members):
            if member.incarnation == incarnation:
                return rank
        return None

    def first_worker_rank(self, node_rank: int) -> int:
        """Global rank of the first worker of a member."""
        return sum(member.workers for member in self.members[:node_rank])


@dataclass(frozen=True)
class Commit:
    """A checkpoint counts. `checkpoints` names all that are kept, newest (this one) first."""

    checkpoints: tuple[Checkpoint, ...]
    history: str
    """Key of the JSON lines that tell each step since the commit before."""

    @property
    def newest(self) -> Checkpoint:
        """The checkpoint that this record commits."""
        return self.checkpoints[0]


@dataclass(frozen=True)
class Quarantine:
    """A committed checkpoint must not be used any more."""

    directory: str
    why: str


@dataclass(frozen=True)
class Stop:
    """The run has ended."""

    reason: str
    step: int


Body = Generation | Commit | Quarantine | Stop

_KIND_OF: Final[dict[type, Kind]] = {
    Generation: Kind.GENERATION,
    Commit: Kind.COMMIT,
    Quarantine: Kind.QUARANTINE,
    Stop: Kind.STOP,
}


@dataclass(frozen=True)
class Record:
    """An envelope with its body; `sha256` is that of the stored bytes."""

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

    def to_bytes(self) -> bytes:
        """The stored form."""
        document = {
            "schema": SCHEMA,
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
        """Read a stored record. Raises `LogDamaged` naming `key` when it is not one."""
        try:
            document = json.loads(data)
            if document["schema"] != SCHEMA:
                raise LogDamaged(
                    f"{key}: schema {document['schema']!r}; this version reads schema {SCHEMA}"
                )
            return Record(
                index=document["index"],
                generation=document["generation"],
                writer=document["writer"],
                nonce=document["nonce"],
                time=document["time"],
                previous=document["previous"],
                latest={Kind(kind): index for kind, index in document["latest"].items()},
                body=_body_from(Kind(document["kind"]), document["body"]),
                sha256=hashlib.sha256(data).hexdigest(),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise LogDamaged(f"{key}: not a record of a run's log: {error!r}") from error


def _body_from(kind: Kind, body: dict[str, Any]) -> Body:
    match kind:
        case Kind.GENERATION:
            resume = body.pop("resume")
            return Generation(
                members=tuple(Member(**member) for member in body.pop("members")),
                slots=tuple(body.pop("slots")),
                resume=None if resume is None else Checkpoint(**resume),
                **body,
            )
        case Kind.COMMIT:
            checkpoints = tuple(Checkpoint(**checkpoint) for checkpoint in body.pop("checkpoints"))
            if not checkpoints:
                raise ValueError("a COMMIT without a checkpoint")
            return Commit(checkpoints=checkpoints, **body)
        case Kind.QUARANTINE:
            return Quarantine(**body)
        case Kind.STOP:
            return Stop(**body)
