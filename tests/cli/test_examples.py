"""The examples of `--help` are commands that work: each one is taken from the help text and run.

They run in a working directory that has what they name: texts, data, a configuration, a completed run, and one that
has not ended. A bucket is a directory here, and the step of an example is one that the run keeps.
"""

import json
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Result, Trained, elastic_pt
from rich.text import Text
from typer.main import get_command

from elastic_pt.cli import app
from elastic_pt.runlog.log import RunLog, record_key
from elastic_pt.runlog.records import Stop
from elastic_pt.store.open import open_store

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

WAIT_S = 120.0
CONVERTED = Path(__file__).parents[1] / "data" / "converted"
"""Files of other trainers, and their tokenizer."""


def examples_of(epilog: str | None) -> list[str]:
    """The lines below the heading at the end of a help text."""
    heading, *lines = Text.from_markup(epilog or "").plain.splitlines()
    assert heading == "Examples"
    return lines


ROOT = get_command(app)
EXAMPLES = {
    name: examples_of(command.epilog)
    for name, command in {"": ROOT, **ROOT.commands}.items()  # type: ignore[attr-defined]
}
# Each one once, and without the demo, which tests/cli/test_demo.py runs.
RUN_HERE = dict.fromkeys(
    line for name, lines in EXAMPLES.items() for line in lines if name != "demo"
)


@pytest.fixture(scope="session")
def place(trained: Trained, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory as the examples expect it. Each example gets a copy."""
    root = tmp_path_factory.mktemp("examples") / "place"
    for folder in ("books", "more", "src"):
        shutil.copytree(texts, root / folder)
        # Enough words for the vocabulary of the examples.
        rng = random.Random(folder)
        words = (
            "".join(rng.choices("abcdefghijklmno", k=rng.randint(3, 8))) for _ in range(40_000)
        )
        (root / folder / "words.txt").write_text(" ".join(words))
    lines = (
        json.dumps({"text": f"{n} {path.read_text()}"}) for n, path in enumerate(texts.iterdir())
    )
    (root / "crawl.jsonl.zst").write_bytes(zstd.compress("\n".join(lines).encode()))
    shutil.copytree(trained.data, root / "data")
    shutil.copy(CONVERTED / "tokenizer.json", root / "tokenizer.json")
    shutil.copytree(CONVERTED / "nanogpt", root / "openwebtext")
    for name in ("corpus", "code"):
        for suffix in ("bin", "idx"):
            shutil.copy(CONVERTED / f"plain.{suffix}", root / f"{name}_text_document.{suffix}")
    for run in ("runs/first", "bucket/run"):
        shutil.copytree(trained.run, root / run)
    for run in ("runs/live", "bucket/live"):
        shutil.copytree(trained.run, root / run)
        log = RunLog(open_store(f"file://{root / run}"), writer="test")
        (root / run / record_key(log.refresh().length - 1)).unlink()
    config = trained.config.read_text().replace(str(trained.run), "runs/new")
    (root / "run.toml").write_text(config.replace("steps = 240", "steps = 30"))
    (root / "shared").mkdir()
    return root


def arguments_of(example: str, here: Path, step: int) -> list[str]:
    """The arguments of an example, for this working directory, without the pipe or redirection of its output."""
    text = example.replace("s3://bucket", f"file://{here}/bucket")
    text = text.replace("https://hc-ping.com", "http://127.0.0.1:9")
    text = text.replace("/mnt/shared", f"{here}/shared").replace("--step 2000", f"--step {step}")
    program, *words = shlex.split(re.split(r" [|>] ", text)[0])
    assert program == "elastic-pt"
    return words


def make_ready(words: list[str], here: Path) -> None:
    """Prepare what only this command needs."""
    if words[0] in ("prepare", "convert"):
        shutil.rmtree(here / "data")
    if words[:2] == ["generate", "model/"]:
        assert elastic_pt("export", "runs/first", "--out", "model").exit_code == 0
    if words[0] == "reopen":
        for run in ("runs/first", "bucket/run"):
            log = RunLog(open_store(f"file://{here / run}"), writer="test")
            (here / run / record_key(log.refresh().length - 1)).unlink()
        log = RunLog(open_store(f"file://{here / 'runs/first'}"), writer="test")
        log.append(
            lambda _: Stop("diverged: loss is nan", 240), generation=log.refresh().generation_number
        )


def run_in_place(words: list[str]) -> Result:
    """Run a command. An agent runs in a separate process, because it forks and sets signal handlers."""
    if words[0] != "run":
        return elastic_pt(*words)
    command = [sys.executable, "-m", "elastic_pt", *words, "--address", "127.0.0.1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("example", RUN_HERE, ids=lambda line: line.removeprefix("elastic-pt "))
def test_help_example_works(
    example: str, place: Path, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user can copy an example into a directory that has what it names, and it works."""
    here = tmp_path / "here"
    shutil.copytree(place, here)
    monkeypatch.chdir(here)
    words = arguments_of(example, here, trained.kept[1])
    make_ready(words, here)
    result = run_in_place(words)
    assert result.exit_code == 0, result
    if "| jq .kind" in example:
        assert all(json.loads(line)["kind"] for line in result.out.splitlines())
    elif "--json" in example:
        assert result.json


def test_each_command_has_an_example() -> None:
    """The help of each command, and of the program, ends with at least one example of that command."""
    for name, lines in EXAMPLES.items():
        assert lines, name
        assert all(line.startswith(f"elastic-pt {name}".rstrip()) for line in lines), name
        printed = elastic_pt(*([name] if name else []), "--help").out
        ends = re.sub(r"\s+", "", printed)
        assert ends.endswith(re.sub(r"\s+", "", "Examples" + "".join(lines))), name


COMPLETE = """
eval "$(elastic-pt --show-completion)"
complete -p elastic-pt >/dev/null || exit 9
answer() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _elastic_pt_completion elastic-pt; echo "${COMPREPLY[@]}"; }
answer elastic-pt checkpoints
answer elastic-pt digest --st
"""


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], list[str]]:
    """A function that runs a script in bash, where `elastic-pt` is this program; returns its output's lines."""
    called = tmp_path / "bin" / "elastic-pt"
    called.parent.mkdir()
    called.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m elastic_pt "$@"\n')
    called.chmod(0o755)

    def run(script: str) -> list[str]:
        done = subprocess.run(
            ["bash", "-c", f"PATH={shlex.quote(str(called.parent))}:$PATH\n{script}"],
            capture_output=True,
            text=True,
            timeout=WAIT_S,
        )
        assert done.returncode == 0, done
        return done.stdout.splitlines()

    return run


def test_bash_completes_commands_and_options(program: Callable[[str], list[str]]) -> None:
    """With the output of `--show-completion`, bash completes the names of commands and options."""
    assert program(COMPLETE) == ["checkpoints", "--step"]
