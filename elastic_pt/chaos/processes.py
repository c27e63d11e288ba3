"""Finding and ending the processes of a scenario, from /proc alone.

Every process of a scenario inherits an environment variable with a value unique to the scenario. It survives changes
of session, group and parent, so leftover processes are found by it. One that was started without it is found by the
directories of its node, in which it stands or which are mounted for it.
"""

import os
import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

MARK: Final = "ELASTIC_PT_CHAOS"
_PROC: Final = Path("/proc")


@contextmanager
def mark_children() -> Iterator[str]:
    """Give all processes that are started meanwhile a unique mark."""
    before, value = os.environ.get(MARK), uuid.uuid4().hex
    os.environ[MARK] = value
    try:
        yield value
    finally:
        if before is None:
            del os.environ[MARK]
        else:
            os.environ[MARK] = before


def marked(value: str) -> dict[int, int]:
    """Living processes that carry the mark, as pid -> parent's pid; zombies hold nothing and do not count."""
    wanted = f"{MARK}={value}".encode()
    found = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            # A process may end, or turn out to be somebody else's, while it is looked at.
            with suppress(OSError):
                if wanted not in (entry / "environ").read_bytes().split(b"\0"):
                    continue
                state, parent = (entry / "stat").read_text().rpartition(") ")[2].split()[:2]
                if state != "Z":
                    found[int(entry.name)] = int(parent)
    return found


def those_in(directory: Path) -> list[int]:
    """Living processes that stand in a directory, or have a mount of something in it. Its name is that of no other one."""
    inside = f"/{directory.name}/"
    found = []
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            # A process may end while it is looked at. A zombie has neither of the two.
            with suppress(OSError):
                current = str((entry / "cwd").readlink())
                if inside in f"{current}/" or inside in (entry / "mountinfo").read_text():
                    found.append(int(entry.name))
    return found


def workers_of(agent: int, value: str) -> list[int]:
    """Worker processes of an agent: the children of its fork server."""
    parents = marked(value)
    children = {pid for pid, parent in parents.items() if parent == agent}
    return sorted(pid for pid, parent in parents.items() if parent in children)


def fork_server_of(agent: int, value: str) -> int:
    """The process that forks an agent's workers: the child that has children itself; 0 if there is none."""
    parents = marked(value)
    return next((pid for pid, up in parents.items() if up == agent and pid in parents.values()), 0)


def kill_all(value: str) -> None:
    """SIGKILL to everything that carries the mark."""
    for pid in marked(value):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
