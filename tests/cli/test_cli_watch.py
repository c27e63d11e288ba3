"""`elastic-pt watch` against real runs: 0 healthy, 1 sick, 2 cannot see; and the dead-man's switch."""

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Result, Trained, assert_one_line_mistake, elastic_pt

from elastic_pt.config import load_config
from elastic_pt.errors import ConfigError, RunFailed
from elastic_pt.fleet.local import Fleet

WAIT_S = 120.0


class Switch(http.server.ThreadingHTTPServer):
    """A dead-man's switch that counts its calls and answers with `status`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.calls: list[str] = []
        self.status = 200

    @property
    def url(self) -> str:
        """With a secret in its path, like those of the services."""
        return f"http://127.0.0.1:{self.server_address[1]}/s3cret"


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Switch)
        self.server.calls.append(self.path)
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Write nothing."""


@pytest.fixture
def switch() -> Iterator[Switch]:
    """A real server."""
    with Switch() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_healthy_then_stalled_then_down(prepared: Trained, tmp_path: Path, switch: Switch) -> None:
    """A run that trains is healthy, by its agents; after the loss of all nodes it is sick. Only health calls the switch."""
    url = tmp_path / "run"
    config = load_config(prepared.config, [f"run.url={url}", "train.steps=1000000"])
    with Fleet(config, tmp_path / "output") as fleet:
        fleet.start("solo")
        deadline_s = time.monotonic() + WAIT_S
        while not any(url.glob("ckpt/*/manifest.json")):
            assert time.monotonic() < deadline_s, fleet.tail("solo")
            time.sleep(0.05)
        while True:
            switch.calls.clear()
            healthy = elastic_pt("watch", url, "--heartbeat-url", switch.url)
            assert healthy.exit_code == 0, healthy
            assert (healthy.err, switch.calls) == ("", ["/s3cret"])
            # On a busy machine an agent may answer too late.
            if healthy.out.startswith("healthy: running, step "):
                break
            assert time.monotonic() < deadline_s, (healthy, fleet.tail("solo"))
        stalled = elastic_pt("watch", url, "--stall", "0.000001", "--json")
        assert stalled.exit_code == 1, stalled
        assert [each["kind"] for each in stalled.json["reasons"]] == ["no progress"]
        fleet.kill("solo")
    switch.calls.clear()
    down = elastic_pt("watch", url, "--heartbeat-url", switch.url)
    assert (down.exit_code, down.out, switch.calls) == (1, "", [])
    assert down.err.startswith("sick: down: no agent answers")
    assert down.err.count("\n") == 1


def test_a_completed_run_is_healthy_and_a_switch_that_is_away_changes_nothing(
    trained: Trained, switch: Switch
) -> None:
    """The verdict stays; standard error tells of the switch without the secret in its URL."""
    switch.status = 500
    result = elastic_pt("watch", trained.run, "--heartbeat-url", switch.url, "--interval", 60)
    assert result.exit_code == 0, result
    assert result.out.startswith("healthy: completed, step ")
    assert switch.calls, "it was called"
    assert result.err == "the heartbeat URL at 127.0.0.1 could not be called: HTTP 500\n"
    refused = elastic_pt("watch", trained.run, "--heartbeat-url", "http://127.0.0.1:9/s3cret")
    assert refused.exit_code == 0
    assert "could not be called" in refused.err
    assert "s3cret" not in refused.err


@pytest.mark.parametrize("url", ["nowhere", "s3://bucket/run", "file:///dev/null/run"])
def test_what_cannot_be_seen_is_never_healthy(
    url: str, switch: Switch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No run there, an object store that refuses connections, and a broken path: 2, one line, and no call."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    result = elastic_pt("watch", url, "--heartbeat-url", switch.url)
    assert (result.exit_code, result.out, switch.calls) == (2, "", [])
    assert result.err.startswith("cannot see: ")
    assert result.err.count("\n") == 1
    assert elastic_pt("watch", url, "--json").json["verdict"] == "cannot see"


def test_a_run_that_waits_for_its_first_nodes_is_sick(prepared: Trained, tmp_path: Path) -> None:
    """Its log is empty, so the account of the agent that waits tells for how long."""
    url = tmp_path / "run"
    config = load_config(prepared.config, [f"run.url={url}", "elastic.nodes_min=3"])
    with Fleet(config, tmp_path / "output") as fleet:
        fleet.start("solo")
        deadline_s = time.monotonic() + WAIT_S
        while True:
            result = elastic_pt("watch", url, "--stall", "0.5")
            # Its first account may be older than its registration, by which it counts as waiting.
            if "waits for nodes" in result.err and "1 of at least 3 nodes" in result.err:
                break
            assert time.monotonic() < deadline_s, (result, fleet.tail("solo"))
            time.sleep(0.2)
        assert result.exit_code == 1
        healthy = elastic_pt("watch", url)
        assert healthy.exit_code == 0, healthy


def test_an_agent_that_ends_again_and_again_before_the_first_generation_is_sick(
    prepared: Trained, tmp_path: Path
) -> None:
    """Its log is empty, and each attempt looks like an agent that waits: the accounts of those before tell how they ended."""
    url = tmp_path / "run"
    config = load_config(prepared.config, [f"run.url={url}", "elastic.nodes_min=3"])
    with Fleet(config, tmp_path / "output") as fleet, socket.socket() as taken:

        def watched_while_it_waits() -> Result:
            fleet.start("solo")
            deadline_s = time.monotonic() + WAIT_S
            while "1 of at least 3 nodes" not in (status := elastic_pt("status", url)).out:
                assert time.monotonic() < deadline_s, (status, fleet.tail("solo"))
                time.sleep(0.2)
            return elastic_pt("watch", url, "--restarts", 2)

        assert watched_while_it_waits().exit_code == 0
        fleet.kill("solo")
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        fleet.start("solo", settings=[f"telemetry.metrics_port={port}"])
        assert fleet.wait(WAIT_S) == {"solo": ConfigError.exit_code}
        between = elastic_pt("watch", url)
        assert between.exit_code == 1
        assert "no agent answers" in between.err
        assert (
            "the newest agent, of node solo, has ended: ConfigError: telemetry.metrics_port"
            in between.err
        )
        again = watched_while_it_waits()
    assert again.exit_code == 1
    assert again.err.startswith(
        "sick: restart storm: 2 agents of node solo have ended within 600 s"
    )
    assert "the newest: ConfigError: telemetry.metrics_port" in again.err


def test_crash_loop_is_sick(
    prepared: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers that fail again and again at the same step: the restarts are named, with their cause, while agents answer."""
    url = tmp_path / "run"
    overrides = [
        f"run.url={url}",
        "train.steps=1000000",
        "elastic.retries_without_progress=64",
        "elastic.failures_max=64",
        "elastic.flaps_max=64",
    ]
    monkeypatch.setenv("ELASTIC_PT_FAILPOINTS", "buffer.begun@1+:kill")
    with Fleet(load_config(prepared.config, overrides), tmp_path / "output") as fleet:
        fleet.start("solo")
        deadline_s = time.monotonic() + WAIT_S
        while True:
            result = elastic_pt("watch", url, "--restarts", 2)
            if "restart storm" in result.err:
                break
            assert time.monotonic() < deadline_s, (result, fleet.tail("solo"))
            time.sleep(0.2)
    assert result.exit_code == 1
    assert "restarts without progress" in result.err
    assert "node solo failed" in result.err


def test_a_run_that_diverged_at_once_is_sick(
    prepared: Trained, tmp_path: Path, switch: Switch
) -> None:
    """No scrape may see a run that ends within seconds. `watch` names the cause, and the agent's exit code tells it, too."""
    url = tmp_path / "run"
    overrides = [f"run.url={url}", "train.learning_rate=1e9", "train.clip_norm=0"]
    with Fleet(load_config(prepared.config, overrides), tmp_path / "output") as fleet:
        fleet.start("solo")
        assert fleet.wait(WAIT_S) == {"solo": RunFailed.exit_code}
    result = elastic_pt("watch", url, "--heartbeat-url", switch.url)
    assert (result.exit_code, result.out, switch.calls) == (1, "", [])
    assert result.err.startswith("sick: failed: the run has failed: diverged: ")


def test_mistakes(trained: Trained) -> None:
    """A heartbeat URL of another scheme is refused before anything is read, and not shown: it may be a secret."""
    result = elastic_pt("watch", trained.run, "--heartbeat-url", "ftp://host/s3cret")
    assert_one_line_mistake(result, "--heartbeat-url", "http://")
    assert "s3cret" not in result.err
