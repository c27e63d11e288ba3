"""What a run shows to those who are not of it: its listeners, its packets, and where its secrets are."""

import re
import shutil
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import pytest

from chaos_tests.conftest import Interrupted, MakeNetwork, StartScenario
from chaos_tests.scenario import CHECKPOINT_STEPS, Scenario
from chaos_tests.test_network import start_on
from elastic_pt.chaos.processes import marked
from elastic_pt.fleet.network import Network
from elastic_pt.membership.asking import ask_status
from elastic_pt.membership.lobby import LOBBY
from elastic_pt.membership.pulse import KEY as PULSE
from elastic_pt.runlog.access import AUTHORITY_KEY, TOKEN_KEY, Access, read_access
from elastic_pt.store.open import open_store

pytestmark = pytest.mark.chaos

ANSWER_S: Final = 5.0
_ALL_FRAMES: Final = 3
"""ETH_P_ALL."""
_LISTENER: Final = re.compile(r"LISTEN\s+\d+\s+\d+\s+(\S+):(\d+)\s.*?(?:pid=(\d+)|$)")
CANARIES: Final = {
    name: f"canary{number:02d}-5e1f0c7d9b"
    for number, name in enumerate(
        (
            "AWS_SECRET_ACCESS_KEY",
            "AWS_ACCESS_KEY_ID",
            "AWS_SESSION_TOKEN",
            "AZURE_STORAGE_ACCOUNT_KEY",
            "AZURE_STORAGE_CONNECTION_STRING",
            "AZURE_CLIENT_SECRET",
            "GRAFANA_TOKEN",
            "HF_TOKEN",
            "WANDB_API_KEY",
            "ELASTIC_PT_EVENT_WEBHOOK",
            "DATABASE_PASSWORD",
        )
    )
}


def listeners(network: Network, node: str) -> set[tuple[str, int]]:
    """Addresses at which processes of a node listen, with the process ids."""
    command = [*network.prefix(node), "ss", "-H", "-l", "-t", "-n", "-p"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = [_LISTENER.match(line) for line in lines]
    return {(each[1].strip("[]"), int(each[3] or 0)) for each in found if each is not None}


@pytest.mark.quick
@pytest.mark.parametrize("version", [4, 6])
def test_all_listeners_are_at_the_nodes_own_address(
    version: int, make_network: MakeNetwork, start: StartScenario
) -> None:
    """Agents, TCPStores and workers listen at the address that the log names; metrics on loopback. No port is open to others."""
    network = make_network(2, versions=(version,))
    run = start_on(network, start, "elastic.workers_per_node=2", "elastic.join_window_s=2")
    loopback = "127.0.0.1"
    seen: dict[str, set[tuple[str, int]]] = {node: set() for node in network.nodes}
    for step in (2, CHECKPOINT_STEPS + 2):
        run.until_step(step, nodes=2)
        for node in network.nodes:
            seen[node] |= listeners(network, node)
    run.finish()
    for node, found in seen.items():
        assert {address for address, _ in found} <= {network.address(node), loopback}
        # An agent and two workers.
        assert len({pid for address, pid in found if address != loopback}) == 3
        assert {pid for _, pid in found} & {0} == set()


@contextmanager
def recorded(network: Network, node: str) -> Iterator[bytearray]:
    """All frames that a node sends and receives."""
    frames, stop = bytearray(), threading.Event()
    with network.on(node):
        ear = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_FRAMES))

    def listen() -> None:
        ear.settimeout(0.1)
        while not stop.is_set():
            with suppress(TimeoutError):
                frames.extend(ear.recv(1 << 16))

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield frames
    finally:
        stop.set()
        thread.join()
        ear.close()


@pytest.mark.parametrize("tls", [True, False])
def test_agents_say_nothing_that_can_be_read_on_the_way(
    tls: bool, make_network: MakeNetwork, start: StartScenario
) -> None:
    """Frames between nodes have neither the token nor a message nor a request of an agent, but with `elastic.tls = false`."""
    network = make_network(2)
    settings = () if tls else ("elastic.tls=false",)
    with recorded(network, "node-0") as frames:
        run = start_on(network, start, "elastic.join_window_s=2", *settings)
        run.until_step(CHECKPOINT_STEPS + 1, nodes=2)
        run.fleet.kill("node-1")
        run.finish()
    for word in (run.store.read(TOKEN_KEY), b'"incarnation"', b"GET /v1/"):
        assert (word in frames) is not tls, word


def told(run: Scenario) -> Iterator[tuple[str, str]]:
    """All text that a run has told somebody, with the place."""
    for path in run.directory.glob("*.log"):
        yield path.name, path.read_text(errors="replace")
    for key in run.store.keys(""):
        if not key.startswith(("secret/", "ckpt/")) or key.endswith(".json"):
            yield key, run.store.read(key).decode(errors="replace")
    for pid in marked(run.mark):
        with suppress(OSError):
            yield f"command of {pid}", Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    for status in run.statuses():
        yield "status", repr(status)
        with urllib.request.urlopen(status.metrics_url, timeout=10) as answer:
            yield status.metrics_url, answer.read().decode()


@pytest.mark.quick
def test_no_secret_is_told_anywhere(start: StartScenario, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted secrets, the run's token and its key are in no event, log, record, manifest, account, command or status."""
    for name, secret in CANARIES.items():
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("HTTPS_PROXY", "http://user:canary99-5e1f0c7d9b@127.0.0.1:1")
    run = start("telemetry.log_level=debug", nodes=2)
    run.until_step(CHECKPOINT_STEPS + 1, nodes=2)
    texts = list(told(run))
    run.fleet.kill("node-1")
    run.finish()
    texts += told(run)
    key = run.store.read("secret/authority.pem").decode().splitlines()[1:3]
    secrets = [*CANARIES.values(), "canary99", run.store.read(TOKEN_KEY).decode(), *key]
    assert len(texts) > 10
    assert [(place, secret) for place, text in texts for secret in secrets if secret in text] == []


def test_a_replaced_secret_shuts_out_those_who_had_the_old_one(
    interrupted: Interrupted, start: StartScenario, tmp_path: Path, reference_digest: str
) -> None:
    """The run goes on with another token and another authority, with the same bits; the old ones open nothing."""
    shutil.copytree(interrupted.directory, tmp_path / "run")
    before = read_access(open_store(f"file://{tmp_path / 'run'}"), "former node", tls=True)
    shutil.rmtree(tmp_path / "run" / "secret")
    run = start(nodes=3)
    run.until("a new secret", (tmp_path / "run" / AUTHORITY_KEY).exists)
    run.until_step(interrupted.step + 1, nodes=3)
    generation = run.view().generation
    assert generation is not None
    now = read_access(run.store, "operator", tls=True)
    assert ask_status(generation.members, before, ANSWER_S) == {}
    for stolen in (Access(before.token, now.identity), Access(now.token, before.identity)):
        assert ask_status(generation.members, stolen, ANSWER_S) == {}
    assert len(ask_status(generation.members, now, ANSWER_S)) == 3
    run.finish()
    run.check_whole(reference_digest)


HINTS: Final = (
    b"",
    b"\xff\xfe",
    b"[" * 100_000,
    b'[1, "x", 1e999, 9007199254740993]',
    b'{"schema": 1, "node": "\x1b[2J", "seconds": null}',
    bytes(1 << 20),
)


@pytest.mark.quick
def test_hostile_hints_change_nothing(start: StartScenario, reference_digest: str) -> None:
    """A writer puts rubbish over pulse, lobby, accounts and events, again and again: the weights are those of an undisturbed run."""
    run = start(nodes=2)
    stop, written = threading.Event(), 0

    def scribble() -> None:
        nonlocal written
        while not stop.wait(0.05):
            hint = HINTS[written % len(HINTS)]
            keys = [PULSE, "events/x-1/account.json", "events/x-1/00000000.jsonl"]
            keys += [
                f"{LOBBY}x!x{written}!evil.example!1!1!1",
                f"{LOBBY}%1b[2J!..!127.0.0.1!1!-1!1",
            ]
            keys += [f"{LOBBY}x!x{written}!127.0.0.1!9!1!1", "chaos/kill-x", f"ckpt/x{written}/y"]
            if written < 2 * len(HINTS):
                # It writes a good one again. The agent that is killed could not, and then goodput is not known.
                accounts = (each for each in run.store.keys("events/node-0") if "account" in each)
                keys += accounts
            for key in keys:
                run.store.write(key, hint)
            written += 1

    writer = threading.Thread(target=scribble, daemon=True)
    writer.start()
    try:
        run.until_step(CHECKPOINT_STEPS + 1, nodes=2)
        run.fleet.kill("node-1")
        run.fleet.start("node-2")
        run.fleet.wait(run.patience_s)
    finally:
        stop.set()
        writer.join()
    codes = run.fleet.exit_codes()
    assert {code for node, code in codes.items() if node != "node-1"} == {0}, run.log_tails()
    assert written > 10
    run.check_whole(reference_digest)
