"""Budgets for repeated failures: flapping nodes are kept out for a while, and failures of the program end the run."""

import dataclasses
from collections.abc import Sequence

import pytest

from elastic_pt.config import ElasticSection
from elastic_pt.membership.decision.budgets import (
    SPACED_S,
    Moments,
    flaps,
    halt,
    kept_out,
    quarantines_due,
    rest_s,
    restarts_of,
)
from elastic_pt.runlog.log import RunView
from elastic_pt.runlog.records import Cause, CauseKind, Checkpoint, Generation, Quarantine
from tests.membership.world import NOW_S, failed, generation

BUDGETS = ElasticSection(
    flaps_max=3, flap_window_s=100.0, quarantine_s=10.0, same_failures_max=3, failures_max=5
)
BUG = "ValueError@loop.py:9"


def began(*causes: Cause, frontier_step: int = 0) -> Generation:
    """A generation that started for these causes; `run` numbers it."""
    return dataclasses.replace(generation("a", "b"), causes=causes, frontier_step=frontier_step)


def lost(node: str) -> Cause:
    """A node was lost."""
    return Cause(CauseKind.LOST, node)


def run(*generations: Generation, bars: Sequence[Quarantine] = ()) -> RunView:
    """A log of generations; the quarantines are records 100, 101, ..."""
    return RunView(
        generations=tuple(
            dataclasses.replace(each, number=number) for number, each in enumerate(generations, 1)
        ),
        bars=tuple(enumerate(bars, 100)),
    )


def read_at(*generations_s: float, bars_s: Sequence[float] = ()) -> Moments:
    """When this node read the generations and the quarantines of `run`."""
    return Moments(dict(enumerate(generations_s, 1)), dict(enumerate(bars_s, 100)))


def bar(node: str, seconds: float = 10.0) -> Quarantine:
    """A node is kept out."""
    return Quarantine("", "3 failures", node, seconds)


# ---- a node ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "counts"),
    [
        (CauseKind.LOST, True),
        (CauseKind.FAILED, True),
        (CauseKind.PARKED, True),
        (CauseKind.GAVE_UP, False),
        (CauseKind.LEFT, False),
        (CauseKind.JOINED, False),
        (CauseKind.BARRED, False),
        (CauseKind.DAMAGED, False),
    ],
)
def test_causes_that_count_against_a_node(kind: CauseKind, counts: bool) -> None:
    """Being lost, failing and being parked count once per generation. Leaving and joining do not count."""
    view = run(began(Cause(kind, "b"), Cause(kind, "b")), began(lost("c")), began(Cause(kind, "b")))
    assert flaps(view, read_at(NOW_S, NOW_S, NOW_S), "b", BUDGETS, NOW_S) == 2 * counts


def test_failures_are_forgotten_by_this_nodes_own_clock() -> None:
    """Records that this node read before the window, or has not read at all, do not count."""
    view = run(began(lost("b")), began(lost("b")), began(lost("b")))
    moments = read_at(NOW_S - 100.0, NOW_S - 99.9)
    assert flaps(view, moments, "b", BUDGETS, NOW_S) == 1


def test_count_starts_again_after_a_quarantine() -> None:
    """Failures from before a node's last quarantine do not count. Another node's quarantine changes nothing."""
    view = run(began(lost("b")), began(lost("b")), began(lost("b")), bars=[bar("b"), bar("c")])
    moments = read_at(NOW_S - 30, NOW_S - 20, NOW_S - 10, bars_s=[NOW_S - 20, NOW_S])
    assert flaps(view, moments, "b", BUDGETS, NOW_S) == 1


def test_a_flapping_node_is_due_for_quarantine_twice_as_long_each_time() -> None:
    """The third loss within the window keeps a node out for quarantine_s. Each later one doubles it, up to an hour."""
    generations = [began(lost("b"), lost("c")), began(lost("b")), began(lost("b"))]
    (due,) = quarantines_due(
        run(*generations), read_at(NOW_S - 20, NOW_S - 10, NOW_S), BUDGETS, NOW_S
    )
    assert (due.directory, due.node, due.seconds) == ("", "b", 10.0)
    assert due.why == "3 failures within 100 s, last: lost b"
    for earlier, seconds in ((1, 20.0), (2, 40.0), (8, 2560.0), (9, 3600.0), (60, 3600.0)):
        bars = [bar("b")] * earlier + [bar("c")]
        moments = read_at(NOW_S - 20, NOW_S - 10, NOW_S, bars_s=[NOW_S - 50] * len(bars))
        (due,) = quarantines_due(run(*generations, bars=bars), moments, BUDGETS, NOW_S)
        assert due.seconds == seconds


def test_quarantines_older_than_two_hours_are_forgotten() -> None:
    """After two hours without a quarantine, a node starts with the shortest quarantine again."""
    generations = [began(lost("b"))] * 3
    moments = read_at(NOW_S, NOW_S, NOW_S, bars_s=[NOW_S - 7200.0, NOW_S - 7199.0])
    view = run(*generations, bars=[bar("b"), bar("b")])
    (due,) = quarantines_due(view, moments, BUDGETS, NOW_S)
    assert due.seconds == 20.0


def test_quarantine_only_for_causes_of_the_newest_generation() -> None:
    """Two losses are accepted, and a node is not kept out for the failure of another one."""
    moments = read_at(NOW_S, NOW_S, NOW_S, NOW_S)
    twice = [began(lost("b")), began(lost("b"))]
    assert quarantines_due(run(*twice), moments, BUDGETS, NOW_S) == []
    others = [*twice, began(lost("b")), began(lost("c"), Cause(CauseKind.JOINED, "b"))]
    assert quarantines_due(run(*others), moments, BUDGETS, NOW_S) == []
    assert quarantines_due(run(), moments, BUDGETS, NOW_S) == []


def test_a_quarantine_lasts_from_when_it_was_read() -> None:
    """A node is kept out for the record's seconds after this node read it, with the reason."""
    view = run(bars=[bar("b"), bar("c", seconds=30.0)])
    moments = read_at(bars_s=[NOW_S - 9.9, NOW_S - 9.9])
    assert kept_out(view, moments, [], BUDGETS, NOW_S) == {
        "b": "3 failures (kept out for 10 s)",
        "c": "3 failures (kept out for 30 s)",
    }
    assert list(kept_out(view, moments, [], BUDGETS, NOW_S + 0.1)) == ["c"]


def test_newest_failure_counts_before_it_is_in_the_log() -> None:
    """The generation after the third failure is without its node. A second failure is accepted."""
    view = run(began(lost("b")), began(failed("b")), began(lost("c")))
    moments = read_at(NOW_S, NOW_S, NOW_S)
    found = kept_out(view, moments, [failed("b"), failed("c")], BUDGETS, NOW_S)
    gave_up = dataclasses.replace(failed("b"), kind=CauseKind.GAVE_UP)
    assert kept_out(view, moments, [gave_up], BUDGETS, NOW_S) == {}
    assert found == {"b": "3 failures within 100 s, last: b: worker 0 killed by SIGKILL"}


# ---- the run -----------------------------------------------------------------------------------------


def ends(
    generations: Sequence[Generation],
    *failures: Cause,
    others: int = 1,
    frontier_step: int = 7,
    budgets: ElasticSection = BUDGETS,
    every_s: float = 1.0,
    reopened: int = 0,
) -> str:
    """Why the run must end, `every_s` after the newest generation; generations are `every_s` apart."""
    view = dataclasses.replace(run(*generations), reopened_generation=reopened)
    moments = read_at(*(every_s * number for number in range(len(generations))))
    return halt(view, moments, failures, others, frontier_step, budgets, every_s * len(generations))


def bug(node: str = "a", step: int = 7, signature: str = BUG) -> Cause:
    """The same exception each time."""
    return failed(node, "worker 0: ValueError: bad", step=step, signature=signature)


def at_7(*causes: Cause) -> Generation:
    """A generation that started when seven steps were done."""
    return began(*causes, frontier_step=7)


def test_the_same_exception_on_two_nodes_ends_the_run() -> None:
    """The same exception at the same step for the third time ends the run if it has happened on two nodes."""
    reason = ends([at_7(), at_7(bug("a")), at_7(bug("a"))], bug("b"))
    assert reason == "the same failure 3 times at step 7, on a, b: worker 0: ValueError: bad"


@pytest.mark.parametrize(
    ("generations", "last"),
    [
        ([at_7(bug()), at_7(bug())], bug("a")),
        ([at_7(bug("b"))], bug("a")),
        ([at_7(bug("b")), at_7(bug("b", step=6))], bug("a")),
        ([at_7(bug("b")), at_7(bug("b", signature="KeyError"))], bug("a")),
        ([at_7(bug("b", signature="")), at_7(bug("b", signature=""))], bug(signature="")),
    ],
    ids=["one node only", "twice", "another step", "another exception", "a signal"],
)
def test_failures_below_the_budget_do_not_end_the_run(
    generations: list[Generation], last: Cause
) -> None:
    """Failures of one node, at another step, with another exception or without one do not end the run."""
    assert ends([at_7(), *generations], last) == ""


def test_other_causes_between_equal_failures_do_not_count() -> None:
    """A loss, leave or join between two failures does not make the second one a different failure."""
    generations = [at_7(bug("a")), at_7(lost("c")), at_7(bug("a")), at_7(), at_7(lost("c"))]
    assert "the same failure 3 times" in ends(generations, bug("b"))


def test_a_single_node_ends_the_run_after_spaced_attempts() -> None:
    """If no other node is alive, the same exception ends the run when its attempts span ten seconds."""
    generations = [at_7(), at_7(bug()), at_7(bug())]
    assert ends(generations, bug(), others=0, every_s=SPACED_S / 2) != ""
    assert ends(generations, bug(), others=0, every_s=SPACED_S / 2 - 0.1) == ""
    assert ends(generations, bug(), others=1, every_s=SPACED_S) == ""


def test_failures_of_the_surroundings_never_end_a_run() -> None:
    """That holds for any number of them, on any number of nodes, over any time."""

    def outside(node: str) -> Cause:
        return dataclasses.replace(bug(node), surroundings=True)

    generations = [at_7()] + [at_7(outside(node)) for node in "abcdefabcdef"]
    assert ends(generations, outside("a"), every_s=100.0) == ""
    assert ends(generations, outside("a"), others=0, every_s=100.0) == ""
    assert ends([*generations, at_7(bug("a")), at_7(bug("a"))], bug("b")) != ""


def test_equal_failures_with_steps_between_them_do_not_add_up() -> None:
    """Equal failures before a first step count together only if the run has made no step between them."""
    start = [bug("a", step=0), bug("b", step=0)]
    early = [began(frontier_step=7), began(start[0], frontier_step=7)]
    assert ends([*early, began(start[1], frontier_step=7)], start[0], frontier_step=7) != ""
    assert ends([*early, began(start[1], frontier_step=900)], start[0], frontier_step=900) == ""


def test_failures_before_a_reopen_do_not_count() -> None:
    """Failures after a REOPEN count."""
    generations = [at_7(), at_7(bug("a")), at_7(bug("b"))]
    assert ends(generations, bug("a")) != ""
    assert ends(generations, bug("a"), reopened=3) == ""
    assert ends([*generations, at_7(), at_7(bug("a")), at_7(bug("a"))], bug("b"), reopened=3) != ""


@pytest.mark.parametrize(
    ("failures", "seconds"), [(1, 0), (2, 1), (3, 2), (4, 4), (8, 60), (99, 60)]
)
def test_a_failing_node_rests_longer_each_time(failures: int, seconds: float) -> None:
    """There is no rest after the first failure. From the second on it doubles up to a minute, varied by a quarter."""
    assert rest_s(failures, 0.5) == seconds
    assert rest_s(failures, 0.0) == 0.75 * seconds
    assert rest_s(failures, 1.0) == 1.25 * seconds


def test_many_failures_without_a_new_step_end_the_run() -> None:
    """Five failures in a row without a new step end the run, whatever their kind and node."""
    generations = [began(frontier_step=7)] + [at_7(failed(node)) for node in "abab"]
    reason = ends(generations, failed("c"))
    assert reason == (
        "5 failures in a row without a step beyond 7; last: c: worker 0 killed by SIGKILL"
    )
    assert ends(generations[:-1], failed("c")) == ""
    assert ends([*generations[:-1], at_7(lost("d"))], failed("c")) == ""
    assert "5 failures" in ends([*generations, at_7(lost("d"))], failed("c"))


def test_a_new_step_resets_the_count() -> None:
    """Progress in the newest generation, or between two failures, resets the count. Repeated steps do not."""
    generations = [began(frontier_step=0)] + [at_7(failed(node)) for node in "abab"]
    assert ends(generations, failed("c"), frontier_step=8) == ""
    assert ends(generations, failed("c"), frontier_step=6) != ""
    again = [began(failed("b"), frontier_step=step) for step in (5, 7, 6, 7)]
    assert ends([began(frontier_step=5), *again], failed("c")) == ""
    assert "4 failures" in ends(
        [began(frontier_step=5), *again],
        failed("c"),
        budgets=BUDGETS.model_copy(update={"failures_max": 4}),
    )


def test_only_failures_end_a_run() -> None:
    """Losing nodes any number of times does not end the run."""
    generations = [at_7(lost("b")) for _ in range(10)]
    assert ends(generations) == ""
    bugs = [at_7(bug("a")), at_7(bug("b"))]
    gave_up = dataclasses.replace(bug("b"), kind=CauseKind.GAVE_UP)
    assert ends(bugs, gave_up) == ""
    assert ends(bugs, bug("b")) != ""


# ---- restarts without progress -----------------------------------------------------------------------


def follow(*generations: Generation) -> list[int]:
    """The restarts of generations that follow each other in one log."""
    told: list[Generation] = []
    for each in generations:
        told.append(dataclasses.replace(each, restarts=restarts_of(run(*told), each)))
    return [each.restarts for each in told]


def joined(*nodes: str) -> tuple[Cause, ...]:
    """Newcomers."""
    return tuple(Cause(CauseKind.JOINED, node) for node in nodes)


LOST_HALFWAY = began(lost("c"), frontier_step=50)


def test_restarts_count_until_a_new_step() -> None:
    """Each generation that nobody planned counts once, however many causes it has."""
    both = began(lost("a"), failed("b"), frontier_step=50)
    assert follow(began(), LOST_HALFWAY, both, LOST_HALFWAY) == [0, 1, 2, 3]
    assert follow(began(), both, both, began(lost("c"), frontier_step=51)) == [0, 1, 2, 1]


def test_newcomers_hide_no_restart() -> None:
    """A planned change is no restart and ends no row of restarts; a newcomer in a restart does not make it planned."""
    eight = began(*joined(*"cdefghij"), frontier_step=50)
    replaced = began(lost("c"), *joined("d"), frontier_step=50)
    assert follow(began(), eight, replaced, eight, replaced, replaced) == [0, 0, 1, 1, 2, 3]
    moved = began(*joined("c"), Cause(CauseKind.LEFT, "b"), Cause(CauseKind.BARRED, "d"))
    assert follow(began(), moved, moved) == [0, 0, 0]


def test_a_commit_is_progress() -> None:
    """Steps that are done again for long, because much was lost, are no loop if checkpoints are committed meanwhile."""
    checkpoint = Checkpoint(20, 2, "ckpt/20", 1, "0" * 64, 1.0)
    committed = dataclasses.replace(LOST_HALFWAY, resume=checkpoint)
    assert follow(began(), LOST_HALFWAY, committed, committed) == [0, 1, 1, 2]


def test_steps_done_again_are_no_progress() -> None:
    """A frontier that falls, because those who had been there are gone, and rises again is no new step."""
    fallen, again = began(lost("a"), frontier_step=30), began(lost("a"), frontier_step=40)
    assert follow(began(), LOST_HALFWAY, fallen, again) == [0, 1, 2, 3]


def test_the_loss_of_all_nodes_is_a_restart() -> None:
    """It has no cause, because nobody is left who knows one. Nor has the end of a pause, which is no restart."""
    others = dataclasses.replace(generation("x"), frontier_step=0)
    assert follow(began(), others, others) == [0, 1, 1]
    assert follow(began(), began()) == [0, 0]


def test_a_reopened_run_begins_a_new_row() -> None:
    """What failed before an operator mended it does not count."""
    view = dataclasses.replace(
        run(dataclasses.replace(LOST_HALFWAY, restarts=5)), reopened_generation=1
    )
    assert restarts_of(view, LOST_HALFWAY) == 0
    assert restarts_of(dataclasses.replace(view, reopened_generation=0), LOST_HALFWAY) == 6
