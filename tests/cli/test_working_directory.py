"""A working directory is data: no file in it is ever executed, whatever its name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import STEPS, Trained

WAIT_S = 120.0
NAMES = (
    "random", "queue", "contextlib", "types", "logging", "socket", "json", "ssl", "typing", "tempfile", "platform",
    "torch", "numpy", "aiohttp", "structlog", "selectors", "signal", "token", "secrets", "copy",
)  # fmt: skip
"""Modules that agents, fork servers and workers import."""
CONSOLE_SCRIPT = Path(sys.executable).with_name("elastic-pt")
MODULE = [sys.executable, "-m", "elastic_pt"]


@pytest.fixture
def poisoned(tmp_path: Path) -> Path:
    """A working directory with files that record their execution and then fail."""
    folder = tmp_path / "work"
    folder.mkdir()
    for name in NAMES:
        code = f"open({str(tmp_path / 'executed')!r}, 'a').write(__file__)\nraise SystemExit(99)\n"
        (folder / f"{name}.py").write_text(code)
    return folder


@pytest.mark.parametrize(
    ("command", "pythonpath"),
    [(MODULE, None), (MODULE, os.pathsep), ([str(CONSOLE_SCRIPT)], None)],
    ids=["module", "empty entry in PYTHONPATH", "script"],
)
@pytest.mark.parametrize("verb", ["run", "local"])
def test_files_in_the_working_directory_are_not_executed(
    verb: str,
    command: list[str],
    pythonpath: str | None,
    poisoned: Path,
    prepared: Trained,
    tmp_path: Path,
) -> None:
    """`run` and `local` train in a directory that has a random.py, and execute none of its files."""
    if not Path(command[0]).exists():
        pytest.skip("the console script is not installed beside this interpreter")
    environment = dict(os.environ)
    if pythonpath is not None:
        # Python itself imports some modules before it runs our code.
        for name in sys.stdlib_module_names & {path.stem for path in poisoned.iterdir()}:
            if name not in ("random", "queue", "secrets"):
                (poisoned / f"{name}.py").unlink()
        environment["PYTHONPATH"] = environment.get("PYTHONPATH", "") + pythonpath
    options = ["--set", f"run.url={tmp_path / 'run'}"]
    options += ["--nodes", "1"] if verb == "local" else ["--address", "127.0.0.1"]
    result = subprocess.run(
        [*command, verb, str(prepared.config), *options],
        cwd=poisoned,
        env=environment,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert not (tmp_path / "executed").exists(), (tmp_path / "executed").read_text()
    assert result.returncode == 0, result.stderr
    assert f"completed at step {STEPS}" in result.stdout
