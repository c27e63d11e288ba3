"""Real nodes over real connections on loopback agree through a real log."""

import contextlib
import dataclasses
import datetime
import functools
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from elastic_pt.agent.holdings import Copy, Holdings
from elastic_pt.checkpoint.snapshot import Buffer
from elastic_pt.config import ElasticSection
from elastic_pt.errors import ConfigError, NodeFailure
from elastic_pt.membership.decision.settled import Settled
from elastic_pt.membership.decision.status import Held, Limits, NodeStatus, StartTimes
from elastic_pt.membership.node import Formed, Left, Node, new_member, new_node
from elastic_pt.membership.pulse import KEY
from elastic_pt.membership.resources import InMemoryStates, NothingInMemory, Resources
from elastic_pt.membership.tcp_store import bind_store
from elastic_pt.runlog.access import join_access
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import CauseKind, Checkpoint, Commit, InMemory, Recovery, Stop
from tests.membership.bucket import WatchedStore
from tests.membership.world import changed

DEADLINE_S = 20.0
LIMITS = Limits(
    ElasticSection(
        nodes_max=8,
        heartbeat_timeout_s=2.0,
        join_window_s=0.3,
        takeover_s=4.0,
        heartbeat_interval_s=0.1,
    ),
    slots=8,
)
FINGERPRINT = {"code": "1", "torch": "2.13"}


@pytest.fixture
def make_node(bucket: WatchedStore) -> Iterator[Callable[..., Node]]:
    """Starts nodes of one run and makes them leave at the end."""
    with contextlib.ExitStack() as stack:

        def make(
            name: str,
            *,
            nodes_min: int = 1,
            on_drain: Callable[[str], None] = lambda _: None,
            fingerprint: dict[str, str] = FINGERPRINT,
            address: str = "127.0.0.1",
            port: int = 0,
            states: InMemoryStates | None = None,
            timeout_s: float = LIMITS.elastic.heartbeat_timeout_s,
        ) -> Node:
            limits = changed(LIMITS, nodes_min=nodes_min, port=port, heartbeat_timeout_s=timeout_s)
            node = new_node(
                NodeStatus.first(new_member(name, address, workers=1), fingerprint),
                limits,
                Resources(
                    log=RunLog(bucket, writer=name),
                    hints=bucket,
                    clock_s=time.monotonic,
                    bind_store=functools.partial(bind_store, address),
                    choose_resume=lambda _: None,
                    on_drain=on_drain,
                    states=states or NothingInMemory(),
                ),
                join_access(bucket, "test", tls=True),
            )
            node.start()
            stack.callback(node.leave)
            return node

        yield make


def formed(*nodes: Node) -> list[Formed]:
    """Wait for the next generation of each node, in parallel, as their agents do."""
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


def content_with_one(*nodes: Node) -> None:
    """Let nodes that waited for all others continue without some of them."""
    for node in nodes:
        set_limits(node, LIMITS)


def set_limits(node: Node, limits: Limits) -> None:
    """Have a node obey these limits from now on."""
    node._participant._limits = node._participant.known._limits = limits


def without_heartbeats(*nodes: Node) -> None:
    """Let nodes send and decide only if there is a reason for it."""
    for node in nodes:
        limits = node._participant._limits
        set_limits(node, changed(limits, heartbeat_interval_s=10 * DEADLINE_S))
        node._driver._interval_s = 10 * DEADLINE_S  # type: ignore[attr-defined]


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Poll until a condition holds."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {DEADLINE_S} s: {what}"
        threading.Event().wait(0.02)


def names(generation: Formed) -> list[str]:
    """The members, in rank order."""
    return [member.node for member in generation.generation.members]


@contextlib.contextmanager
def deaf_address(*, accepts: bool) -> Iterator[int]:
    """A port of this machine that never answers and does not refuse connections; the kernel may accept them."""
    with contextlib.ExitStack() as stack:
        deaf = stack.enter_context(socket.socket())
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(100 if accepts else 0)
        # The first fills the queue; the kernel ignores all later ones.
        for _ in range(0 if accepts else 4):
            caller = stack.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(deaf.getsockname())
        yield deaf.getsockname()[1]


@contextlib.contextmanager
def hanging_turns(node: Node) -> Iterator[None]:
    """The node's turns hang, as on a bucket that does not answer. One turn already hangs."""
    hangs, answered = threading.Event(), threading.Event()

    def turn() -> None:
        hangs.set()
        answered.wait()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node._participant, "turn", turn)
        assert hangs.wait(DEADLINE_S)
        try:
            yield
        finally:
            answered.set()


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_nodes_that_start_together_form_one_generation(
    make_node: Callable[..., Node], address: str
) -> None:
    """Nodes find each other through the lobby and agree on one generation, one rank each, one new store."""
    nodes = [make_node(name, nodes_min=3, address=address) for name in ("c", "a", "b")]
    worlds = formed(*nodes)
    assert {tuple(names(world)) for world in worlds} == {("a", "b", "c")}
    assert sorted(world.node_rank for world in worlds) == [0, 1, 2]
    worlds[0].store.set("greeting", "hello")
    assert worlds[1].store.get("greeting") == b"hello"
    assert {each.address for each in worlds[0].generation.members} == {address}


def test_losing_rank_zero_leads_to_a_generation_without_it(make_node: Callable[..., Node]) -> None:
    """If the proposer is gone, the others form the next generation, on another store, with the reason."""
    a, b, c = (make_node(name, nodes_min=3) for name in "abc")
    first = formed(a, b, c)[1]
    content_with_one(b, c)
    gone_s = time.monotonic()
    a.leave()
    eventually(lambda: b.must_reform(first.generation.number), "b notices")
    for node in (b, c):
        node.spend(first.generation.number, None)
    second = formed(b, c)[0]
    assert names(second) == ["b", "c"]
    assert second.generation.reason == "lost a"
    assert second.generation.store_port != first.generation.store_port
    assert b.read_at_s(2) - gone_s < LIMITS.elastic.heartbeat_timeout_s, (
        "no node waited for the silence timeout"
    )


def test_a_newcomer_joins_after_a_drain(make_node: Callable[..., Node]) -> None:
    """The proposer asks for a drain for a later node. It is a member when all have spent the generation."""
    asked: list[str] = []
    a = make_node("a", on_drain=asked.append)
    first = formed(a)[0]
    b = make_node("b")
    # More than once: workers that were still starting must get the request too.
    eventually(lambda: len(asked) > 3, "the proposer keeps asking for a drain")
    assert set(asked) == {"b joins"}
    assert not a.must_reform(first.generation.number)
    a.settling()
    a.spend(first.generation.number, None)
    assert names(formed(a, b)[0]) == ["a", "b"]


def test_a_node_that_asks_to_leave_is_drained_and_leaves(make_node: Callable[..., Node]) -> None:
    """If a node asks to leave, the others drain. It leaves when it has stopped, and is recorded as left, not lost."""
    asked: list[str] = []
    a, b = make_node("a", nodes_min=2), make_node("b", nodes_min=2, on_drain=asked.append)
    number = formed(a, b)[0].generation.number
    content_with_one(b)
    a.request_leave()
    assert a.leaving
    eventually(lambda: "a leaves" in asked, "the one that stays asks for a drain")
    assert not b.must_reform(number)
    for node in (a, b):
        node.settling()
        node.spend(number, None)
    with pytest.raises(Left):
        a.await_generation()
    a.leave()
    (second,) = formed(b)
    assert names(second) == ["b"]
    assert [(each.kind, each.node) for each in second.generation.causes] == [(CauseKind.LEFT, "a")]


def test_a_node_whose_notice_is_withdrawn_stays_a_member(make_node: Callable[..., Node]) -> None:
    """F17: until a node has left it may cancel its leave: it stays a member, and no node counts it as lost."""
    asked: list[str] = []
    a, b = make_node("a", nodes_min=2), make_node("b", nodes_min=2, on_drain=asked.append)
    number = formed(a, b)[0].generation.number
    content_with_one(b)
    a.request_leave("aws terminate, 118 s ahead")
    eventually(lambda: "a leaves: aws terminate, 118 s ahead" in asked, "b asks for a drain")
    assert a.cancel_leave()
    for node in (a, b):
        node.settling()
        node.spend(number, None)
    found = formed(a, b)[0]
    assert names(found) == ["a", "b"]
    assert found.generation.causes == ()


def test_a_node_that_has_left_cannot_cancel_it(make_node: Callable[..., Node]) -> None:
    """After `await_generation` has raised `Left`, a withdrawn notice has no effect: the other nodes see the node leave."""
    node = make_node("a", nodes_min=2)
    node.request_leave()
    with pytest.raises(Left):
        node.await_generation()
    assert not node.cancel_leave()
    assert node.leaving


def test_an_agent_listens_on_its_configured_port(make_node: Callable[..., Node]) -> None:
    """Peers reach a node at `elastic.port`. If that port is in use, the error names it and what is expected."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    a, b = make_node("a", nodes_min=2, port=port), make_node("b", nodes_min=2)
    assert a.member.port == port
    members = formed(a, b)[0].generation.members
    assert [each.port for each in members] == [port, b.member.port]
    assert b.member.port not in (0, port)
    with pytest.raises(
        ConfigError,
        match=rf"^elastic\.port = {port}: .* at 127\.0\.0\.1; expected a free port or 0$",
    ):
        make_node("c", port=port)


def test_a_node_without_a_generation_leaves_at_once(make_node: Callable[..., Node]) -> None:
    """`await_generation` raises `Left` as soon as a node that is not a member asks to leave."""
    node = make_node("a", nodes_min=2)
    ended: list[type[BaseException]] = []

    def wait() -> None:
        try:
            node.await_generation()
        except Left as left:
            ended.append(type(left))

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    eventually(lambda: node.reason.startswith("waiting for nodes"), "the node waits")
    node.request_leave()
    thread.join(DEADLINE_S)
    assert ended == [Left]


def test_member_leaves_while_its_turn_hangs_on_the_bucket(make_node: Callable[..., Node]) -> None:
    """The others learn at once that it wants to leave, and detect at once that it is gone."""
    asked: list[str] = []
    a, b = make_node("a", nodes_min=2), make_node("b", nodes_min=2, on_drain=asked.append)
    number = formed(a, b)[0].generation.number
    content_with_one(b)
    with hanging_turns(a):
        a.request_leave()
        eventually(lambda: "a leaves" in asked, "the one that stays asks for a drain")
        assert not b.must_reform(number)
        leaves = threading.Thread(target=a.leave)
        leaves.start()
        eventually(lambda: b.must_reform(number), "b sees that a is gone")
    leaves.join()


def test_waiting_node_leaves_while_its_turn_hangs_on_the_bucket(
    make_node: Callable[..., Node],
) -> None:
    """A node that is not a member leaves at once on request."""
    a, left = make_node("a", nodes_min=2), threading.Event()

    def wait() -> None:
        with pytest.raises(Left):
            a.await_generation()
        left.set()

    with hanging_turns(a):
        threading.Thread(target=wait, daemon=True).start()
        a.request_leave()
        assert left.wait(DEADLINE_S)


def test_a_node_that_differs_is_refused_with_the_field(make_node: Callable[..., Node]) -> None:
    """With another fingerprint, `await_generation` raises the field and both values. The run continues."""
    asked: list[str] = []
    a = make_node("a", on_drain=asked.append)
    number = formed(a)[0].generation.number
    stranger = make_node("b", fingerprint=FINGERPRINT | {"torch": "2.14"})
    with pytest.raises(
        ConfigError,
        match=r"^a refuses this node: torch = '2\.14', where the run has '2\.13'; expected the same on all nodes",
    ):
        stranger.await_generation()
    assert asked == []
    assert not a.must_reform(number)


def test_a_failed_node_is_in_the_next_generation(make_node: Callable[..., Node]) -> None:
    """A worker's failure is reported with its cause, step and signature, and ends one generation."""
    a, b = make_node("a", nodes_min=2), make_node("b", nodes_min=2)
    number = formed(a, b)[0].generation.number
    cause = b.failure("worker 0: ValueError: bad", step=7, signature="ValueError@loop.py:9")
    assert (cause.kind, cause.node) == (CauseKind.FAILED, "b")
    b.spend(number, cause)
    eventually(lambda: a.must_reform(number), "a has the failure")
    a.spend(number, None)
    second = formed(a, b)[0].generation
    assert second.causes == (cause,)
    assert second.number == number + 1


def test_recovery_is_recorded_once(make_node: Callable[..., Node]) -> None:
    """When every member has reported its first step, the log has a RECOVERY for the generation."""
    a, b = make_node("a", nodes_min=2), make_node("b", nodes_min=2)
    number = formed(a, b)[0].generation.number
    for node, step_s in ((a, 0.25), (b, 0.5)):
        node.first_step(StartTimes(number, 0.1, 0.2, 0.3, step_s))
    eventually(lambda: b.view.recovery is not None, "a RECOVERY")
    assert isinstance(b.view.recovery, Recovery)
    assert b.view.recovery.number == number
    assert b.view.recovery.total_s == pytest.approx(1.1)


def test_a_generation_with_an_unreachable_store_is_replaced(
    make_node: Callable[..., Node], bucket: WatchedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member that cannot connect to the generation's store gives it up without a failure. The next one is new."""
    monkeypatch.setattr("elastic_pt.membership.tcp_store.TIMEOUT", datetime.timedelta(seconds=0.5))
    a, b = make_node("a", nodes_min=2), make_node("b", nodes_min=2)
    first = formed(a, b)[0].generation
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        unreachable = dataclasses.replace(
            first, number=2, store_port=nobody.getsockname()[1], reason="by hand"
        )
        nobody.close()
        RunLog(bucket, writer="x").append(lambda _: unreachable, generation=1)
    for node in (a, b):
        node.spend(1, None)
    third = formed(a, b)[0].generation
    assert third.number == 3
    assert {each.kind for each in third.causes} == {CauseKind.GAVE_UP}
    assert f"cannot reach the store at 127.0.0.1:{unreachable.store_port}" in third.reason


@pytest.mark.parametrize("accepts", [False, True], ids=["vanished", "stopped"])
def test_stalled_store_does_not_block_the_next_generation(
    make_node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch, accepts: bool
) -> None:
    """A node that connects to the store of a stalled or lost host follows the others as soon as they have continued."""
    patience = datetime.timedelta(seconds=2 * DEADLINE_S)
    monkeypatch.setattr("elastic_pt.membership.tcp_store.TIMEOUT", patience)
    a = make_node("a")
    first = formed(a)[0].generation
    dialled, found = threading.Event(), []

    class WatchedTCPStore(TCPStore):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            dialled.set()
            super().__init__(*arguments, **options)

    monkeypatch.setattr("elastic_pt.membership.tcp_store.TCPStore", WatchedTCPStore)
    with deaf_address(accepts=accepts) as port:
        deaf = dataclasses.replace(first, number=2, store_port=port)
        a._participant.log.append(lambda _: deaf, generation=1)
        waits = threading.Thread(target=lambda: found.append(a.await_generation()), daemon=True)
        waits.start()
        assert dialled.wait(DEADLINE_S)
        a._participant.log.append(lambda _: dataclasses.replace(first, number=3), generation=2)
        waits.join(DEADLINE_S)
    assert [each.generation.number for each in found if isinstance(each, Formed)] == [3]


def test_stop_ends_all_members_at_once(make_node: Callable[..., Node]) -> None:
    """If one node appends STOP, the others end without polling the bucket."""
    a, b = make_node("a", nodes_min=2), make_node("b", nodes_min=2)
    world = formed(a, b)[0]
    log = a._participant.log
    log.append(lambda _: Stop("completed", 7), generation=world.generation.number)
    a.notice_log()
    assert a.await_end(world.generation.number, DEADLINE_S, lambda: False)
    assert b.await_end(world.generation.number, DEADLINE_S, lambda: False)
    assert b.await_generation() == Stop("completed", 7)


def test_settling_ends_when_the_checkpoint_is_committed_or_given_up(
    make_node: Callable[..., Node],
) -> None:
    """A commit of this generation or giving up ends the wait. A commit of another generation does not."""
    a = make_node("a")
    world = formed(a)[0].generation
    number = world.number

    def committed(step: int, generation: int) -> Commit:
        return Commit((Checkpoint(step, generation, f"ckpt/{step}", 1, "0" * 64, None),), "history")

    a._participant.log.append(lambda _: committed(100, number - 1), generation=number)
    assert not a.await_settled(world, 60, 0.1, lambda: False, lambda _: True)
    assert not a.await_settled(world, 60, DEADLINE_S, lambda: True, lambda _: True)
    a._participant.log.append(lambda _: committed(60, number), generation=number)
    assert a.await_settled(world, 60, DEADLINE_S, lambda: False, lambda _: True).tier == "bucket"


class Rows(NothingInMemory):
    """Rows of step 60 of generation 1, of two workers, in a node's memory."""

    held: tuple[Held, ...] = ()

    def hold(self, first_rank: int, end_rank: int) -> None:
        """Hold the rows of these workers."""
        self.held = (Held(1, 60, first_rank, end_rank, 2),)


def test_settling_ends_when_a_member_that_stays_holds_the_state(
    make_node: Callable[..., Node],
) -> None:
    """A node that leaves goes once its rows are on a node that stays. It learns this at once, not with a heartbeat."""
    rows = {name: Rows() for name in "ab"}
    # A link that is silent for longer is opened again, with news.
    a, b = (
        make_node(name, nodes_min=2, states=rows[name], timeout_s=10 * DEADLINE_S) for name in "ab"
    )
    world = formed(a, b)[0].generation
    without_heartbeats(a, b)
    rows["a"].hold(0, 1)
    rows["b"].hold(0, 2)
    b.request_leave()
    for node in (a, b):
        node.settling()
    for node in (a, b):
        eventually(
            lambda node=node: (  # type: ignore[misc]
                node._participant.known.settled(world, 60).reason.endswith("members that stay: 1")
            ),
            "each knows that b leaves",
        )
        assert not node.await_settled(world, 60, 0.1, lambda: False, lambda _: True)
    waits, found = threading.Event(), []
    # `given_up` is called when the wait has found nothing yet.
    b_waits = threading.Thread(
        target=lambda: found.append(
            b.await_settled(world, 60, DEADLINE_S, lambda: bool(waits.set()), lambda _: True)
        )
    )
    b_waits.start()
    assert waits.wait(DEADLINE_S)
    rows["a"].hold(0, 2)
    a.states_changed()
    found.append(a.await_settled(world, 60, DEADLINE_S, lambda: False, lambda _: True))
    b_waits.join(DEADLINE_S / 2)
    assert found == 2 * [Settled("memory", "a hold step 60")]
    # The rows of this node are not on its mirrors yet: a loss during the change would cost more than a step.
    assert not a.await_settled(world, 60, 0.1, lambda: False, lambda _: False)


def test_node_that_stays_waits_for_no_mirror_that_leaves(make_node: Callable[..., Node]) -> None:
    """H3: b, the mirror of a, is gone before it has copied a's last step. a goes on at once, not after the timeout."""
    rows = {name: Rows() for name in "ab"}
    a, b = (make_node(name, nodes_min=2, states=rows[name]) for name in "ab")
    world = dataclasses.replace(formed(a, b)[0].generation, mirrors=((1,), (0,)))
    content_with_one(a, b)
    holdings = Holdings()
    holdings.starts(world, 0)
    holdings.add(Copy(Buffer(1, 0, 0), 60, 10, b"", 0.0))
    rows["a"].hold(0, 2)
    rows["b"].hold(1, 2)
    for node in (a, b):
        node.settling()

    def mirrored(stay: Collection[str]) -> bool:
        return holdings.is_complete(60, stay)

    # While b stays, its copy is waited for.
    assert not a.await_settled(world, 60, 0.1, lambda: False, mirrored)
    b.request_leave()
    assert b.await_settled(world, 60, DEADLINE_S, lambda: False, lambda _: True)
    b.spend(1, None)
    with pytest.raises(Left):
        b.await_generation()
    b.leave()
    assert a.await_settled(world, 60, DEADLINE_S, lambda: False, mirrored).tier == "memory"


def test_leaving_node_with_the_only_copy_is_in_the_next_generation(
    make_node: Callable[..., Node],
) -> None:
    """A node that is told to leave after all have stopped stays for one more generation if the others need its rows."""
    rows = {name: Rows() for name in "ab"}
    a, b = (make_node(name, nodes_min=2, states=rows[name]) for name in "ab")
    number = formed(a, b)[0].generation.number
    content_with_one(a, b)
    rows["b"].hold(0, 2)
    for node in (a, b):
        node.settling()
    b.spend(number, None)
    b.request_leave()
    eventually(
        lambda: any(
            peer.status is not None and peer.status.leaving
            for peer in a._participant.table.peers.values()
        ),
        "a knows that b leaves",
    )
    a.spend(number, None)
    second = formed(a, b)[0]
    assert names(second) == ["a", "b"]
    assert second.generation.memory == InMemory(1, 60, (1, 1), ((), ()))
    assert b.leaving


def test_waiting_node_finds_stop_in_the_log(
    make_node: Callable[..., Node], bucket: WatchedStore
) -> None:
    """If the members left just after STOP, a waiting node reads the log and ends too."""
    a = make_node("a")
    world = formed(a)[0]
    spare = make_node("spare")
    eventually(lambda: spare.reason.startswith("asked a"), "the spare sees the member")
    RunLog(bucket, writer="x").append(
        lambda _: Stop("completed", 7), generation=world.generation.number
    )
    a.leave()
    assert spare.await_generation() == Stop("completed", 7)


def test_training_fleet_makes_few_requests(
    make_node: Callable[..., Node], bucket: WatchedStore
) -> None:
    """While nothing changes, only the first member reaches the bucket, with at most three requests a second."""
    nodes = [make_node(name, nodes_min=4) for name in "abcd"]
    formed(*nodes)
    eventually(lambda: bucket.requests[f"write {KEY}"] > 0, "the first pulse")
    bucket.requests.clear()
    began_s = time.monotonic()
    eventually(lambda: bucket.requests[f"write {KEY}"] >= 3, "three more pulses")
    lasted_s = time.monotonic() - began_s
    assert set(bucket.requests) == {f"write {KEY}", "read log"}
    assert bucket.requests.total() <= 3 * lasted_s


def test_pulse_is_written_only_while_workers_run(
    make_node: Callable[..., Node], bucket: WatchedStore
) -> None:
    """The first member writes the pulse while its workers run, and not after they are spent."""
    a = make_node("a", nodes_min=1)
    number = formed(a)[0].generation.number
    eventually(lambda: bucket.requests[f"write {KEY}"] > 0, "a beat")
    bucket.down = True
    a.spend(number, a.failure("worker 0 killed by SIGKILL"))
    beats = bucket.requests[f"write {KEY}"]
    looks = bucket.requests.total()
    eventually(lambda: bucket.requests.total() >= looks + 3, "attempts to continue")
    assert bucket.requests[f"write {KEY}"] <= beats + 1


def test_training_continues_while_the_bucket_does_not_answer(
    make_node: Callable[..., Node], bucket: WatchedStore
) -> None:
    """A bucket that does not answer breaks no generation. A change waits until it answers."""
    a, b = make_node("a", nodes_min=2), make_node("b", nodes_min=2)
    number = formed(a, b)[0].generation.number
    content_with_one(b)
    bucket.down = True
    bucket.requests.clear()
    eventually(lambda: bucket.requests[f"write {KEY}"] >= 2, "two pulses that fail")
    assert not a.must_reform(number)
    assert not b.must_reform(number)
    a.leave()
    eventually(lambda: b.must_reform(number), "b notices")
    b.spend(number, None)
    bucket.down = False
    assert names(formed(b)[0]) == ["b"]


@pytest.mark.parametrize("part", ["turn", "step_pulse"])
def test_crash_of_the_membership_thread_ends_the_wait(
    make_node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """If the membership thread or its pulse task fails, every wait of the main thread raises the reason."""
    node = make_node("a", nodes_min=2)
    monkeypatch.setattr(node._participant, part, lambda: 1 / 0)
    with pytest.raises(NodeFailure, match=r"membership stopped: ZeroDivisionError"):
        node.await_generation()
    with pytest.raises(NodeFailure):
        node.must_reform(1)
