"""The fork server and the forked call: one import for all processes, errors that end the agent, no orphans."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

DEADLINE_S = 60.0
AGENT = """
import json, os, signal, sys, threading, time
from multiprocessing import forkserver, get_context
from elastic_pt.workers.forking import (
    ForkedCall, await_fork_server, begin_worker, import_once, start_fork_server
)
from elastic_pt.telemetry.events import EventContext, EventOutput, configure_events
from elastic_pt.workers.scratch import scratch_directory

configure_events(EventContext("agent"), EventOutput("error"))

def work(sender):
    begin_worker({})
    sender.send((os.getpid(), os.getppid()))
    time.sleep(3600)

def start_worker():
    receiver, sender = get_context("forkserver").Pipe(duplex=False)
    get_context("forkserver").Process(target=work, args=(sender,), daemon=True).start()
    return receiver.recv()

if __name__ == "__main__":
    with scratch_directory(os.getcwd()) as scratch:
        import_once(["stack"], threads=THREADS, timeout_s=TIMEOUT)
        import stack
        call = ForkedCall("the check of this node", getattr(stack, "look", None))
        if BUSY:
            threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
        if "broken" not in SERVER:
            start_fork_server(scratch, ["stack"])
        SCRIPT
"""
LOOK = """
        call.begin(3)
        while "started" in dir(stack) and not os.path.exists("started"):
            time.sleep(0.01)
        signal.signal(signal.SIGALRM, lambda *_: sys.exit(0))
        signal.setitimer(signal.ITIMER_REAL, LEAVE)
        print("found", call.wait(TIMEOUT))
"""
WORK = """
        server = forkserver._forkserver._forkserver_pid
        first = start_worker()
        if LOSE:
            threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
            os.kill(server, signal.SIGKILL)
            while forkserver._forkserver._forkserver_pid == server:
                time.sleep(0.01)
                try:
                    second = start_worker()
                except (OSError, EOFError):  # the server has not ended yet
                    pass
        else:
            second = start_worker()
        held = [os.readlink(f"/proc/{first[1]}/fd/{each}") for each in os.listdir(f"/proc/{first[1]}/fd")] if not LOSE else []
        print(json.dumps({"agent": os.getpid(), "scratch": str(scratch), "server": server,
                          "first": first, "second": second, "held": held}), flush=True)
        time.sleep(3600)
"""
DIES = """
        start_fork_server(scratch, ["stack", "broken"])
        await_fork_server(3600.0)
"""
HUNG = """
        os.kill(forkserver._forkserver._forkserver_pid, signal.SIGSTOP)
        await_fork_server(0.5)
"""
STUCK = """
import os, signal, time
started = True
def look(x):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with open("began", "w") as file:
        file.write(str(os.getpid()))
    os.rename("began", "started")
    HOW
"""


def write_agent(
    directory: Path,
    stack: str,
    script: str = LOOK,
    *,
    timeout_s: float = 3600.0,
    leave_s: float = 0.0,
    busy: bool = False,
    lose: bool = False,
    threads: int = 1,
) -> dict[str, Any]:
    """An agent with this training stack, as arguments of `subprocess`."""
    (directory / "stack.py").write_text(stack)
    text = AGENT.replace("SERVER", repr(script)).replace("SCRIPT", script.strip())
    values = {
        "TIMEOUT": timeout_s,
        "LEAVE": leave_s,
        "BUSY": busy,
        "LOSE": lose,
        "THREADS": threads,
    }
    for name, value in values.items():
        text = text.replace(name, str(value))
    (directory / "agent.py").write_text(text)
    paths = os.pathsep.join([str(directory), str(Path(__file__).parents[2])])
    return {
        "args": [sys.executable, "agent.py"],
        "cwd": directory,
        "env": os.environ | {"PYTHONPATH": paths},
        "text": True,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    }


def ended(directory: Path, stack: str, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run an agent that calls `stack.look` in a forked process."""
    return subprocess.run(**write_agent(directory, stack, **how), timeout=DEADLINE_S)


def wait_until_gone(pid: int) -> None:
    """Wait until this process has ended or is a zombie."""
    deadline_s = time.monotonic() + DEADLINE_S
    path = Path(f"/proc/{pid}/stat")
    with suppress(FileNotFoundError, ProcessLookupError):
        while path.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline_s
            time.sleep(0.01)


# ---- the fork server -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "imports"),
    [({}, 1), ({"threads": 2}, 1), ({"busy": True}, 2), ({"lose": True}, 2)],
    ids=["forked", "two threads to compute with", "second thread", "killed"],
)
def test_workers_are_forked_from_one_import(
    tmp_path: Path, how: dict[str, bool], imports: int
) -> None:
    """Agent and workers share one import. A server that cannot be a fork of the agent, because a thread runs
    in the agent or the first server was killed, imports again. All processes end with the agent."""
    stack = "import numpy\nwith open('imported', 'a') as file: file.write('x')"
    agent = subprocess.Popen(**write_agent(tmp_path, stack, WORK, **how))
    try:
        assert agent.stdout is not None
        line = agent.stdout.readline()
        assert line, agent.stderr and agent.stderr.read()
        told = json.loads(line)
        assert (tmp_path / "imported").read_text() == "x" * imports
        workers = [told["first"], told["second"]]
        assert [parent == told["server"] for _, parent in workers] == [True, "lose" not in how]
        # The lock on the scratch directory would outlive the agent.
        assert not [each for each in told["held"] if each.startswith(told["scratch"])]
    finally:
        agent.kill()
        agent.wait()
    for worker, server in workers:
        wait_until_gone(server)
        wait_until_gone(worker)


@pytest.mark.parametrize(
    ("stack", "told"),
    [
        (
            "raise RuntimeError('this build has no CUDA')",
            "RuntimeError: this build has no CUDA",
        ),
        ("import flash_attention", "ModuleNotFoundError: No module named 'flash_attention'"),
    ],
    ids=["error", "missing"],
)
def test_an_import_error_ends_the_agent(tmp_path: Path, stack: str, told: str) -> None:
    """A training stack that cannot be imported ends the agent at once, with the error in one line."""
    agent = ended(tmp_path, stack)
    assert agent.returncode != 0
    assert agent.stdout == ""
    assert f"NodeFailure: cannot import what workers need: {told}\n" in agent.stderr


def test_imports_that_take_too_long_end_the_agent(tmp_path: Path) -> None:
    """Imports that hang, for example on a dead file system, end the agent after `startup_timeout_s`."""
    agent = ended(tmp_path, "import time; time.sleep(3600)", timeout_s=0.5)
    assert agent.returncode != 0
    assert "took longer than 0.5 s (elastic.startup_timeout_s)" in agent.stderr


def test_a_module_cannot_swallow_the_import_timeout(tmp_path: Path) -> None:
    """The timeout ends the agent even if the hung module catches every exception."""
    hang = "import time\ntry: time.sleep(3600)\nexcept Exception: pass\ntime.sleep(3600)"
    agent = ended(tmp_path, hang, timeout_s=0.5)
    assert "took longer than 0.5 s (elastic.startup_timeout_s)" in agent.stderr


def test_a_fork_server_that_dies_ends_the_agent_at_once(tmp_path: Path) -> None:
    """If a module that only the server imports ends it, the agent reports that without waiting for the timeout."""
    (tmp_path / "broken.py").write_text("raise RuntimeError('no compiler')")
    agent = ended(tmp_path, "", script=DIES)
    assert agent.returncode != 0
    assert "no compiler" in agent.stderr
    assert "NodeFailure: the fork server cannot fork" in agent.stderr


def test_a_fork_server_that_hangs_ends_the_agent(tmp_path: Path) -> None:
    """A node does not join if its fork server is not ready in time."""
    agent = ended(tmp_path, "", script=HUNG)
    assert agent.returncode != 0
    assert "NodeFailure: the fork server was not ready within 0.5 s" in agent.stderr


# ---- the forked call -----------------------------------------------------------------------------


def test_a_forked_call_returns_its_result(tmp_path: Path) -> None:
    """The agent gets the result of the function in the forked process."""
    agent = ended(tmp_path, "def look(x): return {'found': x}")
    assert (agent.returncode, agent.stdout) == (0, "found {'found': 3}\n"), agent.stderr


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("raise RuntimeError('CUDA error')", "its error is above"),
        ("import os; os._exit(3)", "its process ended with exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "its process was ended by signal 9 (Killed)"),
    ],
    ids=["error", "exit", "killed"],
)
def test_a_forked_call_that_fails_ends_the_agent(tmp_path: Path, how: str, told: str) -> None:
    """A node does not join if its forked call fails. The error says how the process ended."""
    agent = ended(tmp_path, f"def look(x):\n    {how}")
    assert agent.returncode != 0
    assert agent.stdout == ""
    assert f"NodeFailure: the check of this node failed; {told}" in agent.stderr


@pytest.mark.parametrize("leaves", [False, True], ids=["late", "asked to leave"])
@pytest.mark.parametrize(
    "how", ["time.sleep(3600)", "os.kill(os.getpid(), signal.SIGSTOP)"], ids=["hangs", "stopped"]
)
def test_a_forked_call_that_never_ends_does_not_keep_the_agent(
    tmp_path: Path, how: str, leaves: bool
) -> None:
    """A call that hangs, ignores SIGTERM or is stopped delays neither the timeout nor an agent that leaves."""
    stack = STUCK.replace("HOW", how)
    if leaves:
        agent = ended(tmp_path, stack, leave_s=0.5)
        assert agent.returncode == 0, agent.stderr
    else:
        agent = ended(tmp_path, stack, timeout_s=0.5)
        assert agent.returncode != 0
        assert (
            "NodeFailure: the check of this node did not end within 0.5 s (elastic.startup_timeout_s)"
            in agent.stderr
        )
    assert agent.stdout == ""
    wait_until_gone(int((tmp_path / "started").read_text()))
