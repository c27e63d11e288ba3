"""Failpoints: how rules are written, when they act, and that the code has each of them."""

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_pt import failpoints
from elastic_pt.errors import ConfigError, StoreError
from elastic_pt.failpoints import Action, Deed, Failpoint, Reached, Rule, arm, failpoint, parse

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
        Rule(POINT, Deed(Action.KILL)),
        Rule(Failpoint.SHARD_WRITTEN, Deed(Action.DELAY, 0.5), 2, True),
        Rule(Failpoint.OBJECT_PART, Deed(Action.OS_ERROR, 28), 7),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("commit.appended", r"'commit.appended', expected POINT\[@HIT"),
        ("commit.appended:kill,", r"'', expected POINT\[@HIT"),
        ("commit.appended@0:kill", r"expected POINT\[@HIT"),
        ("commit.apended:kill", "point 'commit.apended', expected one of imports.begun, "),
        ("commit.appended:die", "action 'die', expected one of kill, "),
        ("commit.appended:kill=9", "kill=9, expected kill alone"),
        ("commit.appended:delay", "delay, expected seconds from 0 to 3600"),
        ("commit.appended:delay=9999", "delay=9999, expected seconds from 0 to 3600"),
        ("commit.appended:exit=256", "exit=256, expected an exit code from 0 to 255"),
        ("commit.appended:signal=9", "signal=9, expected a signal such as SIGSEGV"),
        ("commit.appended:ask", "ask, expected the path of a Unix socket"),
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


@pytest.mark.parametrize(("deed", "status"), [("exit=9", 9 << 8), ("signal=SIGSEGV", 11)])
def test_an_action_can_end_the_process_in_its_own_way(deed: str, status: int) -> None:
    """With an exit code, or by a signal."""
    child = os.fork()
    if child == 0:
        arm(f"commit.appended:{deed}")
        failpoint(POINT)
        os._exit(3)
    assert os.waitpid(child, 0)[1] == status


def test_hold_keeps_the_lock_of_the_interpreter() -> None:
    """No other thread runs meanwhile; with `delay` others do."""
    for deed, held in (("hold=0.3", True), ("delay=0.3", False)):
        arm(f"commit.appended:{deed}")
        ticks: list[float] = []
        done = threading.Event()

        def tick(ticks: list[float] = ticks, done: threading.Event = done) -> None:
            while not done.wait(0.01):
                ticks.append(1)

        other = threading.Thread(target=tick)
        other.start()
        failpoint(POINT)
        counted = len(ticks)
        done.set()
        other.join()
        assert (counted < 5) is held


def test_a_process_that_asks_does_what_it_is_told(tmp_path: Path) -> None:
    """It tells point, hit, process and step, stands still until the answer, and goes on when nobody listens any more."""
    path = tmp_path / "s"
    answers = ["go", "raise", "os_error=ENOSPC", ""]
    told: list[Reached] = []
    with socket.create_server(str(path), family=socket.AF_UNIX) as listening:

        def answer() -> None:
            for each in answers:
                with listening.accept()[0] as asking:
                    told.append(Reached(**json.loads(asking.makefile().readline())))
                    time.sleep(0.05)
                    asking.sendall(f"{each}\n".encode())

        thread = threading.Thread(target=answer)
        thread.start()
        arm(f"commit.appended@1+:ask={path}")
        began_s = time.monotonic()
        failpoint(POINT, 7)
        assert time.monotonic() - began_s >= 0.05
        with pytest.raises(RuntimeError, match=r"failpoint commit\.appended"):
            failpoint(POINT, 8)
        with pytest.raises(OSError, match="No space left"):
            failpoint(POINT)
        failpoint(POINT)
        thread.join()
    failpoint(POINT)
    path.unlink()
    failpoint(POINT)
    label, pid = POINT.label, os.getpid()
    assert told == [
        Reached(label, hit + 1, pid, step) for hit, step in enumerate([7, 8, None, None])
    ]


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
    found = re.findall(r"failpoint\((?:failpoints\.)?Failpoint\.(\w+)(?:, [\w.]+)?\)", text)
    assert sorted(found) == sorted(Failpoint.__members__)
