"""What a terminal shows of a chaos run, and a pipe."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from elastic_pt.chaos.play import Happening
from elastic_pt.cli.chaos_screen import ChaosScreen, RunPicture
from tests.chaos import results


def picture(until_s: float, *, width: int = 100, rows: int = 40) -> list[str]:
    """The lines of the picture at a moment of the run."""
    drawn = RunPicture(results.scenario(), 5, ascii=False)
    drawn.hear(Happening(until_s, "step", "", number=20))
    for each in results.HAPPENINGS:
        if each.at_s <= until_s:
            drawn.hear(each)
    return [line.plain for line in drawn.lines(width, rows, until_s)]


def row(lines: list[str], start: str) -> list[str]:
    """The words of the first line that starts so."""
    return next(each.split() for each in lines if each.startswith(start))


def test_the_picture_shows_nodes_generation_step_and_faults() -> None:
    """A fault that lasts is beside its node until it is over."""
    lines = picture(8.6)
    assert any("step 20 of 48  generation 2" in each for each in lines)
    assert row(lines, "node-0") == ["node-0", "waiting", "1", "node_freezes"]
    assert row(lines, "node-1") == ["node-1", "training", "2"]
    assert row(lines, " 1")[1:3] == ["4.0", "s"]
    assert row(lines, " 2")[1] == "waits"
    assert any(each.endswith("generation 2: node-1; lost node-0") for each in lines)
    assert row(picture(11.0), " 1")[1:3] == ["4.0-10.0", "s"]
    assert row(picture(11.0), "node-0") == ["node-0", "waiting", "1"]
    assert row(picture(13.0), "node-1")[:3] == ["node-1", "ended:", "killed"]
    assert row(picture(15.0), "node-0")[1] == "starting"


def test_what_comes_before_the_run_does_not_count_as_its_time() -> None:
    """`longest_s` begins when the nodes start; until then no node is shown."""
    drawn = RunPicture(results.scenario(), 5, ascii=False)
    drawn.hear(Happening(0.0, "reference", "first the undisturbed run"))
    lines = [line.plain for line in drawn.lines(100, 40, 32.0)]
    assert lines[-1] == "first its data and the undisturbed run that judges it: 32 s"
    assert not any("node-0" in each for each in lines)
    now_s = iter([100.0, 132.0, 140.0])
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=100, height=30)
    screen = ChaosScreen(console, clock=lambda: next(now_s))
    screen.begin(results.scenario(), 5)
    screen.tell(Happening(2.0, "step", "", number=0))
    console.print(screen.picture())
    assert "10 s of at most 2 min" in output.getvalue()


def test_a_long_hypothesis_has_two_lines() -> None:
    """It is what the user wants to see confirmed."""
    told = results.scenario().model_copy(update={"hypothesis": "word " * 30})
    lines = RunPicture(told, 5, ascii=False).lines(80, 24, 0.0)
    assert [len(line.plain.split()) for line in lines[1:3]] == [16, 14]


@pytest.mark.parametrize(("width", "rows"), [(30, 40), (100, 8), (100, 14)])
def test_the_picture_fits(width: int, rows: int) -> None:
    """No line is longer than the terminal, and there are not more than it has."""
    lines = picture(25.0, width=width, rows=rows)
    assert len(lines) <= rows
    assert max(map(len, lines)) <= width


def shown(*, terminal: bool, passed: bool, place: Path) -> str:
    """All that a whole run prints."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=100, height=30)
    with ChaosScreen(console) as screen:
        screen.begin(results.scenario(), 5)
        for each in results.HAPPENINGS:
            screen.tell(each)
        screen.tell(Happening(24.6, "step", "", number=48))
        screen.end(results.result(place, passed=passed))
    return output.getvalue()


def test_a_pipe_gets_a_line_for_all_that_happens(tmp_path: Path) -> None:
    """Steps are left out; the verdict comes last."""
    lines = shown(terminal=False, passed=True, place=tmp_path).splitlines()
    assert len(lines) == 1 + len(results.HAPPENINGS) + 1
    assert lines[2].split()[:4] == ["4.0", "s", "fault", "node-0"]
    assert lines[-1].startswith("passed  frozen, seed 5  24.5 s")
    assert lines[-1].endswith("recovered within 7.0 s, 5 steps lost")


def test_a_failed_run_names_the_oracle_and_the_command(tmp_path: Path) -> None:
    """What to do next is the last line."""
    lines = shown(terminal=False, passed=False, place=tmp_path).splitlines()
    assert lines[-3].startswith("FAILED  frozen")
    assert "digest: step 48: abc" in lines[-2]
    assert lines[-1].strip() == "replay: elastic-pt chaos run frozen.toml --seed 5"


def test_a_terminal_gets_a_picture_and_keeps_the_verdict(tmp_path: Path) -> None:
    """It is drawn over itself."""
    found = shown(terminal=True, passed=True, place=tmp_path)
    assert "\x1b[" in found
    assert "passed  frozen" in found
