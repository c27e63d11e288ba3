"""Nodes on separate addresses and a network with faults: one side continues, the other waits and rejoins."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import permutations
from pathlib import Path

import pytest

from chaos_tests.conftest import MakeNetwork, StartScenario
from chaos_tests.scenario import CHECKPOINT_STEPS, PATIENCE_S, Scenario, Whole, make_config
from elastic_pt.chaos.processes import workers_of
from elastic_pt.fleet.network import Network
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import Generation

pytestmark = pytest.mark.chaos

FAULT_STEP = CHECKPOINT_STEPS + 3
PROBE_TIMEOUT_S = 0.5
PATIENT = ("elastic.hang_timeout_s=60", "elastic.join_window_s=2")
"""A test may stop a worker for long, and a node that rejoins is admitted soon."""


def start_on(network: Network, start: StartScenario, *overrides: str) -> Scenario:
    """A run with a node on each node of the network, under its own address."""
    run = start(f"elastic.nodes_max={len(network.nodes)}", *overrides)
    run.ask_from = network.on_hub
    for node in network.nodes:
        run.fleet.start(node, address=network.address(node), prefix=network.prefix(node))
    return run


def proposers_since(run: Scenario, before: Generation) -> set[str]:
    """The nodes that appended a generation after that one."""
    return {
        record.writer
        for record in RunLog(run.store, writer="judge").records()
        if isinstance(record.body, Generation) and record.body.number > before.number
    }


def names_of(generation: Generation) -> list[str]:
    """Its members, in rank order."""
    return [member.node for member in generation.members]


def reaches(network: Network, here: str, there: str, version: int) -> bool:
    """Whether a connection from one node to another succeeds."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with ExitStack() as stack:
        with network.on(there):
            listener = socket.create_server((network.address(there, version), 0), family=family)
            stack.enter_context(listener)
        with network.on(here):
            caller = stack.enter_context(socket.socket(family))
        caller.settimeout(PROBE_TIMEOUT_S)
        try:
            caller.connect(listener.getsockname())
        except OSError:
            return False
        return True


def test_each_network_fault_cuts_its_own_paths(make_network: MakeNetwork) -> None:
    """Each fault cuts its own paths for both IP versions and no other path, and `heal` undoes it."""
    network = make_network(3, versions=(4, 6))
    one, two, three = network.nodes

    paths = [(*ends, version) for ends in permutations(network.nodes, 2) for version in (4, 6)]

    def cut() -> set[tuple[str, str, int]]:
        with ThreadPoolExecutor(len(paths)) as pool:
            passes = list(pool.map(lambda path: reaches(network, *path), paths))
        return {path for path, passed in zip(paths, passes, strict=True) if not passed}

    def both(*pairs: tuple[str, str]) -> set[tuple[str, str, int]]:
        return {(*ends, v) for a, b in pairs for ends in ((a, b), (b, a)) for v in (4, 6)}

    assert cut() == set()
    network.partition(one, two)
    assert cut() == both((one, two))
    network.heal()
    network.split([one], [two, three])
    assert cut() == both((one, two), (one, three))
    network.heal()
    network.link_down(three)
    assert network.unsent(three) == 0
    assert cut() == both((one, three), (two, three))
    assert network.unsent(three) > 0
    network.heal()
    assert cut() == set()


def test_block_drops_one_direction_only(make_network: MakeNetwork) -> None:
    """B's packets still arrive at A while A's packets do not arrive at B."""
    network = make_network(2)
    one, two = network.nodes
    network.block(two, from_=one)
    sockets = {}
    with ExitStack() as stack:
        for node in network.nodes:
            with network.on(node):
                sockets[node] = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
            sockets[node].bind((network.address(node), 0))
            sockets[node].settimeout(PROBE_TIMEOUT_S)
        sockets[two].sendto(b"from two", sockets[one].getsockname())
        sockets[one].sendto(b"from one", sockets[two].getsockname())
        assert sockets[one].recv(16) == b"from two"
        with pytest.raises(TimeoutError):
            sockets[two].recv(16)


@pytest.mark.parametrize("version", [4, 6])
def test_nodes_on_ipv4_or_ipv6_without_loopback(
    version: int, make_network: MakeNetwork, start: StartScenario, reference_digest: str
) -> None:
    """Every connection between nodes goes to the address a node was given, IPv4 or IPv6; none needs loopback."""
    network = make_network(3, versions=(version,))
    run = start_on(network, start)
    run.until_step(FAULT_STEP, nodes=3)
    addresses = {member.node: member.address for member in run.generation().members}
    assert addresses == {node: network.address(node) for node in network.nodes}
    victim = names_of(run.generation())[0]
    run.fleet.kill(victim)
    run.finish()
    newest = run.check_whole(reference_digest).generations[-1]
    assert newest.reason == f"lost {victim}"
    assert newest.store_address in {member.address for member in newest.members}


@pytest.mark.parametrize("rank", [0, 2])
def test_a_node_whose_link_is_down_is_lost(
    rank: int, make_network: MakeNetwork, start: StartScenario, reference_digest: str
) -> None:
    """F4: a node that becomes silent without a connection reset is lost; it sees that and appends nothing."""
    network = make_network(3)
    run = start_on(network, start)
    run.until_step(FAULT_STEP, nodes=3)
    before = run.generation()
    victim = names_of(before)[rank]
    network.link_down(victim)
    run.finish()
    whole = run.check_whole(reference_digest)
    (after,) = whole.generations[before.number :]
    assert [cause.node for cause in after.causes] == [victim]
    assert names_of(after) == [node for node in names_of(before) if node != victim]
    assert victim not in proposers_since(run, before)


@contextmanager
def standing_still(run: Scenario, node: str) -> Iterator[None]:
    """Stop a worker of `node`, so that the run cannot end before the world changes."""
    worker = workers_of(run.fleet.pid(node), run.mark)[0]
    os.kill(worker, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(worker, signal.SIGCONT)


def heal_and_finish(run: Scenario, network: Network, others: list[str], digest: str) -> Whole:
    """The continuing side does a step, the network heals, and the run ends with all nodes as members again."""
    run.until("one side goes on", lambda: sorted(names_of(run.generation())) == sorted(others))
    run.until_step(run.generation().frontier_step + 1, nodes=len(others))
    leader, *_, last = names_of(run.generation())
    with standing_still(run, last):
        drains = run.decisions(leader).count("drain")
        network.heal()
        run.until(
            "the others are to be taken in again",
            lambda: run.decisions(leader).count("drain") > drains,
        )
    run.finish()
    whole = run.check_whole(digest)
    assert sorted(names_of(whole.generations[-1])) == sorted(network.nodes)
    return whole


def test_a_partitioned_leader_rejoins(
    make_network: MakeNetwork, start: StartScenario, reference_digest: str
) -> None:
    """F7: two of three nodes continue; the cut-off proposer appends no generation and is admitted after the network heals."""
    network = make_network(3)
    run = start_on(network, start, *PATIENT)
    run.until_step(FAULT_STEP, nodes=3)
    before = run.generation()
    victim, *others = names_of(before)
    network.split([victim], others)
    whole = heal_and_finish(run, network, others, reference_digest)
    cut, back = whole.generations[before.number :]
    assert [cause.node for cause in cut.causes] == [victim]
    assert back.reason == f"{victim} joins"
    assert set(back.members) == set(before.members)
    assert victim not in proposers_since(run, before)


@pytest.mark.parametrize("deaf", [0, 2])
def test_the_later_node_of_a_one_way_link_is_parked(
    deaf: int, make_network: MakeNetwork, start: StartScenario, reference_digest: str
) -> None:
    """F8: when one node no longer receives from another, the later of the two is parked; after the network heals all continue."""
    network = make_network(3)
    run = start_on(network, start, *PATIENT)
    run.until_step(FAULT_STEP, nodes=3)
    before = run.generation()
    names = names_of(before)
    first, middle, last = names
    network.block(names[deaf], from_=names[2 - deaf])
    whole = heal_and_finish(run, network, [first, middle], reference_digest)
    cut, back = whole.generations[before.number :]
    assert cut.reason == f"{last} parked: no link to {first}"
    assert back.reason == f"{last} joins"
    assert set(back.members) == set(before.members)
    assert last not in proposers_since(run, before)


def test_one_half_of_an_equal_split_continues(
    make_network: MakeNetwork, start: StartScenario, reference_digest: str
) -> None:
    """F9: split 2 | 2, the half with the first member continues and the other waits; after the network heals all four continue."""
    network = make_network(4)
    run = start_on(network, start, *PATIENT)
    run.until_step(FAULT_STEP, nodes=4)
    before = run.generation()
    first, second, *others = names_of(before)
    network.split([first, second], others)
    whole = heal_and_finish(run, network, [first, second], reference_digest)
    assert names_of(whole.generations[before.number]) == [first, second]
    assert set(whole.generations[-1].members) == set(before.members)
    assert not proposers_since(run, before) & set(others)


@pytest.mark.parametrize("address", ["10.77.0.99", "fd77::99", "node-7", "10.77.0"])
def test_an_address_of_another_machine_is_refused(
    address: str, data_url: str, tmp_path: Path
) -> None:
    """A wrong `--address` ends the agent with exit code 2 and a one-line error, before the run begins."""
    config = tmp_path / "config.toml"
    config.write_text(make_config(f"file://{tmp_path}/run", data_url, 1).to_toml())
    command = [sys.executable, "-m", "elastic_pt", "run", str(config), "--address", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    said = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert done.returncode == 2, done.stderr
    assert len(said) == 1
    assert f"--address {address}" in said[0]
    assert not (tmp_path / "run" / "log").exists()


def test_start_and_recovery_ask_no_dns_server(
    make_network: MakeNetwork, start: StartScenario, reference_digest: str, tmp_path: Path
) -> None:
    """F47: nodes reach each other by address and ask no DNS server, so a silent one causes no delay."""
    network = make_network(2)
    resolver = tmp_path / "resolv.conf"
    resolver.write_text(f"nameserver {network.address_of_hub()}\noptions timeout:5 attempts:2\n")
    with network.on_hub():
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        server.bind((network.address_of_hub(), 53))
    server.setblocking(False)
    hide = ["unshare", "--mount", "sh", "-c"]
    script = f'mount --bind {resolver} /etc/resolv.conf && exec "$@"'
    with server:
        run = start("elastic.nodes_max=2", "elastic.workers_per_node=2", *PATIENT)
        run.ask_from = network.on_hub
        for node in network.nodes:
            run.fleet.start(
                node,
                address=network.address(node),
                prefix=[*network.prefix(node), *hide, script, "sh"],
            )
        run.until_step(FAULT_STEP, nodes=2)
        os.kill(workers_of(run.fleet.pid("node-1"), run.mark)[0], signal.SIGKILL)
        run.finish()
        run.check_whole(reference_digest)
        assert received(server) == []


def received(server: socket.socket) -> list[str]:
    """The names in the DNS queries that arrived."""
    names = []
    while True:
        try:
            query = server.recv(4096)
        except BlockingIOError:
            return names
        names.append(query[12:].partition(b"\0\0")[0].decode(errors="replace"))
