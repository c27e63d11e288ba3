"""Which scrape targets an asker gets: rules of addresses, and real nodes that ask each other."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import pytest

from elastic_pt.config import ElasticSection
from elastic_pt.membership import contacts, discovery
from elastic_pt.membership.decision.status import Limits, NodeStatus, Peer
from elastic_pt.membership.discovery import Discovery
from elastic_pt.membership.endpoints import (
    NODE_LABEL,
    Endpoint,
    as_targets,
    nodes_up,
    reachable,
)
from elastic_pt.membership.node import Node, new_member, new_node
from elastic_pt.membership.resources import Resources
from elastic_pt.membership.tcp_store import bind_store
from elastic_pt.runlog.access import Access, join_access
from elastic_pt.runlog.log import RunLog
from tests.access import TLS
from tests.membership.bucket import WatchedStore
from tests.membership.fleet import Fleet
from tests.membership.world import NOW_S, changed, waiting

DEADLINE_S = 20.0
HERE = frozenset({"10.77.0.1", "fd77::1", "127.0.0.1"})
LIMITS = Limits(
    ElasticSection(
        nodes_max=16,
        heartbeat_timeout_s=2.0,
        join_window_s=0.3,
        takeover_s=4.0,
        heartbeat_interval_s=0.1,
    ),
    slots=16,
)


def endpoint(address: str, url: str, node: str = "n") -> Endpoint:
    """A node's endpoint at a URL without its scheme and path."""
    return Endpoint(node, address, f"http://{url}/metrics")


@pytest.mark.parametrize(
    ("asker", "address", "url", "listed"),
    [
        # On loopback: for this machine's askers only, and only if the node is on this machine too.
        ("127.0.0.1", "127.0.0.1", "127.0.0.1:9400", True),
        ("127.0.0.1", "10.77.0.1", "127.0.0.1:9400", True),
        ("127.0.0.1", "10.77.0.2", "127.0.0.1:9400", False),
        ("10.77.0.254", "10.77.0.1", "127.0.0.1:9400", False),
        ("10.77.0.254", "127.0.0.1", "127.0.0.1:9400", False),
        ("10.77.0.1", "10.77.0.1", "127.0.0.1:9400", True),
        ("::ffff:127.0.0.1", "10.77.0.1", "127.0.0.1:9400", True),
        ("::ffff:10.77.0.254", "10.77.0.1", "127.0.0.1:9400", False),
        ("::1", "fd77::1", "[::1]:9400", True),
        ("::1", "fd77:0::1", "127.0.0.2:9400", True),
        ("::1", "fd77::2", "[::1]:9400", False),
        # On an address of its own: for everyone.
        ("127.0.0.1", "10.77.0.2", "10.77.0.2:9400", True),
        ("10.77.0.254", "10.77.0.2", "10.77.0.2:9400", True),
        ("fd77::254", "fd77::2", "[fd77::2]:9400", True),
        ("not an address", "10.77.0.2", "10.77.0.2:9400", True),
        ("not an address", "10.77.0.1", "127.0.0.1:9400", False),
    ],
)
def test_only_reachable_endpoints_are_listed(
    asker: str, address: str, url: str, listed: bool
) -> None:
    """Each machine has a loopback of its own: an endpoint there is for an asker on the same machine only."""
    found = reachable([endpoint(address, url)], asker, HERE)
    assert [target["targets"] for target in as_targets(found)] == ([[url]] if listed else [])


def test_targets_have_no_labels_of_their_own() -> None:
    """The metrics carry `run` and `node`. A label of that name on the target would rename theirs."""
    (target,) = as_targets([endpoint("10.77.0.2", "10.77.0.2:9400", "node-7")])
    assert target == {"targets": ["10.77.0.2:9400"], "labels": {NODE_LABEL: "node-7"}}
    assert all(name.startswith("__meta_") for name in target["labels"])


def test_a_silent_or_refusing_node_is_not_up() -> None:
    """A node counts as up while its messages are fresh and its address does not refuse."""
    fresh = Peer(waiting("a"), NOW_S - 100, NOW_S - 1, refused=False, spoke_s=NOW_S - 1)
    old = replace(fresh, heard_s=NOW_S - 6, spoke_s=NOW_S - 6)
    # Of this one this node expects no answers, so its silence clock does not run.
    forgotten = replace(old, watched_since_s=None)
    deaf = replace(fresh, heard_s=NOW_S - 6)
    gone = replace(fresh, refused=True)
    unknown = replace(fresh, status=None)
    found = nodes_up([fresh, old, forgotten, deaf, gone, unknown], NOW_S, silence_s=5.0)
    assert found == [fresh.status]


def test_a_dead_member_is_gone_within_one_heartbeat_timeout(fleet: Fleet) -> None:
    """A node that dies is in no list after the heartbeat timeout, whether its address refuses or is silent."""
    fleet.start(*"abcd", metrics_url="http://10.0.0.1:9400/metrics")
    fleet.pass_time(4.0)
    fleet.run()
    a = fleet.nodes["a"]
    assert {each.node for each in a.known.endpoints()} == set("abcd")
    fleet.dead, fleet.off = {"b"}, {"c"}
    fleet.pass_time(fleet.limits.elastic.heartbeat_timeout_s + 0.4)
    assert {each.node for each in a.known.endpoints()} == set("ad")


# ---- real nodes ------------------------------------------------------------------------------------


@pytest.fixture
def start(bucket: WatchedStore) -> Iterator[Callable[[str], Node]]:
    """Starts real nodes of one run, each with a metrics URL of its own that nobody serves."""
    with ExitStack() as stack:

        def make(name: str) -> Node:
            url = f"http://10.0.0.{int(name[1:]) + 1}:9400/metrics"
            node = new_node(
                NodeStatus.first(new_member(name, "127.0.0.1", workers=1), {}, url),
                changed(LIMITS, nodes_min=5),
                Resources(
                    log=RunLog(bucket, writer=name),
                    hints=bucket,
                    clock_s=time.monotonic,
                    bind_store=partial(bind_store, "127.0.0.1"),
                    choose_resume=lambda _: None,
                    on_drain=lambda _: None,
                ),
                join_access(bucket, "test", tls=True),
            )
            node.start()
            stack.callback(node.leave)
            return node

        yield make


def eventually(find: Callable[[], set[str] | None], expected: set[str] | None) -> None:
    """Poll until the nodes that are found are those that are expected."""
    deadline_s = time.monotonic() + DEADLINE_S
    while (found := find()) != expected:
        assert time.monotonic() < deadline_s, f"{found} is not {expected}"
        time.sleep(0.02)


def names_from(node: Node, access: Access) -> Callable[[], set[str] | None]:
    """The names that this node's discovery lists, asked anew each time."""

    def find() -> set[str] | None:
        told = Discovery(node._participant, access, time.monotonic).targets("127.0.0.1")
        return None if told is None else {each["labels"][NODE_LABEL] for each in told}

    return find


def test_every_agent_of_a_large_fleet_lists_all_nodes(
    start: Callable[[str], Node], bucket: WatchedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member that knows only the leaders, and a node that waits, list all members and all that wait."""
    for module in (contacts, discovery):
        monkeypatch.setattr(module, "MESH_NODES_MAX", 2)
    access = join_access(bucket, "test", tls=True)
    nodes = {f"n{number}": start(f"n{number}") for number in range(5)}
    eventually(lambda: names_of_generation(nodes["n0"]), set(nodes))
    nodes |= {name: start(name) for name in ("n5", "n6")}
    for node in nodes.values():
        eventually(names_from(node, access), set(nodes))
    nodes.pop("n4").leave()
    for node in nodes.values():
        eventually(names_from(node, access), set(nodes))


def names_of_generation(node: Node) -> set[str]:
    """The members of the newest generation, as this node has read it."""
    generation = node.view.generation
    return set() if generation is None else {each.node for each in generation.members}


def test_targets_are_unknown_while_no_leader_answers(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leaders are heard and answer no question: the list would be short, so there is none."""
    monkeypatch.setattr(contacts, "MESH_NODES_MAX", 2)
    monkeypatch.setattr(discovery, "MESH_NODES_MAX", 2)
    fleet.start(*"abcd", metrics_url="http://10.0.0.1:9400/metrics")
    fleet.pass_time(4.0)
    fleet.run()
    # Nothing listens at the addresses of these nodes.
    assert Discovery(fleet.nodes["d"], TLS, fleet.clock_s).targets("127.0.0.1") is None


def test_answers_of_others_are_kept_for_a_moment(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An asker that asks without pause makes this agent ask others once in a few seconds, not each time."""
    asked: list[float] = []

    def ask(members: object, access: Access, timeout_s: float) -> dict[str, list[Endpoint]]:
        asked.append(fleet.now_s)
        return {"x": [endpoint("10.77.0.9", "10.77.0.9:9400", "x")]}

    monkeypatch.setattr(discovery, "ask_endpoints", ask)
    fleet.start("a", metrics_url="http://10.0.0.1:9400/metrics")
    found = Discovery(fleet.nodes["a"], TLS, fleet.clock_s)
    for _ in range(50):
        assert {each.node for each in found.endpoints() or ()} == {"a", "x"}
        fleet.now_s += 0.1
    assert len(asked) == 2
