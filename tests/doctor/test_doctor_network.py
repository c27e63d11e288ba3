"""`elastic-pt doctor` and the other nodes: ports that are closed, large packets that are lost, other code."""

import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from elastic_pt.chaos.servers import free_port
from elastic_pt.config import ElasticSection
from elastic_pt.doctor import network
from elastic_pt.doctor.network import Reached, agents_of, peer_checks
from elastic_pt.fleet.network import Network, missing_for_networks
from elastic_pt.membership.decision.status import NodeStatus
from elastic_pt.runlog.access import join_access
from elastic_pt.runlog.log import RunView
from elastic_pt.runlog.records import Generation, Member, Stop
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store
from tests.services.fixtures import left_out


def member(name: str, port: int = 4000, address: str = "127.0.0.1") -> Member:
    return Member(name, f"{name}-1", address, port, 1, 1)


def answer(each: Member, **fingerprint: str) -> NodeStatus:
    return NodeStatus.first(each, fingerprint)


def reached(each: Member, trouble: str = "") -> Reached:
    return Reached(each, trouble, "" if trouble else "10.0.0.9 (eth0)", 0 if trouble else 1448)


# ---- this node's own address ------------------------------------------------------------------------


def test_loopback_is_an_address_for_one_node_alone() -> None:
    """Peers cannot reach loopback; a run of one node has no peers."""
    assert network.own_address("127.0.0.1", alone=True).ok
    check = network.own_address("127.0.0.1", alone=False)
    assert not check.ok
    assert check.found == "127.0.0.1 (lo, MTU 65536), loopback"
    assert "--address" in check.remedy


def test_an_address_of_another_machine_is_refused() -> None:
    """An address that no interface has is a mistake in --address, or a machine that was cloned."""
    assert not network.own_address("198.51.100.7", alone=False).ok


@pytest.mark.parametrize(
    ("name", "ok"),
    [("spot-7", True), ("localhost", False), ("LOCALHOST", False), ("ubuntu", False)],
)
def test_a_name_that_every_machine_has(
    monkeypatch: pytest.MonkeyPatch, name: str, ok: bool
) -> None:
    """The host's name is the node's by default; that of a fresh image is the same on all nodes."""
    monkeypatch.setattr(socket, "gethostname", lambda: name)
    began_s = time.monotonic()
    assert network.host_name().ok == ok
    assert time.monotonic() - began_s < 1


def test_ports_of_this_machine() -> None:
    """A free port can be reached by the node's address; a port that a process has is told as such."""
    assert network.listening("127.0.0.1", 0).ok
    with socket.create_server(("127.0.0.1", 0)) as server:
        check = network.listening("127.0.0.1", server.getsockname()[1], "agent_port")
    assert (check.name, check.ok, check.expected) == ("agent_port", False, "a free port")
    assert "in use" in check.found


def test_a_firewall_on_the_own_address_is_found() -> None:
    """A node that cannot reach its own address, because packets to it are dropped, cannot train."""
    with one_network() as nodes, nodes.on("a"):
        address = nodes.address("a")
        assert network.listening(address, 0).ok
        nodes.block("a", from_="a")
        check = network.listening(address, 0)
        assert not check.ok
        assert "timed out" in check.found


def one_network(*names: str) -> Network:
    if missing := missing_for_networks():
        left_out(f"tests with a network for each node, {missing}")
    return Network(names or ("a",), versions=(4,))


# ---- the agents of a run ------------------------------------------------------------------------------


def test_agents_that_do_not_answer_are_named() -> None:
    """Which agent, at which address, and why: refused and filtered ports have other causes."""
    a, b, c = member("a"), member("b", 4001), member("c", 4002)
    check = network.members(
        [reached(a), reached(b, "Connection refused"), reached(c)], {a.incarnation: answer(a)}
    )
    assert not check.ok
    assert check.found == (
        "1 of 3 reached from 10.0.0.9 (eth0); not b 127.0.0.1:4001: Connection refused, "
        "c 127.0.0.1:4002: connected, but no answer as a member of this run"
    )
    assert network.members([reached(a)], {a.incarnation: answer(a)}).ok


def test_a_large_fleet_is_one_line() -> None:
    """Not more than eight names."""
    lost = [reached(member(f"n{number}"), "timed out") for number in range(1000)]
    assert network.members(lost, {}).found.endswith(" and 992 more")


def test_other_code_is_named() -> None:
    """Nodes with other code are refused by the members: told before the start."""
    a, b = member("a"), member("b")
    answers = {"a-1": answer(a, code="x"), "b-1": answer(b, code="y")}
    check = network.same_code(answers, "x")
    assert (check.ok, check.found) == (False, "other code than here on b")
    assert network.same_code({"a-1": answers["a-1"]}, "x").ok


def test_a_run_whose_agents_have_ended_is_not_asked(tmp_path: Path) -> None:
    """Without a pulse nobody trains: that no agent answers is then no trouble of the network. With a pulse it is."""
    store = open_store(f"file://{tmp_path}")
    gone = member("gone", free_port())
    view = a_view(gone)
    join_access(store, "node", tls=True)
    elastic = ElasticSection().model_copy(update={"takeover_s": 0.5})
    assert list(peer_checks(view, store, elastic)) == []
    store.write("pulse.json", b"1")
    assert list(peer_checks(view, store, elastic)) == []
    (check,) = peer_checks(view, Beating(store), elastic)  # type: ignore[arg-type]
    assert (check.name, check.ok) == ("members", False)
    assert "Connection refused" in check.found
    assert agents_of(replace(view, stop=Stop("completed", 10)), store) == []


def a_view(*members: Member) -> RunView:
    generation = Generation(1, members, (1,) * len(members), "127.0.0.1", 1, None, "started")
    return RunView(generations=(generation,))


class Beating:
    """A store whose pulse has changed at each look: agents train somewhere."""

    def __init__(self, inner: Store) -> None:
        self._inner, self._looks = inner, 0
        self.keys, self.url = inner.keys, inner.url

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        self._looks += key == "pulse.json"
        return str(self._looks).encode() if key == "pulse.json" else self._inner.read(key)
