"""`log --explain`: each change of the members and the time of each phase, from the log alone."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from command_line import STEPS, Trained, elastic_pt

from elastic_pt.membership.decision.admission import slots_per_member
from elastic_pt.report.change import Change, End, FirstStep, as_json
from elastic_pt.report.explanation import explain
from elastic_pt.report.status import describe
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import (
    ORIGIN,
    Body,
    Cause,
    CauseKind,
    Checkpoint,
    Commit,
    Control,
    Generation,
    InMemory,
    Member,
    Quarantine,
    Record,
    Recovery,
    Request,
    Stop,
    Verb,
)
from elastic_pt.store.open import open_store

LOST_B = Cause(CauseKind.LOST, "b", "its address refuses connections", detect_s=0.04)
JOINED_D = Cause(CauseKind.JOINED, "d")
RECOVERED = Recovery(2, start_s=0.11, group_s=0.09, restore_s=0.02, step_s=0.11, total_s=0.54)
PHASES = (
    "workers connected after 0.11 s, process group 0.09 s, restored step 410 from the bucket in 0.02 s, first step 0.11 s; "
    "training again 0.54 s after it was noticed"
)


def checkpoint(step: int) -> Checkpoint:
    """A checkpoint that was committed."""
    return Checkpoint(step, 1, f"ckpt/{step}", 1, "", 2.5)


def generation(
    number: int,
    nodes: str,
    *causes: Cause,
    frontier: int = 412,
    resume: int = 410,
    agree_s: float = 0.21,
    life: int = 1,
    reason: str = "",
    slots: int | None = 8,
) -> Generation:
    """A GENERATION of one-worker nodes named by letters; `life` tells their incarnations apart."""
    members = tuple(Member(node, f"{node}{life}", "127.0.0.1", 1, 1, 1) for node in nodes)
    return Generation(
        number,
        members,
        slots_per_member(members, slots),
        "127.0.0.1",
        2,
        checkpoint(resume) if resume else None,
        reason or "; ".join(str(cause) for cause in causes) or "started",
        causes,
        frontier,
        agree_s,
    )


FIRST = generation(1, "abc", frontier=0, resume=0, agree_s=0.0)
COMMIT = Commit((checkpoint(410), checkpoint(400)), "history")


def records(*bodies: Body, time: str = "2026-01-01T00:00:00.000+00:00") -> list[Record]:
    """A log of these bodies."""
    numbers, number = [], 0
    for body in bodies:
        number = body.number if isinstance(body, Generation) else number
        numbers.append(number)
    return [
        Record(index, number, "a", "", time, ORIGIN, {}, body)
        for index, (body, number) in enumerate(zip(bodies, numbers, strict=True))
    ]


def texts(*bodies: Body) -> list[str]:
    """The explanations of a log of these bodies, for people."""
    return [str(each) for each in explain(records(*bodies))]


def change(*bodies: Body) -> Change:
    """The last change of a log of these bodies."""
    return [each for each in explain(records(*bodies)) if isinstance(each, Change)][-1]


def test_lost_node_is_explained_phase_by_phase() -> None:
    """The text has the node, the step, how it was noticed, the time of each phase, and the steps done again."""
    assert texts(FIRST, COMMIT, generation(2, "ac", LOST_B), RECOVERED) == [
        "generation 2 (2 nodes, world 2): node b lost at step 412: its address refuses connections, "
        "noticed 0.04 s after its last sign of life; agreed after 0.21 s; "
        f"{PHASES}; 2 steps (411 to 412) done again"
    ]


FAILED = Cause(CauseKind.FAILED, "b", "worker 1 killed by SIGKILL at step 412", 412)
HUNG = Cause(
    CauseKind.FAILED, "b", "worker 1 wrote no heartbeat for 2.1 s at step 412 (stopped)", 412
)
UNUSABLE = Cause(CauseKind.UNUSABLE, "b", "worker 1 raised CheckpointError: cut short")
PARKED = Cause(CauseKind.PARKED, "c", "no link to b", detect_s=9.0)
GAVE_UP = Cause(CauseKind.GAVE_UP, "b", "for a while it could not reach the others")
BARRED = Cause(CauseKind.BARRED, "b", "3 failures (kept out for 30 s)")


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (FAILED, "node b failed: worker 1 killed by SIGKILL at step 412"),
        (HUNG, "node b failed: worker 1 wrote no heartbeat for 2.1 s at step 412 (stopped)"),
        (
            UNUSABLE,
            "node b could not use the checkpoint: worker 1 raised CheckpointError: cut short",
        ),
        (PARKED, "node c parked at step 412: no link to b"),
        (GAVE_UP, "node b gave up at step 412: for a while it could not reach the others"),
    ],
    ids=lambda value: value.kind if isinstance(value, Cause) else "",
)
def test_each_kind_of_failure_has_its_text(cause: Cause, words: str) -> None:
    """Each kind of failure is named with its node and its cause. Only a loss has a time until it was noticed."""
    (text,) = texts(FIRST, COMMIT, generation(2, "ac", cause), RECOVERED)
    assert f"): {words}; agreed after 0.21 s; workers" in text
    assert text.endswith("2 steps (411 to 412) done again")


@pytest.mark.parametrize(
    ("causes", "words"),
    [
        ((JOINED_D,), "node d joined after step 410"),
        ((JOINED_D, Cause(CauseKind.JOINED, "e")), "nodes d, e joined after step 410"),
        ((Cause(CauseKind.LEFT, "b"),), "node b left after step 410"),
        (
            (Cause(CauseKind.LEFT, "b"), JOINED_D),
            "node b left after step 410; node d joined after step 410",
        ),
        (
            (BARRED, JOINED_D),
            "node d joined after step 410; node b kept out: 3 failures (kept out for 30 s)",
        ),
        ((), "resumed"),
    ],
)
def test_planned_change_repeats_no_step(causes: Sequence[Cause], words: str) -> None:
    """Joins, leaves and a stop without a change: nodes agree after all have stopped, and no step is done again."""
    planned = generation(2, "abcd", *causes, frontier=410, agree_s=0.03, reason="resumed")
    (text,) = texts(FIRST, COMMIT, planned, RECOVERED)
    assert f"): {words}; agreed 0.03 s after all members had stopped; workers" in text
    assert "training again 0.54 s after all members had stopped; no step done again" in text
    assert change(FIRST, COMMIT, planned).planned


def test_join_during_a_loss_is_not_planned() -> None:
    """One lost member is enough: all members lose the steps since the checkpoint."""
    found = change(FIRST, COMMIT, generation(2, "acd", JOINED_D, LOST_B))
    assert not found.planned
    assert found.lost_steps == 2
    assert str(found).index("node b lost") < str(found).index("node d joined after step 412")


def test_nodes_lost_in_the_same_way_share_a_clause() -> None:
    """If several nodes are lost in the same way, one clause has the range of times until it was noticed."""
    lost_c = dataclasses.replace(LOST_B, node="c", detect_s=0.06)
    silent = Cause(CauseKind.LOST, "d", "silent for 1.5 s", detect_s=1.52)
    (text,) = texts(FIRST, COMMIT, generation(2, "a", LOST_B, lost_c, silent), RECOVERED)
    assert (
        "(1 node, world 1): nodes b, c lost at step 412: their addresses refuse connections, "
        "noticed 0.04 to 0.06 s after their last sign of life; node d lost at step 412: silent for 1.5 s, "
        "noticed 1.52 s after its last sign of life; agreed"
    ) in text


@pytest.mark.parametrize(
    ("resume", "frontier", "words"),
    [
        (410, 410, "no step done again"),
        (410, 411, "1 step (411) done again"),
        (0, 3, "3 steps (1 to 3) done again"),
        (410, 0, "steps from 411 on done again, number unknown"),
    ],
)
def test_steps_done_again_are_counted_if_known(resume: int, frontier: int, words: str) -> None:
    """Steps from the checkpoint to the frontier are done again. If the frontier is unknown, no number is given."""
    later = generation(2, "ac", LOST_B, resume=resume, frontier=frontier)
    (text,) = texts(FIRST, COMMIT, later, RECOVERED)
    assert text.endswith(f"; {words}")
    assert ("initialised weights" in text) is (resume == 0)


@pytest.mark.parametrize(
    ("resume", "words"),
    [
        (411, "1 step (412) done again, all of them lost earlier"),
        (410, "2 steps (411 to 412) done again, 1 of them lost earlier"),
    ],
)
def test_steps_that_were_lost_earlier_are_told_apart(resume: int, words: str) -> None:
    """A change while steps are done again lost only those of the generation before, and happened at its step."""
    second = generation(2, "ac", LOST_B)
    third = dataclasses.replace(generation(3, "acd", JOINED_D, resume=resume), reached_step=411)
    told = list(explain(records(FIRST, COMMIT, second, third, RECOVERED)))[1]
    assert isinstance(told, Change)
    assert told.lost_steps == 411 - resume
    assert "node d joined after step 411; " in str(told)
    assert str(told).endswith(f"; {words}")


def test_wait_for_nodes_is_told() -> None:
    """How much of the time to agree was a wait for nodes is in the text."""
    waited = dataclasses.replace(generation(2, "ac", LOST_B), agree_s=34.0, below_minimum_s=31.0)
    assert "; agreed after 34.00 s; 31.00 s of that with too few nodes; workers" in str(
        change(FIRST, COMMIT, waited, RECOVERED)
    )


def test_steps_that_a_lost_fleet_had_done_are_counted() -> None:
    """If the log knows how far the nodes that are all gone had come, the text has the number."""
    anew = generation(2, "abc", frontier=412, life=2, reason="resumed by new nodes")
    found = change(FIRST, COMMIT, dataclasses.replace(anew, reached_step=412), RECOVERED)
    assert found.lost_steps == 2
    assert str(found).endswith("2 steps (411 to 412) done again")


def test_state_in_memory_is_named() -> None:
    """If the members held a newer step in memory than the bucket has, the text and the JSON say so."""
    memory = InMemory(1, 412, (0, 1))
    later = dataclasses.replace(generation(2, "ac", LOST_B), memory=memory)
    found = change(FIRST, COMMIT, later, RECOVERED)
    assert (found.restored_from, found.lost_steps) == ("memory", 0)
    assert "restored step 412 from memory in 0.02 s" in str(found)
    assert str(found).endswith("no step done again")
    told = json.loads(json.dumps(as_json(found)))
    assert (told["restored_from"], told["lost_steps"], told["resume_step"]) == ("memory", 0, 412)


def test_reason_to_restore_from_the_bucket_is_told() -> None:
    """If the members held no whole state in memory, the text and the JSON say what was missing."""
    why = "no member holds the rows of worker 1 of generation 1 at step 412"
    later = dataclasses.replace(generation(2, "ac", LOST_B), why_not_memory=why)
    found = change(FIRST, COMMIT, later, RECOVERED)
    assert f"restored step 410 from the bucket ({why}) in 0.02 s" in str(found)
    assert as_json(found)["why_not_memory"] == why
    # An earlier version wrote none.
    assert "from the bucket in 0.02 s" in str(
        change(FIRST, COMMIT, generation(2, "ac", LOST_B), RECOVERED)
    )


def test_resume_by_new_nodes_claims_no_cause() -> None:
    """If all members were lost, cause and time are unknown, and the text says so."""
    anew = generation(2, "abc", frontier=0, agree_s=0.0, life=2, reason="resumed by new nodes")
    found = change(FIRST, COMMIT, anew, RECOVERED)
    assert found.resumed_by_new_nodes
    assert not found.planned
    assert found.lost_steps is None
    assert str(found) == (
        "generation 2 (3 nodes, world 3): no member of generation 1 was left; resumed by new nodes; "
        "workers connected after 0.11 s, process group 0.09 s, restored step 410 from the bucket in 0.02 s, first step 0.11 s; "
        "training again 0.54 s after the new nodes had formed a generation; "
        "steps from 411 on done again, number unknown"
    )


def test_leave_of_the_last_member_is_planned() -> None:
    """A generation of new nodes only is a planned change if the last member left in good order."""
    handed_over = generation(
        2, "d", Cause(CauseKind.LEFT, "a"), JOINED_D, frontier=410, agree_s=0.03
    )
    found = change(FIRST, COMMIT, handed_over)
    assert found.planned
    assert not found.resumed_by_new_nodes


THIRD = generation(3, "a", dataclasses.replace(LOST_B, node="c"))
OWN_COMMIT = Commit((dataclasses.replace(checkpoint(420), generation=2),), "history")
FAILED_AGAIN = Stop("the same failure 3 times at step 412", 410)


@pytest.mark.parametrize(
    ("later", "expected", "words"),
    [
        ((RECOVERED,), FirstStep.DONE, "training again"),
        ((THIRD,), FirstStep.REPLACED, "replaced before its first step was on record"),
        (
            (FAILED_AGAIN,),
            FirstStep.ENDED,
            "the run ended before its first step was on record",
        ),
        ((), FirstStep.AWAITED, "its first step is not on record yet"),
        (
            (OWN_COMMIT, THIRD),
            FirstStep.NOT_MEASURED,
            "resumed from step 410; its start is not on record",
        ),
        # The upload of generation 1 has outlived it.
        ((COMMIT, THIRD), FirstStep.REPLACED, "replaced before its first step was on record"),
        (
            (dataclasses.replace(THIRD, frontier_step=413),),
            FirstStep.NOT_MEASURED,
            "2 steps (411 to 412) done again",
        ),
        (
            (Stop("diverged", 415),),
            FirstStep.NOT_MEASURED,
            "resumed from step 410; its start is not on record",
        ),
    ],
)
def test_first_step_is_claimed_only_with_proof(
    later: Sequence[Body], expected: FirstStep, words: str
) -> None:
    """A RECOVERY, a COMMIT of its own or a later frontier prove that a generation trained. Without them the text does not claim it."""
    found, *_ = explain(records(FIRST, COMMIT, generation(2, "ac", LOST_B), *later))
    assert isinstance(found, Change)
    assert found.first_step is expected
    assert words in str(found)
    assert ("done again" in str(found)) is (expected in (FirstStep.DONE, FirstStep.NOT_MEASURED))


def test_quarantines_appear_in_the_right_generation() -> None:
    """A quarantined checkpoint is shown with the next generation, a node that is kept out with the newest one."""
    bodies = (
        FIRST,
        COMMIT,
        Quarantine("ckpt/410", "shard-00000: cut short"),
        generation(2, "ac", UNUSABLE, BARRED, resume=400),
        Quarantine("", "3 failures within 600 s", "b", 30.0),
        RECOVERED,
        generation(3, "a", dataclasses.replace(LOST_B, node="c")),
    )
    second, third = texts(*bodies)
    assert "; node b kept out for 30 s: 3 failures within 600 s;" in second
    assert second.count("kept out") == 1
    assert "; the checkpoint of step 410 was quarantined: shard-00000: cut short; agreed" in second
    assert "12 steps (401 to 412) done again" in second
    assert "kept out" not in third
    assert "quarantined" not in third


def test_a_change_that_an_operator_asked_for_tells_who_asked() -> None:
    """A pause, its resume and a drain are told with the change that they led to, and with none later; answers are not."""
    pause = Request(Verb.PAUSE, "ann@desk", "maintenance", index=2)
    reached = dataclasses.replace(pause, done=True)
    wishes = (
        pause,
        Request(Verb.CHECKPOINT, "ann@desk", index=3),
        reached,
        Request(Verb.DRAIN, "bob@desk", node="b", index=5),
        Request(Verb.RESUME, "ann@desk", index=6),
    )
    left = generation(2, "ac", Cause(CauseKind.LEFT, "b"), frontier=410)
    bodies = (FIRST, COMMIT, *(Control(each, (), 410) for each in wishes), left, THIRD)
    second, third = explain(records(*bodies))
    assert isinstance(second, Change)
    assert second.requests == (wishes[0], wishes[3], wishes[4])
    assert (
        "): node b left after step 410; pause asked for by ann@desk: maintenance; "
        "drain of node b asked for by bob@desk; resume asked for by ann@desk; agreed 0.21 s "
        "after the resume was noticed; "
    ) in str(second)
    assert "asked for" not in str(third)
    assert as_json(second)["requests"][0]["by"] == "ann@desk"
    (line, answer) = (
        describe(each)
        for each in records(FIRST, *(Control(each, (), 0) for each in (pause, reached)))[1:]
    )
    assert "CONTROL     pause asked for by ann@desk: maintenance" in line
    assert "CONTROL     done: pause asked for by ann@desk: maintenance" in answer


def test_quarantined_checkpoint_without_a_commit_is_named_by_directory() -> None:
    """A quarantine is always shown, even if no COMMIT names its checkpoint."""
    bodies = (FIRST, Quarantine("ckpt/7", "gone"), generation(2, "ac", LOST_B))
    assert "the checkpoint ckpt/7 was quarantined: gone" in texts(*bodies)[0]


def test_stock_torchrun_run_claims_no_step() -> None:
    """Such a log has members but no steps, so the text has neither a step nor a phase."""
    first = generation(1, "abc", frontier=0, resume=0, slots=None)
    second = generation(2, "ac", LOST_B, frontier=0, resume=0, slots=None)
    assert texts(first, second, dataclasses.replace(second, number=3)) == [
        f"generation {number} (2 nodes, world 2): node b lost: its address refuses connections, "
        "noticed 0.04 s after its last sign of life; agreed after 0.21 s"
        for number in (2, 3)
    ]


def test_loss_before_the_first_step_names_no_step() -> None:
    """The text says `before the first step`, not step 0."""
    (text,) = texts(FIRST, generation(2, "ac", LOST_B, JOINED_D, frontier=0, resume=0))
    assert "node b lost before the first step: " in text
    assert "node d joined before the first step" in text


@pytest.mark.parametrize(
    ("stop", "words"),
    [
        (Stop("completed", 500), "end: completed at step 500"),
        (
            FAILED_AGAIN,
            "end: failed in generation 1 at step 410: the same failure 3 times at step 412",
        ),
    ],
)
def test_end_of_the_run_is_the_last_explanation(stop: Stop, words: str) -> None:
    """The end of a run comes last, even if its world never changed."""
    (end,) = explain(records(FIRST, COMMIT, stop))
    assert end == End(2, 1, stop.step, stop.reason)
    assert str(end) == words


def test_wall_clocks_do_not_matter() -> None:
    """Records with invalid times are explained in the same words."""
    bodies = (FIRST, COMMIT, generation(2, "ac", LOST_B), RECOVERED, Stop("completed", 500))
    assert explain(records(*bodies)) == explain(records(*bodies, time="not a time at all"))


def test_json_has_durations_as_numbers_and_the_text() -> None:
    """The JSON form has the durations as numbers, and the sentence for people as `text`."""
    bodies = (FIRST, COMMIT, generation(2, "ac", LOST_B), RECOVERED, Stop("completed", 500))
    recovered, end = (json.loads(json.dumps(as_json(each))) for each in explain(records(*bodies)))
    assert (recovered["kind"], end["kind"]) == ("change", "end")
    assert recovered["causes"][0]["detect_s"] == 0.04
    assert recovered["recovery"]["group_s"] == 0.09
    assert (recovered["agree_s"], recovered["lost_steps"]) == (0.21, 2)
    assert recovered["restored_from"] == "bucket"
    assert recovered["text"].startswith("generation 2 (2 nodes, world 2): node b lost")
    assert end["text"] == "end: completed at step 500"


def write_log(url: Path, *bodies: Body) -> None:
    """Write a run directory with a log of these bodies."""
    log = RunLog(open_store(f"file://{url}"), writer="a")
    for body in bodies:
        number = log.refresh().generation_number
        log.append(lambda _, body=body: body, generation=number)  # type: ignore[misc]


def test_explain_prints_one_line_per_change_into_a_pipe(tmp_path: Path) -> None:
    """Into a pipe, each explanation is one line of any length, and its text is not read as markup."""
    odd = Cause(CauseKind.FAILED, "b", "worker 1 raised KeyError: '[bold]x[/bold]' [/]")
    write_log(tmp_path, FIRST, COMMIT, generation(2, "ac", odd), RECOVERED, Stop("completed", 500))
    result = elastic_pt("log", tmp_path, "--explain")
    assert result.exit_code == 0, result
    first, end = result.out.splitlines()
    assert "node b failed: worker 1 raised KeyError: '[bold]x[/bold]' [/]; agreed" in first
    assert end == "end: completed at step 500"
    lines = elastic_pt("log", tmp_path, "--explain", "--json").out.splitlines()
    assert [json.loads(line)["text"] for line in lines] == [first, end]


def test_explain_of_a_log_without_changes_says_so(tmp_path: Path, trained: Trained) -> None:
    """Without a change the command prints a sentence. A run that completed without changes has its end only."""
    write_log(tmp_path, FIRST, COMMIT)
    assert "nothing to explain" in elastic_pt("log", tmp_path, "--explain").out
    assert elastic_pt("log", tmp_path, "--explain", "--json").out == ""
    assert elastic_pt("log", trained.run, "--explain").out == f"end: completed at step {STEPS}\n"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            RECOVERED,
            "generation 2 to its first step in 0.54 s: start 0.11, process group 0.09, restore 0.02, first step 0.11",
        ),
        (Quarantine("", "3 failures", "b", 30.0), "node b kept out for 30 s: 3 failures"),
        (Quarantine("ckpt/410", "cut short"), "ckpt/410: cut short"),
    ],
)
def test_recovery_and_quarantine_records_have_a_line(body: Body, words: str) -> None:
    """`log` without options also shows recoveries and both kinds of quarantine."""
    assert f"  {words}  (by a)" in describe(records(FIRST, body)[-1])
