"""How faults strike: what they meet, and what remains when one of several ends."""

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_pt.chaos.arena import Arena
from elastic_pt.chaos.kinds import KINDS, Need, NothingToStrike, Strike
from elastic_pt.chaos.scenario import Scenario

NODES = ("node-0", "node-1", "node-2")


class Wires:
    """A network that notes what is done to it."""

    nodes = NODES

    def __init__(self) -> None:
        self.cut: set[Any] = set()

    def link_down(self, node: str) -> None:
        self.cut.add(("down", node))

    def block(self, node: str, *, from_: str) -> None:
        self.cut.add((node, from_))

    def split(self, left: Any, right: Any) -> None:
        self.cut.add((tuple(left), tuple(right)))

    def heal(self) -> None:
        self.cut.clear()

    def rejected(self, node: str, *, from_: str) -> int:
        return (node, from_) in self.cut

    def unsent(self, node: str) -> int:
        return 4


@pytest.fixture
def arena(tmp_path: Path) -> Arena:
    """An arena whose nodes never start, on such a network."""
    scenario = Scenario(name="s", hypothesis="h", store="directory")
    config = scenario.run_config(f"file://{tmp_path}/run", f"file://{tmp_path}/d")
    made = Arena(config, tmp_path, NODES, points=(), decide=lambda *_: "go", network=False)
    made.network = Wires()  # type: ignore[assignment]
    return made


def strike(number: int, *nodes: str, **parameters: float) -> Strike:
    """A fault with this number."""
    others = tuple(each for each in NODES if each not in nodes)
    return Strike(number, nodes, 0, parameters, random.Random(number), others)


def test_the_end_of_one_network_fault_leaves_the_others(arena: Arena) -> None:
    """Each fault ends alone, and one that chose a node chooses the same again."""
    down, one_way = strike(1, "node-2"), strike(2, "node-0")
    assert arena.network is not None
    for kind, each in (("link_down", down), ("one_way", one_way)):
        act = KINDS[kind].strike
        assert act is not None
        act(arena, each)
    both = set(arena.network.cut)  # type: ignore[attr-defined]
    assert len(both) == 2
    partition = strike(3, "node-1")
    act, heal = KINDS["partition"].strike, KINDS["partition"].heal
    assert act is not None
    assert heal is not None
    act(arena, partition)
    assert len(arena.network.cut) == 3  # type: ignore[attr-defined]
    heal(arena, partition)
    assert arena.network.cut == both  # type: ignore[attr-defined]
    heal(arena, down)
    assert arena.network.cut == both - {("down", "node-2")}  # type: ignore[attr-defined]
    heal(arena, one_way)
    assert arena.network.cut == set()  # type: ignore[attr-defined]


def test_packets_are_counted_on_when_another_fault_ends(arena: Arena) -> None:
    """The network counts anew when it has healed; a fault that goes on keeps what it has met. Others' packets are not its own."""
    one_way, down = strike(1, "node-0"), strike(2, "node-2")
    for kind, each in (("one_way", one_way), ("link_down", down)):
        act = KINDS[kind].strike
        assert act is not None
        act(arena, each)
    met, heal = KINDS["link_down"].met, KINDS["one_way"].heal
    assert met is not None
    assert heal is not None
    assert met(arena, down) == 4
    heal(arena, one_way)
    assert met(arena, down) == 4 + 4


def test_every_fault_of_the_network_or_the_bucket_tells_what_it_has_met() -> None:
    """One that touched no packet and no request had no effect, and the oracle `strikes` objects."""
    needy = [each for each in KINDS.values() if each.needs & {Need.NETWORK, Need.BUCKET}]
    assert len(needy) >= 20
    assert [each.name for each in needy if each.met is None] == []


def test_every_kind_is_told_by_something_or_says_why_not() -> None:
    """Never both."""
    for each in KINDS.values():
        evidence = each.evidence
        told = evidence.causes | evidence.events | evidence.metrics | evidence.answers
        assert bool(told) is not bool(evidence.silent), each.name


@pytest.mark.parametrize("kind", ["partition", "one_way"])
def test_a_cut_without_another_node_is_no_strike(kind: str, arena: Arena) -> None:
    """Nobody is cut off from nobody."""
    assert arena.network is not None
    arena.network.nodes = ("node-0",)
    act = KINDS[kind].strike
    assert act is not None
    with pytest.raises(NothingToStrike, match="no other node"):
        act(arena, replace(strike(1, "node-0"), others=()))


@pytest.mark.parametrize(
    "kind",
    [
        *("shard_bit_flip", "shard_cut", "shard_deleted", "shards_swapped"),
        *("manifest_bit_flip", "checkpoint_replayed", "foreign_files"),
    ],
)
def test_a_fault_of_a_checkpoint_needs_one(kind: str) -> None:
    """Before the first commit there is nothing to damage, and the run tells so instead of passing or breaking."""
    view = SimpleNamespace(checkpoints=())
    empty: Any = SimpleNamespace(run=SimpleNamespace(view=lambda: view, store=None), change=None)
    act = KINDS[kind].strike
    assert act is not None
    with pytest.raises(NothingToStrike, match="0 checkpoints are committed, expected"):
        act(empty, strike(1, checkpoints=1.0))


def test_faults_of_bucket_run_and_store_need_no_node() -> None:
    """All others strike nodes that run, or start some."""
    others = {each.name for each in KINDS.values() if not each.on_nodes}
    assert {"bucket_away", "shard_deleted", "operator_pauses", "data_away"} <= others
    assert not others & {"kill_node", "link_down", "slow_link", "notice", "join", "staging_full"}
