"""The fork server's start: a training stack that cannot be imported ends the agent instead of letting it wait."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

DEADLINE_S = 60.0
AGENT = """
import sys
from elastic_pt.elastic.forking import FirstFork, start_fork_server
from elastic_pt.elastic.scratch import scratch_directory
with scratch_directory(sys.argv[1]) as scratch:
    start_fork_server(1, scratch, ["stack"])
    first = FirstFork(["stack"], "stack:look" if "look" in STACK else "", (3,))
    print("warm", first.wait(TIMEOUT))
"""


def agent_with(
    directory: Path, stack: str, timeout_s: float = 3600.0
) -> subprocess.CompletedProcess[str]:
    """An agent whose fork server imports this training stack."""
    (directory / "stack.py").write_text(stack)
    paths = os.pathsep.join([str(directory), str(Path(__file__).parents[2])])
    return subprocess.run(
        [
            sys.executable,
            "-c",
            AGENT.replace("TIMEOUT", str(timeout_s)).replace("STACK", repr(stack)),
            str(directory),
        ],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
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
        ("import os; os.register_at_fork(after_in_child=lambda: os._exit(3))", "NodeFailure"),
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


@pytest.mark.parametrize("how", ["raise RuntimeError('CUDA error')", "import os; os._exit(3)"])
def test_a_first_process_that_fails_ends_the_agent(tmp_path: Path, how: str) -> None:
    """A node that cannot take the small step does not join; the trouble may pass, so it may be started again."""
    ended = agent_with(tmp_path, f"def look(x):\n    {how}")
    assert ended.returncode != 0
    assert ended.stdout == ""
    assert "NodeFailure: the small training step" in ended.stderr
