"""Equal shares of the processor: one cgroup with a quota for each node. Needs root on Linux, else there are none.

A node that imports, or computes more than another, cannot take time from the others, as on machines of their own.
"""

import os
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

_V1: Final = Path("/sys/fs/cgroup/cpu")
_V2: Final = Path("/sys/fs/cgroup")
_PERIOD_US: Final = 10_000
"""Short, so that a node that has used its quota waits some milliseconds, not some tens of them."""
_EMPTY_S: Final = 5.0


class ProcessorShares:
    """Groups of processes with `cores` cores each. A context manager that removes them. Parent of the nodes."""

    def __init__(self, cores: float | None) -> None:
        """`cores` None sets no quotas."""
        self._quota_us = round((cores or 0.0) * _PERIOD_US)
        self._parents = () if cores is None else (_V1, _V2)
        self._root: Path | None = None
        self._groups: list[Path] = []

    def __enter__(self) -> Self:
        name = f"elastic-pt-goodput-{os.getpid()}"
        for parent in self._parents:
            try:
                if parent == _V2:
                    _set(parent / "cgroup.subtree_control", "+cpu")
                root = parent / name
                root.mkdir()
                self._groups.append(root)
                if parent == _V2:
                    _set(root / "cgroup.subtree_control", "+cpu")
                self._root = root
                self.place("probe")
            except OSError:
                self.close()
            else:
                break
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def limited(self) -> bool:
        """Whether nodes get quotas on this machine."""
        return self._root is not None

    def place(self, node: str) -> str:
        """A new group for a node: the file to which it writes its process id. Empty if there are no quotas."""
        if self._root is None:
            return ""
        group = self._root / node
        group.mkdir()
        self._groups.append(group)
        if (group / "cpu.max").exists():
            _set(group / "cpu.max", f"{self._quota_us} {_PERIOD_US}")
        else:
            _set(group / "cpu.cfs_period_us", str(_PERIOD_US))
            _set(group / "cpu.cfs_quota_us", str(self._quota_us))
        return str(group / "cgroup.procs")

    def close(self) -> None:
        """Remove the groups. Their processes have been killed; the kernel may need a moment for the last of them."""
        self._root = None
        deadline_s = time.monotonic() + _EMPTY_S
        while self._groups:
            with suppress(FileNotFoundError):
                try:
                    self._groups[-1].rmdir()
                except OSError:
                    if time.monotonic() < deadline_s:
                        time.sleep(0.01)
                        continue
            self._groups.pop()


def _set(file: Path, value: str) -> None:
    # Not `write_text`, which would create a file where there is no cgroup.
    with file.open("r+") as opened:
        opened.write(value)
