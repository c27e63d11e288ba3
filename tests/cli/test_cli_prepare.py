"""`prepare` as a user calls it: what is refused, what is listed, Ctrl-C, and worst-case documents."""

import gzip
import json
import os
import pty
import random
import re
import resource
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import assert_one_line_mistake, elastic_pt

LIMIT_S = 120.0


def _words(seed: int, count: int) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefgh", k=rng.randint(2, 9))) for _ in range(count))


def test_summary_lists_left_out_files_by_path(tmp_path: Path) -> None:
    """The summary names the first ten files that were left out, and the file that lists all of them."""
    (tmp_path / "in").mkdir()
    for number in range(200):
        (tmp_path / "in" / f"{number}.txt").write_text(_words(number, 50))
    for number in range(12):
        (tmp_path / "in" / f"{number:02}.csv").write_text("x")
    result = elastic_pt(
        "prepare", tmp_path / "in", "--out", tmp_path / "out", "--vocab-size", "260"
    )
    assert result.exit_code == 0
    listed = [line for line in result.out.splitlines() if line.startswith("left out")]
    assert listed[:10] == [
        f"left out     file://{tmp_path}/in/{number:02}.csv: unknown_suffix" for number in range(10)
    ]
    assert listed[10:] == [f"left out     … 2 more lines in file://{tmp_path}/out/left-out.jsonl"]


def test_source_with_too_many_left_out_files_is_refused(tmp_path: Path) -> None:
    """The error names the share and the option that allows it. With that option the corpus is prepared."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text(_words(1, 500))
    (tmp_path / "in" / "b.csv").write_text("x")
    command = ["prepare", tmp_path / "in", "--out", tmp_path / "out", "--vocab-size", "260"]
    assert_one_line_mistake(elastic_pt(*command), "b.csv", "1 of 2", "--allow-left-out 0.51")
    assert elastic_pt(*command, "--allow-left-out", "0.51").exit_code == 0


def test_contradicting_arguments_are_refused(tmp_path: Path) -> None:
    """A given tokenizer has its own vocabulary, so `--vocab-size` is refused, not ignored."""
    command = ["prepare", "x.txt", "--out", tmp_path, "--tokenizer", "t.json"]
    assert_one_line_mistake(elastic_pt(*command, "--vocab-size", "300"), "--vocab-size 300")
    assert_one_line_mistake(
        elastic_pt("prepare", "x.txt", "--out", tmp_path, "--allow-left-out", "2"), "2.0"
    )


def test_worst_case_documents_are_prepared_in_linear_time(tmp_path: Path) -> None:
    """Documents without spaces, of one character, of spaces, and in one line: 4 MB within a limit on CPU time.

    Quadratic time would take an hour.
    """
    (tmp_path / "in").mkdir()
    rng = random.Random(1)
    long = "".join(rng.choices("abcdefghij", k=1_000_000))
    texts = [long, "a" * 1_000_000, "x" + " " * 1_000_000 + "y", "é" * 500_000, "ab" * 500_000]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "in" / "a.jsonl").write_text(lines)
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode(), 1))
    (tmp_path / "in" / "c.txt").write_text(long)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (int(LIMIT_S), int(LIMIT_S)))

    command = [sys.executable, "-m", "elastic_pt", "prepare", "in", "--out", "out"]
    done = subprocess.run(
        [*command, "--vocab-size", "1000"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=limit,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "5 duplicate" in done.stdout


@pytest.fixture(scope="module")
def slow_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus that keeps every stage busy for seconds."""
    root = tmp_path_factory.mktemp("slow")
    with (root / "x.jsonl").open("w") as file:
        for number in range(8_000):
            file.write(json.dumps({"text": _words(number, 150)}) + "\n")
    return root / "x.jsonl"


@pytest.mark.parametrize(
    ("stage", "vocab_size"),
    [
        (r"scan\D+[1-9]", 30000),
        (r"learn\D+[1-9]", 30000),
        (r"learn\D+(\d\d+)/\1\D", 100000),
        (r"encode\D+[1-9]", 300),
    ],
    ids=["scan", "learn", "merges", "encode"],
)
def test_ctrl_c_ends_every_stage(
    slow_corpus: Path, tmp_path: Path, stage: str, vocab_size: int
) -> None:
    """Ctrl-C ends the process soon, with exit code 130 and no manifest, also while compiled code runs.

    It takes less than a second; the limit allows for a busy machine.
    """
    command = [sys.executable, "-m", "elastic_pt", "prepare", str(slow_corpus)]
    terminal, end = pty.openpty()
    out = tmp_path / "out"
    process = subprocess.Popen(
        [*command, "--out", str(out), "--vocab-size", str(vocab_size)],
        stdout=subprocess.DEVNULL,
        stderr=end,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100", "NO_COLOR": "1"},
    )
    os.close(end)
    shown, deadline = "", time.monotonic() + LIMIT_S
    try:
        while not re.search(stage, _plain(shown)):
            assert select.select([terminal], [], [], deadline - time.monotonic())[0], shown[-300:]
            shown += os.read(terminal, 65536).decode()
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        while process.poll() is None and time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.05)[0]:
                try:
                    shown += os.read(terminal, 65536).decode()
                except OSError:  # the other end is closed
                    break
        code = process.wait(LIMIT_S)
        took_s = time.monotonic() - began
    finally:
        process.kill()
        os.close(terminal)
    assert code == 130
    assert took_s < 4.0
    assert "interrupted; the data is prepared only if" in shown
    assert not (out / "manifest.json").exists()


def _plain(shown: str) -> str:
    """The last state of the bars, without escape sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)[-1000:]
