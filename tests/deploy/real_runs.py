"""What tests of several platforms share: a small corpus, and commands called as a user calls them."""

import contextlib
import io
from pathlib import Path

from elastic_pt.cli import run_command_line


def elastic_pt(*arguments: object) -> str:
    """What one command prints, in this process; it must succeed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        exit_code = run_command_line([str(argument) for argument in arguments])
    assert exit_code == 0, err.getvalue()
    return out.getvalue()


def prepare(folder: Path, data_url: str) -> None:
    """Prepare a made-up corpus, whose texts are in `folder`, at `data_url`."""
    folder.mkdir()
    for number in range(8):
        words = (f"{number * word % 997:x}" for word in range(2000))
        (folder / f"{number}.txt").write_text(" ".join(words))
    elastic_pt("prepare", folder, "--out", data_url, "--vocab-size", 300)
