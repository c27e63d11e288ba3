"""`goodput`: from accounts and the log to node-seconds, buckets and the cost of failures."""

import datetime
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from elastic_pt.checkpoint.history import Line, write_history
from elastic_pt.report.change import Change
from elastic_pt.report.explanation import explain
from elastic_pt.report.goodput import (
    AgentTime,
    FailureCost,
    Goodput,
    failure_costs,
    goodput_of,
    read_accounts,
    read_goodput,
)
from elastic_pt.report.status import Run
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import (
    ORIGIN,
    Body,
    Cause,
    CauseKind,
    Checkpoint,
    Commit,
    Generation,
    Member,
    Record,
    Recovery,
    Reopen,
    Stop,
)
from elastic_pt.store.open import open_store
from elastic_pt.telemetry.account import Account
from elastic_pt.telemetry.goodput import Bucket

EPOCH_S = 1_760_000_000.0
LOST_B = Cause(CauseKind.LOST, "b", "silent for 4.0 s", detect_s=4.0)
FAILED_B = Cause(CauseKind.FAILED, "b", "worker 1 killed by SIGKILL", 412)
RECOVERED = Recovery(2, start_s=0.2, group_s=0.3, restore_s=0.5, step_s=1.5, total_s=9.0)


def account(node: str, start_s: float, end_s: float, **changes: object) -> Account:
    """An agent that began and wrote its last account at these seconds; productive but for a second of start."""
    values: dict[str, object] = {
        "ended": True,
        "incarnation": f"{node}1",
        "bucket": Bucket.PRODUCTIVE,
        "seconds": {Bucket.START: 1.0, Bucket.PRODUCTIVE: end_s - start_s - 1.0},
    }
    return Account(
        node,
        started_at=EPOCH_S + start_s,
        written_at=EPOCH_S + end_s,
        **values | changes,  # type: ignore[arg-type]
    )


def generation(number: int, nodes: str, *causes: Cause, life: int = 1, **values: int) -> Generation:
    """A GENERATION of one-worker nodes; `life` tells incarnations apart."""
    members = tuple(Member(node, f"{node}{life}", "127.0.0.1", 1, 1, 1) for node in nodes)
    resume = values.get("resume", 0)
    return Generation(
        number,
        members,
        tuple(4 for _ in members),
        "127.0.0.1",
        1,
        Checkpoint(resume, 1, "ckpt/x", 1, "", None) if resume else None,
        "a test",
        causes,
        frontier_step=values.get("frontier", 0),
        agree_s=0.5,
        reached_step=values.get("reached"),
    )


def records(*bodies: Body, at_s: Mapping[int, float] | None = None) -> list[Record]:
    """A log of these bodies; `at_s`: when the record of an index was written."""
    moments = at_s or {}
    return [
        Record(
            index,
            0,
            "a",
            "nonce",
            datetime.datetime.fromtimestamp(
                EPOCH_S + moments.get(index, 0.0), datetime.UTC
            ).isoformat(timespec="milliseconds"),
            ORIGIN,
            {},
            body,
        )
        for index, body in enumerate(bodies)
    ]


def goodput(*accounts: Account, log: list[Record] | None = None, now_s: float = 1e4) -> Goodput:
    """The goodput of these agents."""
    return goodput_of(accounts, log or [], EPOCH_S + now_s)


def costs(log: list[Record], step_s: Mapping[int, float] | None = None) -> tuple[FailureCost, ...]:
    """The cost of each failure in this log."""
    changes = [each for each in explain(log) if isinstance(each, Change)]
    return failure_costs(log, changes, step_s or {})


def only(found: Goodput) -> AgentTime:
    """The only agent."""
    (agent,) = found.agents
    return agent


def test_node_seconds_go_from_starts_to_ends() -> None:
    """Restarts and fleets add up by their own starts and ends, even where an account's buckets are wrong."""
    wrong = account("b", 0.0, 50.0, seconds={Bucket.PRODUCTIVE: 7.0})
    found = goodput(account("a", 0.0, 100.0), wrong, account("a", 200.0, 250.0, incarnation="a2"))
    assert found.node_seconds == pytest.approx(200.0)
    assert found.buckets[Bucket.PRODUCTIVE] == pytest.approx(99.0 + 7.0 + 49.0)
    assert found.goodput == pytest.approx(155.0 / 200.0)
    assert [agent.node for agent in found.agents] == ["a", "b", "a"]
    assert found.cost is None


def test_killed_agent_ends_when_its_peers_last_heard_it() -> None:
    """The time from its last account to its last sign of life counts as what it did then."""
    log = records(generation(1, "ab"), generation(2, "a", LOST_B), at_s={1: 100.0})
    agent = only(goodput(account("b", 0.0, 90.0, ended=False), log=log))
    assert agent.ended_at_s == pytest.approx(EPOCH_S + 100.0 - 0.5 - 4.0)
    assert agent.seconds[Bucket.PRODUCTIVE] == pytest.approx(89.0 + 5.5)
    assert not agent.running


def test_killed_agent_does_not_end_before_its_last_account() -> None:
    """A clock that differs, or an agent that was only cut off, takes no time away."""
    log = records(generation(1, "ab"), generation(2, "a", LOST_B), at_s={1: 50.0})
    agent = only(goodput(account("b", 0.0, 90.0, ended=False), log=log))
    assert agent.ended_at_s == EPOCH_S + 90.0


def test_agent_that_writes_after_it_was_declared_lost_runs() -> None:
    """It was only cut off, so its time goes on; a kill before it was declared lost is seen at once."""
    log = records(generation(1, "ab"), generation(2, "a", LOST_B), at_s={1: 100.0})
    alive = only(goodput(account("b", 0.0, 200.0, ended=False), log=log, now_s=201.0))
    assert alive.running
    assert alive.ended_at_s == EPOCH_S + 201.0
    killed = only(goodput(account("b", 0.0, 99.0, ended=False), log=log, now_s=101.0))
    assert (killed.running, killed.ended_at_s) == (False, EPOCH_S + 99.0)


def test_later_loss_of_the_same_agent_ends_it() -> None:
    """An agent that was cut off, came back and was killed ends by the second loss; else with its last account."""
    log = records(
        generation(1, "ab"),
        generation(2, "a", LOST_B),
        generation(3, "ab"),
        generation(4, "a", LOST_B),
        at_s={1: 100.0, 2: 120.0, 3: 210.0},
    )
    twice = only(goodput(account("b", 0.0, 200.0, ended=False), log=log))
    assert twice.ended_at_s == pytest.approx(EPOCH_S + 210.0 - 4.5)
    once = only(goodput(account("b", 0.0, 200.0, ended=False), log=log[:3]))
    assert once.ended_at_s == EPOCH_S + 200.0


def test_clock_skew_invents_no_time() -> None:
    """The clock of the node that declares it lost may be an hour ahead: an agent that lived would have written."""
    log = records(generation(1, "ab"), generation(2, "a", LOST_B), at_s={1: 3700.0})
    found = goodput(account("b", 0.0, 90.0, ended=False, price_per_hour=3600.0), log=log)
    # Its next account was due after 1 s, and two writes may take 10 s.
    assert found.node_seconds == pytest.approx(90.0 + 11.0)
    assert found.cost == pytest.approx(101.0)


def test_loss_of_one_incarnation_does_not_end_the_next() -> None:
    """A restarted agent has the same name: only the incarnation that was a member was lost."""
    log = records(generation(1, "ab"), generation(2, "a", LOST_B), at_s={1: 100.0})
    agent = only(goodput(account("b", 10.0, 20.0, ended=False, incarnation="b2"), log=log))
    assert agent.ended_at_s == EPOCH_S + 20.0


def test_agents_killed_together_end_with_their_last_accounts() -> None:
    """If nobody was left to notice, the last account is all there is."""
    log = records(generation(1, "ab"), generation(2, "ab", life=2), at_s={1: 500.0})
    found = goodput(
        account("a", 0.0, 90.0, ended=False), account("b", 0.0, 91.0, ended=False), log=log
    )
    assert found.node_seconds == pytest.approx(181.0)


def test_running_agent_ends_now() -> None:
    """A fresh account without an end is that of an agent that runs: its time goes on as what it does."""
    agent = only(goodput(account("a", 0.0, 100.0, ended=False), now_s=103.0))
    assert agent.running
    assert agent.ended_at_s == EPOCH_S + 103.0
    assert sum(agent.seconds.values()) == pytest.approx(103.0)
    behind = only(goodput(account("a", 0.0, 100.0, ended=False), now_s=97.0))
    assert (behind.running, behind.ended_at_s) == (True, EPOCH_S + 100.0)


def test_account_from_the_future_is_not_fresh() -> None:
    """If the clock of a killed agent was ahead, it does not count as one that runs until that time has come."""
    ahead = only(goodput(account("a", 0.0, 100.0, ended=False), now_s=60.0))
    assert (ahead.running, ahead.ended_at_s) == (False, EPOCH_S + 100.0)


def test_cost_is_that_of_the_agents_with_a_price() -> None:
    """Each agent has its own price for an hour."""
    found = goodput(
        account("a", 0.0, 3600.0, price_per_hour=2.0), account("b", 0.0, 1800.0, price_per_hour=1.0)
    )
    assert found.cost == pytest.approx(2.5)
    assert found.unpriced == 0


def test_agent_without_a_price_is_told_and_spends_no_money() -> None:
    """The cost of a part of the agents must not look like that of all, nor be spread over the time of the others."""
    stalled = {Bucket.CHECKPOINT_STALL: 3600.0}
    found = goodput(
        account("a", 0.0, 3600.0, price_per_hour=36.0), account("b", 0.0, 3600.0, seconds=stalled)
    )
    assert (found.cost, found.unpriced) == (pytest.approx(36.0), 1)
    assert found.cost_of(Bucket.PRODUCTIVE) == pytest.approx(35.99)
    assert found.cost_of(Bucket.CHECKPOINT_STALL) == 0.0


def test_failure_costs_node_seconds_by_phase() -> None:
    """The members that stayed wait for detection and agreement; all members pay for start, restore and lost steps."""
    lost = generation(2, "ac", LOST_B, frontier=12, resume=10)
    (found,) = costs(records(generation(1, "abc"), lost, RECOVERED), {11: 1.0, 12: 2.0})
    assert (found.generation, found.causes) == (2, ("lost b",))
    assert found.cost_s == pytest.approx(
        {
            "detect": 8.0,
            "agree": 1.0,
            "paused_below_minimum": 0.0,
            "start": 1.0,
            "restore": 1.0,
            "recompute": 6.0 + 2.0,
        }
    )


def test_failed_worker_costs_its_own_node_too() -> None:
    """A node whose worker failed stays: it waits like the others."""
    failed = generation(2, "abc", FAILED_B, frontier=12, resume=11)
    (found,) = costs(records(generation(1, "abc"), failed, RECOVERED), {0: 2.0})
    assert (found.cost_s["agree"], found.cost_s["recompute"]) == (1.5, 6.0 + 3.0)


def test_wait_for_nodes_is_a_phase_of_its_own() -> None:
    """The time with too few nodes is part of the time to agree by the record, but not of what agreeing cost."""
    waited = replace(generation(2, "ac", LOST_B), agree_s=34.0, below_minimum_s=31.0)
    (found,) = costs(records(generation(1, "abc"), waited, RECOVERED))
    assert (found.cost_s["agree"], found.cost_s["paused_below_minimum"]) == (2 * 3.0, 2 * 31.0)


def test_lost_step_costs_once() -> None:
    """Crashes before the first step lose no more steps. A step costs the nodes that do it again, with the change that lost it."""
    bodies = [
        generation(1, "abc"),
        generation(2, "ab", LOST_B, reached=100, frontier=100),
        generation(3, "ab", FAILED_B, reached=0, frontier=100),
        generation(4, "abc", Cause(CauseKind.JOINED, "c"), reached=40, frontier=100, resume=40),
    ]
    crash, again = costs(records(*bodies), {0: 1.0})
    assert crash.cost_s["recompute"] == 40 * 2.0 + 60 * 3.0 + 2 * 0.5
    assert again.cost_s["recompute"] == 0.0


def test_steps_lost_with_all_nodes_cost() -> None:
    """A fleet of new nodes pays for the steps that the one before had reached, if the log knows them."""
    anew = generation(2, "ab", life=2, reached=64, frontier=64, resume=24)
    (found,) = costs(records(generation(1, "a"), anew), {0: 1.0})
    assert found.cost_s["recompute"] == 40 * 2.0


def test_steps_without_a_history_take_the_time_of_the_first_one() -> None:
    """The time of a step that nobody has on record is that of the first step after the failure."""
    lost = generation(2, "ac", LOST_B, frontier=12, resume=10)
    (found,) = costs(records(generation(1, "abc"), lost, RECOVERED))
    assert found.cost_s["recompute"] == 2 * 2 * 1.5 + 2 * 0.75


def test_step_that_was_broken_off_costs_half_of_a_step() -> None:
    """With the state in memory no step is lost, but the members that stayed had begun one. Before any step: nothing."""
    lost = generation(2, "ac", LOST_B, frontier=12, resume=12)
    (found,) = costs(records(generation(1, "abc"), lost, RECOVERED), {0: 5.0, 12: 3.0})
    assert found.cost_s["recompute"] == 2 * 1.5
    early = generation(2, "ac", LOST_B)
    (found,) = costs(records(generation(1, "abc"), early, RECOVERED), {0: 5.0})
    assert found.cost_s["recompute"] == 0.0


def test_loss_of_all_members_is_a_failure_and_a_planned_change_is_none() -> None:
    """A join costs no failure; a run that new nodes resumed was lost, also after a reopen."""
    joined = generation(2, "abc", Cause(CauseKind.JOINED, "c"), resume=5)
    anew = generation(3, "abc", life=2, resume=5)
    log = records(generation(1, "ab"), joined, Stop("x", 5), Reopen("y", False, 5), anew)
    (found,) = costs(log)
    assert (found.generation, found.causes) == (3, ("no member of generation 2 was left",))
    assert found.cost_s["agree"] == 0.0


def run_with(directory: Path, *bodies: Body) -> Run:
    """A run with these records, in a new directory."""
    store = open_store(f"file://{directory}")
    log = RunLog(store, writer="test")
    log.refresh()
    for body in bodies:
        log.append(lambda _, body=body: body, generation=log.view.generation_number)  # type: ignore[misc]
    return Run(store, log, None)


def test_goodput_is_read_from_the_url_alone(tmp_path: Path) -> None:
    """Accounts and histories come from the bucket; an account that is damaged is left out."""
    checkpoint = Checkpoint(12, 2, "ckpt/x", 1, "", None)
    run = run_with(
        tmp_path,
        generation(1, "abc"),
        generation(2, "ac", LOST_B, frontier=12, resume=0),
        Commit((checkpoint,), "history/1.jsonl"),
    )
    lines = [Line(step, b'{"step": %d, "seconds": 3.0}\n' % step) for step in range(1, 13)]
    write_history(run.store, "history/1.jsonl", lines)
    run.store.write("events/a-1/account.json", account("a", 0.0, 10.0).to_bytes())
    run.store.write("events/a-1/00000000.jsonl", b"{}\n")
    run.store.write("events/b-1/account.json", b"not JSON")
    found = read_goodput(run, list(run.log.records()))
    assert found.node_seconds == pytest.approx(10.0)
    assert found.failures[0].cost_s["recompute"] == pytest.approx(2 * 12.5 * 3.0)


def test_run_without_accounts_has_no_time(tmp_path: Path) -> None:
    """Agents of an earlier version and of stock torchrun leave none: no crash, and no invented figure."""
    run = run_with(tmp_path, generation(1, "abc"), generation(2, "ac", LOST_B))
    assert read_accounts(run.store) == []
    found = read_goodput(run, list(run.log.records()))
    assert (found.node_seconds, found.goodput, found.agents) == (0.0, None, ())
    assert all(
        isinstance(seconds, float) for seconds in [found.node_seconds, *found.buckets.values()]
    )


def test_without_a_history_steps_take_the_mean_time_of_the_accounts(tmp_path: Path) -> None:
    """Before the first commit no step is on record. The first one after a failure is slow, so it does not stand for all."""
    lost = generation(2, "ac", LOST_B, frontier=12, resume=0)
    run = run_with(tmp_path, generation(1, "abc"), lost, RECOVERED)
    seconds = {Bucket.START: 50.0, Bucket.PRODUCTIVE: 6.0, Bucket.RECOMPUTE: 2.0}
    trained = account("a", 0.0, 58.0, seconds=seconds, steps=80)
    run.store.write("events/a-1/account.json", trained.to_bytes())
    run.store.write("events/d-1/account.json", account("d", 0.0, 20.0).to_bytes())
    assert read_goodput(run, list(run.log.records())).failures[0].cost_s[
        "recompute"
    ] == pytest.approx(2 * 12.5 * 0.1)


def test_damaged_history_does_not_end_goodput(tmp_path: Path) -> None:
    """Its steps take the mean time of those that can be read, or that of the first step."""
    checkpoint = Checkpoint(12, 2, "ckpt/x", 1, "", None)
    run = run_with(
        tmp_path,
        generation(1, "abc"),
        generation(2, "ac", LOST_B, frontier=12, resume=0),
        RECOVERED,
        Commit((checkpoint,), "history/1.jsonl"),
    )
    run.store.write("history/1.jsonl", b'{"step": 1, "seconds": 3.0}\n{"st')
    found = read_goodput(run, list(run.log.records()))
    assert found.failures[0].cost_s["recompute"] == pytest.approx(2 * 12.5 * 1.5)


def test_accounts_of_agents_that_have_ended_are_read_once(tmp_path: Path) -> None:
    """Only those of agents that may live change: a view that looks again and again reads no others."""
    store = open_store(f"file://{tmp_path}")
    store.write("events/a-1/account.json", account("a", 0.0, 10.0).to_bytes())
    store.write("events/b-1/account.json", account("b", 0.0, 10.0, ended=False).to_bytes())
    ended: dict[str, Account] = {}
    assert len(read_accounts(store, ended)) == 2
    assert list(ended) == ["events/a-1/account.json"]
    store.write("events/a-1/account.json", b"not JSON")
    store.write("events/b-1/account.json", account("b", 0.0, 20.0, ended=False).to_bytes())
    first, second = read_accounts(store, ended)
    assert (first.node, second.written_at) == ("a", EPOCH_S + 20.0)
