"""One node's requests to the bucket, its records, and its reaction to a bucket that does not answer."""

import dataclasses

import pytest

from elastic_pt.errors import StoreError
from elastic_pt.membership.decision.budgets import SPACED_S
from elastic_pt.membership.decision.decide import Ended, Wait
from elastic_pt.membership.decision.status import NodePhase, StartTimes
from elastic_pt.membership.pulse import KEY, Pulse
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import (
    Checkpoint,
    Commit,
    Generation,
    Quarantine,
    Record,
    Recovery,
    Stop,
)
from tests.membership.bucket import WatchedStore
from tests.membership.fleet import TICK_S, Fleet, names
from tests.membership.world import LIMITS, changed, failed, member

# ---- pulse and bucket --------------------------------------------------------------------------------


def test_only_the_first_member_writes_the_pulse_while_it_trains(
    fleet: Fleet, bucket: WatchedStore
) -> None:
    """One node of the fleet writes the pulse, a few times per takeover_s, while its workers run or settle."""
    fleet.form("a", "b")

    def beats(seconds: float) -> int:
        before = bucket.requests[f"write {KEY}"]
        for _ in range(round(seconds / TICK_S)):
            fleet.pass_time(TICK_S)
            for node in fleet.alive():
                node.step_pulse()
        return bucket.requests[f"write {KEY}"] - before

    expected = 4 * 10 / LIMITS.elastic.takeover_s
    assert beats(10.0) == pytest.approx(expected, abs=1)
    assert bucket.requests[f"read {KEY}"] == 0
    fleet.nodes["a"].me.say(phase=NodePhase.SETTLING)
    assert beats(10.0) == pytest.approx(expected, abs=1)
    fleet.nodes["a"].me.say(phase=NodePhase.WAITING)
    assert beats(2.0) == 0
    fleet.nodes["a"].me.say(phase=NodePhase.RUNNING)
    fleet.dead.add("a")
    fleet.pass_time(1.0)
    assert names(fleet.log.generation) == ["b"]
    assert fleet.log.generation is not None
    assert fleet.log.generation.why_not_memory == "no member holds a state of generation 1"
    assert fleet.log.generation.restarts == 1
    fleet.spend(1, "b")
    assert beats(4.0) == 0
    fleet.run()
    assert beats(4.0) >= 3


def test_a_broken_generation_has_no_pulse(fleet: Fleet, bucket: WatchedStore) -> None:
    """A first member that has found its generation broken writes no pulse."""
    fleet.limits = changed(LIMITS, nodes_min=2)
    fleet.form("a", "b")
    fleet.dead.add("b")
    fleet.pass_time(1.0)
    before = bucket.requests[f"write {KEY}"]
    fleet.now_s += 10.0
    fleet.nodes["a"].step_pulse()
    assert bucket.requests[f"write {KEY}"] == before


def test_first_member_looks_at_the_log_once_a_second(fleet: Fleet, bucket: WatchedStore) -> None:
    """Looking for takeovers and requests costs the fleet one request a second, and nothing else."""
    fleet.form("a", "b")
    bucket.requests.clear()
    seconds = 5 * LIMITS.elastic.takeover_s
    for _ in range(round(seconds / TICK_S)):
        fleet.pass_time(TICK_S)
        for node in fleet.alive():
            node.step_pulse()
    assert set(bucket.requests) == {f"write {KEY}", "read log"}
    assert bucket.requests["read log"] == pytest.approx(seconds, abs=1)


@pytest.mark.parametrize("answers", [True, False], ids=["at once", "not at first"])
def test_a_lone_member_detects_that_it_was_replaced(
    fleet: Fleet, bucket: WatchedStore, answers: bool
) -> None:
    """A member that no other node could reach, and that was replaced, does not train beside the new generation."""
    fleet.form("a")
    a = fleet.nodes["a"]
    theirs = dataclasses.replace(fleet.log.generations[-1], number=2, members=(member("z"),))
    RunLog(bucket, writer="z").append(lambda _: theirs, generation=1)

    def train(seconds: float) -> None:
        for _ in range(round(seconds / TICK_S)):
            fleet.now_s += TICK_S
            a.step_pulse()
            a.turn()

    if not answers:
        bucket.deaf_to = "read"
        train(LIMITS.elastic.takeover_s)
        assert (a.me.now.generation, a.decision) == (1, Wait("training"))
        bucket.deaf_to = ""
    train(LIMITS.elastic.takeover_s / 2 + TICK_S)
    assert a.me.now.generation == 2
    assert a.decision != Wait("training")


def test_a_lone_member_whose_turn_hangs_ends_its_workers_when_it_was_replaced(
    fleet: Fleet, bucket: WatchedStore
) -> None:
    """The workers end even if a request to a bucket that did not answer still hangs."""
    first = fleet.form("a")
    theirs = dataclasses.replace(first, number=2, members=(member("z"),))
    RunLog(bucket, writer="z").append(lambda _: theirs, generation=1)
    a = fleet.nodes["a"]
    for _ in range(round(LIMITS.elastic.takeover_s / TICK_S)):
        fleet.now_s += TICK_S
        a.step_pulse()
    assert a.broken == 1


def test_late_read_of_the_log_changes_nothing(
    fleet: Fleet, bucket: WatchedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken generation stays broken, even if a slow answer about the previous one arrives afterwards."""
    first = fleet.form("a")
    a = fleet.nodes["a"]
    theirs = dataclasses.replace(first, number=2)
    RunLog(bucket, writer="z").append(lambda _: theirs, generation=1)
    glance = Pulse.record

    def slow(pulse: Pulse, index: int) -> Record | None:
        a.me.give_up(2)
        return glance(pulse, index)

    monkeypatch.setattr(Pulse, "record", slow)
    fleet.now_s += LIMITS.elastic.takeover_s
    a.step_pulse()
    assert a.broken == 2


@pytest.mark.parametrize("sign", ["pulse", "log"])
def test_cut_off_node_waits_while_log_or_pulse_changes(fleet: Fleet, sign: str) -> None:
    """A newcomer that reaches no member takes over only after takeover_s without a change of pulse and log."""
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
            b.step_pulse()

    wait(5 * LIMITS.elastic.takeover_s, moves=True)
    assert fleet.log.generation_number == 1
    wait(LIMITS.elastic.takeover_s - 1.0, moves=False)
    assert fleet.log.generation_number == 1
    wait(2.0, moves=False)
    assert names(fleet.log.generation) == ["b"]


def test_time_without_a_read_of_the_pulse_is_not_quiet(fleet: Fleet) -> None:
    """Time in which a node was delayed and did not read the pulse does not count as quiet."""
    fleet.form("a")
    fleet.start("b")
    fleet.cut = {frozenset("ab")}
    b = fleet.nodes["b"]
    for _ in range(round(5 * LIMITS.elastic.takeover_s / TICK_S)):
        fleet.now_s += TICK_S
        b.turn()
    assert fleet.log.generation_number == 1
    for _ in range(round((LIMITS.elastic.takeover_s + 2.0) / TICK_S)):
        fleet.now_s += TICK_S
        b.turn()
        b.step_pulse()
    assert names(fleet.log.generation) == ["b"]


def test_time_without_the_bucket_is_not_quiet(fleet: Fleet, bucket: WatchedStore) -> None:
    """A node without members and without bucket does not take over as soon as the bucket answers again."""
    fleet.form("a")
    fleet.start("b")
    fleet.cut = {frozenset("ab")}
    b = fleet.nodes["b"]

    def wait(seconds: float) -> None:
        for _ in range(round(seconds / TICK_S)):
            fleet.now_s += TICK_S
            b.step_pulse()
            try:
                b.turn()
            except StoreError:
                assert bucket.down

    wait(LIMITS.elastic.takeover_s)
    bucket.down = True
    wait(3 * LIMITS.elastic.takeover_s)
    bucket.down = False
    wait(LIMITS.elastic.takeover_s - 2.0)
    assert fleet.log.generation_number == 1
    wait(4.0)
    assert names(fleet.log.generation) == ["b"]


def test_without_the_bucket_members_detect_a_loss_and_wait(
    fleet: Fleet, bucket: WatchedStore
) -> None:
    """A loss is detected and reported while the bucket does not answer. The next generation waits for the bucket."""
    fleet.form("a", "b")
    bucket.down = True
    before = bucket.requests.total()
    fleet.pass_time(10.0)
    assert bucket.requests.total() == before
    fleet.dead.add("b")
    with pytest.raises(StoreError):
        fleet.pass_time(1.0)
    assert fleet.nodes["a"].broken == 1
    bucket.down = False
    fleet.pass_time(1.0)
    assert names(fleet.log.generation) == ["a"]


def test_a_member_that_cannot_read_the_log_is_left_behind(fleet: Fleet) -> None:
    """A member that answers, but does not read the generation's record, delays the others for at most takeover_s."""
    fleet.start("a", "b")
    members = (fleet.nodes["a"].member, fleet.nodes["b"].member)
    world = Generation(1, members, (4, 4), "127.0.0.1", 1, None, "started")
    RunLog(fleet.bucket, writer="x").append(lambda _: world, generation=0)
    for passed in range(round((LIMITS.elastic.takeover_s + 2.0) / TICK_S)):
        fleet.now_s += TICK_S
        fleet.talk()
        fleet.nodes["a"].turn()
        if passed * TICK_S < LIMITS.elastic.takeover_s:
            assert fleet.nodes["a"].broken == 0
    assert names(fleet.log.generation) == ["a"]
    assert fleet.log.generations[-1].causes[0].detail == "it does not read the log"


def test_turns_of_training_members_make_no_request(fleet: Fleet, bucket: WatchedStore) -> None:
    """While nothing changes, turns make no request. Each other member reads a new record once."""
    fleet.limits = changed(LIMITS, nodes_max=4)
    fleet.form(*"abcd")
    fleet.start("spare")
    fleet.pass_time(1.0)
    before = bucket.requests.total()
    fleet.pass_time(20.0)
    assert bucket.requests.total() == before
    log = fleet.nodes["a"].log
    log.append(lambda _: Quarantine("ckpt/x", "bad"), generation=1)
    fleet.pass_time(4 * TICK_S)
    assert {node.me.now.log_length for node in fleet.alive()} == {log.view.length}


# ---- failures, recoveries, the end -------------------------------------------------------------------


def test_node_that_fails_too_often_is_left_out_and_recorded(fleet: Fleet) -> None:
    """The last failure of the budget keeps its node out of the next generation, and a QUARANTINE follows."""
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
    assert (quarantine.node, quarantine.seconds) == ("b", LIMITS.elastic.quarantine_s)
    assert "b: failure 2" in quarantine.why
    assert fleet.nodes["b"].decision.reason.startswith("kept out: 2 failures within 600 s")
    fleet.pass_time(LIMITS.elastic.quarantine_s)
    assert fleet.drains[-1] == "b joins"


def test_node_that_is_lost_too_often_is_recorded(fleet: Fleet) -> None:
    """A node that is lost repeatedly is kept out when it comes back."""
    fleet.form("a", "b")
    for life in ("b2", "b3"):
        fleet.dead.add("b")
        fleet.pass_time(1.0)
        fleet.run()
        fleet.dead.clear()
        fleet.start("b", member=dataclasses.replace(member("b"), incarnation=life))
        fleet.pass_time(LIMITS.elastic.join_window_s + 1.0)
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
    """If the budget of one exception is used up, all nodes end with a STOP that has the step of the last checkpoint."""
    fleet.form("a", "b")
    same = {"step": 7, "signature": "ValueError@loop.py:9"}
    fleet.spend(1, "a")
    fleet.spend(1, "b", failure=failed("b", "ValueError: bad", **same))
    fleet.pass_time(1.0)
    fleet.run()
    checkpoint = Checkpoint(6, 2, "ckpt/6", 1, "0" * 64, None)
    fleet.nodes["a"].log.append(lambda _: Commit((checkpoint,), "history"), generation=2)
    fleet.spend(2, "b")
    fleet.spend(2, "a", failure=failed("a", "ValueError: bad", **same))
    fleet.pass_time(1.0)
    stop = Stop("the same failure 2 times at step 7, on a, b: ValueError: bad", 6)
    assert fleet.log.stop == stop
    assert {node.decision for node in fleet.alive()} == {Ended(stop.reason)}


def test_alone_the_same_failure_ends_the_run_after_spaced_attempts(fleet: Fleet) -> None:
    """If there is no other node, failures of one node end the run when they span ten seconds."""
    fleet.form("a")
    same = failed("a", step=7, signature="ValueError@loop.py:9")
    for number in (1, 2, 3):
        fleet.spend(number, "a", failure=same)
        fleet.pass_time(1.0)
        assert fleet.log.stop is None
        fleet.run()
    fleet.pass_time(SPACED_S)
    fleet.spend(4, "a", failure=same)
    fleet.pass_time(1.0)
    assert fleet.log.stop is not None
    assert fleet.log.stop.reason.startswith("the same failure 4 times at step 7, on a")


def test_silent_members_count_as_possible_nodes(fleet: Fleet) -> None:
    """Failures of one node do not end the run while a silent node may be alive behind a partition."""
    fleet.form("a", "b")
    same = {"step": 7, "signature": "ValueError@loop.py:9"}
    fleet.spend(1, "a", failure=failed("a", **same))
    fleet.spend(1, "b")
    fleet.pass_time(1.0)
    fleet.run()
    fleet.off = {"b"}
    fleet.spend(2, "a", failure=failed("a", **same))
    fleet.pass_time(4.0)
    assert fleet.log.stop is None


def test_failures_with_progress_between_them_do_not_end_the_run(fleet: Fleet) -> None:
    """Steps since the last failure count before a record names them."""
    fleet.limits = changed(LIMITS, failures_max=2, flaps_max=9)
    fleet.form("a")
    for number, step in ((1, 5), (2, 9)):
        fleet.step(step, "a")
        fleet.spend(number, "a", failure=failed("a"))
        fleet.pass_time(1.0)
        fleet.run()
    fleet.pass_time(SPACED_S)
    assert fleet.log.stop is None
    fleet.step(8, "a")
    fleet.spend(3, "a", failure=failed("a"))
    fleet.pass_time(1.0)
    assert fleet.log.stop is not None
    assert fleet.log.stop.reason.startswith("2 failures in a row without a step beyond 9")


def test_failures_of_the_surroundings_on_all_nodes_do_not_end_the_run(fleet: Fleet) -> None:
    """Failures of the surroundings are retried, on any number of nodes and any number of times."""
    fleet.form("a", "b")
    for number in range(1, 6):
        trouble = {"step": 7, "surroundings": True, "signature": "OSError"}
        fleet.spend(number, "a", failure=failed("a", **trouble))
        fleet.spend(number, "b", failure=failed("b", **trouble))
        fleet.pass_time(SPACED_S)
        fleet.run()
    assert fleet.log.stop is None


def test_the_others_continue_without_a_resting_node_until_it_is_back(fleet: Fleet) -> None:
    """The next generation is without a node that rests. After its rest it joins again."""
    fleet.form("a", "b")
    fleet.nodes["a"].me.rest("no space in /dev/shm", 5.0)
    fleet.spend(1, "a", failure=failed("a", surroundings=True))
    fleet.spend(1, "b")
    fleet.pass_time(1.0)
    assert names(fleet.run()) == ["b"]
    assert fleet.nodes["a"].decision.reason == "rests: no space in /dev/shm"
    fleet.pass_time(3.0)
    assert fleet.drains == []
    fleet.pass_time(3.0)
    assert fleet.drains[-1] == "a joins"


def test_a_single_resting_node_pauses_the_run_and_resumes(fleet: Fleet) -> None:
    """A single node that rests pauses the run with the reason, and resumes by itself."""
    fleet.form("a")
    fleet.nodes["a"].me.rest("no space in /dev/shm", 5.0)
    fleet.spend(1, "a", failure=failed("a", surroundings=True))
    fleet.pass_time(4.0)
    assert fleet.log.generation_number == 1
    assert fleet.nodes["a"].decision.reason == (
        "paused: 0 of at least 1 nodes; a rests: no space in /dev/shm"
    )
    fleet.pass_time(2.0)
    assert fleet.log.generation_number == 2


def test_a_node_that_is_needed_does_not_leave(fleet: Fleet) -> None:
    """A node may leave for its failures only if enough others are alive and neither leave nor rest."""
    fleet.form("a", "b")
    a, b = fleet.nodes["a"], fleet.nodes["b"]
    assert a.known.others_can_go_on()
    b.me.rest("no space in /dev/shm", 3.0)
    fleet.pass_time(1.0)
    assert not a.known.others_can_go_on()
    fleet.pass_time(3.0)
    assert a.known.others_can_go_on()
    fleet.dead.add("b")
    fleet.pass_time(3.0)
    assert not a.known.others_can_go_on()


def test_recovery_is_recorded_once_all_have_started(fleet: Fleet) -> None:
    """The first member appends the slowest member's time of each phase, once, and for this generation only."""
    fleet.form("a", "b", "c")

    def times(number: int, start_s: float, step_s: float) -> StartTimes:
        return StartTimes(number, start_s=start_s, group_s=1.0, restore_s=0.5, step_s=step_s)

    fleet.nodes["a"].me.say(start_times=times(1, 1.0, 0.25))
    fleet.nodes["c"].me.say(start_times=times(1, 0.5, 0.25))
    fleet.pass_time(1.0)
    fleet.nodes["b"].me.say(start_times=times(0, 9.0, 9.0))
    fleet.pass_time(1.0)
    assert fleet.log.recovery is None
    fleet.nodes["b"].me.say(start_times=times(1, 0.5, 2.0))
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
        fleet.nodes[name].me.say(start_times=times(2, 0.5, 2.0))
    fleet.pass_time(1.0)
    assert fleet.log.recovery is not None
    assert fleet.log.recovery.number == 2
    assert fleet.log.recovery.total_s == pytest.approx(TICK_S + 4.0), "agreeing comes first"


def test_log_is_read_before_acting(fleet: Fleet) -> None:
    """A node reads the log before it acts on a broken generation: the run may have ended, or have a newer one."""
    fleet.form("a", "b")
    RunLog(fleet.bucket, writer="b").append(lambda _: Stop("completed", 9), generation=1)
    fleet.dead.add("b")
    fleet.pass_time(2 * TICK_S)
    assert fleet.nodes["a"].decision == Ended("completed")
    assert len(fleet.records()) == 2
    assert fleet.bound == 1, "for the first generation"


def test_read_at_s_is_on_this_nodes_clock(fleet: Fleet) -> None:
    """`read_at_s` is when this node first saw the record, not when it was written."""
    fleet.form("a", "b")
    known_s = fleet.nodes["b"].read_at_s(1)
    assert 0.0 < known_s < fleet.now_s
    fleet.pass_time(3.0)
    assert fleet.nodes["b"].read_at_s(1) == known_s
    assert fleet.nodes["b"].read_at_s(2) == fleet.now_s
