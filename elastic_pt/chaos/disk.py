"""A small disk for one node, which a chaos run fills or makes read-only. Needs root on Linux.

    node's mounts:  <directory>  tmpfs of its own  ◄── nsenter, /proc/<pid>/root ── this process

The mount is in a mount namespace that only the node's processes are in: it is gone with them, and the machine's own
mounts never change.
"""

import subprocess
import threading
from pathlib import Path
from typing import Final

from elastic_pt.errors import UnexpectedError

_BYTES: Final = 64 << 20
_CHUNK: Final = bytes(4096)
_RETRY_S: Final = 0.001
_BLOB: Final = "filled-by-chaos"
_MOUNT: Final = 'mount -t tmpfs -o size={size} tmpfs "$0" && exec "$@"'


def prefix_for_disk(directory: Path) -> list[str]:
    """Words to put before a command: it then has a small disk of its own at `directory`, under the same process id."""
    directory.mkdir(parents=True, exist_ok=True)
    return ["unshare", "--mount", "sh", "-c", _MOUNT.format(size=_BYTES), str(directory)]


class Disk:
    """The disk of a running node; `pid` is one of the node's processes."""

    def __init__(self, directory: Path, pid: int) -> None:
        self._directory = directory
        self._pid = pid
        self._blob = Path(f"/proc/{pid}/root{directory}/{_BLOB}")
        self._ends = threading.Event()
        self._filler = threading.Thread(target=self._fill, daemon=True)

    def fill(self) -> None:
        """Take all room there is, and all that others free, until `empty`."""
        self._filler.start()

    def empty(self) -> None:
        """Free the room."""
        self._ends.set()
        self._filler.join()
        self._blob.unlink(missing_ok=True)

    def make_read_only(self) -> None:
        """Lay a read-only view over the directory: files that are open stay writable, as on a disk that the kernel remounts."""
        self._mount("--bind", str(self._directory), str(self._directory))
        self._mount("-o", "remount,bind,ro", str(self._directory))

    def make_writable(self) -> None:
        """Take the view away."""
        self._inside("umount", "-l", str(self._directory))

    def _fill(self) -> None:
        # The node may end meanwhile: then there is nothing to fill any more.
        try:
            with self._blob.open("wb", buffering=0) as file:
                while not self._ends.is_set():
                    try:
                        file.write(_CHUNK)
                    except OSError:
                        self._ends.wait(_RETRY_S)
        except FileNotFoundError:
            return

    def _mount(self, *words: str) -> None:
        self._inside("mount", *words)

    def _inside(self, *command: str) -> None:
        whole = ["nsenter", f"--mount=/proc/{self._pid}/ns/mnt", "--", *command]
        done = subprocess.run(whole, capture_output=True, text=True, check=False)
        # A node that has ended has no disk any more.
        if done.returncode and Path(f"/proc/{self._pid}").exists():
            raise UnexpectedError(f"{' '.join(whole)}: {done.stderr.strip()}")
