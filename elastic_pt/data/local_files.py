"""The open files of local shards: a `file://` store is read where it is.

A file may be replaced, written to or removed while it is open. So whoever reads it compares its identity before and
after. Runs in workers and in the command line's process. Safe to share between threads.
"""

import errno
import os
import threading
from collections import deque
from pathlib import Path
from typing import Final

from elastic_pt.data.blocks import Identity, LocalFile, OpenShard, identity_of

_OPEN_MAX: Final = 512
"""The file that was opened first is closed."""


class LocalFiles:
    """Opens the files of shards below a directory, and closes them when there are too many."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._open_ones: deque[OpenShard] = deque()

    def identity(self, shard: OpenShard) -> Identity:
        """Of the file that now has the name of a shard, which is opened if it is not. Raises `OSError`."""
        if shard.file is not None and (found := identity_of(shard.file.descriptor)):
            return found
        if not (found := identity_of(self._open(shard).descriptor)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return found

    def read(self, shard: OpenShard, start: int, end: int) -> bytes:
        """Bytes [start, end) of a shard; fewer if the file ends before. Raises `OSError`."""
        file = shard.file or self._open(shard)
        try:
            return os.pread(file.descriptor, end - start, start)
        except OSError:
            # Stale, perhaps: the next attempt opens it again.
            shard.file = None
            raise

    def close_half(self) -> bool:
        """Close half of the open files: the process may have too many of all kinds. False if none is open."""
        with self._lock:
            count = -(-len(self._open_ones) // 2)
            for _ in range(count):
                self._open_ones.popleft().file = None
        return count > 0

    def _open(self, shard: OpenShard) -> LocalFile:
        path = self._root / shard.shard.key
        try:
            file = LocalFile(path)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            self.close_half()
            file = LocalFile(path)
        shard.file = file
        with self._lock:
            self._open_ones.append(shard)
            if len(self._open_ones) > _OPEN_MAX:
                self._open_ones.popleft().file = None
        return file
