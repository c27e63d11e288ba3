"""A machine for units: a real systemd as the first process of its own namespaces, with a copy of this machine's files.

    unshare ─► bash: overlay over /, own /run, /tmp, /dev/shm, /proc, cgroups ─► chroot ─► systemd ─► the unit

Nothing of the machine's own systemd, if it has one, is touched: what is written to the root goes to memory, and all is gone
when the first process ends. It shares the network. Needs root.
"""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from elastic_pt.chaos.servers import start, wait_until
from elastic_pt.errors import UnexpectedError

COMMANDS: Final = ("systemctl", "systemd-analyze", "unshare", "nsenter", "useradd")

_SYSTEMD: Final = "/lib/systemd/systemd"
_ROOT: Final = Path(__file__).parents[2]
_TIMEOUT_S: Final = 60.0
_BOOT: Final = r"""
set -euo pipefail
top=$1 python=$2 packages=$3 source=$4 state=$5
mount --make-rprivate /
mount -t tmpfs tmpfs "$top"
mkdir "$top"/{upper,work,root}
mount -t overlay overlay -o "lowerdir=/,upperdir=$top/upper,workdir=$top/work" "$top/root"
cd "$top/root"
mount -t proc proc proc
mount --rbind /sys sys
mount -t tmpfs tmpfs sys/fs/cgroup
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount --rbind /dev dev
mount -t tmpfs -o mode=1777 tmpfs dev/shm
mount -t tmpfs tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
# Only what the test starts.
rm -rf etc/systemd/system/*
cp -r "$top".files/. .
chroot . useradd --system --home-dir /var/lib/elastic-pt --shell /usr/sbin/nologin elastic-pt
mkdir -p opt/python opt/packages opt/source var/lib/elastic-pt
mount --bind "$python" opt/python
mount --bind "$packages" opt/packages
mount --bind "$source" opt/source
mount --bind "$state" var/lib/elastic-pt
chroot . /opt/python/bin/python3 -m venv --without-pip /opt/elastic-pt
printf '/opt/source\n/opt/packages\n' > "$(echo opt/elastic-pt/lib/python3*/site-packages)/paths.pth"
# An interpreter with a shared library would find it where it was built, which no user of this machine may read.
cat > opt/elastic-pt/bin/elastic-pt <<'END'
#!/bin/sh
LD_LIBRARY_PATH=/opt/python/lib exec /opt/elastic-pt/bin/python -m elastic_pt "$@"
END
chmod 755 opt/elastic-pt/bin/elastic-pt
container=elastic-pt exec chroot . /lib/systemd/systemd --system --unit=idle.target
"""
_IDLE: Final = "[Unit]\nDefaultDependencies=no\n"


def missing_for_systemd() -> str:
    """Why this machine cannot start one, as a clause ("since ... are not installed"); empty if it can."""
    if os.geteuid() != 0:
        return "since that takes root"
    if not os.access(_cgroups() / "cgroup.procs", os.W_OK):
        return "since it has no cgroups of version 2 that can be written"
    absent = [command for command in COMMANDS if shutil.which(command) is None]
    absent += [] if Path(_SYSTEMD).exists() else [_SYSTEMD]
    return f"since {', '.join(absent)} are not installed" if absent else ""


class Machine:
    """A running systemd with no unit but those in `files`; a context manager that leaves nothing behind.

    It has the user elastic-pt, and /opt/elastic-pt with this very code. Its /var/lib/elastic-pt is `state`.
    """

    def __init__(self, directory: Path, files: Mapping[str, tuple[str, int]]) -> None:
        """`files`: text and mode by absolute path. `directory` is empty, and nothing else uses it."""
        self.state = directory / "state"
        self.state.mkdir()
        self._top = directory / "machine"
        self._top.mkdir()
        self._log = directory / "machine.log"
        units = {"/etc/systemd/system/idle.target": (_IDLE, 0o644)}
        for path, (text, mode) in {**units, **files}.items():
            copied = Path(f"{self._top}.files{path}")
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_text(text)
            copied.chmod(mode)
        self._cgroup = _cgroups() / f"elastic-pt-{uuid.uuid4().hex[:8]}"
        self._shell: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._cgroup.mkdir()
        script = f'echo $$ > "{self._cgroup}/cgroup.procs"; exec unshare -mpiuC --fork --kill-child bash -c "$0" boot "$@"'
        places = [sys.base_prefix, sysconfig.get_path("purelib"), str(_ROOT), str(self.state)]
        command = ["bash", "-c", script, _BOOT, str(self._top), *places]
        try:
            self._shell = start(command, self._log, dict(os.environ))
            wait_until("systemd", self._answers, _TIMEOUT_S, self._log)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill the first process, and so all of them, and remove the cgroups."""
        if self._shell is not None:
            self._shell.kill()
            self._shell.wait()
        deadline_s = time.monotonic() + _TIMEOUT_S
        while self._cgroup.exists():
            for each in sorted(self._cgroup.rglob("*/"), reverse=True):
                _remove(each)
            _remove(self._cgroup)
            if time.monotonic() > deadline_s:
                raise UnexpectedError(f"{self._cgroup} is still in use")
            time.sleep(0.01)

    def run(self, *words: str) -> str:
        """What a command on that machine prints. Raises `UnexpectedError` if it fails."""
        done = self._run(*words)
        if done.returncode:
            raise UnexpectedError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr}")
        return done.stdout

    def show(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).strip()

    def journal(self, unit: str) -> str:
        """What a unit has printed."""
        return self.run("journalctl", "--no-pager", "--output=cat", f"--unit={unit}")

    def until(self, what: str, condition: Callable[[], bool], timeout_s: float) -> None:
        """Wait for a condition; fails with what all units have printed last."""
        try:
            wait_until(what, condition, timeout_s, self._log)
        except UnexpectedError as error:
            tail = self.run("journalctl", "--no-pager", "--lines=40")
            raise AssertionError(f"{error}\n{tail}") from error

    def kill(self, pid: int) -> None:
        """SIGKILL to a process, by its id on that machine."""
        self.run("kill", f"-{signal.SIGKILL.value}", str(pid))

    def _answers(self) -> bool:
        return self._run("systemctl", "is-system-running").stdout.strip() in ("running", "degraded")

    def _run(self, *words: str) -> subprocess.CompletedProcess[str]:
        assert self._shell is not None
        children = Path(f"/proc/{self._shell.pid}/task/{self._shell.pid}/children")
        first = children.read_text().split()
        enter = ["nsenter", f"--target={first[0] if first else 0}", "--all", "--root", "--wd"]
        return subprocess.run(
            [*enter, *words], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )


def _cgroups() -> Path:
    """The top of cgroups of version 2, which a machine may also have beside those of version 1."""
    beside = Path("/sys/fs/cgroup/unified")
    return beside if beside.exists() else Path("/sys/fs/cgroup")


def _remove(cgroup: Path) -> None:
    try:
        cgroup.rmdir()
    except OSError:
        # A process in it has not ended yet.
        return
