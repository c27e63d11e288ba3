"""The port between the project and object storage: six methods, nothing else.

`open_store(url)` (in `store/open.py`) returns one of these for any fsspec URL. Keys are relative to
that URL, use `/`, never start with `/` and never contain `..`; anything else is a `ValueError`, since
keys come from this project and never from a user. Only `create` decides anything, so only `create`
needs the store to be atomic; everything else is bytes that are verified after reading.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from elastic_pt.errors import ConfigError, NotFound

CREATE_LIMIT_BYTES = 64 * 2**20


class NoAtomicCreate(ConfigError):
    """The store's protocol or file system has no create that only one of several writers can win."""


class Store(Protocol):
    """Bytes under keys below one URL. Safe to share between threads; open another one after a fork."""

    @property
    def url(self) -> str:
        """The URL everything lives below, without a trailing slash."""

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes `[start, end)` of the object, or all of it.

        Raises `NotFound`, `AccessDenied`, or `StoreError` once the deadline has passed.
        A range that goes beyond the object gives the bytes that exist.
        """

    def create(self, key: str, data: bytes) -> None:
        """Create the object if no object has this key, atomically against every other writer.

        Raises `AlreadyExists` when another object is there. Finding exactly `data` there counts as
        success, because a response may be lost on the way: callers who race put a nonce in `data`.
        After any other `StoreError` the object may or may not be there. Raises
        `NoAtomicCreate` where none is known. `data` is a record, at most `CREATE_LIMIT_BYTES` (else `ValueError`).
        """

    def write(self, key: str, source: bytes | Path) -> None:
        """Put the object as a whole, from memory or from a local file; readers see old or new, never half.

        Raises `FileNotFoundError` if the local file is not there, and the errors of `read`.
        """

    def size(self, key: str) -> int | None:
        """Bytes of the object, or None if there is none."""

    def keys(self, prefix: str) -> list[str]:
        """Keys that start with `prefix`, sorted. A hint only: a listing may be stale, nothing may depend on it."""

    def delete(self, key: str) -> None:
        """Remove the object; removing what is not there is fine."""


@dataclass(frozen=True)
class UnfinishedUpload:
    """Parts of an object that a writer has sent and not put together: it still writes, or was killed."""

    key: str
    upload_id: str
    age_s: float
    """Seconds since its start, on the server's own clock."""


@runtime_checkable
class KeepsUnfinished(Protocol):
    """A store in which a killed writer leaves parts that cost money and that no listing of keys shows.

    Not part of `Store`: only S3 is such a store, and nothing but the sweep of one node asks. A directory removes
    its own, Google and Azure drop theirs after a week.
    """

    def unfinished(self, prefix: str) -> list[UnfinishedUpload]:
        """Uploads in the making of keys that start with `prefix`, as many as a few requests tell. A hint, as a listing is."""

    def abandon(self, upload: UnfinishedUpload) -> None:
        """Give the upload up: its parts are deleted, its writer fails. One that is not there any more is fine."""


def checked_key(key: str) -> str:
    """The key itself, if it names one object below the store's URL; else `ValueError`."""
    if not key or key != key.strip("/") or any(part in ("", ".", "..") for part in key.split("/")):
        raise ValueError(f"not a key: {key!r}; expected a relative path such as log/1.json")
    return key


def checked_prefix(prefix: str) -> str:
    """The prefix itself, if keys can start with it ("" means all); else `ValueError`."""
    if prefix.startswith("/") or ".." in prefix.split("/") or "//" in prefix:
        raise ValueError(
            f"not a prefix of keys: {prefix!r}; expected a prefix such as log/, or nothing for all"
        )
    return prefix


def checked_range(start: int, end: int | None) -> None:
    """`ValueError` unless `[start, end)` is a range of bytes."""
    if start < 0 or (end is not None and end < start):
        raise ValueError(f"not a range of bytes: [{start}, {end})")


def checked_record(data: bytes) -> bytes:
    """The data itself, if it is small enough to be created in one request; else `ValueError`."""
    if len(data) > CREATE_LIMIT_BYTES:
        raise ValueError(
            f"{len(data)} bytes are too many to create; at most {CREATE_LIMIT_BYTES}, or use write"
        )
    return data


def checked_source(source: bytes | Path) -> int:
    """Bytes of what is to be written; `FileNotFoundError` if that is a local file which is not there."""
    return source.stat().st_size if isinstance(source, Path) else len(source)


def holds(store: Store, key: str, data: bytes) -> bool:
    """True if the object under `key` is exactly `data`: a create whose response was lost, not a race lost."""
    try:
        return store.read(key) == data
    except NotFound:
        return False
