"""The demo, made small: real nodes, one is killed, and the commands that it recommends work."""

import io
import shlex
import sys
from pathlib import Path

import pytest
from command_line import elastic_pt
from rich.console import Console
from rich.text import Text

from elastic_pt.cli import demo
from elastic_pt.cli.demo_screen import PHASES, Screen, command_line, live_view, next_commands
from elastic_pt.cli.local import live_view_of

SMALL = {"width = 96": "width = 16", "layers = 2": "layers = 1", "steps = 300": "steps = 90"}


@pytest.mark.chaos
def test_demo_shows_equal_digests_and_working_commands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A node is killed, the digests are equal, and each command of `Try next` works on what the demo left."""
    text = demo._CONFIG
    for large, small in SMALL.items():
        assert large in text
        text = text.replace(large, small)
    monkeypatch.setattr(demo, "_CONFIG", text)
    monkeypatch.setattr(demo, "CORPUS_CHARACTERS", 400_000)
    monkeypatch.setattr(demo, "VOCABULARY", 300)
    monkeypatch.chdir(tmp_path)
    shown = elastic_pt("demo", "--directory", tmp_path / "shown")
    assert shown.exit_code == 0, shown
    assert "SIGKILL to node-" in shown.out
    assert "The weights are equal, bit for bit." in shown.out
    assert "The model continues 'def __init__(self':" in shown.out
    place = tmp_path / "shown" / "1"
    watching = live_view(place / "disturbed")
    assert shown.out.index(" ".join(watching)) < shown.out.index("SIGKILL to node-")
    assert elastic_pt(*watching).exit_code == 0
    assert (place / "disturbed" / demo.PLOT_NAME).stat().st_size > 10_000
    assert "Failures survived" in (place / "disturbed" / demo.REPORT_NAME).read_text()
    for arguments, _ in next_commands(place):
        assert " ".join(arguments[:2]) in shown.out
        result = elastic_pt(*arguments)
        assert result.exit_code == 0, result
    # The last command is the digest of the run that was trained again.
    assert result.out.split("sha256=")[1].strip() in shown.out


def test_printed_commands_can_be_pasted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A command that `local` or the demo prints is, for a shell, this program with its arguments as words."""
    monkeypatch.chdir(tmp_path)
    for called, program in (
        ("/any/elastic_pt/__main__.py", [sys.executable, "-m", "elastic_pt"]),
        ("/my tools/elastic-pt", ["/my tools/elastic-pt"]),
    ):
        monkeypatch.setattr(sys, "argv", [called])
        words = [*program, "status", "my run", "--watch"]
        assert shlex.split(command_line(["status", "my run", "--watch"])) == words
        assert shlex.split(live_view_of(f"file://{tmp_path}/my run")) == words


def test_each_phase_ends_with_a_full_bar() -> None:
    """All phases have a bar from the start. A phase that has ended has a full bar and a stopped clock."""
    written = io.StringIO()
    with Screen(Console(file=written, force_terminal=True, width=100)) as screen:
        for number, phase in enumerate(PHASES):
            screen.begin(phase, f"{phase} begins")
            screen.progress(3, 9, "at work")
            screen.end(f"ended as number {number}")
    lines = Text.from_ansi(written.getvalue()).plain.splitlines()
    last = [line for line in lines if "9/9" in line][-len(PHASES) :]
    for number, (phase, line) in enumerate(zip(PHASES, last, strict=True)):
        assert line.split()[0] == phase
        assert f"ended as number {number}" in line
