"""The port between the project and object storage: six methods.

`open_store(url)` (in `store/open.py`) returns a `Store` for any fsspec URL. Keys are relative to that
URL, use `/`, never start with `/` and never contain `..`. Any other key raises `NotAKey`: objects name further
objects, and whoever can write one of them must not reach anything outside. Only `create` decides between writers, so
only `create` must be atomic. All other bytes are verified after reading.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from elastic_pt.errors import ConfigError, NotFound, StoreError

CREATE_LIMIT_BYTES = 64 * 2**20
WHOLE_LIMIT_BYTES = 256 * 2**20
"""Most bytes of an object that is read without a range. Every such object is smaller: the largest are histories and manifests
(64 MiB), and block indexes (32 bytes for each block of a shard). Shards are read by ranges."""
KEY_LIMIT_BYTES = 1024
"""As of S3."""
PRIVATE = "secret/"
"""Keys below it are for the nodes of a run alone. A policy of the bucket says so; a directory has modes for it."""
_READ_BYTES = 2**20


class NotAKey(StoreError, ValueError):
    """The text cannot name an object below the store's URL."""


class TooLarge(StoreError):
    """The object has more than `WHOLE_LIMIT_BYTES`, so it is none of those that are read whole."""


class NoAtomicCreate(ConfigError):
    """The protocol or file system has no atomic create: several writers of one key could all succeed."""


@dataclass(frozen=True)
class FilePart:
    """Bytes `[offset, offset + size)` of a local file. Nothing here reads more than a chunk of it into memory."""

    path: Path
    offset: int
    """A multiple of `mmap.ALLOCATIONGRANULARITY`, so that it can be mapped."""
    size: int

    def chunks(self) -> Iterator[memoryview]:
        """The bytes in order. Each chunk is valid until the next one: all use one buffer.

        Fewer bytes come if the file is too short. Reading into one warm buffer is faster than a mapping.
        """
        buffer = memoryview(bytearray(min(_READ_BYTES, self.size)))
        left = self.size
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            while left and (count := file.readinto(buffer[:left])):
                yield buffer[:count]
                left -= count

    def read(self, start: int, count: int) -> bytes:
        """Bytes `[start, start + count)` of the part; fewer at its end."""
        with self.path.open("rb") as file:
            file.seek(self.offset + start)
            return file.read(max(0, min(count, self.size - start)))


Source = bytes | Path | FilePart
"""What an object is written from: memory, a local file, or a part of one."""


class Store(Protocol):
    """Bytes under keys below one URL. Safe to share between threads, and to use after a fork (not `memory://`)."""

    @property
    def url(self) -> str:
        """The URL of the store, without a trailing slash."""

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes `[start, end)` of the object, or all of it from `start` on.

        Raises `NotFound`, `AccessDenied`, or `StoreError` once the deadline has passed. Without `end`, raises `TooLarge`
        instead of reading more than `WHOLE_LIMIT_BYTES` into memory.
        For a range beyond the end of the object, returns the bytes that exist.
        """

    def create(self, key: str, data: bytes) -> None:
        """Create the object if no object has this key, atomically against all other writers.

        Raises `AlreadyExists` if the key holds other bytes. Succeeds if the key holds exactly `data`,
        because an earlier response may have been lost: callers that race put a nonce in `data`. After any
        other `StoreError` the object may or may not exist. Raises `NoAtomicCreate` if the store has no
        atomic create. `data` is a record of at most `CREATE_LIMIT_BYTES` (else `ValueError`).
        """

    def write(self, key: str, source: Source) -> None:
        """Write the whole object from memory, a local file or a part of one. Readers get the old or the new one, whole.

        Raises `FileNotFoundError` for a missing local file, and the errors of `read`.
        """

    def size(self, key: str) -> int | None:
        """Bytes of the object, or None if there is none."""

    def keys(self, prefix: str) -> list[str]:
        """Keys that start with `prefix`, sorted. Only a hint: a listing may be stale, so nothing may depend on it."""

    def delete(self, key: str) -> None:
        """Delete the object. Succeeds if there is none."""


@dataclass(frozen=True)
class UnfinishedUpload:
    """Uploaded parts of an object that is not complete: its writer still uploads, or was killed."""

    key: str
    upload_id: str
    age_s: float
    """Seconds since its start, on the server's own clock."""


@runtime_checkable
class KeepsUnfinished(Protocol):
    """A store in which a killed writer leaves parts that cost money and that no listing of keys shows.

    Not part of `Store`: only S3 is such a store, and only the sweep of one node and the check at a start use it. A directory removes its own
    parts, Google and Azure delete them after a week.
    """

    def unfinished(self, prefix: str) -> list[UnfinishedUpload]:
        """Unfinished uploads of keys that start with `prefix`, as many as a few requests return. A hint, like a listing."""

    def abandon(self, upload: UnfinishedUpload) -> None:
        """End the upload: its parts are deleted, its writer fails. An upload that does not exist is no error."""

    def expires_unfinished(self, prefix: str) -> bool:
        """Whether a rule of the bucket ends unfinished uploads of all keys that start with `prefix` after some days."""


@dataclass(frozen=True)
class Credentials:
    """Where a client's credentials come from, without their values."""

    origin: str
    """Such as `env`, `shared-credentials-file`, `iam-role`; empty if there are none."""
    renewed: bool
    """Whether the client gets new ones before they expire, or they never expire."""
    expires: str = ""
    """When they end, if the client knows."""


@runtime_checkable
class Examinable(Protocol):
    """A store whose bucket and client can be examined. Not part of `Store`: only S3 is, and only checks ask it."""

    @property
    def clock_ahead_s(self) -> float | None:
        """How far this machine's clock was ahead of the server's at the newest answer; None before the first one.

        Servers tell whole seconds, so it is exact to a second.
        """

    def credentials(self) -> Credentials:
        """The credentials in use."""

    def keeps_all_versions(self, prefix: str) -> bool:
        """Whether the bucket keeps old versions of keys that start with `prefix`, and no rule ever removes them."""

    def write_in_parts(self, key: str, source: Source) -> None:
        """`Store.write`, also for a small object as an upload in parts."""

    def begin_upload(self, key: str) -> UnfinishedUpload:
        """Start an upload that has no part yet."""


def checked_key(key: str) -> str:
    """Return the key if it can name an object below the store's URL; else raise `NotAKey`."""
    if (
        any(part in ("", ".", "..") for part in key.split("/"))
        or "\\" in key
        or not key.isprintable()
        or len(key.encode()) > KEY_LIMIT_BYTES
    ):
        shown = repr(key) if len(key) <= 80 else f"{key[:77]!r}..."
        raise NotAKey(f"not a key: {shown}; expected a relative path such as log/1.json")
    return key


def checked_prefix(prefix: str) -> str:
    """Return the prefix if keys can start with it ("" means all); else raise `ValueError`."""
    if prefix.startswith("/") or ".." in prefix.split("/") or "//" in prefix:
        raise ValueError(
            f"not a prefix of keys: {prefix!r}; expected a prefix such as log/, or nothing for all"
        )
    return prefix


def checked_range(start: int, end: int | None) -> None:
    """Raise `ValueError` unless `[start, end)` is a range of bytes."""
    if start < 0 or (end is not None and end < start):
        raise ValueError(f"not a range of bytes: [{start}, {end}); expected 0 <= start <= end")


def checked_whole(what: str, size: int) -> None:
    """Raise `TooLarge` if an object of this size may not be read without a range."""
    if size > WHOLE_LIMIT_BYTES:
        raise TooLarge(f"{what}: more than {WHOLE_LIMIT_BYTES} bytes; expected an object of fewer")


def checked_record(data: bytes) -> bytes:
    """Return the data if one request can create it; else raise `ValueError`."""
    if len(data) > CREATE_LIMIT_BYTES:
        raise ValueError(
            f"{len(data)} bytes are too many to create; expected at most {CREATE_LIMIT_BYTES}, or a call of write"
        )
    return data


def checked_source(source: Source) -> int:
    """Size of `source` in bytes. Raises `FileNotFoundError` for a missing local file, `ValueError` for a short one."""
    if isinstance(source, bytes):
        return len(source)
    if isinstance(source, Path):
        return source.stat().st_size
    found, end = source.path.stat().st_size, source.offset + source.size
    if found < end:
        raise ValueError(f"{source.path}: {found} bytes; expected at least {end}")
    return source.size


def as_part(source: Path | FilePart) -> FilePart:
    """The whole of a local file, or the part itself."""
    return source if isinstance(source, FilePart) else FilePart(source, 0, source.stat().st_size)


def holds(store: Store, key: str, data: bytes) -> bool:
    """True if the object under `key` is exactly `data`: our create succeeded and its response was lost."""
    try:
        return store.read(key) == data
    except NotFound:
        return False
