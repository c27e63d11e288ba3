"""A real Slurm on loopback: munged, slurmctld, and a slurmd for each of a few virtual nodes.

The daemons run in the foreground, as children of this process, in a directory and on ports of their own, so several
clusters can run at once and none touches a Slurm of the machine. Jobs are real: a batch script under a slurmstepd.
Needs root, because slurmd starts jobs as the user who submitted them.

Two partitions have all nodes: `train`, the default, whose jobs are requeued when they are preempted, and `urgent`, whose
jobs preempt them.
"""

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from elastic_pt.chaos.servers import free_port, start, wait_until
from elastic_pt.errors import UnexpectedError

COMMANDS: Final = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol")

_TIMEOUT_S: Final = 30.0
_KILL_WAIT_S: Final = 15
"""Seconds from SIGTERM to SIGKILL when Slurm ends a job; 30 by default."""
_SILENT_S: Final = 6
"""Seconds after which a node that does not answer is down, and its job is queued again."""
_CONFIGURATION: Final = """\
ClusterName=elastic-pt
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge/socket
CredType=cred/munge
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool/%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout={silent_s}
MessageTimeout=3
KillWait={kill_wait_s}
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=100000
{lines}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
{nodes}
PartitionName=train Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode={preempt_mode} GraceTime={grace_s}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def missing_for_slurm() -> str:
    """Why this machine cannot start a Slurm, as a clause ("since ... are not installed"); empty if it can."""
    if os.geteuid() != 0:
        return "since that takes root"
    absent = [command for command in COMMANDS if shutil.which(command) is None]
    return f"since {', '.join(absent)} are not installed" if absent else ""


class Slurm:
    """A running cluster; a context manager that leaves no process and no file behind.

    `nodes` virtual nodes, named n0, n1, ..., each with room for one job of one CPU.
    """

    def __init__(
        self,
        nodes: int,
        *,
        preempt_mode: str = "REQUEUE",
        grace_s: int = 0,
        lines: Sequence[str] = (),
    ) -> None:
        """`preempt_mode` and `grace_s` are those of the partition `train`; `lines` are further ones of slurm.conf."""
        self.nodes = tuple(f"n{number}" for number in range(nodes))
        # Of a short name: sockets are below it.
        self.home = Path(tempfile.mkdtemp(prefix="elastic-pt-slurm-"))
        self._settings = {
            "preempt_mode": preempt_mode,
            "grace_s": grace_s,
            "lines": "\n".join(lines),
        }
        self._munged: subprocess.Popen[bytes] | None = None
        self._controller: subprocess.Popen[bytes] | None = None
        self._slurmds: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which Slurm's commands reach this cluster."""
        return {"SLURM_CONF": str(self.home / "slurm.conf")}

    def __enter__(self) -> Self:
        try:
            self._start()
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

    def _start(self) -> None:
        for name in ("munge", "state", "spool"):
            (self.home / name).mkdir()
        # Jobs of other users read the configuration.
        self.home.chmod(0o755)
        nodes = [
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={free_port()} "
            "CPUs=1 RealMemory=1000"
            for name in self.nodes
        ]
        (self.home / "slurm.conf").write_text(
            _CONFIGURATION.format(
                home=self.home,
                port=free_port(),
                nodes="\n".join(nodes),
                silent_s=_SILENT_S,
                kill_wait_s=_KILL_WAIT_S,
                **self._settings,
            )
        )
        self._start_munged()
        self._controller = self._daemon("slurmctld", "-D", "-i")
        for name in self.nodes:
            self.start_node(name)
        self._until("slurmctld", lambda: all(self.state_of(each) == "idle" for each in self.nodes))

    def _start_munged(self) -> None:
        munge = self.home / "munge"
        key = munge / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log"}
        words = [f"--{option}={munge / name}" for option, name in files.items()]
        # Forced: it is not at its usual place.
        self._munged = self._daemon(
            "munged", "--foreground", "--force", *words, f"--seed-file={munge / 'seed'}"
        )
        self._until("munged", (munge / "socket").exists)

    def start_node(self, name: str) -> None:
        """Start the slurmd of a node."""
        self._slurmds[name] = self._daemon("slurmd", "-D", "-N", name)

    def kill_slurmd(self, name: str) -> None:
        """SIGKILL to a node's slurmd alone; its job goes on."""
        slurmd = self._slurmds.pop(name)
        slurmd.kill()
        slurmd.wait()

    def kill_node(self, name: str) -> None:
        """Simulate the loss of a machine: SIGKILL to a node's slurmd, its job, and all that the job has started."""
        self.kill_slurmd(name)
        of_the_job = [
            pid for pid, variables in self.processes() if f"SLURMD_NODENAME={name}" in variables
        ]
        # The first one's parent is its slurmstepd.
        for pid in {*of_the_job, *map(_parent_of, of_the_job[:1])}:
            _kill(pid)

    def processes(self) -> Iterator[tuple[int, list[str]]]:
        """Each living process of this cluster with its environment: Slurm passes SLURM_CONF on to all that it starts."""
        wanted = f"SLURM_CONF={self.home / 'slurm.conf'}"
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                # A process may end while it is looked at.
                with suppress(OSError):
                    variables = (entry / "environ").read_text(errors="replace").split("\0")
                    if wanted in variables:
                        yield int(entry.name), variables

    def state_of(self, node: str) -> str:
        """A node's state in the words of Slurm, such as idle or down*; empty if slurmctld does not know it."""
        found = self._ask("sinfo", "--noheader", f"--nodes={node}", "--format=%T")
        return (found.split() or [""])[0]

    def submit(self, *arguments: str, environment: Mapping[str, str], directory: Path) -> str:
        """The id of a job that `sbatch ARGUMENTS` submits from `directory`, with only these variables."""
        return self.command(
            "sbatch", "--parsable", *arguments, environment=environment, directory=directory
        ).strip()

    def command(
        self,
        *words: str,
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> str:
        """What one of Slurm's commands prints. Raises `UnexpectedError` if it fails."""
        variables = {**(os.environ if environment is None else environment), **self.environment}
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            env=variables,
            cwd=directory,
            check=False,
        )
        if done.returncode:
            raise UnexpectedError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr}")
        return done.stdout

    def job(self, task: str) -> dict[str, str]:
        """What `scontrol show job` tells of a job or of a task of an array (`75_2`), by field."""
        text = self.command("scontrol", "--oneliner", "show", "job", task)
        return dict(
            word.split("=", 1)
            for line in text.splitlines()[:1]
            for word in line.split()
            if "=" in word
        )

    def close(self) -> None:
        """End every job and every daemon, and remove the directory."""
        # First what would report the end of a job, and what would start another.
        for daemon in (self._controller, *self._slurmds.values(), self._munged):
            if daemon is not None:
                daemon.kill()
                daemon.wait()
        self._slurmds.clear()
        deadline_s = time.monotonic() + _TIMEOUT_S
        while left := [pid for pid, _ in self.processes()]:
            for pid in left:
                _kill(pid)
            if time.monotonic() > deadline_s:
                raise UnexpectedError(f"processes {left} of {self.home} do not end")
            time.sleep(0.01)
        shutil.rmtree(self.home, ignore_errors=True)

    def log_tails(self) -> str:
        """The end of each daemon's log."""
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-2000:]}"
            for path in sorted(self.home.glob("*.log"))
        )

    def _ask(self, *words: str) -> str:
        try:
            return self.command(*words)
        except UnexpectedError:
            return ""

    def _until(self, what: str, ready: Callable[[], bool]) -> None:
        wait_until(what, ready, _TIMEOUT_S, self.home / f"{what}.log")

    def _daemon(self, command: str, *arguments: str) -> subprocess.Popen[bytes]:
        name = arguments[-1] if command == "slurmd" else command
        return start(
            [command, *arguments], self.home / f"{name}.log", {**os.environ, **self.environment}
        )


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
