"""What the cgroup of a process tells: its limits, and whether the kernel killed a worker because memory ran out.

Agent process, and the command line's process.
"""

from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Final

_NO_LIMIT: Final = 2**60
"""cgroup v1 writes a number near 2^63 for no limit."""


class OomKills:
    """OOM kills in the cgroup of a process from now on. Create it while that process is alive.

    Reads `memory.events` (cgroup v2) or `memory.oom_control` (v1) of the process's own group. Without either, as on a
    machine without containers, it reads the machine's `/proc/vmstat`. Each has a line `oom_kill`.
    """

    def __init__(self, pid: int) -> None:
        self._path = oom_counter(pid)
        self._before = read_oom_kills(self._path)

    def happened(self) -> bool:
        """Whether one has happened since."""
        return read_oom_kills(self._path) > self._before


def oom_counter(pid: int) -> Path:
    """The file that counts the OOM kills of a living process's cgroup."""
    machine = Path("/proc/vmstat")
    try:
        cgroups = Path(f"/proc/{pid}/cgroup").read_text()
        candidates = oom_counters(cgroups, Path("/proc/self/mountinfo").read_text())
    except OSError:
        return machine
    return next((path for path in candidates if path.exists()), machine)


def read_oom_kills(path: Path) -> int:
    """The `oom_kill` line of a counter file; 0 if it has none."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def oom_counters(cgroups: str, mounts: str) -> list[Path]:
    """Where the counter of a process may be, given the texts of its `/proc/PID/cgroup` and of `mountinfo`."""
    return [
        group / name
        for group, name, _ in _groups(
            cgroups, mounts, "memory", "memory.events", "memory.oom_control"
        )
    ]


def read_limit(controller: str, name: str, name_v1: str) -> int | None:
    """The least limit of this process's cgroup and of those around it; None without one.

    `name` is the file of the controller in cgroup v2, such as `memory.max`, `name_v1` that of v1. Of several numbers in
    a line the first one counts.
    """
    try:
        cgroups = Path("/proc/self/cgroup").read_text()
        found = _groups(
            cgroups, Path("/proc/self/mountinfo").read_text(), controller, name, name_v1
        )
    except OSError:
        return None
    limits = []
    for group, file, top in found:
        for each in (group, *group.parents):
            if not each.is_relative_to(top):
                break
            with suppress(OSError, ValueError, IndexError):
                limits.append(int((each / file).read_text().split()[0]))
    return min((each for each in limits if 0 < each < _NO_LIMIT), default=None)


def _groups(
    cgroups: str, mounts: str, controller: str, name: str, name_v1: str
) -> list[tuple[Path, str, Path]]:
    """Directories of a process's cgroup, the controller's file there, and where the hierarchy is mounted."""
    found = []
    for line in cgroups.splitlines():
        hierarchy, controllers, group = line.split(":", 2)
        if hierarchy == "0":
            found += [(*each, name) for each in _directories(mounts, "cgroup2", "", group)]
        elif controller in controllers.split(","):
            found += [
                (*each, name_v1) for each in _directories(mounts, "cgroup", controller, group)
            ]
    return [(directory, file, top) for directory, top, file in found]


def _directories(mounts: str, kind: str, option: str, group: str) -> list[tuple[Path, Path]]:
    """Directories of a group, each with the mount point above it."""
    found = []
    for line in mounts.splitlines():
        where, _, filesystem = line.partition(" - ")
        root, point = where.split()[3:5]
        found_kind, _, options = filesystem.split(None, 2)
        if found_kind == kind and (not option or option in options.split(",")):
            inside = PurePosixPath(group)
            # A mount may show only a part of the hierarchy, as in a container.
            below = inside.relative_to(root) if inside.is_relative_to(root) else PurePosixPath()
            found.append((Path(point) / below, Path(point)))
    return found
