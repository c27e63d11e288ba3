"""What faults cost, and whether the run tells of it."""

from dataclasses import replace
from pathlib import Path

import pytest

from elastic_pt.chaos.costs import costs_of, hidden_losses, lost_steps_of
from elastic_pt.chaos.play import Waited
from elastic_pt.chaos.pressure import waited_s
from elastic_pt.runlog.records import Cause, CauseKind, Stop
from tests.chaos.made_up import BEGAN_S, fault, generation, log_of, member, played, struck, training

A, B = member("node-0"), member("node-1")
LOST = (Cause(CauseKind.LOST, "node-0"),)
SEEN = played(struck(14.0), steps=[*training(10.0, 0, 9), *training(17.0, 4, 8)])


def test_cost_of_a_fault() -> None:
    """Until the first step that a later generation has done; its lost steps are the larger number."""
    after = generation(2, B, resume_step=4, reached=6, frontier=6, causes=LOST)
    log = log_of((9.0, generation(1, A, B)), (16.0, after))
    (cost,) = costs_of(SEEN, log)
    assert cost.recovery_s == pytest.approx(3.4)
    assert cost.lost_steps == 4
    assert lost_steps_of(SEEN, log, log[1]) == 4
    more = log_of((9.0, generation(1, A, B)), (16.0, generation(2, B, resume_step=4, reached=11)))
    assert lost_steps_of(SEEN, more, more[1]) == 7


def test_cost_up_to_the_end_of_the_run() -> None:
    """No step is done after the loss, as the run stops."""
    log = log_of(
        (9.0, generation(1, A, B)),
        (16.0, generation(2, B, resume_step=9, causes=LOST)),
        (20.0, Stop("completed", 9)),
    )
    seen = played(struck(14.0), steps=training(10.0, 0, 9))
    assert costs_of(seen, log)[0].recovery_s == pytest.approx(6.0)


def test_steps_are_lost_once() -> None:
    """A generation that did no step loses none, however far an earlier one came."""
    log = log_of(
        (9.0, generation(1, A, B)),
        (16.0, generation(2, B, resume_step=4, reached=8, causes=LOST)),
        (16.5, generation(3, B, resume_step=4, reached=4, causes=LOST)),
    )
    assert [lost_steps_of(SEEN, log, each) for each in log] == [0, 4, 0]


def test_others_train_while_a_newcomer_starts() -> None:
    """What a join costs begins with the last step without it, not with the start of its node."""
    joined = (Cause(CauseKind.JOINED, "node-2"),)
    seen = played(
        replace(struck(11.0, fault("join")), nodes=("node-2",)),
        steps=[*training(10.0, 0, 9), *training(17.0, 9, 12)],
    )
    after = generation(2, A, B, member("node-2"), resume_step=9, reached=9, causes=joined)
    (cost,) = costs_of(seen, log_of((9.0, generation(1, A, B)), (16.0, after)))
    last_s = max(each.time_s for each in seen.progress if each.time_s < BEGAN_S + 16)
    next_s = min(
        each.time_s for each in seen.progress if each.time_s > BEGAN_S + 16 and each.step > 9
    )
    assert cost.recovery_s == pytest.approx(next_s - last_s)
    assert last_s > BEGAN_S + 11


def test_a_fault_that_is_over_does_not_answer_for_another_one() -> None:
    """What strikes the same node later ends the generation; what strikes the bucket concerns no node."""
    log = log_of((9.0, generation(1, A, B)), (60.0, generation(2, B, resume_step=9, causes=LOST)))
    for kind, ended in (("staging_full", False), ("bucket_away", False), ("kill_node", True)):
        spec = fault(kind, for_s=None if kind == "kill_node" else 3.0)
        (cost,) = costs_of(played(struck(12.0, spec), steps=training(61.0, 9, 12)), log)
        assert (cost.recovery_s is not None) == ended
    (soon,) = costs_of(played(struck(50.0, fault("staging_full", for_s=3.0))), log)
    assert soon.lost_steps is not None


def test_a_fault_that_ends_no_generation_costs_nothing() -> None:
    """Nobody was lost."""
    (cost,) = costs_of(SEEN, log_of((9.0, generation(1, A, B))))
    assert (cost.recovery_s, cost.lost_steps) == (None, None)


@pytest.mark.parametrize(
    ("reached", "told"),
    [(8, ""), (9, ""), (7, "tells of 3 lost steps, 4 were seen"), (4, "0 lost"), (None, "0 lost")],
)
def test_lost_steps_are_told(reached: int | None, told: str) -> None:
    """All but the last one, of which the members may not know."""
    after = generation(2, B, resume_step=4, reached=reached, causes=LOST)
    found = list(hidden_losses(SEEN, log_of((9.0, generation(1, A, B)), (16.0, after))))
    assert len(found) == bool(told)
    assert told in "".join(found)


def test_nobody_is_left_who_knows_of_lost_steps() -> None:
    """A new fleet has only a hint of what the one before has done."""
    log = log_of((9.0, generation(1, A)), (16.0, generation(2, B, resume_step=4)))
    assert list(hidden_losses(SEEN, log)) == []


def test_each_loss_counts_once() -> None:
    """What an earlier generation has lost is not what this one has."""
    log = log_of(
        (9.0, generation(1, A)),
        (16.0, generation(2, B, resume_step=6, reached=6)),
        (20.0, generation(3, B, resume_step=4, reached=6)),
    )
    # A worker of the first generation was on its way when it was replaced.
    seen = played(steps=[*training(10.0, 0, 10), (16.2, 11), (18.0, 6), (19.0, 7)])
    assert list(hidden_losses(seen, log)) == []
    more = played(steps=[*training(10.0, 0, 10), (18.0, 6), *training(18.4, 7, 9)])
    assert list(hidden_losses(more, log)) == ["generation 3 tells of 2 lost steps, 4 were seen"]


def test_waits_for_a_processor_are_told() -> None:
    """What processes waited for a processor during a recovery, and half of it where the kernel does not tell."""
    after = generation(2, B, resume_step=4, reached=6, frontier=6, causes=LOST)
    log = log_of((9.0, generation(1, A, B)), (16.0, after))
    told = [
        Waited(BEGAN_S + second, waited)
        for second, waited in ((13.9, 7.0), (15.0, 8.5), (17.5, 9.0))
    ]
    busy = replace(SEEN, waited=told)
    assert costs_of(busy, log)[0].waited_s == pytest.approx(2.0)
    assert costs_of(replace(busy, waited=[*told[:1], Waited(BEGAN_S + 18, 99.0)]), log)[
        0
    ].waited_s == pytest.approx(3.4)
    assert costs_of(SEEN, log)[0].waited_s == pytest.approx(1.7)


def test_waits_of_a_kernel(tmp_path: Path) -> None:
    """The kernel counts microseconds; one that does not tell is no error."""
    pressure = tmp_path / "cpu"
    assert waited_s(pressure) is None
    pressure.write_text(
        "some avg10=1.00 avg60=2.00 avg300=3.00 total=2500000\nfull avg10=0.00 total=7\n"
    )
    assert waited_s(pressure) == 2.5
