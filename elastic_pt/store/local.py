"""A store in a directory: `link` creates once, `rename` replaces, both with a complete and fsynced file.

Unfinished files are in one hidden folder below the root, so a killed writer leaves nothing under any key.
The first write or create of each `LocalStore` removes unfinished files that are older than an hour.
Deleting a key also removes the directories that become empty, because object stores have none.
Only the owner can read what lies below `secret/`; all other files have the modes that the process gives to new ones.

Reading follows symbolic links, to regular files only. Nothing is written, created or deleted through a link that leads
outside of the root.
"""

import contextlib
import errno
import os
import re
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from elastic_pt.errors import AccessDenied, AlreadyExists, ConfigError, NotFound, StoreError
from elastic_pt.failpoints import Failpoint, failpoint
from elastic_pt.store.observer import NoObserver, Observer, Result, operation_of
from elastic_pt.store.port import (
    PRIVATE,
    NoAtomicCreate,
    NotAKey,
    Source,
    as_part,
    checked_key,
    checked_prefix,
    checked_range,
    checked_record,
    checked_source,
    checked_whole,
    holds,
)

UNFINISHED = ".elastic-pt-unfinished"
ABANDONED_AFTER_S = 3600.0
_UNFINISHED_NAME = re.compile(r"[0-9a-f]{32}")

# Errors of `link` on FAT and on most buckets that are mounted through FUSE.
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})

# Another writer may remove an empty directory after our `mkdir` and before our `link` or `rename`.
_PUBLISH_ATTEMPTS = 100


class LocalStore:
    """A `Store` below a directory that all its users mount. Needs hard links and an atomic rename."""

    def __init__(self, url: str, *, observer: Observer | None = None) -> None:
        path = url.removeprefix("file://")
        if not path.startswith("/"):
            raise ConfigError(f"{url} is not an absolute path; expected file:///absolute/path")
        self._url = f"file://{path}"
        self._root = Path(path or "/")
        self._swept = False
        self._observer = observer or NoObserver()

    @property
    def url(self) -> str:
        """The URL of the store, without a trailing slash."""
        return self._url

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """See `Store.read`."""
        checked_range(start, end)
        path = self._path(key)
        with self._errors(f"reading {key}"):
            # Not blocking: opening a pipe would wait for a writer.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            with open(descriptor, "rb") as file:
                about = os.fstat(descriptor)
                if not stat.S_ISREG(about.st_mode):
                    raise IsADirectoryError(errno.EISDIR, "not a regular file")
                size = max(0, about.st_size - start)
                if end is None:
                    checked_whole(f"reading {key} of {self._url}", size)
                file.seek(start)
                # Not more than there is: Python allocates all that is asked for.
                found = file.read(size if end is None else min(size, end - start))
            self._observer.read(len(found))
            return found

    def create(self, key: str, data: bytes) -> None:
        """See `Store.create`. `link` fails if the name exists; the linked file is already on disk."""
        checked_record(data)
        try:
            self._publish(f"creating {key}", key, data, self._link)
            self._observer.wrote(len(data))
        except AlreadyExists:
            if not holds(self, key, data):
                raise

    def write(self, key: str, source: Source) -> None:
        """See `Store.write`."""
        size = checked_source(source)
        self._publish(f"writing {key}", key, source, os.replace)
        self._observer.wrote(size)

    def size(self, key: str) -> int | None:
        """See `Store.size`."""
        try:
            with self._errors(f"measuring {key}"):
                path = self._path(key)
                return path.stat().st_size if path.is_file() else None
        except NotFound:
            return None

    def keys(self, prefix: str) -> list[str]:
        """See `Store.keys`."""
        folder = self._root / checked_prefix(prefix).rpartition("/")[0]
        found: list[str] = []
        with self._errors(f"listing {prefix}"):
            for directory, below, names in os.walk(folder):
                below[:] = [name for name in below if name != UNFINISHED]
                where = Path(directory).relative_to(self._root)
                found += [(where / name).as_posix() for name in names]
        return sorted(key for key in found if key.startswith(prefix))

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        path = self._path(key)
        with self._errors(f"deleting {key}"):
            self._require_inside(path)
            path.unlink(missing_ok=True)
        for parent in path.relative_to(self._root).parents:
            if parent == Path("."):
                return
            try:
                (self._root / parent).rmdir()
            except OSError:
                return

    def _path(self, key: str) -> Path:
        checked_key(key)
        if key.split("/")[0] == UNFINISHED:
            raise NotAKey(f"not a key: {key!r} is in the folder of unfinished files")
        return self._root / key

    def _require_inside(self, path: Path) -> None:
        """Raise `StoreError` if a symbolic link on the way to `path` leads outside of the root."""
        root, parent = os.path.realpath(self._root), os.path.realpath(path.parent)
        if os.path.commonpath((root, parent)) != root:
            raise StoreError(
                f"{path}: is in {parent}, because of a symbolic link; expected a directory below {self._root}"
            )

    def _publish(
        self, what: str, key: str, source: Source, publish: Callable[[Path, Path], None]
    ) -> None:
        path = self._path(key)
        mode, folder_mode = (0o600, 0o700) if key.startswith(PRIVATE) else (0o666, 0o777)
        self._require_inside(path)
        with self._errors(what), self._finished(source, mode) as finished:
            for left in reversed(range(_PUBLISH_ATTEMPTS)):
                try:
                    new = [
                        each for each in (path.parent, *path.parent.parents) if not each.exists()
                    ]
                    path.parent.mkdir(folder_mode, parents=True, exist_ok=True)
                    publish(finished, path)
                    failpoint(Failpoint.OBJECT_PUBLISHED)
                    # A new directory is durable only after an fsync of its parent.
                    for directory in dict.fromkeys((path.parent, *(each.parent for each in new))):
                        _sync_directory(directory)
                    return
                except FileNotFoundError:
                    if not left:
                        raise

    def _link(self, finished: Path, path: Path) -> None:
        try:
            os.link(finished, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            raise NoAtomicCreate(
                f"{self._url} is on a file system without hard links, which a run's log needs; "
                "expected a local disk, NFS or the bucket's own URL"
            ) from error

    @contextlib.contextmanager
    def _finished(self, source: Source, mode: int) -> Iterator[Path]:
        """Yield a synced file with the content of `source`; remove it afterwards unless it was renamed."""
        making = self._making()
        if not self._swept:
            self._swept = True
            _remove_abandoned(making, time.time())
        path = making / uuid.uuid4().hex
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            with open(descriptor, "wb") as file:
                if isinstance(source, bytes):
                    file.write(source)
                else:
                    for chunk in as_part(source).chunks():
                        file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            failpoint(Failpoint.OBJECT_PREPARED)
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _making(self) -> Path:
        """The folder of unfinished files: a directory itself, because what is old in it is removed."""
        making = self._root / UNFINISHED
        with contextlib.suppress(FileExistsError):
            making.mkdir(parents=True, exist_ok=True)
        if making.is_symlink() or not making.is_dir():
            raise StoreError(
                f"{making}: is a symbolic link or a file; expected a directory: remove it, and it is made again"
            )
        return making

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        text = f"{what} of {self._url}"
        began_s, result = time.monotonic(), Result.FAILED
        try:
            yield
            result = Result.OK
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            result = Result.MISSING
            raise NotFound(f"{text}: {error.strerror}") from error
        except FileExistsError as error:
            result = Result.EXISTS
            raise AlreadyExists(f"{text}: the file exists") from error
        except PermissionError as error:
            result = Result.DENIED
            raise AccessDenied(f"{text}: {error.strerror}") from error
        except OSError as error:
            raise StoreError(f"{text}: {error.strerror or error}") from error
        finally:
            self._observer.attempted(operation_of(what), result, time.monotonic() - began_s)


def _remove_abandoned(making: Path, now_s: float) -> None:
    for path in making.iterdir():
        with contextlib.suppress(OSError):
            if (
                _UNFINISHED_NAME.fullmatch(path.name)
                and now_s - path.lstat().st_mtime > ABANDONED_AFTER_S
            ):
                path.unlink()


def _sync_directory(directory: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # another writer has removed it again
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
