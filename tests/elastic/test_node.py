"""Real nodes over real HTTP on loopback agree through a real log."""

import contextlib
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elastic_pt.elastic.log import RunLog
from elastic_pt.elastic.membership import Limits
from elastic_pt.elastic.node import Formed, Node, NodeOptions
from elastic_pt.elastic.peers import run_token, url_of
from elastic_pt.elastic.records import Checkpoint, Commit, Stop
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store

DEADLINE_S = 20.0


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A run directory."""
    return open_store(f"file://{tmp_path}")


@pytest.fixture
def make_node(store: Store) -> Iterator[Callable[..., Node]]:
    """Starts nodes of one run and makes them leave in the end."""
    with contextlib.ExitStack() as stack:

        def make(
            name: str, *, nodes_min: int = 1, on_drain: Callable[[str], None] = lambda _: None
        ) -> Node:
            limits = Limits(nodes_min, 8, 8, heartbeat_timeout_s=2.0, join_window_s=0.3)
            options = NodeOptions(name, "127.0.0.1", 1, "same", limits, heartbeat_interval_s=0.05)
            node = Node(
                options,
                store,
                RunLog(store, writer=name),
                choose_resume=lambda _: None,
                on_drain=on_drain,
            )
            node.start()
            stack.callback(node.leave)
            return node

        yield make


def formed(*nodes: Node) -> list[Formed]:
    """Wait for the next generation of each node, all at once, as their agents would."""
    results: dict[int, Formed | Stop] = {}

    def wait(index: int, node: Node) -> None:
        results[index] = node.await_generation()
        node.running()

    threads = [threading.Thread(target=wait, args=each, daemon=True) for each in enumerate(nodes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive(), f"no generation after {DEADLINE_S} s"
    found = [results[index] for index in range(len(nodes))]
    assert all(isinstance(each, Formed) for each in found)
    return found  # type: ignore[return-value]


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Poll until a condition holds."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {DEADLINE_S} s: {what}"
        threading.Event().wait(0.02)


def names(generation: Formed) -> list[str]:
    """The members, in rank order."""
    return [member.node for member in generation.generation.members]


def test_nodes_that_start_together_form_one_generation(make_node: Callable[..., Node]) -> None:
    """Nodes find each other through the lobby and agree on one generation, one rank each, one fresh store."""
    nodes = [make_node(name, nodes_min=3) for name in ("c", "a", "b")]
    worlds = formed(*nodes)
    assert {tuple(names(world)) for world in worlds} == {("a", "b", "c")}
    assert sorted(world.node_rank for world in worlds) == [0, 1, 2]
    worlds[0].store.set("greeting", "hello")
    assert worlds[1].store.get("greeting") == b"hello"


def test_losing_rank_zero_leads_to_a_generation_without_it(make_node: Callable[..., Node]) -> None:
    """When the leading node goes, the others form the next generation, on another store, with the reason."""
    a, b, c = (make_node(name, nodes_min=2) for name in "abc")
    first = formed(a, b, c)[1]
    a.leave()
    eventually(lambda: b.must_reform(first.generation.number), "b notices")
    for node in (b, c):
        node.spend(first.generation.number, "")
    second = formed(b, c)[0]
    assert names(second) == ["b", "c"]
    assert second.generation.reason == "lost a"
    assert second.generation.store_port != first.generation.store_port


def test_a_newcomer_joins_after_a_drain(make_node: Callable[..., Node]) -> None:
    """A node that comes later makes the leader ask for a drain, and is a member once all have spent."""
    asked: list[str] = []
    a = make_node("a", on_drain=asked.append)
    first = formed(a)[0]
    b = make_node("b")
    # More than once: workers that were still starting must hear of it too.
    eventually(lambda: len(asked) > 3, "the leader keeps asking for a drain")
    assert set(asked) == {"b joins"}
    assert not a.must_reform(first.generation.number)
    a.settling()
    a.spend(first.generation.number, "")
    assert names(formed(a, b)[0]) == ["a", "b"]


def test_everyone_learns_of_the_end_through_heartbeats(make_node: Callable[..., Node]) -> None:
    """A STOP that one node appends ends the others without their polling the bucket."""
    a, b = make_node("a", nodes_min=2), make_node("b", nodes_min=2)
    world = formed(a, b)[0]
    log = a._log
    log.append(lambda _: Stop("completed", 7), generation=world.generation.number)
    a.notice_log()
    assert a.await_end(world.generation.number, DEADLINE_S, lambda: False)
    assert b.await_end(world.generation.number, DEADLINE_S, lambda: False)
    assert b.await_generation() == Stop("completed", 7)


def test_settling_ends_when_the_checkpoint_counts_or_is_given_up(
    make_node: Callable[..., Node],
) -> None:
    """A commit of another generation settles nothing; one of this generation does; giving up ends the wait."""
    a = make_node("a")
    number = formed(a)[0].generation.number

    def committed(step: int, generation: int) -> Commit:
        return Commit((Checkpoint(step, generation, f"ckpt/{step}", 1, "0" * 64, None),), "history")

    a._log.append(lambda _: committed(100, number - 1), generation=number)
    assert not a.await_settled(number, 60, 0.1, lambda: False)
    assert not a.await_settled(number, 60, DEADLINE_S, lambda: True)
    a._log.append(lambda _: committed(60, number), generation=number)
    assert a.await_settled(number, 60, DEADLINE_S, lambda: False)


def test_a_node_outside_learns_of_the_end_by_itself(
    make_node: Callable[..., Node], store: Store
) -> None:
    """A waiting node whose members left right after STOP looks at the log and ends too."""
    a = make_node("a")
    world = formed(a)[0]
    spare = make_node("spare")
    eventually(lambda: spare.reason.startswith("asked a"), "the spare sees the member")
    RunLog(store, writer="x").append(
        lambda _: Stop("completed", 7), generation=world.generation.number
    )
    a.leave()
    assert spare.await_generation() == Stop("completed", 7)


def test_strangers_are_turned_away(make_node: Callable[..., Node], store: Store) -> None:
    """Without the run's token an agent answers 401; with it, rubbish gets 400 and changes nothing."""
    node = make_node("a")

    def ask(path: str, token: str, body: bytes | None = None) -> int:
        request = urllib.request.Request(
            url_of(node.member, path), data=body, headers={"Authorization": f"Bearer {token}"}
        )
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                assert json.load(answer)["member"]["node"] == "a"
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    token = run_token(store)
    assert ask("/v1/status", token) == 200
    assert ask("/v1/status", "wrong") == 401
    assert ask("/v1/heartbeat", "", b"{}") == 401
    assert ask("/v1/heartbeat", token, b'{"member": 1}') == 400
    assert ask("/v1/heartbeat", token, b"x" * 100_000) == 413
    assert node._table.peers == {}
