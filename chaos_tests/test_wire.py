"""Faults on the wire between nodes, seen by real packets: each does what it says, on its own path only."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from chaos_tests.conftest import MakeNetwork
from elastic_pt.fleet.forwarder import Disturbance
from elastic_pt.fleet.network import Network

WAIT_S = 20.0
QUICK_S = 0.05
"""Far more than a path without a fault takes, and less than any fault here."""
DATAGRAMS = 400
HUB = "hub"
SO_RCVBUFFORCE = 33
STREAM = bytes(range(256)) * 4096


def place(network: Network, node: str) -> AbstractContextManager[None]:
    """Puts this thread on a node, or on the hub."""
    return network.on_hub() if node == HUB else network.on(node)


@contextmanager
def connection(
    network: Network, caller: str, listener: str
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a new TCP connection between two nodes, or a node and the hub."""
    address = network.address_of_hub() if listener == HUB else network.address(listener)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with ExitStack() as stack:
        with place(network, listener):
            opened = socket.create_server((address, 0), family=family)
        stack.enter_context(opened)
        with place(network, caller):
            one = stack.enter_context(socket.socket(family))
        one.settimeout(WAIT_S)
        one.connect(opened.getsockname())
        other = stack.enter_context(opened.accept()[0])
        other.settimeout(WAIT_S)
        for each in (one, other):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield one, other


def round_trip_s(network: Network, one: str, other: str) -> float:
    """The shortest of several round trips on a connection."""
    with connection(network, one, other) as (here, there):
        return min(_round_trip_s(here, there) for _ in range(5))


def _round_trip_s(here: socket.socket, there: socket.socket) -> float:
    began_s = time.monotonic()
    here.sendall(b"?")
    assert there.recv(1) == b"?"
    there.sendall(b"!")
    assert here.recv(1) == b"!"
    return time.monotonic() - began_s


def transferred(
    network: Network, sender: str, receiver: str, data: bytes = STREAM
) -> tuple[bytes, float]:
    """What arrives of a stream, and the seconds it takes."""
    with connection(network, sender, receiver) as (here, there):

        def send() -> None:
            here.sendall(data)
            here.shutdown(socket.SHUT_WR)

        began_s = time.monotonic()
        thread = threading.Thread(target=send)
        thread.start()
        received = bytearray()
        while piece := there.recv(1 << 16):
            received += piece
        thread.join()
        return bytes(received), time.monotonic() - began_s


def datagrams(network: Network, sender: str, receiver: str) -> Counter[int]:
    """How often each of `DATAGRAMS` datagrams arrives."""
    with ExitStack() as stack:
        with network.on(receiver):
            there = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        with network.on(sender):
            here = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        there.bind((network.address(receiver), 0))
        there.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 4 << 20)  # of itself it drops none
        there.settimeout(0.5)
        # Until addresses are resolved the sender's kernel keeps some datagrams back, and drops others.
        first = False
        while not first:
            here.sendto(b"first", there.getsockname())
            with suppress(TimeoutError):
                first = there.recv(16) == b"first"
        arrived: Counter[int] = Counter()
        for number in range(DATAGRAMS):
            here.sendto(number.to_bytes(4, "big"), there.getsockname())
        with suppress(TimeoutError):
            while True:
                if (data := there.recv(16)) != b"first":
                    arrived[int.from_bytes(data, "big")] += 1
        return arrived


def test_delay_holds_frames_back_on_one_nodes_paths_only(make_network: MakeNetwork) -> None:
    """A round trip takes twice the delay, also to the hub; between other nodes it takes none, and after `heal` nowhere."""
    network = make_network(3)
    one, two, three = network.nodes
    network.disturb(one, Disturbance(delay_s=0.1, jitter_s=0.02))
    assert 0.2 <= round_trip_s(network, one, two) < 0.3
    assert 0.2 <= round_trip_s(network, two, one) < 0.3
    began_s = time.monotonic()
    with connection(network, one, HUB):
        # One round trip for the hub's address, one for the connection: nobody answers in the hub's place.
        assert time.monotonic() - began_s >= 0.4
    assert 0.2 <= round_trip_s(network, one, HUB) < 0.3
    assert round_trip_s(network, two, HUB) < QUICK_S
    assert round_trip_s(network, two, three) < QUICK_S
    network.heal()
    assert round_trip_s(network, one, two) < QUICK_S


def test_share_of_frames_is_lost_in_both_directions(make_network: MakeNetwork) -> None:
    """About that share of datagrams is missing, as many as are counted; other nodes lose none."""
    network = make_network(3)
    one, two, three = network.nodes
    network.disturb(one, Disturbance(lost=0.3), seed=3)
    for sender, receiver in ((one, two), (two, one)):
        before = network.disturbed(one)["lost"]
        missing = DATAGRAMS - len(datagrams(network, sender, receiver))
        assert 0.2 * DATAGRAMS < missing < 0.4 * DATAGRAMS
        # Apart from those, a few frames resolve addresses.
        assert missing <= network.disturbed(one)["lost"] - before <= missing + 20
    assert datagrams(network, two, three).total() == DATAGRAMS
    network.heal()
    assert datagrams(network, one, two).total() == DATAGRAMS


def test_share_of_frames_arrives_twice(make_network: MakeNetwork) -> None:
    """About that share of datagrams arrives twice, none is missing; other nodes receive each once."""
    network = make_network(3)
    one, two, three = network.nodes
    network.disturb(one, Disturbance(duplicated=0.5), seed=3)
    arrived = datagrams(network, two, one)
    assert len(arrived) == DATAGRAMS
    twice = sum(count == 2 for count in arrived.values())
    assert 0.4 * DATAGRAMS < twice < 0.6 * DATAGRAMS
    assert twice == arrived.total() - DATAGRAMS <= network.disturbed(one)["duplicated"]
    assert set(datagrams(network, two, three).values()) == {1}


@pytest.mark.parametrize("version", [4, 6])
def test_flipped_bits_reach_the_application(version: int, make_network: MakeNetwork) -> None:
    """TCP delivers wrong bits, as many as are counted, because the checksum is right; other nodes receive what was sent."""
    network = make_network(3, versions=(version,))
    one, two, three = network.nodes
    network.disturb(one, Disturbance(flipped=0.2), seed=3)
    for sender, receiver in ((one, two), (two, one)):
        before = network.disturbed(one)["flipped"]
        received, _ = transferred(network, sender, receiver)
        assert len(received) == len(STREAM)
        wrong = int.from_bytes(received, "big") ^ int.from_bytes(STREAM, "big")
        flipped = network.disturbed(one)["flipped"] - before
        # TCP may send a frame again although it has arrived; then one of the two is not read.
        assert 0 < wrong.bit_count() <= flipped <= wrong.bit_count() + 2
    assert transferred(network, two, three)[0] == STREAM
    network.heal()
    assert transferred(network, one, two)[0] == STREAM


def test_streams_survive_all_but_flips(make_network: MakeNetwork) -> None:
    """Loss, duplicates and frames that overtake each other change no byte of a stream, and another disturbance replaces them."""
    network = make_network(2)
    one, two = network.nodes
    network.disturb(one, Disturbance(delay_s=0.002, jitter_s=0.01, lost=0.02, duplicated=0.1))
    assert transferred(network, one, two)[0] == STREAM
    assert transferred(network, two, one)[0] == STREAM
    counts = network.disturbed(one)
    assert counts["lost"] > 0 < counts["duplicated"]
    network.disturb(one, Disturbance())
    assert transferred(network, one, two)[0] == STREAM
    assert network.disturbed(one)["lost"] == 0


def test_bandwidth_is_limited_in_both_directions(make_network: MakeNetwork) -> None:
    """What a limited node sends and receives takes its time, also through a disturbance; other nodes are as fast as before."""
    network = make_network(3)
    one, two, three = network.nodes
    network.limit(one, 2 * len(STREAM))
    network.disturb(one, Disturbance(delay_s=0.001))
    for path in ((one, two), (two, one)):
        received, took_s = transferred(network, *path)
        assert received == STREAM
        assert 0.35 < took_s < 2.0
    assert network.throttled(one) > 0
    assert transferred(network, two, three)[1] < 0.3
    network.heal()
    assert transferred(network, one, two)[1] < 0.3


def ends_with(error: type[OSError], act: Callable[[], object]) -> bool:
    """Whether repeating it ends with that error soon."""
    give_up_s = time.monotonic() + WAIT_S
    while time.monotonic() < give_up_s:
        try:
            act()
        except error:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("version", [4, 6])
def test_connections_of_a_pair_are_reset_at_both_ends(
    version: int, make_network: MakeNetwork
) -> None:
    """Both ends see a reset, and a new connection is refused; the pair's other connections live, and `heal` ends it."""
    network = make_network(3, versions=(version,))
    one, two, three = network.nodes
    with (
        connection(network, one, two) as (here, there),
        connection(network, one, three) as (apart, from_it),
    ):
        network.reset(one, two)
        here.sendall(b"x")
        with pytest.raises(ConnectionResetError):
            here.recv(1)
        assert ends_with(ConnectionResetError, lambda: there.sendall(b"x") or there.recv(1))
        for ends in ((one, two), (two, one)):
            with pytest.raises(ConnectionRefusedError), connection(network, *ends):
                pass
        assert _round_trip_s(apart, from_it) < QUICK_S
    assert network.rejected(one, from_=two) > 0
    assert network.rejected(one, from_=three) == 0
    assert network.rejected(three, from_=one) == 0
    network.heal()
    assert round_trip_s(network, one, two) < QUICK_S
    assert network.rejected(one, from_=two) == 0


def links_of_hub(network: Network) -> str:
    """The kernel's list of the hub's links, without statistics."""
    with network.on_hub():
        return subprocess.run(
            ["ip", "-brief", "link"], capture_output=True, text=True, check=True
        ).stdout


def children() -> set[str]:
    """Process ids of this process's children."""
    return set(Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split())


def test_heal_leaves_neither_process_nor_link(make_network: MakeNetwork) -> None:
    """After `heal` the hub has the links that it had, and no forwarder runs; a link that was taken down is up again."""
    network = make_network(2)
    one, two = network.nodes
    before, running = links_of_hub(network), children()
    (hub,) = (line for line in before.splitlines() if line.startswith(HUB))
    network.disturb(two, Disturbance())
    network.disturb(one, Disturbance(delay_s=0.001))
    network.link_down(one)
    network.disturb(one, Disturbance(delay_s=0.002))
    assert len(children() - running) == 2
    # With the address that nodes remember, although both links were taken from it.
    assert hub in links_of_hub(network).splitlines()
    network.heal()
    assert links_of_hub(network) == before
    assert children() == running
    assert round_trip_s(network, one, two) < QUICK_S
    network.disturb(two, Disturbance())
    network.close()
    assert children() == running


PARENT = """
import os, time
from elastic_pt.fleet.forwarder import Disturbance
from elastic_pt.fleet.network import Network
with Network(["one", "two"]) as network:
    network.disturb("one", Disturbance())
    other = os.fork()
    if other:
        print(other, flush=True)
    time.sleep(600)
"""


def test_forwarder_dies_with_a_killed_parent(make_network: MakeNetwork) -> None:
    """SIGKILL to the process that made the network ends the forwarder, even if a fork keeps its input open."""
    make_network(1)
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    other = parent.stdout.readline().strip()
    try:
        started = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        (forwarder,) = set(started) - {other}
        assert "forwarder" in Path(f"/proc/{forwarder}/cmdline").read_text()
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        give_up_s = time.monotonic() + WAIT_S
        while Path(f"/proc/{forwarder}").exists():
            assert time.monotonic() < give_up_s
            time.sleep(0.01)
    finally:
        os.kill(int(other), signal.SIGKILL)
        parent.kill()
        parent.wait()
        parent.stdout.close()
