"""What a run over the WireGuard network of deploy/wireguard shows to the network below, and who its peers are."""

import importlib.util
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import pytest

from chaos_tests.conftest import MakeNetwork, StartScenario
from chaos_tests.scenario import CHECKPOINT_STEPS
from chaos_tests.test_security import listeners
from chaos_tests.wireguard import MESH, PORT, Mesh
from elastic_pt.fleet.network import Network
from elastic_pt.store.open import open_store
from tests.services.fixtures import left_out

pytestmark = [pytest.mark.chaos, pytest.mark.quick]

DEADLINE_S: Final = 20.0
_ALL_FRAMES: Final = 3
_IPV4, _IPV6, _ARP = 0x0800, 0x86DD, 0x0806
_UDP: Final = 17
_ICMP6: Final = frozenset({0, 58})
"""Next headers: groups and neighbours of the interface's own link-local address."""
_IGMP: Final = (_IPV4, 2)
_GRADIENTS_BYTES_MIN: Final = 10 * 2**20

MakeMesh = Callable[[Network, str], Mesh]


@pytest.fixture
def make_mesh(tmp_path: Path) -> Iterator[MakeMesh]:
    """Makes the mesh of a network and a run; all its processes end with the test."""
    missing = [each for each in ("wg", "wireguard-go") if shutil.which(each) is None]
    if missing or not Path("/dev/net/tun").exists():
        left_out(f"tests of WireGuard, without {', '.join(missing) or '/dev/net/tun'}")
    with ExitStack() as stack:

        def make(network: Network, run_url: str) -> Mesh:
            mesh = Mesh(network, run_url, tmp_path)
            stack.callback(mesh.close)
            return mesh

        yield make


def mesh_module() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("mesh", MESH)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def sizes_on_the_wire(network: Network, node: str) -> Iterator[dict[str, int]]:
    """Bytes that a node sends and receives over the network below, by what a listener there can tell."""
    sizes: dict[str, int] = {}
    stop = threading.Event()
    with network.on(node):
        ear = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_FRAMES))
        ear.bind(("eth0", 0))

    def listen() -> None:
        ear.settimeout(0.1)
        while not stop.is_set():
            with suppress(TimeoutError):
                frame = ear.recv(1 << 16)
                kind = kind_of(frame)
                sizes[kind] = sizes.get(kind, 0) + len(frame)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield sizes
    finally:
        stop.set()
        thread.join()
        ear.close()


def kind_of(frame: bytes) -> str:
    """`wireguard`, `kernel` (neighbours and groups of the link), or the protocol and ports of anything else."""
    ether, packet = int.from_bytes(frame[12:14], "big"), frame[14:]
    if ether == _ARP or (ether == _IPV6 and packet[6] in _ICMP6) or (ether, packet[9]) == _IGMP:
        return "kernel"
    if ether != _IPV4:
        return f"ether {ether:04x}"
    ports = packet[4 * (packet[0] & 15) :]
    there, here = int.from_bytes(ports[:2], "big"), int.from_bytes(ports[2:4], "big")
    if (packet[9], there, here) == (_UDP, PORT, PORT):
        return "wireguard"
    ends = ".".join(map(str, packet[12:16])), ".".join(map(str, packet[16:20]))
    return f"protocol {packet[9]} from {ends[0]}:{there} to {ends[1]}:{here}"


def until_peers(mesh: Mesh, node: str, addresses: set[str]) -> None:
    """Wait until these and no others are the peers that have answered a node."""
    deadline_s = time.monotonic() + DEADLINE_S
    while (found := mesh.peers(node).keys()) != addresses:
        assert time.monotonic() < deadline_s, f"{node}: {found}; expected {addresses}"
        time.sleep(0.05)


def test_a_run_over_wireguard_shows_nothing_else_to_the_network(
    make_network: MakeNetwork, make_mesh: MakeMesh, start: StartScenario, reference_digest: str
) -> None:
    """A node is lost and another comes; below there is only WireGuard's port, and the weights are those of the reference."""
    network = make_network(3)
    run = start("elastic.nodes_max=2", "elastic.nodes_min=2", "elastic.join_window_s=2")
    mesh = make_mesh(network, run.config.run.url)
    run.ask_from = lambda: network.on("node-0")
    addresses = {}

    def come(node: str) -> None:
        addresses[node] = mesh.join(node)
        run.fleet.start(node, address=addresses[node], prefix=network.prefix(node))

    with sizes_on_the_wire(network, "node-0") as sizes:
        come("node-0")
        come("node-1")
        run.until_step(CHECKPOINT_STEPS + 2, nodes=2)
        assert {each for each, _ in listeners(network, "node-0")} <= {
            addresses["node-0"],
            "127.0.0.1",
        }
        network.link_down("node-1")
        run.fleet.kill("node-1")
        mesh.lose("node-1")
        come("node-2")
        run.until_step(3 * CHECKPOINT_STEPS, nodes=2)
        run.finish()
    mesh.close()
    run.check_whole(reference_digest)
    assert sizes.keys() <= {"wireguard", "kernel"}, sizes
    assert sizes["wireguard"] > _GRADIENTS_BYTES_MIN, sizes


def test_peers_come_and_go_with_their_objects(
    make_network: MakeNetwork, make_mesh: MakeMesh, tmp_path: Path
) -> None:
    """A deleted object of a live node comes back, that of a lost node does not; no other object is a peer."""
    network = make_network(3)
    folder = tmp_path / "run" / "secret" / "wireguard"
    mesh = make_mesh(network, f"file://{tmp_path / 'run'}")
    addresses = {node: mesh.join(node) for node in network.nodes}
    folder.joinpath("rubbish").touch()
    folder.joinpath(f"{'0' * 64}@nobody:51820").touch()
    folder.joinpath(f"{'0' * 64}@10.0.0.1:99999").touch()
    for node in network.nodes:
        others = {addresses[other] for other in network.nodes if other != node}
        until_peers(mesh, node, others)
    assert mesh.peers("node-0")[addresses["node-1"]] == f"{network.address('node-1')}:{PORT}"
    entries = sorted(folder.glob("*@10.77.*"))
    assert len(entries) == 3
    mesh.lose("node-2")
    for entry in entries:
        entry.unlink()
    until_peers(mesh, "node-0", {addresses["node-1"]})
    until_peers(mesh, "node-1", {addresses["node-0"]})
    assert len(list(folder.glob("*@10.77.*"))) == 2
    # It had written its object again before anybody had missed it too often.
    assert f"{addresses['node-1']} is gone" not in (tmp_path / "node-0.mesh.log").read_text()


def test_a_silent_peer_is_removed_with_its_object(
    make_network: MakeNetwork, make_mesh: MakeMesh, tmp_path: Path
) -> None:
    """After ten minutes without an answer; the own object and those of peers that answer stay. Time is an argument."""
    network = make_network(2)
    run_url = f"file://{tmp_path / 'run'}"
    mesh, module = make_mesh(network, run_url), mesh_module()
    store = open_store(run_url)
    lost = f"{module.PREFIX}{'1' * 64}@10.77.0.9:{PORT}"
    store.create(lost, b"")
    alive = mesh.join("node-1")
    mesh.make("node-0")
    until_peers(mesh, "node-0", {alive})
    (own,) = [key for key in store.keys(module.PREFIX) if network.address("node-0") in key]
    (other,) = [key for key in store.keys(module.PREFIX) if network.address("node-1") in key]
    peers: dict[str, Any] = {}

    def sync(now_s: float) -> None:
        with network.on("node-0"):
            module.sync(store, mesh.interface("node-0"), own, peers, now_s)

    sync(0.0)
    assert peers.keys() == {module.public_key_in(each) for each in (lost, other)}
    peers[module.public_key_in(other)].heard_s = module.SILENT_S
    sync(module.SILENT_S - 1)
    assert lost in store.keys(module.PREFIX)
    sync(module.SILENT_S + 1)
    assert peers.keys() == {module.public_key_in(other)}
    assert set(store.keys(module.PREFIX)) == {own, other}
    assert mesh.peers("node-0").keys() == {alive}


def test_a_node_that_starts_again_keeps_its_address(
    make_network: MakeNetwork, make_mesh: MakeMesh, tmp_path: Path
) -> None:
    """Its key is in memory until the machine ends; nobody else may read it, and it is not in the run directory."""
    network = make_network(2)
    mesh = make_mesh(network, f"file://{tmp_path / 'run'}")
    addresses = [mesh.join("node-0"), mesh.join("node-1")]
    key = tmp_path / "node-0.key"
    assert key.stat().st_mode & 0o777 == 0o600
    mesh.lose("node-0")
    assert mesh.join("node-0") == addresses[0]
    until_peers(mesh, "node-1", {addresses[0]})
    private = key.read_text().strip()
    assert not [path for path in (tmp_path / "run").rglob("*") if private in str(path)]
