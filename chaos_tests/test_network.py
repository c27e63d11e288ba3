"""Nodes with addresses of their own on a network that is cut: one side goes on, the other waits and comes back."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import permutations
from pathlib import Path

import pytest

from chaos_tests.conftest import StartScenario
from chaos_tests.processes import workers_of
from chaos_tests.scenario import CHECKPOINT_STEPS, PATIENCE_S, Scenario, Whole, make_config
from elastic_pt.fleet.network import Network, missing_for_networks
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import Generation
from tests.services.fixtures import left_out

pytestmark = pytest.mark.chaos

FAULT_STEP = CHECKPOINT_STEPS + 3
PROBE_TIMEOUT_S = 0.5
PATIENT = ("elastic.hang_timeout_s=60", "elastic.join_window_s=2")
"""A worker may be made to stand still, and who comes back does not wait long to be taken in."""

MakeNetwork = Callable[..., Network]


@pytest.fixture
def make_network() -> Iterator[MakeNetwork]:
    """Makes the test's network: `make_network(3, versions=(6,))` for three nodes that speak IPv6 only."""
    missing = missing_for_networks()
    if missing:
        left_out(f"tests on networks of their own, {missing}")
    with ExitStack() as stack:

        def make(count: int, *, versions: tuple[int, ...] = (4,)) -> Network:
            names = [f"node-{number}" for number in range(count)]
            return stack.enter_context(Network(names, versions=versions))

        yield make


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
    """Whether a connection from one node to another one comes about."""
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


def test_the_network_cuts_what_it_is_told_to_cut(make_network: MakeNetwork) -> None:
    """Each fault cuts its own paths for both versions of IP, spares the others, and is undone by `heal`."""
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
    assert cut() == both((one, three), (two, three))
    network.heal()
    assert cut() == set()


def test_a_one_way_cut_lets_the_other_way_pass(make_network: MakeNetwork) -> None:
    """What B sends still arrives at A while B hears nothing of A."""
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
def test_nodes_with_addresses_of_their_own(
    version: int, make_network: MakeNetwork, start: StartScenario, reference_digest: str
) -> None:
    """Every connection between nodes goes to the address a node was given, be it IPv4 or IPv6; none needs loopback."""
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
def test_a_node_without_a_link_is_left_behind(
    rank: int, make_network: MakeNetwork, start: StartScenario, reference_digest: str
) -> None:
    """F4: a node that falls silent, nothing being reset, is lost to the others; it sees the end and adds nothing."""
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
    """The world cannot finish a step meanwhile, because a worker is stopped: it would be over before it changes."""
    worker = workers_of(run.fleet.pid(node), run.mark)[0]
    os.kill(worker, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(worker, signal.SIGCONT)


def heal_and_finish(run: Scenario, network: Network, others: list[str], digest: str) -> Whole:
    """The side that went on does a step, the network heals, and the run ends with everyone in it again."""
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


def test_a_leader_cut_off_by_a_partition_comes_back(
    make_network: MakeNetwork, start: StartScenario, reference_digest: str
) -> None:
    """F7: two of three go on; the first leaves the run to them, appends no generation, and is taken in once healed."""
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
def test_of_two_nodes_with_a_one_way_link_one_waits(
    deaf: int, make_network: MakeNetwork, start: StartScenario, reference_digest: str
) -> None:
    """F8: when one node no longer hears another one, the later of the two is parked; healed, all go on."""
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


def test_of_two_halves_one_goes_on(
    make_network: MakeNetwork, start: StartScenario, reference_digest: str
) -> None:
    """F9: torn 2 | 2, the half with the first member goes on and the other one waits; healed, all four go on."""
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
def test_an_address_that_is_not_this_nodes_own_is_refused(
    address: str, data_url: str, tmp_path: Path
) -> None:
    """A wrong `--address` ends the agent with exit code 2 and one line that says so; the run has not begun."""
    config = tmp_path / "config.toml"
    config.write_text(make_config(f"file://{tmp_path}/run", data_url, 1).to_toml())
    command = [sys.executable, "-m", "elastic_pt", "run", str(config), "--address", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    said = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert done.returncode == 2, done.stderr
    assert len(said) == 1
    assert f"--address {address}" in said[0]
    assert not (tmp_path / "run" / "log").exists()


def test_no_name_is_looked_up_from_the_start_to_the_recovery(
    make_network: MakeNetwork, start: StartScenario, reference_digest: str, tmp_path: Path
) -> None:
    """F47: nodes that know each other by address ask no DNS server, so a silent one costs no second."""
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
    """The names that were asked for, as far as they can be read."""
    names = []
    while True:
        try:
            query = server.recv(4096)
        except BlockingIOError:
            return names
        names.append(query[12:].partition(b"\0\0")[0].decode(errors="replace"))
