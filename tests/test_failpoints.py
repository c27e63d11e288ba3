"""Failpoints: how rules are written, when they act, and that the code has each of them."""

import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_pt import failpoints
from elastic_pt.errors import ConfigError, StoreError
from elastic_pt.failpoints import Action, Failpoint, Rule, arm, failpoint, parse

ROOT = Path(__file__).parents[1]
POINT = Failpoint.COMMIT_APPENDED


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    """No rule outlives its test."""
    yield
    arm("")


def test_rules_are_read_from_a_text() -> None:
    """A rule names the point, the hits and the action; the first hit is the default."""
    assert parse("") == parse("  ") == ()
    assert parse("commit.appended:kill, shard.written@2+:delay=0.5,object.part@7:os_error=ENOSPC") == (
        Rule(POINT, Action.KILL),
        Rule(Failpoint.SHARD_WRITTEN, Action.DELAY, 2, True, delay_s=0.5),
        Rule(Failpoint.OBJECT_PART, Action.OS_ERROR, 7, error_code=28),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("commit.appended", r"'commit.appended', expected POINT\[@HIT"),
        ("commit.appended:kill,", r"'', expected POINT\[@HIT"),
        ("commit.appended@0:kill", r"expected POINT\[@HIT"),
        ("commit.apended:kill", "point 'commit.apended', expected one of buffer.begun, "),
        ("commit.appended:die", "action 'die', expected one of kill, "),
        ("commit.appended:kill=9", "kill=9, expected kill alone"),
        ("commit.appended:delay", "delay=None, expected seconds from 0 to 3600"),
        ("commit.appended:delay=9999", "delay=9999, expected seconds from 0 to 3600"),
        ("commit.appended:os_error=ENOTHING", "os_error=ENOTHING, expected a code such as ENOSPC"),
    ],
)
def test_wrong_rule_is_refused_in_one_line(text: str, message: str) -> None:
    """The error names the variable, the value and what is expected."""
    with pytest.raises(ConfigError, match=f"^ELASTIC_PT_FAILPOINTS: .*{message}") as error:
        arm(text)
    assert "\n" not in str(error.value)


def test_rule_acts_at_its_hit_alone_or_from_it_on() -> None:
    """`@2` acts at the second hit only, `@2+` at each one from the second on."""

    def acts() -> list[bool]:
        found = []
        for _ in range(4):
            try:
                failpoint(POINT)
                found.append(False)
            except StoreError:
                found.append(True)
        return found

    arm("commit.appended@2:store_error")
    assert acts() == [False, True, False, False]
    arm("commit.appended@2+:store_error,commit.released:kill")
    assert acts() == [False, True, True, True]
    arm("")
    assert acts() == [False, False, False, False]


def test_each_action_does_what_it_says() -> None:
    """A full disk has its code, and a kill ends the process at once with SIGKILL."""
    arm("commit.appended:os_error=ENOSPC")
    with pytest.raises(
        OSError, match=r"No space left on device .failpoint commit\.appended"
    ) as full:
        failpoint(POINT)
    assert full.value.errno == 28
    child = os.fork()
    if child == 0:
        try:
            arm("commit.appended:kill")
            failpoint(POINT)
        finally:
            os._exit(3)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def test_hits_of_several_threads_are_counted_once_each() -> None:
    """Of many threads that reach a point, exactly one has the hit at which the rule acts."""
    arm("commit.appended@500:store_error")
    failed: list[int] = []

    def reach() -> None:
        for _ in range(100):
            try:
                failpoint(POINT)
            except StoreError:
                failed.append(1)

    threads = [threading.Thread(target=reach) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert failed == [1]


def test_code_reaches_each_point_once() -> None:
    """Each point is at exactly one place of the product, and the place names it."""
    text = "\n".join(
        path.read_text()
        for path in (ROOT / "elastic_pt").rglob("*.py")
        if path != Path(failpoints.__file__)
    )
    found = re.findall(r"failpoint\(Failpoint\.(\w+)\)", text)
    assert sorted(found) == sorted(Failpoint.__members__)
