"""The decision table of docs/membership.md, row by row against `decide`."""

import ast
import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, get_args

import pytest

from elastic_pt.membership.decision import decide as module
from elastic_pt.membership.decision.decide import Decision, Propose, Wait
from elastic_pt.membership.decision.status import Held, NodePhase
from elastic_pt.runlog.records import CauseKind, Request, Stop, Verb
from tests.membership.world import (
    LIMITS,
    NOTICED_S,
    NOW_S,
    changed,
    decision,
    failed,
    generation,
    lives,
    peer,
    refusing,
    silent,
    status,
    waiting,
)

PAGE = Path(__file__).parents[2] / "docs" / "membership.md"
ROW = re.compile(r"^\| (\d+) \| (.+) \| (.+) \| `(.+)` \|$", re.MULTILINE)
WORLD = generation("a", "b", "c")
TAKEOVER_S = LIMITS.elastic.takeover_s
HEALTHY = {"b": peer(status("b")), "c": peer(status("c"))}
LOST_C = {"b": peer(status("b")), "c": refusing(status("c"))}
STOPPED = {"b": peer(waiting("b", spent=1)), "c": peer(waiting("c", spent=1))}
FAILED_C = {"b": peer(status("b")), "c": peer(waiting("c", spent=1, failure=failed("c")))}
ENDED_WITHOUT_C = STOPPED | {"c": refusing(status("c"))}
ENDED_C_FAILED = STOPPED | {"c": peer(waiting("c", spent=1, failure=failed("c")))}
CUT_OFF = {"b": silent(status("b")), "c": silent(status("c"))}
OUTSIDE_ALONE = {node: refusing(status(node)) for node in "abc"}
TWO = changed(LIMITS, nodes_min=2)
THREE = changed(LIMITS, nodes_min=3)
D = {"d": peer(waiting("d"))}
PAUSE = Request(Verb.PAUSE, "ann@desk", "maintenance", index=7)
REACHED = dataclasses.replace(PAUSE, done=True)
STOP = Request(Verb.STOP, "ann@desk", "too expensive", index=7)
CHECKPOINT = Request(Verb.CHECKPOINT, "ann@desk", index=7)
YOUNG = {"newcomers_changed_s": NOW_S}
MOVED = {"quiet_since_s": NOW_S}


def of_member(
    peers: dict[str, Any],
    *,
    node: str = "a",
    phase: NodePhase = NodePhase.RUNNING,
    of: Any = WORLD,
    **facts: Any,
) -> Decision:
    """The decision of a member of the generation a, b, c."""
    said = {key: facts.pop(key) for key in ("spent", "unreachable", "held") if key in facts}
    return decision(status(node, phase, **said), peers, of=of, **facts)


def of_newcomer(peers: dict[str, Any], *, of: Any = WORLD, **facts: Any) -> Decision:
    """The decision of node d, which waits outside the generation."""
    said = {key: facts.pop(key) for key in ("unreachable", "resting", "leaving") if key in facts}
    return decision(waiting("d", **said), peers, of=of, **facts)


def rows(step: int, first_rank: int, end_rank: int | None = None) -> tuple[Held, ...]:
    """Rows of the generation a, b, c: of one worker, or up to `end_rank`."""
    return (Held(1, step, first_rank, end_rank or first_rank + 1, 3),)


def b_leaves(held_by_b: tuple[int, int, int]) -> dict[str, Any]:
    """After a drain b leaves with these rows of a step; c holds those of the workers 1 and 2 or of 2 alone."""
    first_rank = 2 if held_by_b[1] == 1 else 1
    return {
        "b": peer(waiting("b", spent=1, leaving=True, held=rows(*held_by_b))),
        "c": peer(waiting("c", spent=1, held=rows(7, first_rank, 3))),
    }


CASES: dict[int, Callable[[], Decision]] = {
    1: lambda: of_member(HEALTHY, stop=Stop("completed", 100)),
    2: lambda: of_member(HEALTHY),
    3: lambda: of_member(HEALTHY | {"b": peer(status("b", leaving=True))}),
    4: lambda: of_member(HEALTHY | D),
    5: lambda: of_member(HEALTHY | D, **YOUNG),
    6: lambda: of_member({"a": peer(status("a")), "c": peer(status("c"))} | D, node="b"),
    7: lambda: of_member(STOPPED, phase=NodePhase.SETTLING),
    8: lambda: of_member(STOPPED | D, phase=NodePhase.WAITING, spent=1),
    9: lambda: of_member(STOPPED, phase=NodePhase.WAITING, spent=1),
    10: lambda: of_member(LOST_C),
    11: lambda: of_member(HEALTHY | {"c": silent(status("c", unreachable=lives("a", "b")))}
                          | {"b": peer(status("b", unreachable=lives("c")))}),
    12: lambda: of_member(LOST_C | {"b": peer(status("b"), silent_s=NOW_S - NOTICED_S + 0.1)}),
    13: lambda: of_member({"a": peer(status("a")), "c": refusing(status("c"))}, node="b", **MOVED),
    14: lambda: of_member(
        {"a": peer(status("a")), "c": refusing(status("c"))},
        node="b",
        broken_since_s=NOW_S - 2 * TAKEOVER_S,
    ),
    15: lambda: of_member(FAILED_C),
    16: lambda: of_member(FAILED_C, halt="20 failures in a row without a step beyond 7"),
    17: lambda: of_member(FAILED_C, barred={"c": "3 failures within 600 s"}),
    18: lambda: of_member(HEALTHY | {"c": peer(status("c", unreachable=lives("b")))}),
    19: lambda: of_member(HEALTHY | {"c": peer(status("c", broken=1))}),
    20: lambda: of_member(LOST_C, limits=THREE),
    21: lambda: of_member(
        LOST_C | {"b": peer(waiting("b", resting="no space in /dev/shm"))}, limits=TWO
    ),
    22: lambda: of_member(CUT_OFF, **MOVED),
    23: lambda: of_member(CUT_OFF, broken_since_s=NOW_S - TAKEOVER_S),
    24: lambda: of_newcomer(HEALTHY | {"a": peer(status("a"))}),
    25: lambda: of_newcomer(HEALTHY, resting="no space in /dev/shm"),
    26: lambda: of_newcomer(HEALTHY, barred={"d": "3 failures within 600 s"}),
    27: lambda: of_newcomer(HEALTHY, unreachable=lives("c")),
    28: lambda: of_newcomer(OUTSIDE_ALONE, **MOVED),
    29: lambda: of_newcomer(OUTSIDE_ALONE),
    30: lambda: of_newcomer({}, of=None),
    31: lambda: of_newcomer({}, of=None, **YOUNG),
    32: lambda: of_newcomer({"e": peer(waiting("e"))}, of=None, limits=THREE),
    33: lambda: of_newcomer({"c": peer(waiting("c"))}, of=None),
    34: lambda: of_newcomer({}, of=None, leaving=True),
    35: lambda: of_member(HEALTHY, requests=(PAUSE,)),
    36: lambda: of_member(HEALTHY, requests=(CHECKPOINT,)),
    37: lambda: of_member(
        {"a": peer(status("a")), "c": peer(status("c"))}, node="b", requests=(CHECKPOINT,)
    ),
    38: lambda: of_member(STOPPED, phase=NodePhase.WAITING, spent=1, requests=(PAUSE,)),
    39: lambda: of_member(STOPPED, phase=NodePhase.WAITING, spent=1, requests=(REACHED,)),
    40: lambda: of_member(LOST_C, requests=(PAUSE,)),
    41: lambda: of_member(STOPPED, phase=NodePhase.WAITING, spent=1, requests=(STOP,)),
    42: lambda: of_member(CUT_OFF, requests=(STOP,), **MOVED),
    43: lambda: of_newcomer(HEALTHY | {"a": peer(status("a"))}, requests=(PAUSE,)),
    44: lambda: of_newcomer(OUTSIDE_ALONE, requests=(REACHED,)),
    45: lambda: of_newcomer({}, of=None, requests=(STOP,)),
    46: lambda: of_member(b_leaves((7, 1, 2)), phase=NodePhase.WAITING, spent=1, held=rows(7, 0)),
    47: lambda: of_member(b_leaves((7, 2, 3)), phase=NodePhase.WAITING, spent=1, held=rows(7, 0)),
    48: lambda: of_member(
        STOPPED, phase=NodePhase.WAITING, spent=1, requests=(PAUSE,), held=rows(7, 0, 3)
    ),
    49: lambda: of_member(ENDED_WITHOUT_C, phase=NodePhase.WAITING, spent=1, requests=(STOP,),
                          held=rows(7, 0, 3)),
    50: lambda: of_member(ENDED_C_FAILED, phase=NodePhase.WAITING, spent=1, requests=(PAUSE,),
                          held=rows(7, 0, 3), of=dataclasses.replace(WORLD, causes=(failed("b"),))),
    51: lambda: of_member(STOPPED, phase=NodePhase.WAITING, spent=1, requests=(REACHED,),
                          held=rows(7, 0, 3)),
}  # fmt: skip
"""The facts of each row."""


def in_words(found: Decision) -> str:
    """A decision in the form of the table."""
    if isinstance(found, Propose):
        return f"Propose {', '.join(each.node for each in found.members)}"
    if isinstance(found, Wait) and found.asking:
        return "Wait for answers; workers end"
    if isinstance(found, Wait) and found.broken:
        return "Wait; workers end"
    return type(found).__name__


def test_the_decision_table_has_all_rows_of_this_test() -> None:
    """This test has a case for each row of docs/membership.md, and no other."""
    assert [int(row[0]) for row in ROW.findall(PAGE.read_text())] == list(CASES)


@pytest.mark.parametrize("number", CASES)
def test_decide_returns_the_decision_of_each_row(number: int) -> None:
    """The facts of a row lead to the decision and the reason that docs/membership.md states."""
    rows = {int(row[0]): row for row in ROW.findall(PAGE.read_text())}
    found = CASES[number]()
    assert (in_words(found), found.reason) == rows[number][2:]


@contextmanager
def lines_of_decide(lines: set[int]) -> Iterator[None]:
    """Collect the lines of `decide`'s module that are run."""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != module.__file__:
            return None
        if event == "line":
            lines.add(frame.f_lineno)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def test_each_decision_in_the_code_has_a_row() -> None:
    """Some row reaches each place where `decide` returns a decision: a new branch needs a new row."""
    kinds = {each.__name__ for each in get_args(Decision)}
    places = {
        node.lineno
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Return)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
        and node.value.func.id in kinds
    }
    assert len(places) > 15
    reached: set[int] = set()
    with lines_of_decide(reached):
        for case in CASES.values():
            case()
    assert places <= reached, f"no row for decide.py lines {sorted(places - reached)}"


def test_each_kind_of_cause_is_explained_on_the_page() -> None:
    """The page explains each kind of cause."""
    page = PAGE.read_text()
    assert [kind for kind in CauseKind if f"| `{kind}` |" not in page] == []
