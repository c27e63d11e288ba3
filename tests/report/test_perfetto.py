"""`log --explain --perfetto`: a trace in the Chrome format, whose slices nest, with the words of `--explain`."""

import json
from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from elastic_pt.cli import run_command_line
from elastic_pt.report.explanation import explain
from elastic_pt.report.perfetto import steps_per_slice, trace_events
from elastic_pt.runlog.records import (
    COMPLETED,
    ORIGIN,
    Body,
    Cause,
    CauseKind,
    Checkpoint,
    Commit,
    Control,
    Generation,
    Member,
    Record,
    Recovery,
    Request,
    Stop,
    Verb,
)

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
STORED = Path(__file__).parents[1] / "stored_run" / "0.1" / "run"
LOST_B = Cause(CauseKind.LOST, "b", "its address refuses connections", detect_s=0.5)
JOINED_D = Cause(CauseKind.JOINED, "d")
PAUSE = Request(Verb.PAUSE, "ada@host", "a new disk", index=6)


def generation(number: int, nodes: str, *causes: Cause, agree_s: float = 0.25) -> Generation:
    """A GENERATION of one-worker nodes named by letters."""
    members = tuple(Member(node, f"{node}1", "127.0.0.1", 1, 1, 1) for node in nodes)
    reason = "; ".join(map(str, causes)) or "started"
    slots = (1,) * len(nodes)
    return Generation(
        number, members, slots, "127.0.0.1", 2, None, reason, causes, 9, agree_s=agree_s
    )


def commit(step: int) -> Commit:
    """A COMMIT."""
    return Commit((Checkpoint(step, 1, f"ckpt/{step}", 1, "", 2.5),), "history")


def recovery(number: int) -> Recovery:
    """A RECOVERY of 1 s."""
    return Recovery(number, start_s=0.3, group_s=0.2, restore_s=0.1, step_s=0.4, total_s=1.25)


LIFE: list[tuple[float, Body]] = [
    (0, generation(1, "abc", agree_s=0.0)),
    (1, recovery(1)),
    (5, commit(10)),
    (10, generation(2, "ac", LOST_B)),
    (11, recovery(2)),
    (20, commit(20)),
    (21, Control(PAUSE, (PAUSE,), 20)),
    (22, Control(Request(Verb.PAUSE, "ada@host", "a new disk", index=6, done=True), (), 20)),
    (60, generation(3, "acd", JOINED_D)),
    (61, recovery(3)),
    (70, commit(30)),
    (71, Stop(COMPLETED, 30)),
]


def records(life: Iterable[tuple[float, Body]]) -> list[Record]:
    """A log of these bodies, each with its second."""
    number, found = 0, []
    for index, (second, body) in enumerate(life):
        number = body.number if isinstance(body, Generation) else number
        time = (BEGIN + timedelta(seconds=second)).isoformat(timespec="milliseconds")
        found.append(Record(index, number, "a", "", time, ORIGIN, {}, body))
    return found


LINES = [
    {"generation": 1 + (step - 1) // 10, "step": step, "seconds": 0.25, "loss": 8 / step}
    for step in range(1, 31)
]


def trace(life: Iterable[tuple[float, Body]] = LIFE, per_slice: int = 1) -> list[dict[str, Any]]:
    """The checked trace of a log."""
    events = list(trace_events(records(life), LINES, per_slice))
    check(events)
    return events


def check(events: list[dict[str, Any]]) -> None:
    """The fields of the format are there, every track has a name, and slices of one track nest."""
    named = {
        (each["pid"], each["tid"] if each["name"] == "thread_name" else 0)
        for each in events
        if each["ph"] == "M" and each["name"] in ("thread_name", "process_name")
    }
    tracks = defaultdict(list)
    for each in events:
        assert each["ph"] in ("X", "i", "C", "M"), each
        assert isinstance(each["name"], str)
        assert each["name"]
        assert all(isinstance(each[key], int) for key in ("pid", "tid", "ts")), each
        assert each["ts"] >= 0
        assert (each["pid"], each["tid"]) in named, each
        if each["ph"] == "X":
            assert each["dur"] >= 0, each
            tracks[each["pid"], each["tid"]].append((each["ts"], each["ts"] + each["dur"], each))
        elif each["ph"] == "i":
            assert each["s"] in ("t", "p", "g")
        elif each["ph"] == "C":
            assert all(isinstance(value, int | float) for value in each["args"].values())
    for slices in tracks.values():
        open_until: list[int] = []
        for begin, end, each in sorted(slices, key=lambda found: (found[0], -found[1])):
            while open_until and open_until[-1] <= begin:
                open_until.pop()
            assert not open_until or end <= open_until[-1], f"overlaps: {each}"
            open_until.append(end)


def slices_of(
    events: list[dict[str, Any]], process: str, thread: str
) -> list[tuple[str, int, int]]:
    """The slices of a track: name, begin and duration in milliseconds."""
    names = {
        (each["pid"], each["tid"]): each["args"]["name"]
        for each in events
        if each["ph"] == "M" and each["name"] in ("thread_name", "process_name")
    }
    return [
        (each["name"], round(each["ts"] / 1e3), round(each["dur"] / 1e3))
        for each in events
        if each["ph"] == "X"
        and (names[each["pid"], 0], names[each["pid"], each["tid"]]) == (process, thread)
    ]


def test_a_node_has_its_generations_and_their_phases() -> None:
    """A survivor's track has each generation with the phases of its start, how long was needed to detect and agree, and the pause."""
    phases = [("start", 300), ("process group", 200), ("restore", 100), ("first step", 400)]

    def started(begin: int) -> list[tuple[str, int, int]]:
        found = []
        for name, duration in phases:
            found.append((name, begin, duration))
            begin += duration
        return found

    assert slices_of(trace(), "node a", "membership") == [
        ("generation 1 (3 nodes, world 3)", 0, 9250),
        *started(0),
        ("detect", 9250, 500),
        ("agree", 9750, 250),
        ("generation 2 (2 nodes, world 2)", 10_000, 12_000),
        *started(10_000),
        ("paused: pause asked for by ada@host: a new disk", 22_000, 37_750),
        ("agree", 59_750, 250),
        ("generation 3 (3 nodes, world 3)", 60_000, 11_000),
        *started(60_000),
    ]
    assert [name for name, _, _ in slices_of(trace(), "node b", "membership")] == [
        "generation 1 (3 nodes, world 3)",
        *(name for name, _ in phases),
    ]


def test_names_are_those_of_explain() -> None:
    """Each generation's name begins its explanation, and each failure's name is a clause of it, on the track of its node."""
    events = trace()
    texts = [str(each) for each in explain(records(LIFE))]
    slices = [each for each in events if each["ph"] == "X" and "text" in each["args"]]
    for each in slices:
        if each["args"]["text"] != "started":
            assert each["args"]["text"].startswith(each["name"] + ": ")
            assert each["args"]["text"] in texts
    failures = [each for each in events if each["ph"] == "i" and "generation" in each["args"]]
    assert [(each["name"], each["ts"]) for each in failures] == [
        ("started", 0),
        (
            "node b lost at step 9: its address refuses connections, "
            "noticed 0.50 s after its last sign of life",
            9_250_000,
        ),
        ("node d joined after step 9", 60_000_000),
        ("pause asked for by ada@host: a new disk", 59_750_000),
    ]
    assert all(any(each["name"] in text for text in texts) for each in failures[1:])


def test_records_and_steps_are_there() -> None:
    """Commits, requests and the end are instants. Steps follow each other within their generation."""
    events = trace()
    instants = [each["name"] for each in events if each["ph"] == "i" and each["tid"] == 3]
    assert instants == [
        "commit step 10",
        "commit step 20",
        "pause asked for by ada@host: a new disk",
        "done: pause asked for by ada@host: a new disk",
        "commit step 30",
        "end: completed",
    ]
    steps = slices_of(events, "run", "steps")
    assert [name for name, _, _ in steps] == [f"step {step}" for step in range(1, 31)]
    assert steps[10] == ("step 11", 10_600, 250)
    losses = [each["args"]["loss"] for each in events if each["name"] == "loss"]
    assert losses == [line["loss"] for line in LINES]


def test_many_steps_share_slices() -> None:
    """Beyond the limit neighbours of one generation share a slice, and its name says so. No time is left out."""
    assert steps_per_slice(records(LIFE), slices_max=30) == 1
    assert steps_per_slice(records(LIFE), slices_max=8) == 4
    steps = slices_of(trace(per_slice=4), "run", "steps")
    assert steps[:3] == [
        ("steps 1 to 4", 600, 1000),
        ("steps 5 to 8", 1600, 1000),
        ("steps 9 to 10", 2600, 500),
    ]
    assert sum(duration for _, _, duration in steps) == 30 * 250


def test_steps_without_a_generation_are_left_out() -> None:
    """A history line that lacks its generation, as an older run may have, is no error: its step has no slice."""
    lines = [{key: line[key] for key in ("step", "seconds")} for line in LINES[:5]] + LINES[5:]
    events = list(trace_events(records(LIFE), lines, 1))
    check(events)
    assert next(name for name, _, _ in slices_of(events, "run", "steps")) == "step 6"


@pytest.mark.parametrize("skew_s", [-3600.0, -30.0, -0.2, 0.2, 30.0, 3600.0])
@pytest.mark.parametrize("skewed", range(len(LIFE)))
def test_a_skewed_clock_breaks_no_track(skewed: int, skew_s: float) -> None:
    """With one record's clock ahead or behind, the order is the log's and slices still nest."""
    trace(
        (second + (skew_s if index == skewed else 0.0), body)
        for index, (second, body) in enumerate(LIFE)
    )


def test_phases_end_with_their_generation() -> None:
    """A generation that broke before its start was over has only the part of its phases until then."""
    events = trace(
        [(0, generation(1, "abc")), (1, recovery(1)), (1.1, generation(2, "ac", LOST_B))]
    )
    assert slices_of(events, "node b", "membership") == [
        ("generation 1 (3 nodes, world 3)", 0, 350),
        ("start", 0, 300),
        ("process group", 300, 50),
        ("restore", 350, 0),
        ("first step", 350, 0),
    ]


def test_the_command_writes_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file is JSON with the events of the run. Standard output is that of --explain."""
    path = tmp_path / "trace.json"
    assert run_command_line(["log", str(STORED), "--explain", "--perfetto", str(path)]) == 0
    events = json.loads(path.read_text())["traceEvents"]
    check(events)
    assert [name for name, _, _ in slices_of(events, "run", "steps")] == [
        f"step {step}" for step in range(1, 21)
    ]
    assert capsys.readouterr().out == "nothing to explain: the members have not changed yet\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--perfetto", "x"], "--perfetto x: draws explanations; expected --explain too"),
        (["--explain", "--perfetto", "/"], "--perfetto /: Is a directory; expected a file"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistake in the options is one line with exit code 2."""
    assert run_command_line(["log", str(STORED), *arguments]) == 2
    assert message in capsys.readouterr().err
