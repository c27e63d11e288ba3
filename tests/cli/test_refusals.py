"""A request is carried out, or refused by name with the documented exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Trained, assert_one_line_mistake, elastic_pt

from elastic_pt import errors

WAIT_S = 120.0


def test_unreachable_data_is_a_store_error(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that does not answer gives exit code 3. Only missing data is a user's mistake (2)."""
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


def test_generate_from_an_export_refuses_data(trained: Trained, tmp_path: Path) -> None:
    """`generate` refuses --data for an exported directory instead of ignoring it."""
    (tmp_path / "config.json").write_text("{}")
    command = ("generate", tmp_path, "--prompt", "a", "--data", trained.data)
    assert_one_line_mistake(elastic_pt(*command), f"--data {trained.data}", "tokenizer")


def test_export_to_a_link_is_refused_before_the_run_is_read(tmp_path: Path) -> None:
    """`export` cannot replace a link or a mount point, so it refuses them first."""
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for out in (tmp_path / "link", tmp_path / "dangling", Path("/dev/shm")):
        result = elastic_pt("export", tmp_path / "no run", "--out", out)
        assert_one_line_mistake(result, f"--out {out}", "expected")


def test_error_names_the_option_as_the_user_wrote_it(tmp_path: Path) -> None:
    """The error has the option and its value once, and no internal name."""
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


def test_demo_refuses_a_directory_that_cannot_be_created() -> None:
    """A directory that the demo cannot create is a user's mistake, not a bug."""
    assert_one_line_mistake(
        elastic_pt("demo", "--directory", "/proc/x"), "--directory /proc/x", "expected a directory"
    )


def test_status_does_not_retry_a_refused_connection() -> None:
    """A refused connection is reported at once for every protocol, not after all retries."""
    result = elastic_pt("status", "ftp://127.0.0.1:1/run")
    assert_one_line_mistake(result, "expected a server that answers there", exit_code=3)
    assert "gave up" not in result.err


def test_no_error_has_exit_code_1() -> None:
    """Python ends with 1 when it cannot start a program, so none of our errors uses 1."""
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


def test_unprintable_character_does_not_fail_a_command() -> None:
    """Text that the locale cannot show is escaped, and the command continues."""
    result = subprocess.run(
        [sys.executable, "-c", SHOW],
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=WAIT_S,
    )
    assert result.stdout.splitlines()[-1] == b"caf\\xe9", result.stderr


END = """
import atexit, os
from elastic_pt import cli

class Module:
    def __del__(self, write=os.write):
        write(2, b"taken apart")

taken = Module()
def command_line(arguments):
    atexit.register(print, "handler")
    print("command")
    {end}
cli.run_command_line = command_line
cli.main()
"""


@pytest.mark.parametrize("end", ["return 7", "raise SystemExit(7)"])
def test_process_ends_without_taking_modules_apart(end: str) -> None:
    """That takes torch a second which no account has. Output, handlers and exit code are as usual."""
    program = END.format(end=end)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=WAIT_S)
    assert (result.returncode, result.stdout, result.stderr) == (7, b"command\nhandler\n", b"")
