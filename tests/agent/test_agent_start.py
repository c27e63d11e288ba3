"""A node between its start and its part in the run."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import structlog

from elastic_pt.agent.agent import run_agent
from elastic_pt.config import parse_config
from elastic_pt.errors import ElasticPtError
from elastic_pt.report.goodput import read_accounts
from elastic_pt.runlog.identity import IDENTITY_KEY
from elastic_pt.store.open import open_store

WAIT_S = 60.0
CONFIG = '[run]\nurl = "{0}/run"\n[data]\nurl = "{0}/data"\n[checkpoint]\nstaging = "{0}"\n'


@pytest.mark.parametrize(
    ("number", "options", "code"),
    [
        (signal.SIGTERM, (), 0),
        (signal.SIGINT, (), 0),
        (signal.SIGUSR1, (), 0),
        (signal.SIGTERM, ("--left-code", "143"), 143),
    ],
)
def test_a_node_asked_to_leave_during_imports_ends_at_once(
    tmp_path: Path, number: signal.Signals, options: tuple[str, ...], code: int
) -> None:
    """F18: a node that does not take part yet has nothing to finish, so it ends at once, with the code of a leave."""
    (tmp_path / "run.toml").write_text(CONFIG.format(tmp_path))
    agent = subprocess.Popen(
        [sys.executable, "-m", "elastic_pt", "run", str(tmp_path / "run.toml"), *options],
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
        assert (agent.returncode, err) == (code, "")
        assert not list(tmp_path.glob("elastic_pt-*"))
    finally:
        agent.kill()
        agent.wait()


def test_start_that_fails_has_an_account_if_the_run_exists(tmp_path: Path) -> None:
    """A loop of failing starts costs node-seconds. A mistake at the start of a new run leaves no directory behind."""
    config = parse_config(CONFIG.format(tmp_path), source="test")
    store = open_store(config.run.url)

    def start() -> None:
        # It fails before it uses its worker and its platform.
        with pytest.raises(ElasticPtError):
            run_agent(config, "a", "127.0.0.1", tmp_path, None, None)  # type: ignore[arg-type]

    try:
        start()
        assert not (tmp_path / "run").exists()
        store.create(IDENTITY_KEY, b"{}")
        start()
    finally:
        structlog.reset_defaults()
    (account,) = read_accounts(store)
    assert account.ended
    assert account.reason.startswith("StoreError: data.url")
