"""`elastic-pt status --watch`: the picture for facts and sizes, and a real run watched through a terminal."""

import contextlib
import dataclasses
import datetime
import fcntl
import io
import itertools
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import STEPS, Trained, assert_one_line_mistake, elastic_pt
from rich.cells import cell_len
from rich.console import Console

from elastic_pt.cli.live import shows_only_ascii
from elastic_pt.cli.live_screen import Size, screen
from elastic_pt.cli.loss_chart import chart
from elastic_pt.config import load_config
from elastic_pt.errors import AccessDenied
from elastic_pt.fleet.local import Fleet
from elastic_pt.membership.decision.at_risk import AtRisk
from elastic_pt.report.events import Event, KeptOut, Mood, events_of
from elastic_pt.report.live import Account, Facts, LiveReader
from elastic_pt.report.losses import Losses, LossPoint
from elastic_pt.report.status import CommitReport, MemberReport, Run, RunStatus, State
from elastic_pt.report.tiers import Tier
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import (
    ORIGIN,
    Cause,
    CauseKind,
    Generation,
    Member,
    Record,
    Recovery,
)
from elastic_pt.store.open import open_store
from elastic_pt.telemetry.account import Account as AgentAccount

WAIT_S = 120.0
NOW = datetime.datetime(2026, 11, 27, 20, 0, tzinfo=datetime.UTC)
SIZES = [Size(80, 24, False), Size(80, 24, True), Size(40, 12, False), Size(200, 60, False)]
SIZES += [Size(120, 30, True), Size(110, 20, False), Size(100, None, False)]
SIZES += [Size(110, 10, False), Size(110, 6, False), Size(60, 15, False), Size(40, 10, False)]


def member(node: str, **changes: object) -> MemberReport:
    """A node that trains."""
    found = MemberReport(node, 1, "10.0.0.1", 1, 2, 1, "running", "", "", "", "zone-a", ("node-2",))
    return dataclasses.replace(found, **changes)  # type: ignore[arg-type]


STATUS = RunStatus(
    url="s3://bucket/runs/first",
    state=State.RUNNING,
    reason="lost node-9",
    generation=4,
    world_size=3,
    step=1234,
    steps=5000,
    loss=2.5432,
    members=(member("node-1"), member("node-2"), member("node-3")),
    waiting=(),
    commit=CommitReport(1200, 30.0, "ckpt/x"),
    tiers=(Tier("memory", 1234, 0.4), Tier("peer", 1233, 0.6), Tier("bucket", 1200, 30.0)),
    at_risk_steps=AtRisk(1, 1, 34),
    step_age_s=0.3,
)
FACTS = Facts(
    status=STATUS,
    now=NOW,
    read_at=NOW,
    started=NOW - datetime.timedelta(hours=2, minutes=5),
    starts=False,
    planned=False,
    beats=False,
    losses=tuple(LossPoint(step, 5 - step / 600) for step in range(0, 1234, 10)),
    step_s=2.0,
    tokens_per_step=4096,
    account=Account(0.9712, 12.3, 4.0),
    kept_out=(),
    events=(
        Event(
            NOW,
            Mood.GOOD,
            "generation 4: node node-9 lost at step 1100; 3 nodes train again after 2.10 s",
        ),
    ),
)


def picture(facts: Facts, size: Size, color: bool = False) -> list[str]:
    """The lines of a picture, as a terminal of that width gets them."""
    console = Console(
        width=size.columns,
        file=io.StringIO(),
        force_terminal=color,
        highlight=False,
        no_color=not color,
    )
    console.print(screen(facts, size))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def changed(facts: Facts = FACTS, **changes: object) -> Facts:
    """Facts with other values in their status."""
    status = dataclasses.replace(facts.status, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(facts, status=status)


@pytest.mark.parametrize("size", [SIZES[0], SIZES[1], SIZES[3], SIZES[6]], ids=str)
def test_the_picture_has_all_facts(size: Size) -> None:
    """State, step, loss, speed, ETA, goodput, cost, tiers, nodes and events are there at each usual size."""
    text = "\n".join(picture(FACTS, size))
    for fact in (
        "RUNNING",
        "s3://bucket/runs/first",
        "generation 4, world size 3, run began 2 h 5 min ago, 3 of 3 members answer",
        "lost node-9",
        "1,234 of 5,000",
        "24.7 %",
        "ETA 2 h 5 min",
        "2.5432",
        "2,048 tokens/s, 2 s a step, last step 0.3 s ago",
        "97.1 %",
        "cost $12.30 so far, $20.67 at the end",
        "node-3",
        "zone-a",
        "3 nodes train again after 2.10 s",
    ):
        assert fact in " ".join(text.split()), fact
    for tier in (
        r"memory +1,234 +0.4 s +0 ",
        r"peer +1,233 +0.6 s +1 ",
        r"bucket +1,200 +30 s +34 ",
    ):
        assert re.search(tier, text), tier


def test_cost_of_a_part_of_the_agents_says_so() -> None:
    """Without the price of some agents the cost is too low: the line says how many have none."""
    found = dataclasses.replace(FACTS, account=Account(0.9712, 12.3, 4.0, unpriced=2))
    text = " ".join(" ".join(picture(found, SIZES[0])).split())
    assert "cost $12.30 so far (2 agents without a price)" in text


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("nodes", [0, 3, 200])
def test_the_picture_fits(size: Size, nodes: int) -> None:
    """No line is too long and no row too many, with long names, many nodes and many events; ASCII is ASCII."""
    members = tuple(member(f"node-{number}" * 5, resting="x" * 300) for number in range(nodes))
    event = Event(NOW, Mood.BAD, "é 運転 " * 400)
    facts = dataclasses.replace(FACTS, events=(event,) * 99, trouble="timeout … " * 30)
    for url in ("s3://" + "b" * 300, "s3://bucket/運転" + "運" * 300, "s3://bucket/運転"):
        found = changed(facts, members=members, url=url, reason="運" * 300)
        _assert_fits(picture(found, size), size)


def _assert_fits(lines: list[str], size: Size) -> None:
    assert max(map(cell_len, lines)) <= size.columns
    assert "20:00:00 UTC" in lines[0] or size.columns < 60
    assert lines[-1].strip()
    assert not re.match(r"(─|-){2} \w+ ", lines[-1]), "a title without anything below it"
    assert size.rows is None or len(lines) <= size.rows
    assert not size.ascii or "".join(lines).isascii()


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"starts": True}, ["RECOVERING"]),
        ({"starts": True, "planned": True}, ["CHANGING"]),
        ({"state": State.DOWN, "step": 1200}, ["DOWN", "30 steps will be done again"]),
        (
            {"state": State.PAUSED, "reason": "asked for by ann: x"},
            ["PAUSED", "asked for by ann", "no step is done now"],
        ),
        (
            {"state": State.DOWN, "reason": "no agent answers"},
            ["DOWN", "`elastic-pt run RUN_URL` resumes from step 1,234"],
        ),
        (
            {"state": State.DOWN, "beats": True},
            ["RUNNING", "no agent answers from here, but the pulse"],
        ),
        (
            {"state": State.FAILED, "reason": "diverged"},
            ["FAILED", "diverged", "elastic-pt reopen"],
        ),
        ({"state": State.COMPLETED, "reason": "completed", "step": 5000}, ["COMPLETED", "100.0 %"]),
        ({"members": (member("n", phase="down"),)}, ["down", "0 of 1 members answer"]),
        ({"members": (member("n", resting="out of memory"),)}, ["rests", "out of memory"]),
        ({"members": (member("n", leaving="spot notice"),)}, ["leaves", "spot notice"]),
        (
            {"waiting": (member("n7", slots=0, phase="waiting"),)},
            ["n7", "waiting", "no member yet"],
        ),
        (
            {"kept_out": (KeptOut("n8", NOW + datetime.timedelta(seconds=20), "it flaps"),)},
            ["n8", "kept out", "for 20 s: it flaps"],
        ),
        ({"steps": None, "tiers": ()}, ["no state is saved yet"]),
        (
            {"trouble": "bucket away", "read_at": NOW - datetime.timedelta(seconds=75)},
            ["last read 1 min 15 s ago: bucket away"],
        ),
        (
            {"read_at": NOW - datetime.timedelta(seconds=75), "step_age_s": 5.0},
            [
                "last read 1 min 15 s ago: the bucket has not answered yet",
                "UNKNOWN",
                "last known: running: lost node-9",
                "last known step 1 min 20 s ago",
                "3 of 3 members answered",
            ],
        ),
        ({"account": None, "step_s": None, "loss": None, "losses": ()}, ["not known"]),
    ],
    ids=str,
)
def test_each_state_is_told_in_words(changes: dict[str, object], facts: list[str]) -> None:
    """What is special about a run, a node or this view is a word in the picture, not only a colour."""
    of_status = {field.name for field in dataclasses.fields(RunStatus)}
    found = changed(**{key: value for key, value in changes.items() if key in of_status})
    own = {key: value for key, value in changes.items() if key not in of_status}
    found = dataclasses.replace(found, **own)  # type: ignore[arg-type]
    for size in (Size(80, 24, False), Size(160, 40, False)):
        text = " ".join(" ".join(picture(found, size)).split())
        for fact in facts:
            assert fact in text, (fact, text)


def test_nothing_is_at_risk_when_all_is_lost() -> None:
    """Without agents, what was at risk is lost: the picture does not tell what would be lost with them."""
    down = "\n".join(picture(changed(state=State.DOWN), SIZES[0]))
    assert re.search(r"bucket +1,200 +30 s", down)
    assert "at risk" not in down


def test_nodes_in_trouble_are_shown_first_if_there_is_no_room_for_all() -> None:
    """Among a hundred nodes the one that is down is there, and the others are counted."""
    members = tuple(
        member(f"n{number}", phase="down" if number == 77 else "running") for number in range(100)
    )
    text = "\n".join(picture(changed(members=members), Size(80, 24, False)))
    assert "n77" in text
    assert re.search(r"and \d+ more: \d+ running", text)


def test_a_stale_picture_promises_nothing() -> None:
    """A picture of three hours ago has no ETA, no cost at the end, no green, and its ages have grown; looks may be rare."""
    old = dataclasses.replace(FACTS, read_at=NOW - datetime.timedelta(hours=3))
    for size in (Size(80, 24, False), Size(160, 40, False)):
        text = "\n".join(picture(old, size))
        assert "ETA" not in text
        assert "at the end" not in text
        assert re.search(r"bucket +1,200 +3 h 0 min", text)
    rare = dataclasses.replace(old, interval_s=4 * 3600.0)
    assert "RUNNING" in "\n".join(picture(rare, SIZES[0]))
    over = changed(old, state=State.COMPLETED)
    assert "COMPLETED" in "\n".join(picture(over, SIZES[0]))


def test_a_node_has_one_row() -> None:
    """A node that rests and is kept out is told once; one that still trains keeps its phase."""
    kept_out = (
        KeptOut("node-1", NOW + datetime.timedelta(seconds=20), "it flaps"),
        KeptOut("node-2", NOW + datetime.timedelta(seconds=30), "out of memory"),
    )
    facts = changed(members=(member("node-1", resting="it flaps"), member("node-2")))
    text = "\n".join(picture(dataclasses.replace(facts, kept_out=kept_out), Size(100, 30, False)))
    assert re.findall(r"^node-1 .*", text, re.M)[0].split()[:2] == ["node-1", "kept"]
    assert len(re.findall(r"^node-\d ", text, re.M)) == 2
    assert re.search(r"^node-2 +running .* kept out for 30 s: out of memory", text, re.M)


def test_a_small_terminal_tells_the_eta_in_whole() -> None:
    """Where the line of the step has no room for it, it has a line of its own."""
    assert any(
        re.fullmatch(r"ETA +2 h 5 min", line) for line in picture(FACTS, Size(40, 12, False))
    )


def test_a_crash_loop_is_no_good_news() -> None:
    """A restart is good once a step is done that had not been done before."""
    lost = Cause(CauseKind.FAILED, "a", "killed by signal 9")
    members = (Member("a", "a1", "127.0.0.1", 1, 1, 1),)

    def generation(number: int) -> Generation:
        causes = (lost,) if number > 1 else ()
        return Generation(number, members, (1,), "127.0.0.1", 2, None, "r", causes, frontier_step=7)

    bodies = [generation(1), generation(2), Recovery(2, 1.0, 2.0, 3.0, 4.0, 10.0)]
    bodies += [generation(3), Recovery(3, 1.0, 2.0, 3.0, 4.0, 10.0)]
    log = [
        Record(index, 1, "a", "n", NOW.isoformat(), ORIGIN, {}, body)
        for index, body in enumerate(bodies)
    ]
    *_, second, third = events_of(log, 7)
    assert (second.mood, third.mood) == (Mood.WARNING, Mood.WARNING)
    assert second.text.endswith("it did no new step")
    *_, second, third = events_of(log, 8)
    assert (second.mood, third.mood) == (Mood.WARNING, Mood.GOOD)


def test_the_first_picture_does_not_wait_for_the_accounts(tmp_path: Path) -> None:
    """Listing all events may take long: the first look has no goodput, a later one has. An error is told once."""
    store = open_store(f"file://{tmp_path}")
    log = RunLog(store, writer="test")
    member = Member("a", "a1", "127.0.0.1", 1, 1, 1)
    log.append(
        lambda _: Generation(1, (member,), (1,), "127.0.0.1", 2, None, "r", ()), generation=0
    )
    store.write("events/a-1/account.json", AgentAccount("a", 10.0, written_at=20.0).to_bytes())
    listed, calls = threading.Event(), []

    class Slow:
        """Its listing of the events waits; the second one fails."""

        def __getattr__(self, name: str) -> object:
            return getattr(store, name)

        def keys(self, prefix: str) -> list[str]:
            if prefix == "events/":
                calls.append(prefix)
                assert listed.wait(WAIT_S)
                if len(calls) == 2:
                    raise AccessDenied("events/: not allowed")
            return store.keys(prefix)

    clock_s = itertools.count(0.0, 100.0)
    reader = LiveReader(Run(Slow(), log, None), lambda: next(clock_s))  # type: ignore[arg-type]
    assert reader.look().account is None
    listed.set()
    deadline_s = time.monotonic() + WAIT_S
    found, told = None, []
    while found is None or not told:
        assert time.monotonic() < deadline_s
        with contextlib.suppress(AccessDenied):
            told.append("")
            found = reader.look().account or found
            told.pop()
    assert len(told) == 1
    assert found.goodput == 0.0


def test_texts_cannot_steer_the_terminal() -> None:
    """An operator's reason with an escape sequence is shown without it."""
    facts = dataclasses.replace(FACTS, events=(Event(NOW, Mood.PLAIN, "a\x1b[2Jb\x07"),))
    assert not any("\x1b" in line or "\x07" in line for line in picture(facts, SIZES[0]))


def test_the_chart_falls_with_the_loss_and_ignores_spikes() -> None:
    """The first step's loss does not flatten the rest, and gaps are filled."""
    points = [LossPoint(0, 100.0), *(LossPoint(step, 4 - step / 100) for step in range(1, 200))]
    (line,) = chart(points, 20, 1, "12345678")
    assert line == "".join(sorted(line, reverse=True))
    assert (line[0], line[-1]) == ("8", "1")
    assert len(chart(points, 20, 5, "12345678")) == 5
    assert chart(points[:1], 20, 1, "12345678") == []


def test_losses_are_bounded_and_lost_steps_go() -> None:
    """A long run keeps a bounded number of losses, and a new generation drops the steps that it does again."""
    losses = Losses()
    for step in range(20_000):
        losses.add([(step, 1.0), (step, None)])
    assert len(losses.points) <= 4096
    assert (losses.points[0].step, losses.points[-1].step) == (0, 19_999)
    losses.resume(1, 100)
    assert losses.points[-1].step == 19_999, "steps of the generation that was found"
    losses.resume(2, 19_000)
    assert losses.points[-1].step == 19_000


def test_only_a_utf8_locale_gets_unicode() -> None:
    """Python writes UTF-8 even in the C locale, where a terminal may show rubbish."""
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    for environment, only_ascii in (
        ({"LC_ALL": "C", "LANG": "en_US.UTF-8"}, True),
        ({"LANG": "en_US.UTF-8"}, False),
        ({"LC_ALL": "", "LC_CTYPE": "de_DE.utf8"}, False),
        ({}, True),
    ):
        assert shows_only_ascii(environment, console) is only_ascii
    latin = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    assert shows_only_ascii({"LANG": "en_US.UTF-8"}, latin)


class Terminal:
    """`elastic-pt status --watch` in a real terminal of 80 x 24."""

    def __init__(self, url: Path, environment: dict[str, str]) -> None:
        self._main, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        command = [
            sys.executable,
            "-m",
            "elastic_pt",
            "status",
            str(url),
            "--watch",
            "--interval",
            "0.5",
        ]
        env = {**os.environ, "TERM": "xterm-256color", **environment}
        env.pop("COLUMNS", None)
        self.process = subprocess.Popen(
            command, stdin=side, stdout=side, stderr=side, env=env, start_new_session=True
        )
        os.close(side)
        self.bytes = b""

    def read_until(self, *words: str) -> str:
        """All that was written until a later picture has all `words`."""
        begin, deadline_s = len(self.bytes), time.monotonic() + WAIT_S
        while not all(word in self.bytes[begin:].decode(errors="replace") for word in words):
            assert time.monotonic() < deadline_s, (words, self.bytes[begin:][-4000:])
            assert self._read(), (words, self.bytes[begin:][-4000:])
        return self.bytes[begin:].decode(errors="replace")

    def end(self) -> int:
        """The exit code, after all that is still written."""
        deadline_s = time.monotonic() + WAIT_S
        while self._read():
            assert time.monotonic() < deadline_s, self.bytes[-4000:]
        return self.process.wait(WAIT_S)

    def close(self) -> None:
        """Kill it if it still runs."""
        self.process.kill()
        self.process.wait()
        os.close(self._main)

    def _read(self) -> bool:
        ready, _, _ = select.select([self._main], [], [], 0.2)
        if not ready:
            return self.process.poll() is None
        with contextlib.suppress(OSError):
            new = os.read(self._main, 65536)
            self.bytes += new
            return bool(new)
        return False


@contextlib.contextmanager
def terminal(url: Path, **environment: str) -> Iterator[Terminal]:
    """A terminal that is closed in any case."""
    found = Terminal(url, environment)
    try:
        yield found
    finally:
        found.close()


def test_a_run_watched_through_a_terminal(prepared: Trained, tmp_path: Path) -> None:
    """The loss of a node, a bucket that is away for a while, and the loss of all are told in words; Ctrl-C leaves a clean terminal."""
    url = tmp_path / "run"
    config = load_config(prepared.config, [f"run.url={url}", "train.steps=1000000"])
    with Fleet(config, tmp_path / "output") as fleet, contextlib.ExitStack() as stack:
        fleet.start("a")
        fleet.start("b")
        deadline_s = time.monotonic() + WAIT_S
        while elastic_pt("status", url).out.count("running, pid") < 2:
            assert time.monotonic() < deadline_s, fleet.tail("a")
            time.sleep(0.1)
        screen = stack.enter_context(terminal(url, LC_ALL="C.UTF-8"))
        screen.read_until("RUNNING", "tokens/s", "2 of 2 members answer")
        fleet.kill("a")
        screen.read_until("node a lost", "1 node trains again after", "1 of 1 members answer")
        # Else its next commit would begin another directory, in which this view goes on.
        os.kill(fleet.pid("b"), signal.SIGSTOP)
        (url / "log").rename(url / "away")
        screen.read_until("last read ", "UNKNOWN", "last known: running")
        (url / "away").rename(url / "log")
        fleet.kill("b")
        # Only a look that succeeded can know this.
        screen.read_until("DOWN", "no agent answers")
        screen.process.send_signal(signal.SIGINT)
        assert screen.end() == 130
        # The cursor is shown again, and the terminal is back on its usual screen.
        assert screen.bytes.rfind(b"\x1b[?25h") > screen.bytes.rfind(b"\x1b[?25l")
        assert screen.bytes.rfind(b"\x1b[?1049l") > screen.bytes.rfind(b"\x1b[?1049h")
        assert b"Traceback" not in screen.bytes


def test_a_completed_run_leaves_its_last_picture(trained: Trained) -> None:
    """On a terminal and in a pipe: one last picture, exit code 0; plain ASCII without colours where that is asked for."""
    with terminal(trained.run, LC_ALL="C", NO_COLOR="1") as found:
        assert found.end() == 0
        last = found.bytes.rpartition(b"\x1b[?1049l")[2].decode("ascii")
    assert f"{STEPS} of {STEPS}" in last
    assert "the run is completed" in last
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", last)
    piped = elastic_pt("status", trained.run, "--watch")
    assert piped.exit_code == 0
    assert piped.out.count("COMPLETED") == 1
    assert "\x1b" not in piped.out


def test_watch_of_nothing_and_with_json(trained: Trained, tmp_path: Path) -> None:
    """A wrong URL is a mistake at once, not an endless wait; `--watch --json` is refused."""
    assert_one_line_mistake(elastic_pt("status", tmp_path / "none", "--watch"), "no run there")
    assert_one_line_mistake(elastic_pt("status", trained.run, "--watch", "--json"), "--watch")
