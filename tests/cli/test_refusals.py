"""What was asked is done, or refused by name with the exit code that the documents give for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Trained, assert_one_line_mistake, elastic_pt

from elastic_pt import errors

WAIT_S = 120.0


def test_data_that_cannot_be_reached_is_no_mistake(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that does not answer is code 3, and only data that is not there is the user's mistake."""
    for name, value in (
        ("ENDPOINT_URL", "http://127.0.0.1:9"),
        ("ACCESS_KEY_ID", "x"),
        ("SECRET_ACCESS_KEY", "y"),
    ):
        monkeypatch.setenv(f"AWS_{name}", value)
    result = elastic_pt("eval", trained.run, "--data", "s3://bucket/data")
    assert_one_line_mistake(result, "s3://bucket/data", "--data URL", exit_code=3)
    result = elastic_pt("eval", trained.run, "--data", trained.root / "nothing")
    assert_one_line_mistake(result, "nothing", "--data URL")


def test_an_exported_directory_takes_no_data(trained: Trained, tmp_path: Path) -> None:
    """`generate` says that it has no use for --data, instead of passing over it."""
    (tmp_path / "config.json").write_text("{}")
    command = ("generate", tmp_path, "--prompt", "a", "--data", trained.data)
    assert_one_line_mistake(elastic_pt(*command), f"--data {trained.data}", "tokenizer")


def test_an_export_refuses_a_link_before_the_work(tmp_path: Path) -> None:
    """What a finished directory cannot replace is refused before the run is read."""
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for out in (tmp_path / "link", tmp_path / "dangling", Path("/dev/shm")):
        result = elastic_pt("export", tmp_path / "no run", "--out", out)
        assert_one_line_mistake(result, f"--out {out}", "expected")


def test_an_option_is_refused_by_its_own_name(tmp_path: Path) -> None:
    """The error names the option and its value as the user wrote them, once, and no internal name."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    prepare = ("prepare", tmp_path / "texts", "--out", tmp_path / "out")
    for command, part in (
        ((*prepare, "--vocab-size", 3), "--vocab-size 3: expected"),
        ((*prepare, "--held-out", 2), "--held-out 2.0: expected"),
        ((*prepare, "--allow-left-out", 2), "--allow-left-out 2.0: expected"),
        (("generate", tmp_path, "--prompt", "a", "--seed", 2**63), f"error: --seed {2**63}: Input"),
        (("generate", tmp_path, "--prompt", "a", "--seed=-1"), "error: --seed: Input"),
    ):
        assert_one_line_mistake(elastic_pt(*command), part, "expected")


def test_a_demo_refuses_a_directory_that_cannot_be_made() -> None:
    """A directory that the system does not let the demo make is the user's mistake, not a bug."""
    assert_one_line_mistake(
        elastic_pt("demo", "--directory", "/proc/x"), "--directory /proc/x", "expected a directory"
    )


def test_a_reading_command_does_not_retry_a_host_that_refuses() -> None:
    """A host that refuses connections is told at once for every protocol, not after the time of all retries."""
    result = elastic_pt("status", "ftp://127.0.0.1:1/run")
    assert_one_line_mistake(result, "expected a server that answers there", exit_code=3)
    assert "gave up" not in result.err


def test_no_error_has_the_exit_code_of_python_itself() -> None:
    """1 is what Python ends with when it cannot start a program; no error of ours looks like that."""
    kinds = [each for each in vars(errors).values() if isinstance(each, type)]
    assert all(kind.exit_code > 1 for kind in kinds if issubclass(kind, errors.ElasticPtError))


SHOW = """
import sys
from rich.console import Console
from elastic_pt import cli
sys.argv = ["elastic-pt", "--version"]
try:
    cli.main()
except SystemExit:
    Console().print("caf\\u00e9")
"""


def test_a_locale_without_a_character_ends_no_command() -> None:
    """Text that the terminal cannot show is escaped, and the command goes on."""
    result = subprocess.run(
        [sys.executable, "-c", SHOW],
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=WAIT_S,
    )
    assert result.stdout.splitlines()[-1] == b"caf\\xe9", result.stderr
