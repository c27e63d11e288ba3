"""Help, usage mistakes, `config` and `storage-check`."""

import json
import subprocess
import sys
import threading
import tomllib
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from command_line import Trained, assert_one_line_mistake, elastic_pt

from elastic_pt.cli import app
from elastic_pt.config import Config, section_type
from elastic_pt.report.status import open_run
from tests.services.fixtures import point_aws_at

COMMANDS = [command.name for command in app.registered_commands if command.name is not None]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str) -> None:
    """`--help` of each command shows examples of that command."""
    result = elastic_pt(command, "--help")
    assert result.exit_code == 0
    assert "Examples" in result.out
    assert f"elastic-pt {command} " in result.out or f"elastic-pt {command}\n" in result.out


def test_version_is_printed() -> None:
    """`--version` names the program and a version."""
    result = elastic_pt("--version")
    assert result.exit_code == 0
    assert result.out.startswith("elastic-pt 0.")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nope"], "nope"),
        (["status"], "RUN_URL"),
        (["status", "x", "--nope"], "--nope"),
        (["local", "run.toml", "--nodes", "0"], "--nodes"),
        (["local", "run.toml", "--nodes", "two"], "two"),
        (["generate", "run"], "--prompt"),
        (["storage-check", "nope://bucket"], "nope://"),
        (["status", " "], "RUN_URL"),
    ],
)
def test_usage_mistakes_are_one_line(arguments: list[str], part: str) -> None:
    """A mistake in the arguments gives one line with the wrong value, and exit code 2."""
    assert_one_line_mistake(elastic_pt(*arguments), part)


def test_config_prints_every_key_with_a_sentence() -> None:
    """Without a file `config` prints all keys of all sections, each below its sentence."""
    result = elastic_pt("config")
    assert result.exit_code == 0
    lines = result.out.splitlines()
    tree = tomllib.loads(result.out)
    for section_name, section_field in Config.model_fields.items():
        keys = section_type(section_field.annotation).model_fields
        assert set(tree[section_name]) == set(keys)
        start = lines.index(f"[{section_name}]")
        for key in keys:
            at = next(
                n for n, line in enumerate(lines[start:], start) if line.startswith(f"{key} = ")
            )
            sentence = lines[at - 1]
            assert sentence.startswith("# ")
            assert sentence.endswith((".", ")")), sentence


def test_config_output_is_a_valid_config(trained: Trained, tmp_path: Path) -> None:
    """What `config` prints can be used as a configuration file, and contains the overrides."""
    printed = elastic_pt("config", trained.config, "--set", "train.steps=77").out
    (tmp_path / "again.toml").write_text(printed)
    assert "steps = 77" in printed
    assert elastic_pt("config", tmp_path / "again.toml").out == printed


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.stepz=1", ["train.stepz = 1", "unknown key; expected steps"]),
        ("train.steps=none", ["train.steps", "none"]),
        ("steps=1", ["steps=1", "section.key=value"]),
        ("model.heads=3", ["model.width", "model.heads"]),
        ("train.beta1=1", ["train.beta1 = 1", "less than 1"]),
        ("train.beta2=1.0", ["train.beta2 = 1.0", "less than 1"]),
        ("elastic.nodes_min=65", ["elastic.nodes_min = 65", "elastic.nodes_max = 64"]),
        (
            "elastic.heartbeat_interval_s=0.6",
            ["elastic.heartbeat_timeout_s = 1.5", "three times", "heartbeat_interval_s = 0.6"],
        ),
        (
            "elastic.heartbeat_timeout_s=1.6",
            ["elastic.takeover_s = 3.0", "twice", "elastic.heartbeat_timeout_s = 1.6"],
        ),
        ("elastic.leave_timeout_s=0", ["elastic.leave_timeout_s = 0", "expected", "0.001"]),
    ],
)
def test_mistakes_in_overrides_name_the_key(override: str, parts: list[str]) -> None:
    """A wrong --set names the key, the value and what is expected, in one line."""
    assert_one_line_mistake(elastic_pt("config", "--set", override), *parts)


def test_missing_or_broken_config_file_is_named(tmp_path: Path) -> None:
    """A configuration file that is missing, a folder or not TOML is named in one line."""
    broken = tmp_path / "broken.toml"
    broken.write_text("[run\n")
    for path in (tmp_path / "missing.toml", tmp_path, broken):
        assert_one_line_mistake(elastic_pt("config", path), str(path))
        assert_one_line_mistake(elastic_pt("local", path, "--nodes", 1), str(path))
    assert_one_line_mistake(elastic_pt("run", tmp_path / "missing.toml"), "missing.toml")


def test_storage_check_ends_with_its_verdict(tmp_path: Path) -> None:
    """The last line is the verdict, and the exit code agrees with it: scripts use either."""
    fenced = elastic_pt("storage-check", tmp_path)
    assert (fenced.exit_code, fenced.out.splitlines()[-1]) == (0, "fenced")
    unfenced = elastic_pt("storage-check", "memory://bucket/x")
    assert (unfenced.exit_code, unfenced.out.splitlines()[-1]) == (2, "unfenced")


def test_storage_check_of_an_unusable_directory_is_a_mistake(tmp_path: Path) -> None:
    """A path that cannot be created or written is an error of one line, not a verdict about a store."""
    (tmp_path / "file").write_text("")
    for path in ("/proc/x", tmp_path / "file" / "x", tmp_path / "file"):
        assert_one_line_mistake(elastic_pt("storage-check", path), f"URL = '{path}'", "expected")


class Unavailable(BaseHTTPRequestHandler):
    """An S3 server that is overloaded."""

    def do_GET(self) -> None:
        """Answer as S3 does when it throttles."""
        self.send_error(503)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Keep silent."""


def test_warnings_stay_out_of_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning about a retry of the store goes to standard error, so a script can parse standard output."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Unavailable) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        point_aws_at(f"http://127.0.0.1:{server.server_port}", "key", "secret", monkeypatch)
        impatient = partial(open_run, timeout_s=10.0)
        monkeypatch.setattr("elastic_pt.report.status.open_run", impatient)
        result = elastic_pt("status", "s3://bucket/run", "--json")
        server.shutdown()
    *warnings, error = result.err.splitlines()
    assert (result.exit_code, result.out) == (3, "")
    assert warnings
    assert {json.loads(warning)["event"] for warning in warnings} == {"store_retry"}
    assert error.startswith("error: ")


def test_light_commands_do_not_import_torch(trained: Trained, tmp_path: Path) -> None:
    """Help and commands that only read a run do not import torch, which takes seconds."""
    commands = [
        ["--help"],
        ["config"],
        ["status", str(trained.run)],
        ["log", str(trained.run)],
        ["checkpoints", str(trained.run)],
        ["storage-check", str(tmp_path)],
    ]
    script = (
        "import sys\n"
        "from elastic_pt.cli import run_command_line\n"
        f"for command in {commands!r}:\n"
        "    assert run_command_line(command) == 0, command\n"
        "    assert 'torch' not in sys.modules, command\n"
    )
    subprocess.run(
        [sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL, timeout=60
    )
