"""The events of a node: the sinks that its configuration and environment ask for, its workers', and its last words."""

import json
import queue
import socket
import sys
import threading
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import structlog

from elastic_pt.agent import events as agent_events
from elastic_pt.agent.events import Events
from elastic_pt.config import Config, parse_config
from elastic_pt.errors import ConfigError, NodeFailure
from elastic_pt.store.open import open_store
from elastic_pt.telemetry import webhook
from elastic_pt.telemetry.webhook import VARIABLE
from elastic_pt.workers.channel import AgentSide, WorkerSide

WAIT_S = 30.0
TOKEN = "0f" * 32


@pytest.fixture(autouse=True)
def standard_error(monkeypatch: pytest.MonkeyPatch) -> Iterator[StringIO]:
    """What the events print. The environment has a secret and no webhook."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")
    out = StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    yield out
    structlog.reset_defaults()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run in a directory, with a local file of events per node."""
    text = f'[run]\nurl = "{tmp_path}/run"\n[data]\nurl = "data"\n'
    return parse_config(
        text, source="test", overrides=[f"telemetry.log_file={tmp_path}/{{node}}.log"]
    )


def shipped(config: Config) -> list[dict[str, Any]]:
    """The events in the bucket."""
    store = open_store(config.run.url)
    return [
        json.loads(line) for key in store.keys("events/") for line in store.read(key).splitlines()
    ]


def test_what_ends_an_agent_is_in_the_bucket_and_in_the_file(
    config: Config, tmp_path: Path, standard_error: StringIO
) -> None:
    """An agent's last words, with a traceback if they are unexpected, reach all sinks, without secrets."""
    store = open_store(config.run.url)
    events = Events(config, store, "a", "a-1234abcd")
    events.hide(TOKEN)
    events.context.changing = lambda: {"generation": 3, "step": 7}
    with pytest.raises(NodeFailure), events:
        raise NodeFailure(f"peer refuses {TOKEN}")
    with pytest.raises(ZeroDivisionError), Events(config, store, "a", "a-5678abcd"):
        print(1 / 0, "wJalrXUtnFEMI/K7MDENG")
    found = {each["event"]: each for each in shipped(config)}
    failed, crashed = found["agent_failed"], found["agent_crashed"]
    assert failed["cause"] == "peer refuses [redacted]"
    assert (failed["run"], failed["node"]) == (config.run.url, "a")
    assert (failed["generation"], failed["step"]) == (3, 7)
    assert "ZeroDivisionError" in crashed["exception"]
    lines = (tmp_path / "a.log").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["agent_failed", "agent_crashed"]
    for text in (standard_error.getvalue(), str(found), str(lines)):
        assert TOKEN not in text
        assert "wJalrXUtnFEMI" not in text


def test_an_event_of_a_worker_reaches_the_agents_sinks(config: Config, tmp_path: Path) -> None:
    """Workers have no sinks of their own: the channel carries their events, and the agent's secrets are removed."""
    received = threading.Event()
    store = open_store(config.run.url)
    with Events(config, store, "a", "a-1234abcd") as events:
        events.hide(TOKEN)

        def handle(message: dict[str, Any]) -> None:
            events.relay(message["content"])
            received.set()

        side = AgentSide(tmp_path / "socket")
        side.listen(handle)
        worker = WorkerSide(tmp_path / "socket", 1)
        worker.take({"event": "store_retry", "level": "warning", "rank": 1, "trouble": TOKEN})
        assert received.wait(WAIT_S)
        worker.close()
        worker.take({"event": "too late"})
        side.close()
    (event,) = shipped(config)
    assert (event["event"], event["rank"], event["trouble"]) == ("store_retry", 1, "[redacted]")


def test_a_malformed_webhook_is_refused_at_the_start(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start ends with one line that names the variable; no thread of a sink is left."""
    monkeypatch.setenv(VARIABLE, "hooks.example/T0")
    before = threading.active_count()
    with pytest.raises(ConfigError, match=VARIABLE):
        Events(config, open_store(config.run.url), "a", "a-1234abcd")
    assert threading.active_count() == before


def test_a_hanging_webhook_delays_the_end_only_a_little(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sinks end within one bound. What the webhook did not take is an event in the bucket, beside the last words."""
    monkeypatch.setattr(agent_events, "_OTHERS_TIMEOUT_S", 0.5)
    monkeypatch.setattr(webhook, "_TIMEOUT_S", WAIT_S)
    with socket.create_server(("127.0.0.1", 0)) as hangs:
        monkeypatch.setenv(VARIABLE, f"http://127.0.0.1:{hangs.getsockname()[1]}/T0")
        with Events(config, open_store(config.run.url), "a", "a-1234abcd"):
            structlog.get_logger("test").info("stop", reason="completed", step=7)
            began_s = time.monotonic()
        assert time.monotonic() - began_s < WAIT_S / 2
    assert [each["event"] for each in shipped(config)] == ["stop", "webhook_failed"]


def test_a_full_channel_drops_events_and_counts_them(config: Config, tmp_path: Path) -> None:
    """While the agent reads nothing, an event delays no worker. Then the agent learns how many were lost, and no line is broken."""
    received, reads = queue.Queue[dict[str, Any]](), threading.Event()

    def handle(message: dict[str, Any]) -> None:
        reads.wait(WAIT_S)
        received.put(message)

    side = AgentSide(tmp_path / "socket")
    side.listen(handle)
    worker = WorkerSide(tmp_path / "socket", 1)
    taken = 1000
    began_s = time.monotonic()
    for number in range(taken):
        worker.take({"event": "step_skipped", "rank": 1, "number": number, "why": "x" * 4096})
    assert time.monotonic() - began_s < WAIT_S / 3
    reads.set()
    worker.send("last")
    worker.take({"event": "store_retry", "rank": 1})
    with Events(config, open_store(config.run.url), "a", "a-1234abcd") as events:
        found = []
        while not found or found[-1].get("event") != "store_retry":
            message = received.get(timeout=WAIT_S)
            if message["kind"] == "event":
                found.append(message["content"])
                events.relay(found[-1])
        dropped = events.dropped
    worker.close()
    side.close()
    numbers = [each["number"] for each in found if each["event"] == "step_skipped"]
    assert 0 < len(numbers) < taken
    assert dropped == taken - len(numbers)
    # One report or more: the socket may have room for a moment in between.
    assert {each["rank"] for each in found if each["event"] == "events_dropped"} == {1}
