"""`elastic-pt chaos run FILE` with real agents, as a user calls it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.chaos, pytest.mark.quick]

TIMEOUT_S = 240.0
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
    command = [
        sys.executable,
        "-m",
        "elastic_pt",
        "chaos",
        "run",
        "mine.toml",
        "--out",
        "out",
        "--json",
    ]
    told = subprocess.run(
        command, cwd=tmp_path, check=False, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert told.returncode == 0, told.stderr
    (run,) = json.loads(told.stdout)["runs"]
    assert run["passed"]
    assert {each["oracle"] for each in run["verdicts"]} >= {"digest", "ledger", "leftovers"}
    assert [each["kind"] for each in run["faults"]] == ["kill_worker"]
    assert "kill_worker" in (tmp_path / "out" / "mine-1" / "report.html").read_text()
