"""A peer that has the run's certificate and token, and sends whatever it likes: nothing it says may end an agent."""

import copy
import json
import math
from collections.abc import Iterator
from typing import Any, Final

import aiohttp
import pytest
import structlog
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from elastic_pt.membership.decision.status import Held, NodePhase, StartTimes, Unusable
from elastic_pt.membership.endpoints import Endpoint, as_targets, reachable
from elastic_pt.membership.links import message_in
from elastic_pt.membership.peers import MESSAGE, Message
from elastic_pt.runlog.ignored import DamagedSpan
from elastic_pt.runlog.records import Cause, CauseKind
from elastic_pt.store.open import open_store
from tests.membership.bucket import WatchedStore
from tests.membership.fleet import Fleet
from tests.membership.world import status

MESSAGES: Final = 100
ROUNDS: Final = 100
"""Of so many messages each: 10,000."""
TURN_EVERY: Final = 10

FULL: Final = status(
    "x",
    failure=Cause(
        CauseKind.DAMAGED,
        "x",
        "why",
        3,
        "signature",
        damage=(DamagedSpan("source", (0, 64), "shard"),),
    ),
    fingerprint={"code": "1"},
    unreachable=("b1",),
    leave_reason="asked to",
    resting="why",
    step=3,
    loss=1.0,
    step_age_s=0.1,
    start_times=StartTimes(1, 0.1, 0.1, 0.1, 0.1),
    metrics_url="http://127.0.0.1:9400/metrics",
    held=(Held(1, 3, 0, 1, 3, 0.1),),
    unusable=(Unusable(1, 3, 0, "b1"),),
)
VALID: Final = MESSAGE.dump_python(Message(1, 1, True, FULL, "why"), mode="json")
HOSTILE: Final[list[Any]] = [
    None,
    True,
    -1,
    0,
    1,
    2,
    3,
    7,
    2**31,
    2**53,
    2**63,
    10**400,
    -(10**30),
    1.5,
    math.nan,
    math.inf,
    -math.inf,
    1e308,
    "",
    "a1",
    "b1",
    "c1",
    "x" * 5000,
    "\ud800",
    "\x1b[2J\n[critical ] forged\r\n",
    "\u202egnp.exe",
    "../../etc/passwd",
    "'; DROP TABLE nodes",
    "http://169.254.169.254/",
    "::1",
    "0.0.0.0",
    [],
    {},
    [None],
    {"a": 1},
    [[[[[[]]]]]],
    *NodePhase,
    *CauseKind,
]


def paths(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of each value of a JSON tree."""
    items: list[tuple[Any, Any]] = []
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree))
    for key, value in items:
        yield (*path, key)
        yield from paths(value, (*path, key))


PATHS: Final = list(paths(VALID))
_CHANGE = st.tuples(
    st.sampled_from(PATHS),
    st.sampled_from(HOSTILE),
    st.sampled_from(("set", "set", "set", "delete", "repeat", "add")),
)
_SENT = st.tuples(
    st.sampled_from(("a1", "b1", "c1", "x1", "y1", "z1")),
    st.sampled_from((1, 2, 5, 10**6, 10**9)),
    st.sampled_from(list(NodePhase)),
    st.lists(_CHANGE, max_size=3),
)


def changed(tree: Any, path: tuple[Any, ...], value: Any, how: str) -> None:
    """Change one place of a JSON tree, if an earlier change has left it."""
    *way, last = path
    try:
        for key in way:
            tree = tree[key]
        match how:
            case "set":
                tree[last] = value
            case "delete":
                del tree[last]
            case "repeat":
                tree[last] = [tree[last]] * 2000
            case "add":
                tree[last]["unknown"] = value
    except (KeyError, IndexError, TypeError):
        return


def frame(sender: str, count: int, phase: NodePhase, changes: list[Any]) -> aiohttp.WSMessage:
    """A frame with a changed message."""
    tree = copy.deepcopy(VALID)
    tree["count"] = count
    tree["status"] |= {"phase": phase}
    tree["status"]["member"] |= {"incarnation": sender, "node": sender[0]}
    for number, (path, value, how) in enumerate(changes):
        # Repeated once: lists of lists of thousands would take the time of the test, and never arrive.
        changed(tree, path, value, "set" if number and how == "repeat" else how)
    return aiohttp.WSMessage(aiohttp.WSMsgType.TEXT, json.dumps(tree), None)


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254:80/metrics",
        "http://[fe80::1]:80/metrics",
        "http://evil.example:80/metrics",
        "http://8.8.8.8:80/metrics",
        "http://user:word@10.0.0.1:80/metrics",
        "http://10.0.0.1:80/latest/meta-data",
        "http://10.0.0.1:80/metrics?x=1",
        "http://10.0.0.1/metrics",
        "http://0.0.0.0:1/metrics",
        "file:///metrics",
        "gopher://10.0.0.1:70/metrics",
        "http://[",
        "http://10.0.0.1:99999999/metrics",
    ],
)
def test_no_node_sends_prometheus_to_other_servers(url: str) -> None:
    """A target is an address of the node itself; a node that names another place is left out, and the others count."""
    good = Endpoint("b", "203.0.113.7", "https://203.0.113.7:9400/metrics")
    private = Endpoint("c", "10.0.0.1", "http://10.1.0.1:9400/metrics")
    told = [Endpoint("a", "10.0.0.1", url), good, private]
    assert reachable(told, "10.0.0.9", []) == [good, private]
    assert [each["targets"] for each in as_targets(told)] == [
        ["203.0.113.7:9400"],
        ["10.1.0.1:9400"],
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (("start_times", "step_s"), math.nan),
        (("step_age_s",), math.inf),
        (("loss",), -math.inf),
        (("held", 0, "world_size"), 2**53),
        (("held", 0, "end_rank"), 10**30),
        (("log_length",), -1),
        (("member", "address"), "evil.example"),
        (("member", "node"), "a\x1b[2J"),
        (("member", "incarnation"), "../a"),
        (("member", "workers"), 0),
        (("unreachable",), ["a"] * 100_000),
        (("fingerprint",), {str(number): "" for number in range(10_000)}),
    ],
)
def test_values_that_no_node_has_are_refused(field: tuple[Any, ...], value: Any) -> None:
    """They would end a record, take all memory, or lead elsewhere."""
    tree = copy.deepcopy(VALID)
    text = aiohttp.WSMessage(aiohttp.WSMsgType.TEXT, json.dumps(tree), None)
    assert message_in(text) is not None
    changed(tree, ("status", *field), value, "set")
    text = aiohttp.WSMessage(aiohttp.WSMsgType.TEXT, json.dumps(tree), None)
    assert message_in(text) is None


def strings(value: Any) -> Iterator[str]:
    """All texts of a value of a log's event."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from (key, *strings(each))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from strings(each)


def test_no_message_ends_an_agent() -> None:
    """10,000 messages of a node of the run, changed in all places, raise nothing, store no endless data, forge no line."""
    received = {"all": 0, "read": 0}

    @settings(
        max_examples=ROUNDS,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(sent=st.lists(_SENT, min_size=MESSAGES, max_size=MESSAGES))
    def attack(sent: list[Any]) -> None:
        fleet = Fleet(WatchedStore(open_store(f"memory://hostile-{received['all']}")))
        fleet.form("a", "b")
        victim = fleet.nodes["a"]
        with structlog.testing.capture_logs() as events:
            for number, each in enumerate(sent):
                received["all"] += 1
                message = message_in(frame(*each))
                if message is not None:
                    received["read"] += 1
                    victim.received(message)
                    victim.message_to(message.status.member.incarnation, asks=False)
                if number % TURN_EVERY == 0:
                    fleet.now_s += 0.2
                    victim.turn()
                    victim.known.endpoints()
                    victim.known.staying()
                    victim.known.others_can_go_on()
                    victim.node_states()
        assert victim.refusal is None, "a member is refused by nobody"
        assert len(victim.table.peers) <= 8
        assert all(each.isprintable() for event in events for each in strings(event))
        assert all(
            each.isprintable() for record in fleet.records() for each in strings(vars(record))
        )

    attack()
    # Enough of them pass the parser to reach what is behind it.
    assert received["all"] >= MESSAGES * ROUNDS
    assert received["read"] > received["all"] / 10
