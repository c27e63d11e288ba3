"""Blocks of remote shards on this machine's disk, for all its processes: in small files, which never change.

    <cache>/bytes               boot id and counted bytes; locked while they change
    <cache>/evicting            locked by the process that makes room (data/eviction.py)
    <cache>/claims              parts of it are locked while blocks are fetched, so that others wait for them
    <cache>/<sha256>/place      where the shard is in its data: JSON
    <cache>/<sha256>/index      its block index
    <cache>/<sha256>/<number>, <first>-<end>        a block, or consecutive blocks: an extent
    <cache>/<sha256>/<name>.<pid>-<thread>.part     one that is being written

A file is written under another name and renamed, so it is whole or absent; to evict its blocks is to unlink it. Reading
takes no lock. Each process verifies a block before its own first use, so a file that a crash or a disk has damaged
costs one fetch.

The bytes of a file are counted before its `.part` is created, and until it is unlinked, so the files stay within
`bytes_max`. What a killed process leaves is a `.part`, which the next eviction removes, or a number that is too large,
which it finds.

The cache is best effort. If it has no room, or its directory fails, the verified bytes serve the batch all the same.

The directory must be this user's own: another user with write access could fill the disk or follow what is read.
Runs in workers and in the command line's process. Safe to share between threads.
"""

import errno
import fcntl
import functools
import os
import re
import stat
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from elastic_pt.data.blocks import Extent, Place
from elastic_pt.data.eviction import (
    PART,
    PLACE,
    SHARD_BYTES,
    CachedShard,
    Order,
    evict,
    extent_of,
    list_files,
    on_disk,
    place_bytes,
)
from elastic_pt.errors import ConfigError

_OF_EARLIER_VERSIONS: Final = re.compile(
    r"([0-9a-f]{64}(-[0-9a-f]{16})?|room)\.(bin|verified|lock|arriving|room|marking|blocks|tokens|new)"
)
_DISK_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_COUNTED: Final = struct.Struct("<40sq")
"""Boot id, and bytes."""
_OWN_BYTES: Final = 4 * 4096
"""Counted for the directory and its files."""
_LOCK: Final = struct.Struct("hhqqixxxx")
"""The kernel's `struct flock` on 64-bit Linux."""
_POLL_S: Final = 0.005
_LOCK_TIMEOUT_S: Final = 1.0
"""A process that holds the lock may be stopped. The blocks are not kept then."""
_ROOM_TIMEOUT_S: Final = 4.0
"""For the eviction of another process: two seconds of a cache of a million blocks."""
_PAUSE_S: Final = 10.0
"""After trouble with the directory nothing is written to it for this long."""
_LISTINGS_MAX: Final = 8
_FREED_SHARE: Final = 16
"""Each eviction frees this part of the bound, besides what is needed now."""
_FREED_STEPS: Final = 4


def cache_directory(configured: str) -> Path:
    """The directory of the shards: `data.cache`, or one per user below the temporary directory.

    Agents resolve it before they replace the temporary directory by their scratch directory.
    """
    if configured:
        return Path(configured).expanduser().absolute()
    # Not the prefix of scratch directories: agents remove those, and both may be below the same directory.
    return Path(tempfile.gettempdir(), f"elastic-pt-tokens-{os.getuid()}")


class ShardCache:
    """The blocks in one directory. Processes and threads may share it."""

    def __init__(self, directory: Path, bytes_max: int) -> None:
        self._directory = directory
        self.bytes_max: Final = bytes_max
        self._paused_until_s = 0.0
        self._counting = threading.Lock()
        self._checked = False
        self.order: Order | None = None
        """Of this process's run, if it has one."""

    def require(self, largest_bytes: int, name: str) -> None:
        """Refuse a directory that is not this user's own, or a bound below one block. Raises `ConfigError`."""
        self.require_own()
        if largest_bytes > self.bytes_max:
            raise ConfigError(
                f"data.cache_bytes = {self.bytes_max}: too small for {name}; expected at least {largest_bytes}"
            )

    def require_own(self) -> None:
        """Create the directory, or refuse one that another user can write to. Removes files of earlier versions."""
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
        with suppress(OSError):
            for path in self._directory.iterdir():
                if _OF_EARLIER_VERSIONS.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    @property
    def writes(self) -> bool:
        """Whether blocks can be kept; not for a while after trouble with the directory."""
        return time.monotonic() >= self._paused_until_s

    def directory_of(self, sha256: str) -> str:
        """Where the files of a shard are, if there are any."""
        return f"{self._directory}/{sha256}"

    def extents(self, sha256: str) -> list[Extent]:
        """The extents of a shard. Raises `ConfigError` if the directory is not this user's own."""
        if not self._checked:
            self.require_own()
            self._checked = True
        try:
            names = os.listdir(f"{self._directory}/{sha256}")
        except OSError:
            return []
        return [found for name in names if (found := extent_of(name)) is not None]

    def has(self, sha256: str, name: str) -> bool:
        """Whether a file of a shard is there."""
        return os.path.exists(f"{self._directory}/{sha256}/{name}")

    def content(
        self, sha256: str, name: str, start: int = 0, end: int | None = None
    ) -> bytes | None:
        """Bytes [start, end) of a file of a shard, which are not verified; None if there is none."""
        try:
            with open(f"{self._directory}/{sha256}/{name}", "rb", buffering=0) as file:
                file.seek(start)
                return file.read(-1 if end is None else end - start)
        except OSError:
            return None

    def keep(self, sha256: str, place: Place, name: str, data: bytes | memoryview) -> bool:
        """Write a file of a shard: verified bytes, unless it is there. False if it has no room now."""
        path = f"{self._directory}/{sha256}/{name}"
        if not self.writes:
            return False
        if os.path.exists(path):
            return True
        part = f"{path}.{os.getpid()}-{threading.get_native_id()}{PART}"
        try:
            if not self._reserve(part, place, len(data)):
                return False
            try:
                _write(part, data)
                os.rename(part, path)
            except BaseException:
                self._discard(part, len(data))
                raise
        except FileNotFoundError:
            # Evicted meanwhile, or a person has removed the directory.
            return False
        except OSError as error:
            with suppress(OSError):
                if error.errno in _DISK_FULL:
                    self._make_room(None)
                else:
                    self._paused_until_s = time.monotonic() + _PAUSE_S
            return False
        return True

    def remove(self, sha256: str, name: str, size: int) -> None:
        """Remove a file of a shard, which is damaged; it was kept with `size` bytes."""
        self._discard(f"{self._directory}/{sha256}/{name}", size)

    def used(self, sha256: str) -> None:
        """Record that a shard is in use, for eviction."""
        with suppress(OSError):
            os.utime(f"{self._directory}/{sha256}/{PLACE}")

    @contextmanager
    def claimed(self, sha256: str, first: int, end: int, *, until_s: float) -> Iterator[bool]:
        """While the blocks [first, end) are fetched, other processes and threads that claim some of them wait.

        Waits itself until `until_s` on the monotonic clock; True if it has waited. The kernel ends the claim of a
        killed process. If the file system has no locks, nobody waits.
        """
        claims, has_waited = -1, False
        try:
            with suppress(OSError):
                claims = self._open("claims")
                # 40 bits of the shard and 22 of the block: a clash costs a wait.
                start = (int(sha256[:10], 16) << 22) + first
                lock = _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, end - first, 0)
                while not _try(lambda: fcntl.fcntl(claims, fcntl.F_OFD_SETLK, lock)):
                    has_waited = True
                    if time.monotonic() > until_s:
                        break
                    time.sleep(_POLL_S)
            yield has_waited
        finally:
            if claims >= 0:
                os.close(claims)

    def _reserve(self, part: str, place: Place, size: int) -> bool:
        """Count the bytes of a file, and create it under its first name; before, evict if that is needed."""
        if _OWN_BYTES + SHARD_BYTES + on_disk(size) > self.bytes_max:
            return False
        until_s, has_evicted = time.monotonic() + _ROOM_TIMEOUT_S, False
        while True:
            with self._counted() as counted:
                is_new = not os.path.isdir(os.path.dirname(part))
                count = on_disk(size) + SHARD_BYTES * is_new
                if counted.bytes is not None and counted.bytes + count <= self.bytes_max:
                    # In this order: if the process is killed between them, the number is too large.
                    counted.add(count)
                    try:
                        if _create(part, place, size) and not is_new:
                            # It was evicted meanwhile.
                            counted.add(SHARD_BYTES)
                    except OSError:
                        with suppress(OSError):
                            os.unlink(part)
                        counted.add(-on_disk(size))
                        raise
                    return True
            if has_evicted:
                return False
            has_evicted = self._make_room(count)
            if not has_evicted:
                if time.monotonic() > until_s:
                    raise TimeoutError(f"{self._directory}: no room within {_ROOM_TIMEOUT_S} s")
                time.sleep(_POLL_S)

    def _discard(self, path: str, size: int) -> None:
        """Remove a file that was counted with `size` bytes."""
        # Under the lock: whoever counts the files sees both changes, or none.
        with suppress(OSError), self._counted() as counted:
            os.unlink(path)
            counted.add(-on_disk(size))

    def _make_room(self, count: int | None) -> bool:
        """Evict, so that `count` more bytes fit. False if another process or thread does so.

        None: the disk is full, so the files must become fewer than they are.
        """
        evicting = self._open("evicting")
        try:
            if not _try(lambda: fcntl.flock(evicting, fcntl.LOCK_EX | fcntl.LOCK_NB)):
                return False
            found, freed = list_files(self._directory)
            taken = _taken(found)
            keep = taken if count is None else self.bytes_max - count
            need = taken - keep
            for _ in range(_FREED_STEPS):
                need += keep // (_FREED_SHARE * _FREED_STEPS)
                evicted = evict(found, need, self.order)
                need -= evicted
                freed += evicted
                # After each step: others wait for room.
                with self._counted() as counted:
                    counted.add(-freed)
                taken, freed = taken - evicted, 0
            with self._counted() as counted:
                least = taken - self.bytes_max // _FREED_SHARE
                if counted.bytes is None or not least <= counted.bytes <= keep:
                    counted.set(self._count())
            return True
        finally:
            os.close(evicting)

    @contextmanager
    def _counted(self) -> Iterator["_Counted"]:
        """The counted bytes, locked. Raises `OSError` if their lock is not free in time."""
        until_s = time.monotonic() + _LOCK_TIMEOUT_S
        # The threads of this process wait for one another without polling.
        if not self._counting.acquire(timeout=_LOCK_TIMEOUT_S):
            raise TimeoutError(f"{self._directory}/bytes: locked for {_LOCK_TIMEOUT_S} s")
        file = -1
        try:
            file = self._open("bytes")
            while not _try(lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)):
                if time.monotonic() > until_s:
                    raise TimeoutError(f"{self._directory}/bytes: locked for {_LOCK_TIMEOUT_S} s")
                time.sleep(_POLL_S / 10)
            yield _Counted(file)
        finally:
            if file >= 0:
                os.close(file)
            self._counting.release()

    def _count(self) -> int | None:
        """The bytes of all files, while nobody else creates or removes one. None if running writes do not end."""
        before = -1
        for _ in range(_LISTINGS_MAX):
            found, _ = list_files(self._directory)
            # A listing can miss a file that is renamed meanwhile, the next one cannot.
            if (taken := _taken(found)) == before:
                return taken
            before = taken
        return None

    def _open(self, name: str) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            return os.open(f"{self._directory}/{name}", flags, 0o600)
        except FileNotFoundError:
            # A person has removed the directory.
            try:
                self.require_own()
            except ConfigError as error:
                # Refused at the start; later the cache is best effort.
                raise OSError(str(error)) from error
            return os.open(f"{self._directory}/{name}", flags, 0o600)


class _Counted:
    """The number in the file `bytes`, while it is locked."""

    def __init__(self, file: int) -> None:
        self._file = file
        data = os.pread(file, _COUNTED.size, 0)
        boot, count = _COUNTED.unpack(data) if len(data) == _COUNTED.size else (b"", 0)
        # After a restart of the machine the number may be older than the files.
        self.bytes: int | None = count if boot == _boot_id() else None
        """None if it is not known: the next eviction counts the files."""

    def set(self, count: int | None) -> None:
        """Write the number."""
        self.bytes = count
        boot = b"" if count is None else _boot_id()
        os.pwrite(self._file, _COUNTED.pack(boot, max(0, count or 0)), 0)

    def add(self, count: int) -> None:
        """Change the number, if it is known."""
        if self.bytes is not None:
            self.set(self.bytes + count)


def _taken(found: list[CachedShard]) -> int:
    return _OWN_BYTES + sum(each.bytes for each in found)


def _try(lock: Callable[[], object]) -> bool:
    """Whether a lock was free."""
    try:
        lock()
    except BlockingIOError:
        return False
    return True


def _create(part: str, place: Place, size: int) -> bool:
    """Create a file of the right size, and before the directory of its shard, if that is new: True then."""
    directory, is_new = os.path.dirname(part), False
    with suppress(FileExistsError):
        os.mkdir(directory, mode=0o700)
        is_new = True
    if not os.path.exists(f"{directory}/{PLACE}"):
        Path(part).write_bytes(place_bytes(place))
        os.rename(part, f"{directory}/{PLACE}")
    with open(part, "wb") as file:
        file.truncate(size)
    return is_new


def _write(path: str, data: bytes | memoryview) -> None:
    with open(path, "r+b", buffering=0) as file:
        left = memoryview(data)
        while left:
            left = left[file.write(left) :]


@functools.cache
def _boot_id() -> bytes:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()[:40].ljust(40, b"\0")
    except OSError:
        return b"unknown".ljust(40, b"\0")
