"""The directories that all programs of a machine share, for one node alone. Needs root on Linux.

    node's mounts:  /tmp, /var/tmp, /dev/shm    directories of its own, so what is left there is this node's
                    below them                  what must stay reachable: the run, and the program itself

The mounts are in a mount namespace that only the node's processes are in: they are gone with them, and the machine's own
mounts never change. The process of a chaos run.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Final

import elastic_pt

_SHARED: Final = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"))


@cache
def missing_for_mounts() -> str:
    """Why this process cannot give a node mounts of its own, as a clause ("which need root"); empty if it can."""
    if os.geteuid() != 0:
        return "which need root"
    if shutil.which("unshare") is None:
        return "since unshare is not installed"
    # A container may allow the namespace and refuse the mount.
    tried = ["unshare", "--mount", "mount", "--bind", "/tmp", "/tmp"]
    done = subprocess.run(tried, capture_output=True, check=False)
    return "since this machine allows none" if done.returncode else ""


def hidden(kept: Collection[Path]) -> list[Path]:
    """The shared directories that a node can have of its own: all that are not in something that must stay reachable."""
    shared = dict.fromkeys(each.resolve() for each in _SHARED if each.is_dir())
    return [each for each in shared if not any(each.is_relative_to(path) for path in kept)]


def below(shared: Path, kept: Collection[Path]) -> list[Path]:
    """The outermost of the `kept` directories that are in a shared one, relative to it."""
    inside = {each.relative_to(shared) for each in kept if each.is_relative_to(shared)}
    return sorted(each for each in inside if not inside & set(each.parents))


def of_the_program() -> list[Path]:
    """Where the program is that runs, with all that it imports."""
    places = [sys.prefix, sys.base_prefix, *sys.path, *os.environ.get("PYTHONPATH", "").split(":")]
    # An editable installation is on no path: a finder knows where it is.
    places.append(str(Path(elastic_pt.__file__).parents[1]))
    return [Path(each) for each in places if each and Path(each).is_dir()]


def prefix_for_mounts(own: Mapping[Path, Path], kept: Collection[Path]) -> list[str]:
    """Words to put before a command: it sees `own[shared]` in place of each shared directory, under the same process id.

    The directories `kept` are where they were. Makes the empty directories where they are mounted.
    """
    commands: list[Sequence[str]] = []
    for shared, instead in own.items():
        for each in below(shared, kept):
            (instead / each).mkdir(parents=True, exist_ok=True)
            commands.append(["mount", "--bind", str(shared / each), str(instead / each)])
    # Afterwards: the directories of the node are in one of the shared ones, which must come last.
    order = sorted(own, key=lambda shared: own[shared].is_relative_to(shared))
    commands += [["mount", "--rbind", str(own[shared]), str(shared)] for shared in order]
    script = " && ".join([*map(shlex.join, commands), 'exec "$@"'])
    return ["unshare", "--mount", "sh", "-c", script, "sh"]
