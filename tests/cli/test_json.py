"""`--json`: what a command prints for programs has the keys that docs/operations.md lists."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import Trained, elastic_pt
from typer.main import get_command

from elastic_pt.cli import app
from elastic_pt.runlog.log import RunLog, record_key
from elastic_pt.runlog.records import Stop
from elastic_pt.store.open import open_store

PAGE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
WITHOUT = {"run", "local", "demo"}


def documented() -> dict[str, tuple[str, list[str]]]:
    """Form and keys of each command's JSON, as the page has them."""
    _, _, rest = PAGE.partition("<!-- json: begin -->\n")
    found = {}
    for line in rest.partition("<!-- json: end -->")[0].splitlines()[2:]:
        command, form, keys = line.strip("| ").split(" | ")
        found[command.strip("`")] = (form, re.findall(r"`(\w+)`", keys))
    return found


ROWS = documented()


@pytest.fixture
def arguments(trained: Trained, texts: Path, tmp_path: Path) -> dict[str, list[object]]:
    """What each command is called with."""
    failed = tmp_path / "failed"
    shutil.copytree(trained.run, failed)
    log = RunLog(open_store(f"file://{failed}"), writer="test")
    (failed / record_key(log.refresh().length - 1)).unlink()
    log = RunLog(open_store(f"file://{failed}"), writer="test")
    number = log.refresh().generation_number
    shutil.copytree(failed, live := tmp_path / "live")
    log.append(lambda _: Stop("diverged: loss is nan", 240), generation=number)
    return {
        "prepare": [texts, "--out", tmp_path / "data", "--vocab-size", 300],
        "status": [trained.run],
        "log": [trained.run],
        "checkpoints": [trained.run, "--verify"],
        "digest": [trained.run],
        "generate": [trained.run, "--prompt", "abc", "--max-tokens", 3],
        "eval": [trained.run],
        "export": [trained.run, "--out", tmp_path / "model"],
        "checkpoint": [live],
        "pause": [live],
        "resume": [live],
        "drain": [live, "--node", "b"],
        "stop": [live, "--reason", "a test"],
        "reopen": [failed, "--why", "a test"],
        "config": [trained.config],
        "storage-check": [tmp_path / "store"],
    }


@pytest.mark.parametrize("command", ROWS)
def test_the_keys_are_the_documented_ones(command: str, arguments: dict[str, list[object]]) -> None:
    """A script that follows the page finds each key; a key that is not on the page is not printed."""
    result = elastic_pt(command, *arguments[command], "--json")
    assert (result.exit_code, result.err) == (0, "")
    form, keys = ROWS[command]
    printed: Any = result.out.splitlines()[0] if form == "object per line" else result.out
    found = json.loads(printed)
    if form == "list":
        found = found[0]
    if command == "config":
        keys = ["run", "data", "model", "train", "elastic", "checkpoint", "telemetry", "store"]
    elif command == "status":
        table = PAGE.partition("In its JSON:")[2].partition("\n\n")[2].partition("\n\n")[0]
        first_cells = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
        keys = ["url", *re.findall(r"`(\w+)`", " ".join(first_cells))]
    assert set(found) == set(keys)
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", key) for key in found)


def test_every_other_command_has_json() -> None:
    """Only commands whose result is the run itself have no `--json`."""
    commands = get_command(app).commands  # type: ignore[attr-defined]
    having = {
        name
        for name, command in commands.items()
        if any("--json" in parameter.opts for parameter in command.params)
    }
    assert having == set(commands) - WITHOUT == set(ROWS)


def test_an_error_is_told_in_the_same_way(tmp_path: Path) -> None:
    """With `--json`, too, an expected error is one line on standard error and an exit code."""
    result = elastic_pt("status", tmp_path / "nothing", "--json")
    assert (result.exit_code, result.out) == (2, "")
    assert result.err.startswith("error: ")


def test_an_unfenced_store_is_told_in_json(tmp_path: Path) -> None:
    """The verdict is in the JSON, and the exit code follows it."""
    result = elastic_pt("storage-check", "memory://bucket/x", "--json")
    assert (result.exit_code, result.json["verdict"]) == (2, "unfenced")


def test_an_exported_model_has_no_step(trained: Trained, tmp_path: Path) -> None:
    """`generate --json` on a directory that `export` wrote: the same text in parts, and no step."""
    assert elastic_pt("export", trained.run, "--out", tmp_path / "model").exit_code == 0
    words = ("generate", tmp_path / "model", "--prompt", "abc", "--max-tokens", 5)
    found = elastic_pt(*words, "--json").json
    assert found["step"] is None
    assert elastic_pt(*words).out == f"{found['prompt']}{found['continuation']}\n"
