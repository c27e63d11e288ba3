"""One node's part, with a real log and lobby in a directory, a clock that the test moves and words carried by hand."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elastic_pt.elastic.history import Budgets
from elastic_pt.elastic.lobby import LOBBY, Lobby
from elastic_pt.elastic.log import RunLog, RunView
from elastic_pt.elastic.membership import (
    MESH_NODES_MAX,
    Drain,
    Ended,
    Limits,
    Phase,
    StartTimes,
    Wait,
    slots_per_member,
)
from elastic_pt.elastic.participant import BoundStore, Participant, Surroundings
from elastic_pt.elastic.peers import Message
from elastic_pt.elastic.pulse import KEY, Pulse
from elastic_pt.elastic.records import (
    Cause,
    CauseKind,
    Checkpoint,
    Commit,
    Generation,
    Quarantine,
    Recovery,
    Stop,
)
from elastic_pt.errors import ConfigError, StoreError
from elastic_pt.store.open import open_store
from tests.elastic.bucket import WatchedStore
from tests.elastic.world import LIMITS, failed, member, status, waiting

TICK_S = 0.2
BUDGETS = Budgets(flaps_max=2, same_failures_max=2)


@dataclasses.dataclass(frozen=True)
class Port:
    """Where a generation's store would listen."""

    port: int


@dataclasses.dataclass
class Fleet:
    """Nodes of one run. `pass_time` carries their words to and fro and gives each its turns."""

    bucket: WatchedStore
    limits: Limits = LIMITS
    nodes: dict[str, Participant] = dataclasses.field(default_factory=dict)
    dead: set[str] = dataclasses.field(default_factory=set)
    """Whose addresses refuse connections."""
    off: set[str] = dataclasses.field(default_factory=set)
    """Who is gone with its address: nobody refuses, nobody answers."""
    cut: set[frozenset[str]] = dataclasses.field(default_factory=set)
    drains: list[str] = dataclasses.field(default_factory=list)
    now_s: float = 0.0
    bound: int = 0
    """Stores that were bound for generations."""
    choose_resume: Callable[[RunView], Checkpoint | None] = lambda _: None

    def start(self, *names: str, **changes: object) -> None:
        """Start nodes; `changes` is what they say of themselves."""
        for name in names:
            log = RunLog(self.bucket, writer=name)
            log.refresh()
            self.nodes[name] = Participant(
                waiting(name, generation=0, log_length=0, **changes),
                self.limits,
                BUDGETS,
                Surroundings(
                    log=log,
                    lobby=Lobby(self.bucket, self.clock_s),
                    pulse=Pulse(self.bucket, f"{name}1"),
                    clock_s=self.clock_s,
                    bind_store=self._bind_store,
                    choose_resume=lambda view: self.choose_resume(view),
                    on_drain=self.drains.append,
                ),
            )

    def clock_s(self) -> float:
        """The one clock of all."""
        return self.now_s

    def _bind_store(self) -> BoundStore:
        self.bound += 1
        return Port(5000 + self.bound)

    def pass_time(self, seconds: float) -> None:
        """Let everybody ask, answer and take turns."""
        for _ in range(round(seconds / TICK_S)):
            self.now_s += TICK_S / 2
            self.talk()
            self.now_s += TICK_S / 2
            for node in self.alive():
                node.turn()

    def alive(self) -> list[Participant]:
        """Nodes that are neither dead nor off."""
        return [node for name, node in self.nodes.items() if name not in self.dead | self.off]

    def talk(self) -> None:
        """Everyone asks whom it wants to ask, and is answered."""
        for node in self.alive():
            for target in node.targets:
                name, mine = target.node, node.member
                lives = self.nodes[name].member.incarnation == target.incarnation
                if name in self.dead or not lives:
                    node.table.refused(target.incarnation)
                elif name not in self.off and frozenset((name, mine.node)) not in self.cut:
                    other = self.nodes[name]
                    node.table.reached(target.incarnation)
                    other.received(node.message_to(target.incarnation, asks=True))
                    node.received(other.message_to(mine.incarnation, asks=False))

    @property
    def log(self) -> RunView:
        """What the log says."""
        return RunLog(self.bucket, writer="test").refresh()

    def records(self) -> list[object]:
        """All that was appended."""
        return [record.body for record in RunLog(self.bucket, writer="test").records()]

    def run(self) -> Generation:
        """Start the workers of the newest generation, where that is still to be done."""
        generation = self.log.generation
        assert generation is not None
        for each in generation.members:
            if each.node not in self.dead | self.off:
                self.nodes[each.node].say(phase=Phase.RUNNING, step=0)
        self.pass_time(2 * TICK_S)
        return generation

    def spend(self, number: int, *names: str, failure: Cause | None = None) -> None:
        """The workers of these nodes are gone."""
        for name in names:
            self.nodes[name].say(phase=Phase.WAITING, spent=number, failure=failure)

    def form(self, *names: str) -> Generation:
        """A first world of these nodes, with workers."""
        self.start(*names)
        self.pass_time(4.0)
        return self.run()


@pytest.fixture
def bucket(tmp_path: Path) -> WatchedStore:
    """A run directory."""
    return WatchedStore(open_store(f"file://{tmp_path}"))


@pytest.fixture
def fleet(bucket: WatchedStore) -> Iterator[Fleet]:
    """No node yet."""
    fleet = Fleet(bucket)
    yield fleet
    fleet.bucket.down = False
    list(RunLog(fleet.bucket, writer="test").records())


def names(generation: Generation | None) -> list[str]:
    """The members' names."""
    return [] if generation is None else [each.node for each in generation.members]


# ---- forming -----------------------------------------------------------------------------------------


def test_nodes_meet_in_the_lobby_and_leave_it(fleet: Fleet, bucket: WatchedStore) -> None:
    """Nodes that start together form one generation, which all know, and no card is left behind."""
    generation = fleet.form("c", "a", "b")
    assert (generation.number, names(generation)) == (1, ["a", "b", "c"])
    assert {node.status.generation for node in fleet.alive()} == {1}
    assert {node.decision for node in fleet.alive()} == {Wait("training")}
    assert bucket.keys(LOBBY) == []
    assert len(fleet.records()) == 1


def test_the_proposer_holds_the_store_of_its_generation(fleet: Fleet) -> None:
    """The store that a GENERATION names was bound before, by the proposer alone."""
    generation = fleet.form("a", "b")
    assert {number: store.port for number, store in fleet.nodes["a"].stores.items()} == {
        1: generation.store_port
    }
    assert fleet.nodes["b"].stores == {}
    assert generation.slots == slots_per_member(generation.members, LIMITS.slots)


def test_a_loss_is_told_with_its_cause_and_its_times(fleet: Fleet) -> None:
    """The next generation says who was lost, how far the run had come and how long agreeing took."""
    fleet.form("a", "b", "c")
    fleet.nodes["c"].say(step=41)
    fleet.nodes["a"].say(step=40)
    fleet.pass_time(1.0)
    fleet.dead.add("a")
    fleet.pass_time(1.0)
    generation = fleet.log.generation
    assert generation is not None
    assert names(generation) == ["b", "c"]
    assert generation.reason == "lost a"
    assert generation.frontier_step == 41
    assert generation.agree_s == pytest.approx(TICK_S), "one more round of questions"


def test_a_generation_that_is_given_up_stays_given_up(fleet: Fleet) -> None:
    """Once a node has found a generation broken there is no way back, even if the lost member answers again."""
    fleet.limits = dataclasses.replace(LIMITS, nodes_min=2)
    fleet.form("a", "b")
    fleet.cut = {frozenset("ab")}
    fleet.pass_time(LIMITS.heartbeat_timeout_s + 2 * TICK_S)
    assert {node.broken for node in fleet.alive()} == {1}
    assert {node.status.broken for node in fleet.alive()} == {1}
    assert fleet.log.generation_number == 1
    fleet.cut = set()
    fleet.pass_time(1.0)
    generation = fleet.log.generation
    assert generation is not None
    assert (generation.number, names(generation)) == (2, ["a", "b"])
    assert {cause.kind for cause in generation.causes} == {CauseKind.GAVE_UP}


def test_peers_are_asked_once_when_a_world_hangs_on_it(fleet: Fleet) -> None:
    """When trouble is noticed all peers are asked at once, and not again until there is other trouble."""
    fleet.form("a", "b", "c")
    b = fleet.nodes["b"]
    assert not b.wants_answers()
    b.table.refused("a1")
    b.turn()
    assert b.wants_answers()
    assert not b.wants_answers()


def test_answers_are_a_reason_to_think_again_while_they_are_awaited(fleet: Fleet) -> None:
    """A message without news makes a turn exactly while this node waits whether its sender can go on."""
    fleet.form("a", "b", "c")
    a, c = fleet.nodes["a"], fleet.nodes["c"]
    assert not a.received(c.message_to("a1", asks=False))
    fleet.now_s += TICK_S
    a.table.refused("b1")
    a.turn()
    assert isinstance(a.decision, Wait)
    assert a.decision.reason.startswith("asking whether c can go on")
    assert a.received(c.message_to("a1", asks=False))


def test_a_node_hears_nothing_of_itself(fleet: Fleet) -> None:
    """What comes back from its own port, which an earlier life of another node had, makes no peer."""
    fleet.start("a")
    a = fleet.nodes["a"]
    assert not a.received(a.message_to("a1", asks=True))
    assert a.table.peers == {}


def test_a_checkpoint_that_is_committed_meanwhile_is_not_thrown_away(fleet: Fleet) -> None:
    """A generation that would resume from an older checkpoint than the newest commit loses and is proposed again."""
    newest = Checkpoint(30, 1, "ckpt/30", 1, "0" * 64, None)
    fleet.form("a", "b")
    writer = RunLog(fleet.bucket, writer="b")
    writer.refresh()
    committed: list[Checkpoint] = []

    def choose_resume(view: RunView) -> Checkpoint | None:
        chosen = view.checkpoints[0] if view.checkpoints else None
        if not committed:
            committed.append(newest)
            writer.append(lambda _: Commit((newest,), "history"), generation=1)
        return chosen

    fleet.choose_resume = choose_resume
    fleet.dead.add("b")
    fleet.pass_time(1.0)
    generation = fleet.log.generation
    assert generation is not None
    assert (generation.number, generation.resume) == (2, newest)


def test_a_lost_race_is_no_trouble(fleet: Fleet) -> None:
    """Who proposes a number that is taken reads the winner and obeys it."""
    fleet.form("a", "b")
    rival = dataclasses.replace(fleet.log.generations[-1], number=2, reason="rival")

    def choose_resume(_: RunView) -> None:
        fleet.choose_resume = lambda _: None
        RunLog(fleet.bucket, writer="rival").append(lambda _: rival, generation=1)

    fleet.choose_resume = choose_resume
    fleet.spend(1, "b", failure=failed("b"))
    fleet.pass_time(2 * TICK_S)
    assert fleet.log.generations[-1].reason == "rival"
    assert [each.number for each in fleet.log.generations] == [2]
    assert 2 not in fleet.nodes["a"].stores


def test_a_proposal_whose_answer_was_lost_stands(fleet: Fleet, bucket: WatchedStore) -> None:
    """A record that was created although nobody heard so is this node's own: it keeps the store it bound for it."""
    fleet.form("a", "b")
    fleet.dead.add("b")
    bucket.deaf_to = "create"
    with pytest.raises(StoreError):
        fleet.pass_time(1.0)
    bucket.deaf_to = ""
    fleet.pass_time(1.0)
    generation = fleet.log.generation
    assert generation is not None
    assert (generation.number, names(generation)) == (2, ["a"])
    assert fleet.nodes["a"].stores[2].port == generation.store_port
    assert fleet.bound == 2


def test_the_card_of_a_node_that_died_waiting_is_removed(
    fleet: Fleet, bucket: WatchedStore
) -> None:
    """A waiting node whose address refuses is struck from the lobby by who finds that out."""
    fleet.limits = dataclasses.replace(LIMITS, nodes_min=3)
    fleet.start("a", "b")
    fleet.pass_time(1.0)
    assert len(bucket.keys(LOBBY)) == 2
    fleet.dead.add("b")
    fleet.pass_time(2.0)
    assert [key for key in bucket.keys(LOBBY) if "b1" in key] == []
    assert len(bucket.keys(LOBBY)) == 1


# ---- who comes and goes ------------------------------------------------------------------------------


def test_a_newcomer_is_drained_for_and_taken_in(fleet: Fleet) -> None:
    """A node that comes later is asked back by the members; the first of them asks for a drain until it is done."""
    fleet.form("a", "b")
    fleet.start("c")
    fleet.pass_time(LIMITS.join_window_s + 6 * TICK_S)
    assert set(fleet.drains) == {"c joins"}
    assert len(fleet.drains) > 1
    assert isinstance(fleet.nodes["a"].decision, Drain)
    assert "c1" in [each.incarnation for each in fleet.nodes["b"].targets]
    fleet.spend(1, "a", "b")
    fleet.pass_time(1.0)
    assert names(fleet.log.generation) == ["a", "b", "c"]


def test_who_leaves_says_so_and_is_left_out(fleet: Fleet) -> None:
    """A node that wants to go is drained for, and the next generation tells that it left."""
    fleet.form("a", "b")
    fleet.nodes["b"].leaving = True
    fleet.pass_time(1.0)
    assert set(fleet.drains) == {"b leaves"}
    fleet.spend(1, "a", "b")
    fleet.pass_time(1.0)
    generation = fleet.log.generation
    assert generation is not None
    assert names(generation) == ["a"]
    assert [(each.kind, each.node) for each in generation.causes] == [(CauseKind.LEFT, "b")]


def test_a_node_that_differs_is_refused_by_the_members(fleet: Fleet) -> None:
    """A newcomer with another fingerprint hears from a member which field differs and both values; others are not told so."""
    fleet.start("a", "b", fingerprint={"code": "1", "torch": "2.13"})
    fleet.pass_time(4.0)
    fleet.run()
    fleet.start("c", fingerprint={"code": "1", "torch": "2.14"})
    fleet.start("d", fingerprint={"code": "1", "torch": "2.13"})
    fleet.pass_time(3 * TICK_S)
    assert isinstance(fleet.nodes["c"].refusal, ConfigError)
    assert str(fleet.nodes["c"].refusal).endswith(
        "does not take this node in: torch = '2.14', where the run has '2.13'"
    )
    assert all(fleet.nodes[name].refusal is None for name in "abd")


def test_of_nodes_that_differ_the_first_stays(fleet: Fleet) -> None:
    """Before there is a world, the node that comes first by name refuses the other one."""
    fleet.start("b", fingerprint={"code": "2"})
    fleet.start("a", fingerprint={"code": "1"})
    fleet.pass_time(LIMITS.join_window_s)
    assert fleet.log.generation is None
    assert fleet.nodes["a"].refusal is None
    assert "a does not take this node in: code = '2', where the run has '1'" in str(
        fleet.nodes["b"].refusal
    )


def test_only_members_refuse_once_there_is_a_world(fleet: Fleet) -> None:
    """Two nodes that wait outside do not send each other away: it is not their world."""
    fleet.form("m")
    fleet.start("a", fingerprint={"code": "1"})
    fleet.start("b", fingerprint={"code": "2"})
    a, b = fleet.nodes["a"], fleet.nodes["b"]
    a.received(b.message_to("a1", asks=True))
    assert a.message_to("b1", asks=False).refusal == ""
    fleet.nodes["m"].received(b.message_to("m1", asks=True))
    m = fleet.nodes["m"]
    assert m.message_to("b1", asks=False).refusal != ""
    # Who still has workers is no newcomer, and who is in the log's newest generation is no stranger.
    m.received(Message(99, 0, True, status("b", fingerprint={"code": "2"})))
    assert m.message_to("b1", asks=False).refusal == ""
    m.received(Message(99, 0, True, waiting("m2", fingerprint={"code": "2"})))
    world = dataclasses.replace(
        fleet.log.generations[-1], number=2, members=(member("m"), member("m2"))
    )
    RunLog(fleet.bucket, writer="m").append(lambda _: world, generation=1)
    assert m.message_to("m21", asks=False).refusal != ""
    m._log.refresh()
    assert m.message_to("m21", asks=False).refusal == ""


def test_strangers_that_went_away_are_forgotten(fleet: Fleet) -> None:
    """A spare that is gone is asked no more, while members are remembered whatever becomes of them."""
    fleet.limits = dataclasses.replace(LIMITS, nodes_max=2)
    fleet.form("a", "b")
    fleet.start("c")
    fleet.pass_time(1.0)
    assert set(fleet.nodes["a"].table.peers) == {"b1", "c1"}
    fleet.cut = {frozenset("ac"), frozenset("bc")}
    fleet.pass_time(4 * LIMITS.heartbeat_timeout_s + 1.0)
    assert set(fleet.nodes["a"].table.peers) == {"b1"}
    assert [each.node for each in fleet.nodes["a"].targets] == ["b"]


def test_who_cannot_be_reached_is_told_to_the_others(fleet: Fleet) -> None:
    """A node says which of those it asks are silent, and takes it back when they answer."""
    fleet.limits = dataclasses.replace(LIMITS, nodes_min=3)
    fleet.form("a", "b", "c")
    fleet.cut = {frozenset("ab")}
    fleet.pass_time(LIMITS.heartbeat_timeout_s + TICK_S)
    assert fleet.nodes["a"].status.unreachable == ("b1",)
    assert fleet.nodes["c"].status.unreachable == ()
    fleet.cut = set()
    fleet.pass_time(2 * TICK_S)
    assert fleet.nodes["a"].status.unreachable == ()


def test_who_is_asked_for_the_first_time_is_given_its_time(fleet: Fleet) -> None:
    """A stranger that was heard long ago, and begins to wait now, is not unreachable before it could answer."""
    fleet.form("a")
    a = fleet.nodes["a"]
    a.received(Message(1, 0, True, status("z")))
    fleet.pass_time(LIMITS.heartbeat_timeout_s + 1.0)
    a.received(Message(2, 0, True, waiting("z")))
    a.turn()
    assert [each.node for each in a.targets] == ["z"]
    assert a.status.unreachable == ()


# ---- large worlds ------------------------------------------------------------------------------------

LARGE = [f"n{number:02}" for number in range(MESH_NODES_MAX + 1)]


def large_world(fleet: Fleet, *started: str) -> None:
    """A generation of more nodes than ask each other, of which some are started."""
    fleet.limits = dataclasses.replace(LIMITS, nodes_max=64, slots=None)
    world = Generation(1, tuple(map(member, LARGE)), (), "127.0.0.1", 1, None, "started")
    RunLog(fleet.bucket, writer="x").append(lambda _: world, generation=0)
    fleet.start(*started)
    for node in fleet.alive():
        node.turn()


def test_the_first_two_of_a_large_world_watch_everyone(fleet: Fleet) -> None:
    """In a large world a leader notices a member that has never spoken; others watch the leaders only."""
    large_world(fleet, "n00", "n01", "n02")
    everyone = {member(name).incarnation for name in LARGE}
    assert set(fleet.nodes["n00"].table.peers) == everyone - {"n001"}
    assert set(fleet.nodes["n01"].table.peers) == everyone - {"n011"}
    assert set(fleet.nodes["n02"].table.peers) == {"n001", "n011"}
    for _ in range(round(LIMITS.heartbeat_timeout_s / TICK_S) + 1):
        fleet.now_s += TICK_S
        fleet.talk()
        fleet.nodes["n01"].turn()
    assert fleet.nodes["n01"].broken == 1


@pytest.mark.parametrize("gone", [["n00"], ["n00", "n01"], ["n07", "n20"]])
@pytest.mark.parametrize("silent", [True, False])
def test_a_large_world_loses_leaders_and_others_alike(
    fleet: Fleet, gone: list[str], silent: bool
) -> None:
    """Whoever is gone, refusing or silent, the others form one world without it, once."""
    large_world(fleet, *LARGE)
    fleet.run()
    fleet.pass_time(1.0)
    if silent:
        fleet.off = set(gone)
    else:
        fleet.dead = set(gone)
    alive = [name for name in LARGE if name not in gone]
    # Two leaders in a row may each take a timeout to be noticed, by those who ask nobody else.
    for _ in range(round(2 * LIMITS.heartbeat_timeout_s / TICK_S) + 5):
        fleet.pass_time(TICK_S)
        if fleet.log.generation_number > 1:
            break
    assert names(fleet.log.generation) == alive
    fleet.run()
    fleet.pass_time(2 * LIMITS.heartbeat_timeout_s)
    assert fleet.log.generation_number == 2


def test_a_world_may_grow_large(fleet: Fleet) -> None:
    """The node with which members stop asking each other joins as any other: who is not asked any more is not silent."""
    fleet.limits = dataclasses.replace(LIMITS, nodes_max=64, slots=None)
    fleet.form(*LARGE[:-1])
    fleet.start(LARGE[-1])
    fleet.pass_time(LIMITS.join_window_s + 1.0)
    fleet.spend(1, *LARGE[:-1])
    fleet.pass_time(1.0)
    assert names(fleet.run()) == LARGE
    fleet.pass_time(2 * LIMITS.heartbeat_timeout_s)
    assert fleet.log.generation_number == 2
    assert {node.broken for node in fleet.alive()} == {0}


# ---- pulse and bucket --------------------------------------------------------------------------------


def test_only_the_first_member_beats_and_only_while_it_trains(
    fleet: Fleet, bucket: WatchedStore
) -> None:
    """One node of the fleet writes the pulse, a few times per takeover_s, while its workers run or settle."""
    fleet.form("a", "b")

    def beats(seconds: float) -> int:
        before = bucket.requests[f"write {KEY}"]
        for _ in range(round(seconds / TICK_S)):
            fleet.pass_time(TICK_S)
            for node in fleet.alive():
                node.feel_pulse()
        return bucket.requests[f"write {KEY}"] - before

    expected = 4 * 10 / LIMITS.takeover_s
    assert beats(10.0) == pytest.approx(expected, abs=1)
    assert bucket.requests[f"read {KEY}"] == 0
    fleet.nodes["a"].say(phase=Phase.SETTLING)
    assert beats(10.0) == pytest.approx(expected, abs=1)
    fleet.nodes["a"].say(phase=Phase.WAITING)
    assert beats(2.0) == 0
    fleet.nodes["a"].say(phase=Phase.RUNNING)
    fleet.dead.add("a")
    fleet.pass_time(1.0)
    assert names(fleet.log.generation) == ["b"]
    fleet.spend(1, "b")
    assert beats(4.0) == 0
    fleet.run()
    assert beats(4.0) >= 3


def test_a_world_that_is_given_up_has_no_pulse(fleet: Fleet, bucket: WatchedStore) -> None:
    """A first member that has given its generation up tells nobody that it trains."""
    fleet.limits = dataclasses.replace(LIMITS, nodes_min=2)
    fleet.form("a", "b")
    fleet.dead.add("b")
    fleet.pass_time(1.0)
    before = bucket.requests[f"write {KEY}"]
    fleet.now_s += 10.0
    fleet.nodes["a"].feel_pulse()
    assert bucket.requests[f"write {KEY}"] == before


@pytest.mark.parametrize("sign", ["pulse", "log"])
def test_who_is_cut_off_waits_while_the_run_goes_on(fleet: Fleet, sign: str) -> None:
    """A newcomer that reaches no member takes over only once neither pulse nor log has moved for takeover_s."""
    fleet.form("a")
    fleet.start("b")
    fleet.cut = {frozenset("ab")}
    b, number = fleet.nodes["b"], 0

    def wait(seconds: float, *, moves: bool) -> None:
        nonlocal number
        for _ in range(round(seconds / TICK_S)):
            fleet.now_s += TICK_S
            number += 1
            if moves and sign == "pulse":
                fleet.bucket.write(KEY, f"[1, {number}]".encode())
            elif moves and number % 5 == 0:
                body = Quarantine(f"ckpt/{number}", "bad")
                RunLog(fleet.bucket, writer="a").append(lambda _: body, generation=1)
            b.turn()
            b.feel_pulse()

    wait(5 * LIMITS.takeover_s, moves=True)
    assert fleet.log.generation_number == 1
    wait(LIMITS.takeover_s - 1.0, moves=False)
    assert fleet.log.generation_number == 1
    wait(2.0, moves=False)
    assert names(fleet.log.generation) == ["b"]


def test_a_bucket_that_is_away_is_no_quiet(fleet: Fleet, bucket: WatchedStore) -> None:
    """Who can see neither members nor bucket knows nothing, and does not take over the moment the bucket is back."""
    fleet.form("a")
    fleet.start("b")
    fleet.cut = {frozenset("ab")}
    b = fleet.nodes["b"]

    def wait(seconds: float) -> None:
        for _ in range(round(seconds / TICK_S)):
            fleet.now_s += TICK_S
            b.feel_pulse()
            try:
                b.turn()
            except StoreError:
                assert bucket.down

    wait(LIMITS.takeover_s)
    bucket.down = True
    wait(3 * LIMITS.takeover_s)
    bucket.down = False
    wait(LIMITS.takeover_s - 2.0)
    assert fleet.log.generation_number == 1
    wait(4.0)
    assert names(fleet.log.generation) == ["b"]


def test_without_the_bucket_members_still_notice_and_then_wait(
    fleet: Fleet, bucket: WatchedStore
) -> None:
    """A loss while the bucket is away is noticed and told; the next generation comes when the bucket does."""
    fleet.form("a", "b")
    bucket.down = True
    before = bucket.requests.total()
    fleet.pass_time(10.0)
    assert bucket.requests.total() == before
    fleet.dead.add("b")
    with pytest.raises(StoreError):
        fleet.pass_time(1.0)
    assert fleet.nodes["a"].broken == fleet.nodes["a"].status.broken == 1
    bucket.down = False
    fleet.pass_time(1.0)
    assert names(fleet.log.generation) == ["a"]


def test_members_that_train_ask_nothing_of_the_bucket(fleet: Fleet, bucket: WatchedStore) -> None:
    """However long nothing changes, turns cost no request; what one appends makes each of the others read on once."""
    fleet.limits = dataclasses.replace(LIMITS, nodes_max=4)
    fleet.form(*"abcd")
    fleet.start("spare")
    fleet.pass_time(1.0)
    before = bucket.requests.total()
    fleet.pass_time(20.0)
    assert bucket.requests.total() == before
    log = fleet.nodes["a"]._log
    log.append(lambda _: Quarantine("ckpt/x", "bad"), generation=1)
    fleet.pass_time(4 * TICK_S)
    assert {node.status.log_length for node in fleet.alive()} == {log.view.length}


# ---- failures, recoveries, the end -------------------------------------------------------------------


def test_a_node_that_fails_too_often_is_left_out_and_put_on_record(fleet: Fleet) -> None:
    """The failure that is too many keeps its node out of the world that it calls for, and a QUARANTINE follows."""
    fleet.form("a", "b")
    for number in (1, 2):
        fleet.spend(number, "a")
        fleet.spend(number, "b", failure=failed("b", f"failure {number}"))
        fleet.pass_time(1.0)
        fleet.run()
    generation, quarantine = fleet.records()[-2:]
    assert isinstance(generation, Generation)
    assert names(generation) == ["a"]
    assert isinstance(quarantine, Quarantine)
    assert (quarantine.node, quarantine.seconds) == ("b", BUDGETS.bar_s)
    assert "b: failure 2" in quarantine.why
    assert fleet.nodes["b"].decision.reason.startswith("kept out: 2 failures within 600 s")
    fleet.pass_time(BUDGETS.bar_s)
    assert fleet.drains[-1] == "b joins"


def test_a_node_that_is_lost_too_often_is_put_on_record(fleet: Fleet) -> None:
    """A node that is gone again and again finds itself kept out when it comes back."""
    fleet.form("a", "b")
    for life in ("b2", "b3"):
        fleet.dead.add("b")
        fleet.pass_time(1.0)
        fleet.run()
        fleet.dead.clear()
        fleet.start("b", member=dataclasses.replace(member("b"), incarnation=life))
        fleet.pass_time(LIMITS.join_window_s + 1.0)
        if life == "b2":
            assert fleet.drains[-1] == "b joins"
            fleet.spend(2, "a")
            fleet.pass_time(1.0)
            assert names(fleet.run()) == ["a", "b"]
    (quarantine,) = (each for each in fleet.records() if isinstance(each, Quarantine))
    assert (quarantine.node, quarantine.why) == ("b", "2 failures within 600 s, last: lost b")
    assert fleet.nodes["b"].decision.reason.startswith("kept out: 2 failures within 600 s")
    assert names(fleet.log.generation) == ["a"]


def test_the_same_failure_everywhere_ends_the_run(fleet: Fleet) -> None:
    """When the budget of one exception is used up, STOP says so with the step of the last checkpoint, and all end."""
    fleet.form("a", "b")
    same = {"step": 7, "signature": "ValueError@loop.py:9"}
    fleet.spend(1, "a")
    fleet.spend(1, "b", failure=failed("b", "ValueError: bad", **same))
    fleet.pass_time(1.0)
    fleet.run()
    checkpoint = Checkpoint(6, 2, "ckpt/6", 1, "0" * 64, None)
    fleet.nodes["a"]._log.append(lambda _: Commit((checkpoint,), "history"), generation=2)
    fleet.spend(2, "b")
    fleet.spend(2, "a", failure=failed("a", "ValueError: bad", **same))
    fleet.pass_time(1.0)
    stop = Stop("the same failure 2 times at step 7, on a, b: ValueError: bad", 6)
    assert fleet.log.stop == stop
    assert {node.decision for node in fleet.alive()} == {Ended(stop.reason)}


def test_alone_the_same_failure_is_tried_no_further(fleet: Fleet) -> None:
    """Where there is no other node to try, the failures of one end the run."""
    fleet.form("a")
    for number in (1, 2):
        fleet.spend(number, "a", failure=failed("a", step=7, signature="ValueError@loop.py:9"))
        fleet.pass_time(1.0)
        fleet.run()
    assert fleet.log.stop is not None
    assert fleet.log.stop.reason.startswith("the same failure 2 times at step 7, on a")


def test_failures_with_progress_between_them_do_not_end_the_run(fleet: Fleet) -> None:
    """Steps that were done since the last failure count, although no record tells of them yet."""
    budgets = dataclasses.replace(BUDGETS, failures_max=2, flaps_max=9)
    fleet.form("a")
    a = fleet.nodes["a"]
    a._budgets = budgets
    for number, step in ((1, 5), (2, 9)):
        a.say(step=step)
        fleet.spend(number, "a", failure=failed("a"))
        fleet.pass_time(1.0)
        fleet.run()
    assert fleet.log.stop is None
    a.say(step=8)
    fleet.spend(3, "a", failure=failed("a"))
    fleet.pass_time(1.0)
    assert fleet.log.stop is not None
    assert fleet.log.stop.reason.startswith("2 failures in a row without a step beyond 9")


def test_a_recovery_is_told_once_all_have_started(fleet: Fleet) -> None:
    """The first member appends how long the start took until the last member was through each phase: once, and of this generation."""
    fleet.form("a", "b", "c")

    def times(number: int, start_s: float, step_s: float) -> StartTimes:
        return StartTimes(number, start_s=start_s, group_s=1.0, restore_s=0.5, step_s=step_s)

    fleet.nodes["a"].say(start_times=times(1, 1.0, 0.25))
    fleet.nodes["c"].say(start_times=times(1, 0.5, 0.25))
    fleet.pass_time(1.0)
    fleet.nodes["b"].say(start_times=times(0, 9.0, 9.0))
    fleet.pass_time(1.0)
    assert fleet.log.recovery is None
    fleet.nodes["b"].say(start_times=times(1, 0.5, 2.0))
    fleet.pass_time(2.0)
    generation = fleet.log.generation
    assert generation is not None
    assert fleet.log.recovery == Recovery(
        1, start_s=1.0, group_s=1.0, restore_s=0.5, step_s=1.5, total_s=generation.agree_s + 4.0
    )
    assert sum(isinstance(each, Recovery) for each in fleet.records()) == 1
    fleet.dead.add("a")
    fleet.pass_time(1.0)
    fleet.run()
    for name in "bc":
        fleet.nodes[name].say(start_times=times(2, 0.5, 2.0))
    fleet.pass_time(1.0)
    assert fleet.log.recovery is not None
    assert fleet.log.recovery.number == 2
    assert fleet.log.recovery.total_s == pytest.approx(TICK_S + 4.0), "agreeing comes first"


def test_the_log_outruns_what_peers_seem_to_be(fleet: Fleet) -> None:
    """Before a node gives its world up or acts on it, it reads the log: the run may have ended, or gone on."""
    fleet.form("a", "b")
    RunLog(fleet.bucket, writer="b").append(lambda _: Stop("completed", 9), generation=1)
    fleet.dead.add("b")
    fleet.pass_time(2 * TICK_S)
    assert fleet.nodes["a"].decision == Ended("completed")
    assert len(fleet.records()) == 2
    assert fleet.bound == 1, "for the first world"


def test_when_a_generation_was_read_is_this_nodes_own_time(fleet: Fleet) -> None:
    """`read_at_s` is the moment at which this node first saw the record, not when it was written."""
    fleet.form("a", "b")
    known_s = fleet.nodes["b"].read_at_s(1)
    assert 0.0 < known_s < fleet.now_s
    fleet.pass_time(3.0)
    assert fleet.nodes["b"].read_at_s(1) == known_s
    assert fleet.nodes["b"].read_at_s(2) == fleet.now_s
