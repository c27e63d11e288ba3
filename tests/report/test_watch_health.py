"""`judge_health`: which facts make a run sick, as a table. And which restarts a log has."""

import dataclasses
import datetime

import pytest

from elastic_pt.report.goodput import AgentTime, goodput_of
from elastic_pt.report.health import (
    AgentEnd,
    HealthFacts,
    HealthLimits,
    ReasonKind,
    Restart,
    judge_health,
)
from elastic_pt.report.status import State
from elastic_pt.report.watch import ends_in, restarts_in, resumed_in, up_since
from elastic_pt.runlog.records import (
    ORIGIN,
    Body,
    Cause,
    CauseKind,
    Checkpoint,
    Commit,
    Control,
    Generation,
    Member,
    Record,
    Recovery,
    Request,
    Verb,
)
from elastic_pt.telemetry.account import Account

NOW = datetime.datetime(2026, 11, 27, 20, 0, tzinfo=datetime.UTC)
DOWN, STALL = ReasonKind.DOWN, ReasonKind.NO_PROGRESS
WAITS, RISK, CLOCKS = ReasonKind.WAITS_FOR_NODES, ReasonKind.AT_RISK, ReasonKind.CLOCKS_DIFFER
STORM, STUCK = ReasonKind.RESTART_STORM, ReasonKind.RESTARTS_WITHOUT_PROGRESS
HEALTHY = HealthFacts(
    state=State.RUNNING,
    reason="started",
    step=120,
    steps=1000,
    committed_step=100,
    step_age_s=1.0,
    newest_at=NOW - datetime.timedelta(seconds=20),
    resumed_at=None,
    up_since=None,
    ends=(),
    saved_at=NOW - datetime.timedelta(seconds=20),
    nodes_up=3,
    beats=False,
    starts=False,
    startup_timeout_s=600.0,
    pause_asked=False,
    pause_done=False,
    restarts=(),
    usual_step_s=1.0,
    checkpoint_every_steps=50,
)


def ago(seconds: float) -> datetime.datetime:
    """A moment before now."""
    return NOW - datetime.timedelta(seconds=seconds)


def restarts(
    ages: list[float], frontiers: list[int], took_s: float | None = 5.0, lost_steps: int = 0
) -> tuple[Restart, ...]:
    """Restarts of these ages, after these newest steps."""
    return tuple(
        Restart(number, ago(age), step, took_s, lost_steps, f"generation {number}: node-1 failed")
        for number, (age, step) in enumerate(zip(ages, frontiers, strict=True), start=2)
    )


UNSEEN = {"state": State.DOWN, "step_age_s": None, "nodes_up": 0}
NEW = {"state": State.NEW, "newest_at": None, "step_age_s": None, "saved_at": None}
NEW |= {"up_since": ago(299)}
ENDS = tuple(AgentEnd("a", ago(age), "OutOfMemoryError: x") for age in (500, 300, 100))
PAUSED = {"state": State.PAUSED, "pause_asked": True, "pause_done": True}
TABLE: list[tuple[str, dict[str, object], set[ReasonKind]]] = [
    ("it trains", {}, set()),
    ("completed, whatever else", {"state": State.COMPLETED, "step_age_s": 9e9}, set()),
    ("failed", {"state": State.FAILED}, {ReasonKind.FAILED}),
    ("down", UNSEEN, {DOWN}),
    (
        "down for days, and new agents do not answer yet",
        UNSEEN | {"up_since": ago(299), "newest_at": ago(9e5)},
        set(),
    ),
    (
        "new agents of a run that was down do not answer for too long",
        UNSEEN | {"up_since": ago(301), "newest_at": ago(9e5)},
        {DOWN},
    ),
    ("the first agents do not answer yet", NEW | {"nodes_up": 0}, set()),
    ("no agent can be asked from here, but the pulse beats", UNSEEN | {"beats": True}, set()),
    (
        "the pulse beats, but the commit is too old",
        UNSEEN | {"beats": True, "newest_at": ago(900)},
        {STALL},
    ),
    ("never started, and no node is up", {"state": State.NEW, "nodes_up": 0}, {DOWN}),
    ("not started yet, nodes wait", NEW, set()),
    ("nodes wait for the first others too long", NEW | {"up_since": ago(301)}, {WAITS}),
    ("the agent of a node ends again and again, and now it waits", NEW | {"ends": ENDS}, {STORM}),
    (
        "an agent ended three times, but not within ten minutes",
        NEW | {"ends": (dataclasses.replace(ENDS[0], at=ago(601)), *ENDS[1:])},
        set(),
    ),
    ("an agent has ended twice, and now it waits", NEW | {"ends": ENDS[1:]}, set()),
    (
        "agents of three nodes have ended once",
        NEW | {"ends": tuple(dataclasses.replace(ENDS[0], node=node) for node in "abc")},
        set(),
    ),
    ("a step is late, but not late enough", {"step_age_s": 299.0}, set()),
    ("no new step for five minutes", {"step_age_s": 301.0}, {STALL}),
    ("10 usual steps may pass", {"step_age_s": 1900.0, "usual_step_s": 200.0}, set()),
    ("11 usual steps without one", {"step_age_s": 2200.0, "usual_step_s": 200.0}, {STALL}),
    ("an operator paused it", PAUSED | {"step_age_s": 9e9}, set()),
    (
        "paused by an operator, and the machines are gone",
        PAUSED | {"step_age_s": None, "nodes_up": 0},
        set(),
    ),
    (
        "a pause is not reached, and the machines are gone",
        PAUSED | {"pause_done": False, "step_age_s": None, "nodes_up": 0},
        {DOWN},
    ),
    (
        "a pause is not reached for long: the run hangs",
        {"pause_asked": True, "step_age_s": 301.0},
        {STALL},
    ),
    ("a pause is not reached yet", {"pause_asked": True, "step_age_s": 40.0}, set()),
    ("too few nodes for long", {"state": State.PAUSED, "step_age_s": 400.0}, {STALL}),
    ("resumed a moment ago after a long pause", {"step_age_s": 9e9, "resumed_at": ago(5)}, set()),
    ("resumed long ago, and no step since", {"step_age_s": 9e9, "resumed_at": ago(301)}, {STALL}),
    ("new nodes are starting", {"step_age_s": None, "newest_at": ago(30)}, set()),
    ("new nodes are up for too long", {"step_age_s": None, "newest_at": ago(400)}, {STALL}),
    ("workers may start for so long", {"starts": True, "step_age_s": 719.0}, set()),
    ("workers start for too long", {"starts": True, "step_age_s": 721.0}, {STALL}),
    (
        "a run of stock torchrun has no steps",
        {"steps": None, "step_age_s": None, "newest_at": ago(9e6)},
        set(),
    ),
    ("too many steps in no commit", {"step": 201, "saved_at": ago(601)}, {RISK}),
    ("many steps in no commit, but a fast run", {"step": 300, "saved_at": ago(599)}, set()),
    ("as many steps as are allowed", {"step": 200, "saved_at": ago(9e9)}, set()),
    ("a record from the future", {"newest_at": ago(-3600)}, {CLOCKS}),
    ("clocks differ a little", {"newest_at": ago(-4)}, set()),
    ("two restarts", {"restarts": restarts([60, 30], [110, 115])}, set()),
    (
        "three preemptions in ten minutes, each with new steps",
        {"restarts": restarts([90, 60, 30], [110, 115, 119])},
        set(),
    ),
    (
        "three restarts that took most of ten minutes, with new steps",
        {"restarts": restarts([590, 400, 200], [110, 115, 119], 101.0)},
        {STORM},
    ),
    (
        "three restarts after which most of ten minutes was done again",
        {"restarts": restarts([590, 400, 200], [110, 115, 119], 5.0, 96)},
        {STORM},
    ),
    (
        "three restarts over hours, each with new steps",
        {"restarts": restarts([9000, 5000, 30], [110, 115, 119], 101.0)},
        set(),
    ),
    (
        "three restarts over hours at the same step",
        {"restarts": restarts([9000, 5000, 30], [120, 120, 120])},
        {STUCK},
    ),
    ("a crash loop", {"restarts": restarts([30, 20, 10], [120, 120, 120], None)}, {STORM, STUCK}),
    (
        "restarts of stock torchrun over hours",
        {"steps": None, "step": 0, "restarts": restarts([9000, 5000, 30], [0, 0, 0])},
        set(),
    ),
]


@pytest.mark.parametrize(("what", "changes", "kinds"), TABLE, ids=[row[0] for row in TABLE])
def test_verdict(what: str, changes: dict[str, object], kinds: set[ReasonKind]) -> None:
    """Each row's facts give exactly the reasons of the row, each in one line with its numbers."""
    facts = dataclasses.replace(HEALTHY, **changes)  # type: ignore[arg-type]
    found = judge_health(facts, NOW, HealthLimits())
    assert {each.kind for each in found.sick} == kinds, what
    assert all(each.text and "\n" not in each.text for each in found.sick)


def test_limits_of_the_operator_count() -> None:
    """A given limit replaces the one from the run's own pace."""
    late = dataclasses.replace(HEALTHY, step_age_s=50.0, step=131, starts=True)
    kinds = {each.kind for each in judge_health(late, NOW, HealthLimits(40.0, 30)).sick}
    assert kinds == {STALL, ReasonKind.AT_RISK}


def test_restarts_since_the_newest_commit_are_counted_without_planned_changes() -> None:
    """A lost node is a restart, a join is none, and a commit starts the count again."""
    lost = Cause(CauseKind.LOST, "a", "no answer")
    bodies = [
        generation(1),
        generation(2, lost),
        Commit((Checkpoint(5, 2, "d", 1, "0" * 64, None),), "history/x"),
        generation(3, lost),
        generation(4, Cause(CauseKind.JOINED, "b")),
        generation(5, lost),
    ]
    records = [record(index, body) for index, body in enumerate(bodies)]
    assert [each.generation for each in restarts_in(records)] == [3, 5]
    assert "node a lost" in restarts_in(records)[0].text


def test_a_restart_takes_until_its_first_step_or_the_next_generation() -> None:
    """The log tells how long: the measured time, else the time to the next change; None if that is still to come."""
    lost = Cause(CauseKind.LOST, "a", "no answer")
    bodies = [generation(1), generation(2, lost), Recovery(2, 1.0, 2.0, 3.0, 4.0, 10.0)]
    bodies += [generation(3, lost), generation(4, lost)]
    records = [
        dataclasses.replace(record(index, body), time=ago(100 - 10 * index).isoformat())
        for index, body in enumerate(bodies)
    ]
    assert [each.took_s for each in restarts_in(records)] == [10.0, 10.0, None]


def test_only_the_end_of_a_pause_restarts_the_clock() -> None:
    """A checkpoint that is asked for again and again, and a RESUME without a pause, must not hide a stall."""

    def asked(verb: Verb, *standing: Verb) -> Control:
        return Control(Request(verb, "ann"), tuple(Request(each, "ann") for each in standing), 0)

    def resumed(*bodies: Control) -> datetime.datetime | None:
        return resumed_in(record(index, body) for index, body in enumerate(bodies))

    checkpoint = asked(Verb.CHECKPOINT, Verb.CHECKPOINT)
    assert resumed(checkpoint, asked(Verb.RESUME), checkpoint) is None
    paused = asked(Verb.PAUSE, Verb.PAUSE)
    assert resumed(paused) is None
    assert resumed(paused, asked(Verb.RESUME), checkpoint) == NOW


def test_a_lost_fleet_and_one_that_fails_again_and_again_are_no_new_one() -> None:
    """Only agents that started after the newest record are new; a fleet that fails at once began with its first try."""
    now_s = NOW.timestamp()

    def account(started_s: float, ended: bool) -> Account:
        return Account("a", started_at=now_s - started_s, written_at=now_s - 2, ended=ended)

    def times(accounts: list[Account]) -> tuple[AgentTime, ...]:
        return goodput_of(accounts, [], now_s).agents

    before, failed, fresh = account(900, False), account(400, True), account(5, False)
    assert up_since(times([before]), ago(800), now_s) is None
    assert up_since(times([before, failed]), ago(800), now_s) is None
    assert up_since(times([before, fresh]), ago(800), now_s) == ago(5)
    assert up_since(times([before, failed, fresh]), ago(800), now_s) == ago(400)
    assert up_since(times([account(4000, True), fresh]), ago(9000), now_s) == ago(5)
    other = dataclasses.replace(account(4000, False), node="b")
    assert up_since(times([other, fresh]), None, now_s) == ago(4000)
    # The one before it on this node was killed a moment ago, and only seems to run.
    assert up_since(times([account(4000, False), account(5, True)]), None, now_s) is None


def test_what_is_down_is_said_once() -> None:
    """The reason does not repeat that no agent answers."""
    for reason in (
        "no agent answers",
        "asked for by ann; no agent answers",
        "0 of at least 2 nodes wait for the start",
    ):
        facts = dataclasses.replace(HEALTHY, **UNSEEN, reason=reason)  # type: ignore[arg-type]
        (found,) = judge_health(facts, NOW, HealthLimits()).sick
        assert found.text.count("no agent answers") == 1


def test_ends_of_agents_before_the_first_generation() -> None:
    """One that ended or was killed counts, also a moment ago; one that left, and the newest one that runs, does not."""
    names = ("left", "Error: two\n lines", "", "", "")
    agents = [
        AgentTime("a", "", float(at), at + 5.0, at > 20, {}, 0.0, why)
        for at, why in zip((0, 10, 20, 30, 40), names, strict=True)
    ]
    assert [(end.at.timestamp(), end.why) for end in ends_in(agents)] == [
        (15.0, "Error: two lines"),
        (25.0, "killed"),
        (40.0, "killed"),
    ]


def generation(number: int, *causes: Cause) -> Generation:
    """A generation of one node, with steps to do."""
    member = Member("a", "a1", "127.0.0.1", 1, 1, 1)
    return Generation(number, (member,), (1,), "127.0.0.1", 2, None, "r", causes)


def record(index: int, body: Body) -> Record:
    """A record of a log."""
    return Record(index, 1, "a", "n", NOW.isoformat(), ORIGIN, {}, body)
