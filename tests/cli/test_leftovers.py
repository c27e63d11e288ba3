"""Files, sockets and semaphores that a run leaves on its machine, also with long directory names."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from command_line import STEPS, Trained

WAIT_S = 120.0
MEMORY = Path("/dev/shm")
MANY_STEPS = "train.steps=1000000"
TOKENS = f"elastic-pt-tokens-{os.getuid()}"
COMPILED = "torchinductor_"
"""A cache of torch, which all programs of one user share and keep."""


def start(
    config: Path, verb: str, *options: str, staging: Path, temporary: Path
) -> subprocess.Popen[str]:
    """Start `run` or `local` in a new process group."""
    where = ("--nodes", "1") if verb == "local" else ("--address", "127.0.0.1")
    settings = [word for option in options for word in ("--set", option)]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "elastic_pt", verb, str(config), *where),
            *("--set", f"checkpoint.staging={staging}", *settings),
        ],
        env=os.environ | {"TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def left_in(temporary: Path) -> set[str]:
    """Names of what a run has left, without the two caches that are meant to stay."""
    names = {path.name for path in temporary.iterdir()}
    return {name for name in names if name != TOKENS and not name.startswith(COMPILED)}


def semaphores_of(pid: int) -> set[Path]:
    """Named semaphores that a process uses. They are mapped under temporary names, so inodes are compared."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    inodes = {int(line.split()[4]) for line in lines if f"{MEMORY}/sem." in line}
    found = set()
    for path in MEMORY.glob("sem.*"):
        with suppress(FileNotFoundError):
            if path.stat().st_ino in inodes:
                found.add(path)
    return found


def of_processes(group: int) -> set[int]:
    """Processes of a process group."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getpgid(int(entry.name)) == group:
                found.add(int(entry.name))
        except ProcessLookupError:
            continue
    return found


def wait_for(happened: Callable[[], object]) -> None:
    """Wait until `happened()`, at most `WAIT_S`."""
    deadline_s = time.monotonic() + WAIT_S
    while not happened():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


@pytest.fixture
def long(tmp_path: Path) -> Path:
    """A directory with a path longer than the address of a Unix socket may be."""
    folder = tmp_path / ("long" * 25) / ("name" * 25)
    folder.mkdir(parents=True)
    assert len(str(folder)) > 200
    return folder


@pytest.fixture
def memory() -> Iterator[Path]:
    """A staging directory in memory, for this test only."""
    with tempfile.TemporaryDirectory(prefix="staging-", dir=MEMORY) as name:
        yield Path(name)


def test_a_run_leaves_nothing_under_long_names(
    prepared: Trained, tmp_path: Path, long: Path
) -> None:
    """I7: with a TMPDIR and a staging directory of 200 characters a run completes; no file, socket or semaphore is left."""
    staging, temporary = long / "staging", long / "tmp"
    staging.mkdir()
    temporary.mkdir()
    agent = start(
        prepared.config, "run", f"run.url={tmp_path / 'run'}", staging=staging, temporary=temporary
    )
    wait_for(lambda: list((tmp_path / "run").glob("ckpt/*")))
    semaphores = semaphores_of(agent.pid)
    assert semaphores
    out, err = agent.communicate(timeout=WAIT_S)
    assert (agent.returncode, out) == (0, f"completed at step {STEPS}\n"), err
    assert left_in(temporary) == set()
    assert list(staging.iterdir()) == []
    assert not any(path.exists() for path in semaphores)


@pytest.mark.parametrize("verb", ["run", "local"])
def test_next_start_removes_what_a_killed_agent_left(
    verb: str, prepared: Trained, tmp_path: Path, memory: Path
) -> None:
    """I7: the next start removes directories, sockets and semaphores of killed agents, and nothing of other programs."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    run = f"run.url={tmp_path / 'run'}"
    strangers = [temporary / "pymp-stranger", temporary / "torchelastic_stranger"]
    for stranger in strangers:
        stranger.mkdir()
    semaphore = MEMORY / f"sem.mp-stranger{os.getpid()}"
    semaphore.touch()
    try:
        killed = start(prepared.config, verb, run, MANY_STEPS, staging=memory, temporary=temporary)
        wait_for(lambda: list((tmp_path / "run").glob("ckpt/*")))
        agents = children_of(killed.pid) if verb == "local" else [killed.pid]
        semaphores = set().union(*(semaphores_of(pid) for pid in agents))
        groups = [os.getpgid(pid) for pid in agents] if verb == "local" else []
        for group in (*groups, killed.pid):
            os.killpg(group, signal.SIGKILL)
        killed.communicate()
        wait_for(lambda: not any(of_processes(group) for group in (*groups, killed.pid)))
        assert list(memory.iterdir())
        assert semaphores
        assert all(path.exists() for path in semaphores)
        records = len(list((tmp_path / "run").glob("log/*")))
        again = start(prepared.config, verb, run, MANY_STEPS, staging=memory, temporary=temporary)
        wait_for(lambda: len(list((tmp_path / "run").glob("log/*"))) > records)
        again.terminate()
        _, err = again.communicate(timeout=WAIT_S)
        assert again.returncode == (0 if verb == "run" else 128 + signal.SIGTERM), err
        assert list(memory.iterdir()) == []
        assert not any(path.exists() for path in semaphores)
        assert left_in(temporary) == {stranger.name for stranger in strangers}
        assert semaphore.exists()
    finally:
        semaphore.unlink()


def children_of(parent: int) -> list[int]:
    """Child processes."""
    listed = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    return [int(pid) for pid in listed.split()]


WORKER = """
import tempfile
from elastic_pt.agent.start import environment_of_workers
from elastic_pt.workers.forking import begin_worker
begin_worker(environment_of_workers("127.0.0.1"))
print(tempfile.gettempdir())
"""


def test_workers_use_the_tmpdir_of_the_user(long: Path) -> None:
    """A worker's temporary directory is the user's TMPDIR, not the agent's scratch."""
    worker = subprocess.run(
        [sys.executable, "-c", WORKER],
        env=os.environ | {"TMPDIR": str(long)},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert worker.stdout == f"{long}\n", worker.stderr
