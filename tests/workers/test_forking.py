"""The fork server's start: a training stack that cannot be imported ends the agent instead of letting it wait."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

DEADLINE_S = 60.0
AGENT = """
import os, signal, sys, time
from elastic_pt.workers.forking import FirstFork, start_fork_server
from elastic_pt.workers.scratch import scratch_directory
with scratch_directory(sys.argv[1]) as scratch:
    start_fork_server(1, scratch, ["stack"])
    first = FirstFork(["stack"], "stack:look" if "look" in STACK else "", (3,))
    while "started" in STACK and not os.path.exists("started"):
        time.sleep(0.01)
    signal.signal(signal.SIGALRM, lambda *_: sys.exit(0))
    signal.setitimer(signal.ITIMER_REAL, LEAVE)
    print("warm", first.wait(TIMEOUT))
"""
STUCK = """
import os, signal, time
def look(x):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with open("began", "w") as file:
        file.write(str(os.getpid()))
    os.rename("began", "started")
    HOW
"""


def agent_with(
    directory: Path, stack: str, timeout_s: float = 3600.0, leave_s: float = 0.0
) -> subprocess.CompletedProcess[str]:
    """An agent whose fork server imports this training stack, and that is asked to leave after a while."""
    (directory / "stack.py").write_text(stack)
    paths = os.pathsep.join([str(directory), str(Path(__file__).parents[2])])
    return subprocess.run(
        [
            sys.executable,
            "-c",
            AGENT.replace("TIMEOUT", str(timeout_s))
            .replace("LEAVE", str(leave_s))
            .replace("STACK", repr(stack)),
            str(directory),
        ],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        cwd=directory,
        env=os.environ | {"PYTHONPATH": paths},
        check=False,
    )


def test_a_warm_fork_server_is_waited_for(tmp_path: Path) -> None:
    """The agent goes on once the fork server has imported everything."""
    ended = agent_with(tmp_path, "import json")
    assert (ended.returncode, ended.stdout) == (0, "warm None\n"), ended.stderr


@pytest.mark.parametrize(
    ("stack", "told"),
    [
        ("raise RuntimeError('this build has no CUDA')", "this build has no CUDA"),
        ("import flash_attention", "No module named 'flash_attention'"),
        ("import os; os.register_at_fork(after_in_child=lambda: os._exit(3))", "exit code 3"),
    ],
    ids=["import", "missing", "first fork"],
)
def test_an_error_while_warming_up_ends_the_agent_at_once(
    tmp_path: Path, stack: str, told: str
) -> None:
    """A stack that cannot be imported, or processes that die as they are forked, are reported and not waited for."""
    ended = agent_with(tmp_path, stack)
    assert ended.returncode != 0
    assert ended.stdout == ""
    assert told in ended.stderr
    assert "the fork server cannot import what workers need" in ended.stderr


def test_imports_that_take_too_long_end_the_agent(tmp_path: Path) -> None:
    """A training stack that hangs while it is imported, on a file system that is away perhaps, is given up in time."""
    ended = agent_with(tmp_path, "import time; time.sleep(3600)", timeout_s=0.5)
    assert ended.returncode != 0
    assert "not ready within 0.5 s (elastic.startup_timeout_s)" in ended.stderr


def test_the_first_process_tells_what_it_found(tmp_path: Path) -> None:
    """What the training stack finds out about this node reaches the agent, which never imports that stack."""
    ended = agent_with(tmp_path, "def look(x): return {'found': x}")
    assert (ended.returncode, ended.stdout) == (0, "warm {'found': 3}\n"), ended.stderr


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("raise RuntimeError('CUDA error')", "its error is above"),
        ("import os; os._exit(3)", "its process ended with exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "its process was ended by signal 9 (Killed)"),
    ],
    ids=["error", "exit", "killed"],
)
def test_a_first_process_that_fails_ends_the_agent(tmp_path: Path, how: str, told: str) -> None:
    """A node that cannot take the small step does not join, and says how that ended; it may be started again."""
    ended = agent_with(tmp_path, f"def look(x):\n    {how}")
    assert ended.returncode != 0
    assert ended.stdout == ""
    assert "NodeFailure: the small training step" in ended.stderr
    assert told in ended.stderr


def assert_gone(pid: int) -> None:
    """This process ends, or has ended and only nobody has taken note of it."""
    deadline_s = time.monotonic() + DEADLINE_S
    path = Path(f"/proc/{pid}/stat")
    with suppress(FileNotFoundError, ProcessLookupError):
        while path.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline_s
            time.sleep(0.01)


@pytest.mark.parametrize("leaves", [False, True], ids=["late", "asked to leave"])
@pytest.mark.parametrize(
    "how", ["time.sleep(3600)", "os.kill(os.getpid(), signal.SIGSTOP)"], ids=["hangs", "stopped"]
)
def test_a_first_process_that_never_ends_does_not_keep_the_agent(
    tmp_path: Path, how: str, leaves: bool
) -> None:
    """One that hangs, deaf to SIGTERM, or is stopped, is killed in time and when the agent leaves, which ends either way."""
    stack = STUCK.replace("HOW", how)
    if leaves:
        ended = agent_with(tmp_path, stack, leave_s=0.5)
        assert ended.returncode == 0, ended.stderr
    else:
        ended = agent_with(tmp_path, stack, timeout_s=0.5)
        assert ended.returncode != 0
        assert "NodeFailure: everything is imported, but the process" in ended.stderr
        assert "did not end within 0.5 s (elastic.startup_timeout_s)" in ended.stderr
    assert ended.stdout == ""
    assert_gone(int((tmp_path / "started").read_text()))
