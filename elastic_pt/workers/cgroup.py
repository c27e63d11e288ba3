"""Whether the kernel killed a worker because memory ran out: its cgroup counts OOM kills. Agent process."""

from pathlib import Path, PurePosixPath


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
    candidates = []
    for line in cgroups.splitlines():
        hierarchy, controllers, group = line.split(":", 2)
        if hierarchy == "0":
            candidates += [
                each / "memory.events" for each in _directories(mounts, "cgroup2", "", group)
            ]
        elif "memory" in controllers.split(","):
            candidates += [
                each / "memory.oom_control"
                for each in _directories(mounts, "cgroup", "memory", group)
            ]
    return candidates


def _directories(mounts: str, kind: str, option: str, group: str) -> list[Path]:
    found = []
    for line in mounts.splitlines():
        where, _, filesystem = line.partition(" - ")
        root, point = where.split()[3:5]
        found_kind, _, options = filesystem.split(None, 2)
        if found_kind == kind and (not option or option in options.split(",")):
            inside = PurePosixPath(group)
            # A mount may show only a part of the hierarchy, as in a container.
            below = inside.relative_to(root) if inside.is_relative_to(root) else PurePosixPath()
            found.append(Path(point) / below)
    return found
