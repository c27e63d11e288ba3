"""The oracles, on made-up runs: each objection is seen, and each excuse."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest

from elastic_pt.chaos.oracles import ORACLES, Case, judge
from elastic_pt.chaos.play import Played
from elastic_pt.chaos.result import Verdict
from elastic_pt.chaos.scenario import Expectation
from elastic_pt.chaos.workbench import Undisturbed
from elastic_pt.errors import StoreError
from elastic_pt.runlog.log import RunView
from elastic_pt.runlog.records import Cause, CauseKind, Commit, Record, Stop
from tests.chaos.made_up import (
    checkpoint,
    fault,
    generation,
    log_of,
    member,
    played,
    struck,
    training,
)

A, B = member("node-0"), member("node-1")
AFTER = generation(
    2, B, resume_step=8, reached=9, causes=(Cause(CauseKind.LOST, "node-0", detect_s=2.0),)
)
LOG = log_of((9.0, generation(1, A, B)), (16.0, AFTER))
SEEN = replace(
    played(struck(14.0), steps=[*training(10.0, 0, 10), *training(17.0, 8, 12)]), seconds=30.0
)
LAST = Stop("completed", SEEN.config.train.steps)
NO_STOP = None


def expecting(**expect: object) -> Played:
    """The run, with this expectation."""
    wanted = Expectation.model_validate(expect)
    return replace(SEEN, scenario=SEEN.scenario.model_copy(update={"expect": wanted}))


def verdict(
    oracle: str,
    seen: Played = SEEN,
    *,
    stop: Stop | None = LAST,
    records: Sequence[Record] = LOG,
    strays: Sequence[str] = (),
) -> Verdict:
    """What the oracle says of a run with this log."""
    case = Case(seen, Undisturbed({}, {}))
    view = RunView(stop=stop)
    # What a case would read.
    case.__dict__.update(
        store=SimpleNamespace(url="s3://bucket/run"),
        log=SimpleNamespace(view=view),
        records=list(records),
        strays=list(strays),
    )
    (found,) = (each for each in ORACLES if each.name == oracle)
    try:
        return Verdict(oracle, True, found.answer(case))
    except Exception as objection:
        return Verdict(oracle, False, str(objection))


@pytest.mark.parametrize(
    ("seen", "stop", "told"),
    [
        (SEEN, LAST, ""),
        (SEEN, NO_STOP, "no STOP after 30.0 s"),
        (SEEN, Stop("completed", 3), "completed at step 3, expected completed"),
        (SEEN, Stop("failed: no", 3), "failed: no at step 3"),
        (replace(SEEN, timed_out=True), LAST, "agents have not ended"),
        (expecting(generations=2), LAST, ""),
        (expecting(generations=3), LAST, "2 generations, expected 3"),
        (expecting(outcome="stops", reason="no"), Stop("failed: no", 3), ""),
        (expecting(outcome="stops"), LAST, "STOP: completed, expected one for a failure"),
        (expecting(outcome="stops", reason="so"), Stop("failed: no", 3), "expected one for so"),
        (expecting(outcome="stops"), NO_STOP, "no STOP, expected one"),
        (replace(expecting(outcome="pauses"), state=("paused", "asked")), NO_STOP, ""),
        (replace(expecting(outcome="pauses"), state=("training", "")), NO_STOP, "expected paused"),
        (replace(expecting(outcome="pauses"), state=("paused", "")), LAST, "expected paused"),
    ],
)
def test_outcome(seen: Played, stop: Stop | None, told: str) -> None:
    """The run ends as expected: why, where, and with so many generations."""
    found = verdict("outcome", seen, stop=stop)
    assert found.passed is not bool(told), found
    assert told in found.told


@pytest.mark.parametrize(
    ("codes", "seen", "passed"),
    [
        ({"node-1": 0}, SEEN, True),
        ({"node-1": 1}, SEEN, False),
        ({"node-1": None}, SEEN, False),
        ({"node-0": -9, "node-1": 0}, SEEN, True),
        ({"node-0": None, "node-1": 0}, SEEN, False),
        ({"node-0": -9}, replace(SEEN, struck=[struck(1.0, fault("kill_worker"))]), False),
        (
            {"node-0": 0, "node-1": 1},
            replace(SEEN, struck=[struck(1.0, fault("other_code"))]),
            False,
        ),
    ],
)
def test_exit_codes(codes: dict[str, int | None], seen: Played, passed: bool) -> None:
    """Only a fault that ends agents excuses another code than 0, and nothing an agent that does not end, or is refused with 0."""
    assert verdict("exit codes", replace(seen, exit_codes=codes)).passed is passed


def test_exit_codes_of_a_failed_run() -> None:
    """The last members tell of the failure; who had left before may end with 0."""
    seen, stop = expecting(outcome="stops"), Stop("failed: no", 3)
    assert verdict(
        "exit codes", replace(seen, exit_codes={"node-0": 0, "node-1": 1}), stop=stop
    ).passed
    found = verdict("exit codes", replace(seen, exit_codes={"node-0": 1, "node-1": 0}), stop=stop)
    assert found.told == "node-1: 0, expected another code after a failure"


@pytest.mark.parametrize(
    ("seen", "told"),
    [
        (SEEN, ""),
        (replace(SEEN, missed=[fault()]), "never struck: kill_node"),
        (replace(SEEN, without_effect=["link_down: no"]), "without effect: link_down"),
    ],
)
def test_strikes(seen: Played, told: str) -> None:
    """A fault that never came, or met nothing, fails the run."""
    found = verdict("strikes", seen)
    assert found.passed is not bool(told)
    assert told in found.told


@pytest.mark.parametrize(
    ("seen", "after", "told"),
    [
        (SEEN, AFTER, ""),
        (expecting(recovers_within_s=2), AFTER, ""),
        (expecting(recovers_within_s=1), AFTER, "expected 1 beside those"),
        (expecting(lost_steps=0), AFTER, "generation 2 lost 1 steps, expected at most 0"),
        (SEEN, replace(AFTER, reached_step=8), "tells of 0 lost steps, 1 were seen"),
    ],
)
def test_bounds(seen: Played, after: object, told: str) -> None:
    """Slow recoveries, many lost steps, and lost steps that the log hides."""
    log = [LOG[0], replace(LOG[1], body=after)]  # type: ignore[arg-type]
    found = verdict("bounds", seen, records=log)
    assert found.passed is not bool(told), found
    assert told in found.told


@pytest.mark.parametrize(
    ("oracle", "strays", "passed"),
    [
        ("leftovers", ["left"], False),
        ("leftovers", ["ckpt/left"], True),
        ("retention", ["ckpt/left"], False),
        ("retention", ["left"], True),
        ("leftovers", [], True),
    ],
)
def test_objects_that_belong_to_nothing(oracle: str, strays: list[str], passed: bool) -> None:
    """Those of checkpoints are the retention's, all others are leftovers."""
    found = verdict(oracle, strays=strays)
    assert found.passed is passed
    assert passed or f"1 left: {strays[0]}" in found.told


def test_what_is_left_on_a_machine() -> None:
    """A process, or a file."""
    assert verdict("leftovers", replace(SEEN, leftovers=("process 7",))).told == "1 left: process 7"


def test_a_commit_that_keeps_too_few() -> None:
    """It has no room for the one before."""
    first, second = checkpoint(6), checkpoint(12)
    log = log_of((1.0, Commit((first,), "h")), (2.0, Commit((second,), "h")))
    assert "expected [12, 6]" in verdict("retention", records=log).told


def test_an_error_of_a_reader_is_an_objection() -> None:
    """All oracles answer, also where nothing can be read."""

    class Broken(Case):
        def __getattribute__(self, name: str) -> object:
            if name in ("log", "store", "records", "run"):
                raise StoreError("away")
            return super().__getattribute__(name)

    verdicts = {each.oracle: each for each in judge(Broken(SEEN, {}))}
    assert len(verdicts) == len(ORACLES)
    assert not verdicts["digest"].passed
    assert verdicts["digest"].told == "StoreError: away"
    assert verdicts["strikes"].passed
