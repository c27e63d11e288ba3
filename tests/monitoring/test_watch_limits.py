"""`elastic-pt watch` judges by the limits of the delivered rules: its verdict changes at the numbers that they have."""

import dataclasses
import re
from typing import Final

from elastic_pt.config import ElasticSection
from elastic_pt.report.health import HealthLimits, ReasonKind, judge_health
from tests.monitoring.rules import rules
from tests.report.test_watch_health import HEALTHY, NOW, ago, restarts


def number_in(rule: str, pattern: str) -> float:
    """The number that the pattern finds in the expression of an alert, or of a recorded series."""
    (expression,) = (
        each["expr"] for each in rules() if rule in (each.get("alert"), each.get("record"))
    )
    (found,) = re.findall(pattern, expression)
    return float(found)


def limit_s(alert: str) -> float:
    """The constant `elastic_pt:limit_seconds` of an alert."""
    (expression,) = (each["expr"] for each in rules() if each.get("labels") == {"alert": alert})
    return float(expression.removeprefix("vector(").removesuffix(")"))


def kinds(**changes: object) -> set[ReasonKind]:
    """Why a run with these facts is sick."""
    facts = dataclasses.replace(HEALTHY, **changes)  # type: ignore[arg-type]
    return {each.kind for each in judge_health(facts, NOW, HealthLimits()).sick}


STALL, RISK = ReasonKind.NO_PROGRESS, ReasonKind.AT_RISK
NEVER_S: Final = 9e9


def test_no_progress_is_that_of_the_alert() -> None:
    """NoProgress: seconds without a step, seconds for a start, and how many usual steps."""
    stall_s, start_s = limit_s("NoProgress"), limit_s("NoProgress at a start")
    starts = {"starts": True, "startup_timeout_s": ElasticSection().startup_timeout_s}
    usual_steps_s = 100 * number_in("NoProgress", r"(\d+) \* elastic_pt:step_seconds:mean")
    for limit, changes in (
        (stall_s, {}),
        (start_s, starts),
        (usual_steps_s, {"usual_step_s": 100.0}),
    ):
        assert kinds(**changes, step_age_s=limit) == set()
        assert kinds(**changes, step_age_s=limit + 1) == {STALL}


def test_steps_at_risk_are_those_of_the_alert() -> None:
    """CommitTooOld: how many intervals between checkpoints, and seconds without a commit."""
    interval = HEALTHY.checkpoint_every_steps
    steps = number_in("CommitTooOld", r"> on \(run\) (\d+) \* max by \(run\)") * interval
    newest = HEALTHY.committed_step + int(steps)
    assert kinds(step=newest, saved_at=ago(NEVER_S)) == set()
    assert kinds(step=newest + 1, saved_at=ago(NEVER_S)) == {RISK}
    commit_s = limit_s("CommitTooOld")
    assert kinds(step=newest + 1, saved_at=ago(commit_s)) == set()
    assert kinds(step=newest + 1, saved_at=ago(commit_s + 1)) == {RISK}


def test_restarts_without_progress_are_those_of_the_alert() -> None:
    """CrashLoop: how many restarts without a new step."""
    number = int(number_in("CrashLoop", r">= (\d+)"))

    def after(restarts_done: int) -> set[ReasonKind]:
        ages, frontiers = [NEVER_S] * restarts_done, [HEALTHY.step] * restarts_done
        return kinds(restarts=restarts(ages, frontiers))

    assert after(number - 1) == set()
    assert after(number) == {ReasonKind.RESTARTS_WITHOUT_PROGRESS}


def test_clocks_differ_by_the_limit_of_the_alert() -> None:
    """ClockSkew: seconds between two clocks."""
    skew_s = limit_s("ClockSkew")
    assert kinds(newest_at=ago(-skew_s)) == set()
    assert kinds(newest_at=ago(-skew_s - 1)) == {ReasonKind.CLOCKS_DIFFER}
