"""Any other fsspec filesystem: memory, Google Cloud Storage, Azure, and the rest for reading and writing.

`create` works only if the protocol's own exclusive write is known to be atomic. fsspec's default for
`mode="create"` first checks and then writes, so two writers can both win. A store with only this default
refuses to create: it can hold prepared data, but not a run's log.

    memory   one lock around every request; one process only
    gs       ifGenerationMatch=0 (gcsfs maps mode="create" to it)
    abfs     If-None-Match: * (adlfs maps mode="create" to it)
"""

import mmap
import threading
from pathlib import Path
from typing import Any

from elastic_pt.errors import AccessDenied, AlreadyExists, NotFound
from elastic_pt.store.client import BeyondEnd, Client
from elastic_pt.store.observer import Observer
from elastic_pt.store.port import (
    WHOLE_LIMIT_BYTES,
    FilePart,
    NoAtomicCreate,
    Source,
    checked_key,
    checked_prefix,
    checked_range,
    checked_record,
    checked_source,
    checked_whole,
    holds,
)
from elastic_pt.store.retry import Retry

ATOMIC_CREATE = frozenset({"memory", "gs", "gcs", "abfs", "abfss", "az", "adl"})

_MEMORY_LOCK = threading.RLock()


class FsspecStore:
    """A `Store` below any URL that fsspec understands."""

    def __init__(
        self, url: str, *, retry: Retry, patient: bool = True, observer: Observer | None = None
    ) -> None:
        self._protocol = url.partition("://")[0]
        guard = _MEMORY_LOCK if self._protocol == "memory" else None
        self._client = Client(url, retry=retry, guard=guard, patient=patient, observer=observer)

    @property
    def url(self) -> str:
        """The URL of the store, without a trailing slash."""
        return self._client.url

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """See `Store.read`."""
        checked_key(key)
        checked_range(start, end)
        if start == end:
            return b""

        # One byte more than allowed shows that there is more.
        until = start + WHOLE_LIMIT_BYTES + 1 if end is None else end

        def send(filesystem: Any, root: str, timeout: dict[str, float]) -> bytes:
            return bytes(filesystem.cat_file(f"{root}/{key}", start=start, end=until, **timeout))

        try:
            found = self._client.request(f"reading {key}", send, bounded=end is not None)
        except BeyondEnd:
            return b""
        if end is None:
            checked_whole(f"reading {key} of {self.url}", len(found))
        return found

    def create(self, key: str, data: bytes) -> None:
        """See `Store.create`."""
        checked_key(key)
        body = checked_record(data)
        if self._protocol not in ATOMIC_CREATE:
            raise NoAtomicCreate(
                f"{self.url}: {self._protocol}:// has no atomic create that elastic-pt knows, and a run's log "
                "needs one; expected file://, s3://, gs:// or abfs://"
            )

        def send(filesystem: Any, root: str, timeout: dict[str, float]) -> None:
            filesystem.pipe_file(f"{root}/{key}", body, mode="create", **timeout)

        try:
            self._client.request(f"creating {key}", send, sends=len(body))
        except AlreadyExists:
            if not holds(self, key, data):
                raise
        except AccessDenied as error:
            # Google counts an overwrite as a delete, and may refuse it before it looks at the condition.
            if self.size(key) is None:
                raise
            if not holds(self, key, data):
                raise AlreadyExists(str(error)) from error

    def write(self, key: str, source: Source) -> None:
        """See `Store.write`; as atomic as the protocol's own upload of a whole object."""
        checked_key(key)
        size = checked_source(source)

        def send(filesystem: Any, root: str, timeout: dict[str, float]) -> None:
            if isinstance(source, Path):
                filesystem.put_file(str(source), f"{root}/{key}", **timeout)
            elif isinstance(source, FilePart):
                with _mapped(source) as content:
                    filesystem.pipe_file(f"{root}/{key}", content, **timeout)
            else:
                filesystem.pipe_file(f"{root}/{key}", source, **timeout)

        self._client.request(f"writing {key}", send, bounded=False, sends=size)

    def size(self, key: str) -> int | None:
        """See `Store.size`."""
        checked_key(key)

        def send(filesystem: Any, root: str, timeout: dict[str, float]) -> int | None:
            found = filesystem.info(f"{root}/{key}", **timeout)
            return int(found["size"]) if found["type"] == "file" else None

        try:
            return self._client.request(f"measuring {key}", send)
        except NotFound:
            return None

    def keys(self, prefix: str) -> list[str]:
        """See `Store.keys`."""
        folder = checked_prefix(prefix).rpartition("/")[0]

        def send(filesystem: Any, root: str, timeout: dict[str, float]) -> list[str]:
            found = filesystem.find(f"{root}/{folder}".rstrip("/"), **timeout)
            return [path[len(root) + 1 :] for path in found]

        try:
            keys = self._client.request(f"listing {prefix}", send, bounded=False)
        except NotFound:
            return []
        return sorted(key for key in keys if key.startswith(prefix) and not key.endswith("/"))

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        checked_key(key)

        def send(filesystem: Any, root: str, timeout: dict[str, float]) -> None:
            filesystem.rm_file(f"{root}/{key}", **timeout)

        try:
            self._client.request(f"deleting {key}", send)
        except NotFound:
            return


def _mapped(part: FilePart) -> mmap.mmap:
    """The part in memory without a copy. Filesystems slice it, or read it as a file: gcsfs, adlfs, memory."""
    with part.path.open("rb") as file:
        return mmap.mmap(file.fileno(), part.size, offset=part.offset, prot=mmap.PROT_READ)
