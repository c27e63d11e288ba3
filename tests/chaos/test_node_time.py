"""Accounts of the time of agents, compared with what was seen of them."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from elastic_pt.chaos.directory import Objection, check_goodput
from elastic_pt.chaos.node_time import (
    check_detection,
    check_lives,
    check_recoveries,
    check_search,
    check_steps,
    check_sums,
    trained,
)
from elastic_pt.chaos.play import Played
from elastic_pt.report.goodput import goodput_of
from elastic_pt.runlog.records import Cause, CauseKind, Record, Recovery
from elastic_pt.telemetry.account import Account
from elastic_pt.telemetry.goodput import Bucket
from tests.chaos.made_up import (
    BEGAN_S,
    STEP_S,
    fault,
    generation,
    life,
    log_of,
    member,
    played,
    struck,
    training,
)

A, B = member("node-0"), member("node-1")
LOST = Cause(CauseKind.LOST, "node-0", detect_s=2.0)
LOG = log_of((10.0, generation(1, A, B)), (20.0, generation(2, B, resume_step=19, reached=19)))
SEEN = played(
    struck(18.0),
    lives=[life("node-0", 0.0, 18.0, None), life("node-1", 0.0, 40.0)],
    steps=[*training(10.0, 0, 19), *training(21.0, 19, 40)],
)


def account(
    node: str, until_s: float, *, ended: bool = True, from_s: float = 0.0, **seconds: float
) -> Account:
    """Productive are what `seconds` leaves over."""
    found = {Bucket(name): spent for name, spent in seconds.items()}
    rest = until_s - from_s - sum(found.values())
    return Account(
        node,
        BEGAN_S + from_s,
        incarnation=member(node).incarnation,
        written_at=BEGAN_S + until_s,
        ended=ended,
        seconds=found | ({Bucket.PRODUCTIVE: rest} if rest else {}),
    )


HONEST = (
    account("node-0", 17.5, ended=False, start=11.0),
    account("node-1", 39.5, start=15.0, agree=6.0, data_wait=4.0),
)


def objections(
    accounts: Sequence[Account], seen: Played = SEEN, log: Sequence[Record] = LOG
) -> list[str]:
    """All that is found wrong."""
    agents = goodput_of(accounts, log, math.inf).agents
    whole = {each.incarnation for each in accounts if each.ended}
    return [
        *check_sums(accounts),
        *check_lives(seen, log, accounts, agents),
        *check_steps(seen, log, agents, whole),
        *check_search(seen, log),
        *check_recoveries(seen, log),
    ]


def test_honest_accounts_pass() -> None:
    """A killed agent lacks its last second, all others have their whole time."""
    assert objections(HONEST) == []


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (replace(HONEST[1], seconds={Bucket.START: 30.0}), "add up to 30.000 s, expected 39.500"),
        (account("node-1", 39.5, start=2.0), "its new steps took"),
        (account("node-1", 39.5, start=39.5), "s productive, but 19 such steps took"),
        (account("node-1", 30.0, start=15.0, agree=6.0), "lacks the last 10.0 s"),
        (account("node-1", 45.0, start=25.0, agree=6.0), "lacks the last -5.0 s"),
        (account("node-1", 39.5, from_s=8.0, start=15.0, agree=6.0), "no account from its start"),
        (replace(HONEST[1], ended=False), "still counts, expected its end"),
    ],
)
def test_a_wrong_account_is_told(wrong: Account, told: str) -> None:
    """Each lie about one agent is seen from outside."""
    assert told in "; ".join(objections([HONEST[0], wrong]))


def test_each_member_has_an_account() -> None:
    """An agent that was replaced counts, too."""
    assert "node-0 (process 100) has no account" in "; ".join(objections([HONEST[1]]))


def test_an_account_belongs_to_an_agent() -> None:
    """Nobody has one who was not started."""
    stranger = replace(account("node-7", 5.0, start=5.0))
    assert "node-7" in "; ".join(objections([*HONEST, stranger]))


def test_an_agent_that_never_took_part_needs_no_account() -> None:
    """It was killed in its imports."""
    seen = replace(SEEN, lives=[*SEEN.lives, life("node-2", 0.0, 5.0, None)])
    assert objections(HONEST, seen) == []


@pytest.mark.parametrize("code", [0, None])
def test_a_fault_that_lasts_excuses_what_could_not_be_written(code: int | None) -> None:
    """The bucket was away until the end of the agent."""
    away = replace(struck(30.0, fault("bucket_away", for_s=20.0)), members=())
    seen = replace(SEEN, struck=[away], lives=[SEEN.lives[0], life("node-1", 0.0, 40.0, code)])
    early = account("node-1", 30.0, ended=False, start=15.0, agree=6.0)
    assert objections([HONEST[0], early], seen) == []


def test_an_agent_that_stood_still_may_count_more() -> None:
    """It cannot know when its workers did the step that they have reported."""
    rosy = account("node-1", 39.5, start=18.0)
    stopped = replace(struck(30.0, fault("agent_stops", for_s=8.0)), nodes=("node-1",))
    assert "its new steps took" in "; ".join(objections([HONEST[0], rosy]))
    assert objections([HONEST[0], rosy], replace(SEEN, struck=[stopped])) == []


def test_steps_that_were_lost_are_not_new() -> None:
    """From the second generation on the steps are done again that had been done."""
    again = log_of((10.0, generation(1, A, B)), (20.0, generation(2, B, reached=18)))
    seen = replace(
        SEEN, progress=played(steps=[*training(10.0, 0, 19), *training(21.0, 0, 40)]).progress
    )
    first, second = trained(seen, again)
    assert (len(first.new_s), len(first.again_s)) == (19, 0)
    assert (len(second.new_s), len(second.again_s)) == (21, 19)
    assert second.new_s[0] == pytest.approx(STEP_S)
    rosy = account("node-1", 39.5, start=15.0, agree=6.0)
    assert "s recompute, but 17 such steps took" in "; ".join(
        objections([HONEST[0], rosy], seen, again)
    )
    honest = account("node-1", 39.5, start=15.0, agree=6.0, recompute=7.0)
    assert objections([HONEST[0], honest], seen, again) == []


def test_a_step_lasts_from_the_first_worker_that_begins_it() -> None:
    """The first step of a generation waits for the worker that starts last."""
    steps = [*training(10.0, 0, 19), (21.0, 19), (25.0, 19), *training(26.0, 20, 40)]
    second = trained(replace(SEEN, progress=played(steps=steps).progress), LOG)[1]
    assert second.new_s[0] == pytest.approx(5.0)


def test_new_nodes_need_not_know_what_was_done() -> None:
    """After the loss of all, steps count as new that nobody knows to have been done."""
    unknown = log_of((10.0, generation(1, A)), (20.0, generation(2, B)))
    seen = replace(
        SEEN, progress=played(steps=[*training(10.0, 0, 19), *training(21.0, 0, 40)]).progress
    )
    assert len(trained(seen, unknown)[1].new_s) == 40


@pytest.mark.parametrize(("detect_s", "told"), [(2.0, ""), (0.3, "tells of 0.3 s from the loss")])
def test_the_search_for_a_lost_node_is_told(detect_s: float, told: str) -> None:
    """The log has the time from the loss to the next generation."""
    after = generation(2, B, resume_step=19, reached=19, causes=(replace(LOST, detect_s=detect_s),))
    log = log_of((10.0, generation(1, A, B)), (20.0, after))
    assert told in "; ".join(objections(HONEST, SEEN, log))
    assert bool(told) == bool(objections(HONEST, SEEN, log))


@pytest.mark.parametrize(
    ("detect", "steps", "told"),
    [
        (4.0, [], ""),
        (0.5, [], "node-1: 0.5 s detect, expected 1.5 at least of a silence of 5.0 s"),
        (0.5, [(22.0, 20)], ""),
    ],
)
def test_the_wait_for_a_silent_node_is_counted(
    detect: float, steps: list[tuple[float, int]], told: str
) -> None:
    """By who trained with it; not if steps were done meanwhile, as when its workers go on."""
    lost = replace(LOST, detect_s=5.0)
    log = log_of(
        (10.0, generation(1, A, B)),
        (25.0, generation(2, B, resume_step=19, reached=19, causes=(lost,), agree_s=1.0)),
    )
    silent = replace(struck(19.0, fault("link_down", for_s=9.0)), step=19)
    seen = played(silent, steps=[*training(10.0, 0, 19), *steps, *training(26.0, 19, 40)])
    agents = goodput_of([account("node-1", 39.5, detect=detect)], log, math.inf).agents
    assert "; ".join(check_detection(seen, log, agents)) == told


def test_a_process_may_take_long_to_begin() -> None:
    """A busy machine forks late: the account begins when the process does."""
    late = replace(SEEN.lives[1], began_by_s=BEGAN_S + 4.0)
    account_from_4 = account("node-1", 39.5, from_s=4.0, start=12.0, agree=6.0, data_wait=4.0)
    seen = replace(SEEN, lives=[SEEN.lives[0], late])
    assert objections([HONEST[0], account_from_4], seen) == []
    assert objections([HONEST[0], account_from_4], SEEN) != []


def test_a_planned_change_has_no_search() -> None:
    """A node that leaves is not searched for."""
    left = Cause(CauseKind.LEFT, "node-0")
    after = generation(2, B, resume_step=19, reached=19, causes=(left,))
    assert objections(HONEST, SEEN, log_of((10.0, generation(1, A, B)), (20.0, after))) == []


@pytest.mark.parametrize(
    ("total_s", "told"), [(3.6, ""), (0.2, "0.2 s to its first step, expected 3.4")]
)
def test_the_time_to_the_first_step_is_told(total_s: float, told: str) -> None:
    """From the moment at which the loss was noticed to the end of the first step."""
    after = generation(2, B, resume_step=19, reached=19, agree_s=2.0)
    recovery = Recovery(2, 0.1, 0.1, 0.1, 0.1, total_s)
    log = log_of((10.0, generation(1, A, B)), (20.0, after), (21.5, recovery))
    assert told in "; ".join(objections(HONEST, SEEN, log))
    assert bool(told) == bool(objections(HONEST, SEEN, log))


def test_an_agent_is_left_out_of_the_sum() -> None:
    """Its account is there, and the report does not count it."""
    agents = goodput_of(HONEST[1:], LOG, math.inf).agents
    found = list(check_lives(SEEN, LOG, HONEST, agents))
    assert found == ["the time of node-0 (process 100) is not counted"]


@pytest.mark.parametrize("change", [{"goodput": 0.9}, {"node_seconds": 50.0, "buckets": {}}])
def test_the_shares_are_those_of_the_agents(change: dict[str, object]) -> None:
    """What is reported of the run as a whole is the sum of its agents."""
    honest = goodput_of(HONEST, LOG, math.inf)
    assert "57.000 s in buckets" in check_goodput(honest)
    with pytest.raises(Objection):
        check_goodput(replace(honest, **change))  # type: ignore[arg-type]
