"""`--json`: the output of each command has the keys that docs/operations.md lists."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import Trained, elastic_pt
from typer.main import get_command

from elastic_pt.cli import app
from elastic_pt.config import Config
from elastic_pt.runlog.log import RunLog, record_key
from elastic_pt.runlog.records import Stop
from elastic_pt.store.open import open_store

PAGE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
CONVERTED = Path(__file__).parents[1] / "data" / "converted"
WITHOUT = {"run", "local", "demo", "targets", "report", "dashboards push", "dashboards export"}
AGENTS = {"chaos run", "chaos replay", "chaos campaign", "chaos live"}
"""They start agents or disturb a run: tests/cli/test_cli_chaos.py and chaos_tests have them."""

MACHINE = {"doctor"}
"""Its exit code tells about this machine: tests/cli/test_cli_doctor.py."""


def documented() -> dict[str, tuple[str, list[str]]]:
    """Form and keys of each command's JSON, from the page."""
    _, _, rest = PAGE.partition("<!-- json: begin -->\n")
    found = {}
    for line in rest.partition("<!-- json: end -->")[0].splitlines()[2:]:
        command, form, keys = line.strip("| ").split(" | ")
        found[command.strip("`")] = (form, re.findall(r"`(\w+)`", keys))
    return found


ROWS = documented()


@pytest.fixture
def arguments(trained: Trained, texts: Path, tmp_path: Path) -> dict[str, list[object]]:
    """The arguments for each command."""
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
        "convert": [
            CONVERTED / "plain",
            "--out",
            tmp_path / "data",
            "--tokenizer",
            CONVERTED / "tokenizer.json",
        ],
        "data": [trained.run],
        "status": [trained.run],
        "watch": [trained.run],
        "log": [trained.run],
        "checkpoints": [trained.run, "--verify"],
        "goodput": [trained.run],
        "sync": [trained.run, "--to", f"jsonl:{tmp_path / 'steps.jsonl'}"],
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
        "tidy": [live],
        "config": [trained.config],
        "storage-check": [tmp_path / "store"],
    }


@pytest.mark.parametrize("command", sorted(set(ROWS) - AGENTS - MACHINE))
def test_json_keys_are_the_documented_ones(
    command: str, arguments: dict[str, list[object]]
) -> None:
    """Each documented key is printed, and no other key."""
    result = elastic_pt(*command.split(), *arguments.get(command, []), "--json")
    assert (result.exit_code, result.err) == (0, "")
    form, keys = ROWS[command]
    printed: Any = result.out.splitlines()[0] if form == "object per line" else result.out
    found = json.loads(printed)
    if form == "list":
        found = found[0]
    if command == "config":
        keys = list(Config.model_fields)
    elif command == "status":
        table = PAGE.partition("In its JSON:")[2].partition("\n\n")[2].partition("\n\n")[0]
        first_cells = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
        keys = ["url", *re.findall(r"`(\w+)`", " ".join(first_cells))]
    assert set(found) == set(keys)
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", key) for key in found)


def test_every_command_but_those_that_train_has_json() -> None:
    """Only `run`, `local` and `demo` have no `--json`, and those that write documents: `targets`, `report`, `dashboards`."""
    commands = {}
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        parts = getattr(command, "commands", None)
        commands |= (
            {f"{name} {part}": each for part, each in parts.items()} if parts else {name: command}
        )
    having = {
        name
        for name, command in commands.items()
        if any("--json" in parameter.opts for parameter in command.params)
    }
    assert having == set(commands) - WITHOUT - {"chaos campaign"}
    assert having - {"chaos replay"} == set(ROWS)


def test_error_with_json_is_still_one_line(tmp_path: Path) -> None:
    """Also with `--json`, an expected error is one line on standard error and an exit code."""
    result = elastic_pt("status", tmp_path / "nothing", "--json")
    assert (result.exit_code, result.out) == (2, "")
    assert result.err.startswith("error: ")


def test_unfenced_store_is_shown_in_json(tmp_path: Path) -> None:
    """The verdict is in the JSON, and the exit code agrees with it."""
    result = elastic_pt("storage-check", "memory://bucket/x", "--json")
    assert (result.exit_code, result.json["verdict"]) == (2, "unfenced")


def test_json_of_an_exported_model_has_no_step(trained: Trained, tmp_path: Path) -> None:
    """`generate --json` on an exported directory has the same text in two parts, and no step."""
    assert elastic_pt("export", trained.run, "--out", tmp_path / "model").exit_code == 0
    words = ("generate", tmp_path / "model", "--prompt", "abc", "--max-tokens", 5)
    found = elastic_pt(*words, "--json").json
    assert found["step"] is None
    assert elastic_pt(*words).out == f"{found['prompt']}{found['continuation']}\n"
