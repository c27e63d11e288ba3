"""`elastic-pt chaos run FILE` with real agents, as a user calls it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_pt.chaos.leftovers import SHARED_MEMORY
from elastic_pt.chaos.processes import MARK, marked

pytestmark = [pytest.mark.chaos, pytest.mark.quick]

TIMEOUT_S = 240.0
COMMAND = [sys.executable, "-m", "elastic_pt", "chaos", "run", "mine.toml", "--out", "out"]
MINE = """
hypothesis = "A worker of two nodes is killed; both go on."
nodes = 2
store = "directory"

[[faults]]
kind = "kill_worker"
at = { phase = "reduce", step = 10 }
"""


def test_a_scenario_of_ones_own_is_played_and_judged(tmp_path: Path) -> None:
    """Exit code 0, a result with the verdict of each oracle, and a report."""
    (tmp_path / "mine.toml").write_text(MINE)
    told = subprocess.run(
        [*COMMAND, "--json"],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert told.returncode == 0, told.stderr
    (run,) = json.loads(told.stdout)["runs"]
    assert run["passed"]
    assert {each["oracle"] for each in run["verdicts"]} >= {"digest", "ledger", "leftovers"}
    assert [each["kind"] for each in run["faults"]] == ["kill_worker"]
    assert "kill_worker" in (tmp_path / "out" / "mine-1" / "report.html").read_text()


def mark_of_children(pid: int) -> str:
    """The mark that the processes of its run carry."""
    (children,) = Path(f"/proc/{pid}/task").glob(f"{pid}/children")
    for child in children.read_text().split():
        for each in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            name, _, value = each.decode().partition("=")
            if name == MARK:
                return value
    raise AssertionError("no child of a chaos run")


def test_sigterm_leaves_nothing_behind(tmp_path: Path) -> None:
    """A run that a job's time limit or a closed terminal ends has no process and no memory afterwards."""
    (tmp_path / "mine.toml").write_text(f"step_s = 10\nlongest_s = 900\n{MINE}")
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(COMMAND, cwd=tmp_path, **output) as command:
        try:
            assert command.stdout is not None
            assert any(line.split()[2:3] == ["generation"] for line in command.stdout)
            mark = mark_of_children(command.pid)
            held = [
                each for each in SHARED_MEMORY.glob("chaos-*") if mark.startswith(each.name[6:])
            ]
            assert held
            assert marked(mark)
            os.kill(command.pid, signal.SIGTERM)
            assert command.wait(TIMEOUT_S) == 128 + signal.SIGTERM
        finally:
            command.kill()
    assert not marked(mark)
    assert not any(each.exists() for each in held)
