"""Texts of others in a run's log, history and accounts steer no terminal and add no element to a page."""

import json
from pathlib import Path
from typing import Final

import pytest

from elastic_pt.cli import run_command_line
from elastic_pt.runlog.records import Cause, CauseKind, Quarantine, Stop
from tests.report.planted_run import PlantedRun

HOSTILE: Final = "\x1b[2J\x1b]0;owned\x07\r\nforged \x9b31m\u202e <script>alert(1)</script> '\"><img src=x> [/bold]"


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A run in which every free text is hostile."""
    run = PlantedRun(tmp_path / "run")
    run.generation(["a", "b"])
    run.commit([{"skipped": HOSTILE, "sources": {HOSTILE: [1, 3.0]}} for _ in range(3)])
    run.generation(["a"], Cause(CauseKind.LOST, "b", HOSTILE, signature=HOSTILE))
    run.append(Quarantine("", HOSTILE, node=HOSTILE, seconds=5.0))
    run.commit([{"data_wait_cause": HOSTILE, "phases": {HOSTILE: 1.0}}])
    run.append(Stop(HOSTILE, 4))
    place = tmp_path / "run" / "events" / "a-1"
    place.mkdir(parents=True)
    account = {
        "schema": 1,
        "node": HOSTILE,
        "started_at": 1_760_000_000.0,
        "written_at": 1_760_000_010.0,
        "ended": True,
        "reason": HOSTILE,
        "seconds": {"start": 10.0},
        "bucket": HOSTILE,
    }
    (place / "account.json").write_text(json.dumps(account))
    (tmp_path / "run" / "lobby").mkdir()
    (tmp_path / "run" / "lobby" / "%1B[2J!a1!10.0.0.1!1!1!1").touch()
    return f"file://{tmp_path / 'run'}"


@pytest.mark.parametrize(
    "command",
    [
        ["status"],
        ["log"],
        ["log", "--explain"],
        ["log", "--json"],
        ["checkpoints"],
        ["goodput"],
        ["watch"],
        ["targets"],
    ],
    ids=" ".join,
)
def test_commands_steer_no_terminal(
    command: list[str], url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their output has no control character but line ends, and no line that the text has made."""
    run_command_line([command[0], url, *command[1:]])
    told = capsys.readouterr()
    for line in (told.out + told.err).split("\n"):
        assert line.isprintable(), line
        assert not line.startswith("forged"), line
    assert "Traceback" not in told.err
    if command[0] in ("status", "log"):
        assert "forged" in told.out, "they do show the text"


def test_the_page_has_no_element_of_others(url: str, tmp_path: Path) -> None:
    """The report shows such texts, and each is escaped."""
    assert run_command_line(["report", url, "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;" in page
    assert "\x1b" not in page
