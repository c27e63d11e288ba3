"""Token shards on this machine: all processes share them, so each is downloaded and verified once.

    <cache>/<sha256>.bin        a downloaded shard; shared lock while a process maps it
    <cache>/<sha256>.verified   the identity of the file that had that hash: device, inode, size, times
    <cache>/<sha256>.lock       held while one process downloads or verifies; the others wait for its result
    <cache>/<sha256>.arriving   a download in progress
    <cache>/<sha256>.room       a sparse file of the download's final size; it reserves those bytes
    <cache>/room.lock           held while one process makes room and reserves it

Shards of a `file://` store are mapped in place and have only a marker (`.verified`) here. A marker is valid
for one identity of a file. A changed file is therefore hashed again, and a new worker does not hash a file that
another one has hashed. A download beyond `bytes_max` first removes the least recently used shards that no process
maps. A process may always hold the one shard that it needs, so several processes together can exceed a small bound.

The directory must be this user's own: another user with write access could choose the training data.
Runs in workers and in the command line's process.
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
    """The directory of the shards: `data.cache`, or one per user below the temporary directory.

    Agents resolve it before they replace the temporary directory by their scratch directory.
    """
    if configured:
        return Path(configured).expanduser().absolute()
    # Not the prefix of scratch directories: agents remove those, and both may be below the same directory.
    return Path(tempfile.gettempdir(), f"elastic-pt-tokens-{os.getuid()}")


class ShardCache:
    """The token shards in one directory. Processes may share it; threads may, if only one uses it at a time."""

    def __init__(self, directory: Path, bytes_max: int, *, readers: int = 1) -> None:
        """`readers`: processes of this node that read through the cache. None can remove what another one maps."""
        self._directory = directory
        self._bytes_max = bytes_max
        self.mapped_bytes_max: Final = bytes_max // (2 * readers)
        """Bytes that one reader should map at most, besides the shard that it needs."""

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
        """A descriptor of a local file whose content has that hash. The caller closes it.

        Raises `StoreError` if the file cannot be read now, and `DataError` if its size or hash is wrong.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StoreError(f"{name}: {error.strerror}") from error
        try:
            # Before the hash: a file of the wrong size need not be read.
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
        """A descriptor of the shard in the cache, with a shared lock on it. The caller closes it.

        The lock lasts as long as the descriptor or a copy of it. A memory map keeps a copy.

        `download(path)` writes the shard if the cache lacks it. Raises `ConfigError` if the shard cannot fit,
        `StoreError` if there is no room now, and `DataError` if the downloaded bytes have another hash.
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
                    # Another process has just removed it to make room.
                    continue
                try:
                    self._verify(descriptor, sha256, name)
                    return descriptor
                except DataError:
                    os.close(descriptor)
                    path.unlink(missing_ok=True)
                    # Download once more: the cached file may be damaged. After that, the store's own file is.
                    if damaged:
                        raise
                    damaged = True
                except BaseException:
                    os.close(descriptor)
                    raise
        raise StoreError(
            f"data cache {self._directory}: {name} was removed {_ATTEMPTS_MAX} times after its download; "
            "expected data.cache_bytes large enough for the shards that all processes use at once"
        )

    def _require_own(self) -> None:
        """Create the directory, or refuse one that another user can write to."""
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
        """Verify the hash of the file, unless a marker shows that this same file was verified before."""
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
            # If the marker cannot be written, the next worker hashes again.
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
                    # Sparse: the size of the shard, without its disk space.
                    reservation.truncate(size)
            download(arriving)
            # Under one lock: otherwise another process could count neither the shard nor its reservation.
            with self._locked("room"):
                arriving.replace(path)
                room.unlink(missing_ok=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                # The disk is smaller than the bound. Remove all unused shards, so that the next attempt has room.
                with self._locked("room"):
                    self._make_room(self._bytes_max)
            raise StoreError(
                f"data cache {self._directory}: {error.strerror} while {name} was downloaded"
            ) from error
        finally:
            arriving.unlink(missing_ok=True)
            room.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Remove the least recently used shards that no process maps, until `size` more bytes fit the bound."""
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
        """Remove a file of an unfinished download if no process holds its lock, so the downloader is gone."""
        with suppress(OSError):
            lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
            finally:
                os.close(lock)


def _open_shared(path: Path) -> int | None:
    """A descriptor with a shared lock on the file at `path`; None if another process has removed the file."""
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
    """Remove a shard unless a process maps it. True if it was removed."""
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
    """Values that identify one file in one state; a change of the file changes them."""
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
