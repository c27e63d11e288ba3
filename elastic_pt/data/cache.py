"""Token shards on this machine: downloaded once, verified once, and bounded, for all who read them here.

    <cache>/<sha256>.bin        a downloaded shard; shared lock while a process maps it
    <cache>/<sha256>.verified   which file of this machine was found to have that hash: device, inode, size, times
    <cache>/<sha256>.lock       held while one process downloads or verifies; the others wait for its result
    <cache>/<sha256>.arriving   a download under way, and <sha256>.room, as large as it will be, which reserves its bytes
    <cache>/room.lock           held while one process makes room and reserves it

Shards of a `file://` store are mapped where they lie and leave only a marker here. A marker counts for one
identity of a file, so a file that changes is read again, and a new worker hashes nothing that another one has
hashed. Downloads beyond `bytes_max` first remove what was used least recently and nobody maps. A process may
always hold the one shard that it needs, so several processes can exceed a bound that is smaller than that.

The directory must be this user's own: whoever could write to it could choose what a run learns from.
Worker process, and the command line's.
"""

import errno
import fcntl
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from elastic_pt.data.manifest import REMEDY
from elastic_pt.errors import ConfigError, DataError, StoreError

_ARRIVING: Final = ".arriving"
_ROOM: Final = ".room"
_MARKING: Final = ".marking"
_ATTEMPTS_MAX: Final = 10


def cache_directory(configured: str) -> Path:
    """Where shards are kept: `data.cache`, or one directory per user below the temporary directory.

    Called where temporary files go where the user wants them.
    """
    if configured:
        return Path(configured).expanduser().absolute()
    # Not the prefix of scratch directories, which agents sweep; both may lie below the same directory.
    return Path(tempfile.gettempdir(), f"elastic-pt-tokens-{os.getuid()}")


class ShardCache:
    """See the module. Safe to share between threads that take turns, and between processes."""

    def __init__(self, directory: Path, bytes_max: int, *, readers: int = 1) -> None:
        """`readers` is how many processes of this node read through it: what one maps, no other can remove."""
        self._directory = directory
        self._bytes_max = bytes_max
        self.mapped_bytes_max: Final = bytes_max // (2 * readers)
        """What one reader should map at most, beside the shard that it needs."""

    def require(self, largest_bytes: int, name: str) -> None:
        """Refuse a directory that is not this user's own, or a bound below the largest shard. Raises `ConfigError`."""
        self._require_own()
        self._require_room(largest_bytes, name)

    def _require_room(self, size: int, name: str) -> None:
        if size > self._bytes_max:
            raise ConfigError(
                f"data.cache_bytes = {self._bytes_max}: too small for {name}; expected at least {size}"
            )

    def open_local(
        self, path: Path, sha256: str, name: str, check_size: Callable[[int], None]
    ) -> int:
        """A descriptor of a file of this machine whose content has that hash; the caller closes it.

        Raises `StoreError` if it cannot be read now, and `DataError` if its content is another one.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StoreError(f"{name}: {error.strerror}") from error
        try:
            # Before the hash: for a file of the wrong size there is no need to read it.
            check_size(os.fstat(descriptor).st_size)
            self._require_own()
            with self._locked(sha256):
                self._verify(descriptor, sha256, name)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def open_downloaded(
        self, sha256: str, size: int, name: str, download: Callable[[Path], None]
    ) -> int:
        """A descriptor of the shard in the cache, with a shared lock on it; the caller closes it.

        The lock lasts as long as the descriptor or a copy of it, and a memory map keeps a copy.

        `download(path)` writes the shard if it is not there. Raises `ConfigError` if it cannot fit, `StoreError` if
        there is no room now, and `DataError` if what arrived is something else.
        """
        self._require_own()
        self._require_room(size, name)
        path = self._directory / f"{sha256}.bin"
        with self._locked(sha256):
            damaged = False
            for _ in range(_ATTEMPTS_MAX):
                if not path.exists():
                    self._fetch(path, size, name, download)
                descriptor = _open_shared(path)
                if descriptor is None:
                    # Another process has made room with it in this very moment.
                    continue
                try:
                    self._verify(descriptor, sha256, name)
                    return descriptor
                except DataError:
                    os.close(descriptor)
                    path.unlink(missing_ok=True)
                    # What an earlier life left may be damaged; what has just arrived is the store's own.
                    if damaged:
                        raise
                    damaged = True
                except BaseException:
                    os.close(descriptor)
                    raise
        raise StoreError(
            f"data cache {self._directory}: {name} was removed {_ATTEMPTS_MAX} times after its download; "
            "expected data.cache_bytes to hold what all processes use at once"
        )

    def _require_own(self) -> None:
        """Make the directory, or refuse one that somebody else could write to."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = os.lstat(self._directory)
        except OSError as error:
            raise ConfigError(
                f"data.cache = {str(self._directory)!r}: {error.strerror}; expected a directory of your own"
            ) from error
        private = stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o022
        if not private or found.st_uid != os.getuid():
            raise ConfigError(
                f"data.cache = {str(self._directory)!r}: belongs to user {found.st_uid} with mode "
                f"{stat.filemode(found.st_mode)}; expected a directory that only user {os.getuid()} can write to"
            )

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold the lock of a shard, or of "room". The kernel releases it if the process dies."""
        try:
            lock = os.open(
                self._directory / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
        except OSError as error:
            raise StoreError(f"data cache {self._directory}: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _verify(self, descriptor: int, sha256: str, name: str) -> None:
        """Hash the file unless this very file was hashed before."""
        marker = self._directory / f"{sha256}.verified"
        identity = _identity(os.fstat(descriptor))
        with suppress(OSError, ValueError):
            if json.loads(marker.read_text()) == identity:
                os.utime(marker)
                return
        try:
            with os.fdopen(os.dup(descriptor), "rb") as file:
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise StoreError(f"{name}: {error.strerror}") from error
        if digest != sha256:
            raise DataError(f"{name}: corrupt, its SHA-256 is not that of the manifest; {REMEDY}")
        if _identity(os.fstat(descriptor)) == identity:
            # Without room for a marker the next worker hashes again.
            with suppress(OSError):
                partial = marker.with_suffix(_MARKING)
                partial.write_text(json.dumps(identity))
                partial.replace(marker)

    def _fetch(self, path: Path, size: int, name: str, download: Callable[[Path], None]) -> None:
        arriving, room = path.with_suffix(_ARRIVING), path.with_suffix(_ROOM)
        try:
            with self._locked("room"):
                self._make_room(size)
                with room.open("wb") as reservation:
                    # As large as the shard will be, and without a byte on the disk.
                    reservation.truncate(size)
            download(arriving)
            # Under one lock: otherwise another process could count neither the shard nor its reservation.
            with self._locked("room"):
                arriving.replace(path)
                room.unlink(missing_ok=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                # The disk is smaller than the bound: the next attempt finds the unused shards already removed.
                with self._locked("room"):
                    self._make_room(self._bytes_max)
            raise StoreError(
                f"data cache {self._directory}: {error.strerror} while {name} was downloaded"
            ) from error
        finally:
            arriving.unlink(missing_ok=True)
            room.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Remove what was used least recently and nobody maps, until `size` more bytes fit the bound."""
        for path in [*self._directory.glob(f"*{_ROOM}"), *self._directory.glob(f"*{_ARRIVING}")]:
            self._sweep(path)
        taken, shards = 0, []
        for path in [*self._directory.glob("*.bin"), *self._directory.glob(f"*{_ROOM}")]:
            with suppress(OSError):
                found = path.stat()
                taken += found.st_size
                if path.suffix == ".bin":
                    marker = path.with_suffix(".verified")
                    used_s = marker.stat().st_mtime if marker.exists() else found.st_mtime
                    shards.append((used_s, found.st_size, path))
        left = taken + size - self._bytes_max
        for _, bytes_, path in sorted(shards):
            if left <= 0:
                return
            if _remove_unused(path):
                left -= bytes_

    def _sweep(self, path: Path) -> None:
        """Remove what a download has left whose process is gone: nobody holds its lock."""
        with suppress(OSError):
            lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
            finally:
                os.close(lock)


def _open_shared(path: Path) -> int | None:
    """A descriptor with a shared lock on the file that lies at `path`; None if it was removed meanwhile."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
            return descriptor
    except FileNotFoundError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _remove_unused(path: Path) -> bool:
    """Remove a shard that no process maps."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.stat(path).st_ino != os.fstat(descriptor).st_ino:
            return False
        path.with_suffix(".verified").unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _identity(found: os.stat_result) -> list[int]:
    """What tells one state of one file from any other one."""
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
