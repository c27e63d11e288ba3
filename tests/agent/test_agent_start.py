"""A node between its start and its part in the run."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

WAIT_S = 60.0
CONFIG = '[run]\nurl = "{0}/run"\n[data]\nurl = "{0}/data"\n[checkpoint]\nstaging = "{0}"\n'


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_node_asked_to_leave_during_imports_ends_at_once(
    tmp_path: Path, number: signal.Signals
) -> None:
    """F18: a node that does not take part yet has nothing to finish, so it ends at once, with exit code 0."""
    (tmp_path / "run.toml").write_text(CONFIG.format(tmp_path))
    agent = subprocess.Popen(
        [sys.executable, "-m", "elastic_pt", "run", str(tmp_path / "run.toml")],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        maps, deadline_s = Path(f"/proc/{agent.pid}/maps"), time.monotonic() + WAIT_S
        while "libtorch" not in maps.read_text():
            assert time.monotonic() < deadline_s
            time.sleep(0.005)
        agent.send_signal(number)
        _, err = agent.communicate(timeout=WAIT_S)
        assert (agent.returncode, err) == (0, "")
        assert not list(tmp_path.glob("elastic_pt-*"))
    finally:
        agent.kill()
        agent.wait()
