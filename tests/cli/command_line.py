"""Helpers that the tests of this folder import by name."""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_pt.cli import run_command_line

STEPS = 240
CONFIG = """\
[run]
url = "{run}"
seed = 3
[data]
url = "{data}"
sequence_length = 16
[model]
layers = 1
width = 16
heads = 2
kv_heads = 1
[train]
steps = 240
global_batch = 4
micro_batch = 1
warmup_steps = 2
[elastic]
join_window_s = 0.2
[checkpoint]
every_steps = 20
keep = 3
[evaluation]
every_steps = 100
rows = 150
"""


@dataclass(frozen=True)
class Result:
    """How one command ended."""

    exit_code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as JSON."""
        return json.loads(self.out)


def elastic_pt(*arguments: object) -> Result:
    """Run one command in this process, as the entry point does."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        exit_code = run_command_line([str(argument) for argument in arguments])
    return Result(exit_code, out.getvalue(), err.getvalue())


def assert_one_line_mistake(result: Result, *parts: str, exit_code: int = 2) -> None:
    """A user's mistake: nothing on standard output, one line on standard error that holds all `parts`."""
    assert result.exit_code == exit_code, result
    assert result.err.startswith("error: "), result
    assert result.err.count("\n") == 1, result
    assert result.out == ""
    for part in parts:
        assert part in result.err, (part, result.err)


@dataclass(frozen=True)
class Trained:
    """A small completed run, its data and its configuration. Tests must not change it."""

    root: Path

    @property
    def config(self) -> Path:
        """The TOML file."""
        return self.root / "run.toml"

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.root / "run"

    @property
    def kept(self) -> tuple[int, int, int]:
        """Steps of the three checkpoints that are kept, newest first (which ones depends on the upload times)."""
        first, second, third = (
            entry["step"] for entry in elastic_pt("checkpoints", self.run, "--json").json
        )
        return first, second, third

    @property
    def data(self) -> Path:
        """The prepared data."""
        return self.root / "data"
