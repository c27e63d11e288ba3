"""`prepare`, `run` and `local`: user mistakes, and no process is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import STEPS, Trained, assert_one_line_mistake, elastic_pt

from elastic_pt.cli.local import first_failure, fleet_config
from elastic_pt.config import load_config
from elastic_pt.fleet.local import Fleet
from elastic_pt.store.open import open_store

WAIT_S = 60.0


def test_prepare_prints_a_summary(texts: Path, tmp_path: Path) -> None:
    """The summary has the sources, the left-out documents with reasons, and the vocabulary."""
    result = elastic_pt(
        "prepare", f"mine={texts}@1", "--out", tmp_path / "data", "--vocab-size", 290
    )
    assert result.exit_code == 0
    assert "mine: " in result.out
    assert "1 empty" in result.out
    assert "290 tokens" in result.out


def test_mistakes_of_prepare_are_one_line(texts: Path, prepared: Trained, tmp_path: Path) -> None:
    """Each wrong argument of `prepare` is named, with the expectation, and no manifest is written."""
    out = ("--out", tmp_path / "out")
    mistakes = {
        "does not exist": [tmp_path / "missing", *out],
        "already holds prepared data": [texts, "--out", prepared.data],
        "--vocab-size 100000": [texts, *out, "--vocab-size", 100000],
        "--held-out 2.0": [texts, *out, "--held-out", 2],
        "missing.json": [texts, *out, "--tokenizer", tmp_path / "missing.json"],
        "weight": [f"a={texts}@-1", *out],
    }
    for part, arguments in mistakes.items():
        assert_one_line_mistake(elastic_pt("prepare", *arguments), part)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_joining_a_completed_run_succeeds_at_once(trained: Trained) -> None:
    """Joining a completed run by its URL does no work and ends with exit code 0."""
    command = [sys.executable, "-m", "elastic_pt", "run", str(trained.run)]
    options = ["--address", "127.0.0.1", "--set", "elastic.nodes_max=1"]
    result = subprocess.run([*command, *options], capture_output=True, text=True, timeout=WAIT_S)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"completed at step {STEPS}\n"


def test_joining_cannot_change_the_identity_of_a_run(trained: Trained, tmp_path: Path) -> None:
    """With a RUN_URL, --set of a value that decides the bits, or of run.url, is refused by name."""
    assert_one_line_mistake(
        elastic_pt("run", trained.run, "--set", "train.learning_rate=1"),
        "train.learning_rate",
        "cannot change it",
        "0.002",
    )
    assert_one_line_mistake(elastic_pt("run", trained.run, "--set", "run.seed=9"), "run.seed", "3")
    assert_one_line_mistake(
        elastic_pt("run", trained.run, "--set", f"run.url={tmp_path}"), "run.url"
    )
    assert_one_line_mistake(elastic_pt("run", tmp_path / "nothing"), "no run there")


@pytest.mark.parametrize("name", ["../../zz", "", ".hidden", "a/b", "a b", "é", "a" * 65])
def test_node_name_that_is_not_a_key_is_refused(name: str, prepared: Trained) -> None:
    """A name that could leave the run directory is refused before anything is written."""
    assert_one_line_mistake(
        elastic_pt("run", prepared.config, "--node", name), f"--node {name!r}", "letters, digits"
    )


def test_local_prints_the_error_of_a_failed_agent(prepared: Trained, tmp_path: Path) -> None:
    """When agents refuse to start, `local` ends with their error in one line, and their exit code."""
    result = elastic_pt(
        "local", prepared.config, "--nodes", 1,
        "--set", f"data.url={tmp_path / 'nothing'}", "--set", f"run.url={tmp_path / 'run'}",
    )  # fmt: skip
    assert result.exit_code == 2
    assert result.err.splitlines()[-1].startswith("error: refused; node-1: ")
    assert "prepare" in result.err.splitlines()[-1]
    assert "Traceback" not in result.err


def test_local_names_the_signal_that_killed_an_agent(prepared: Trained, tmp_path: Path) -> None:
    """The last line of a killed agent's output, such as a warning, is not shown as its error."""
    with Fleet(load_config(prepared.config), tmp_path) as fleet:
        os.kill(fleet.start("node-1"), signal.SIGKILL)
        assert fleet.wait(WAIT_S) == {"node-1": -signal.SIGKILL}
        (tmp_path / "node-1.log").write_text("  warnings.warn('There appear to be %d '\n")
        assert str(first_failure(fleet, ["node-1"])) == (
            "the run did not end; node-1: killed by signal 9"
        )


def test_local_refuses_other_settings_on_a_completed_run(trained: Trained) -> None:
    """`local` with a value that decides the bits is refused by name, even if the run is complete."""
    result = elastic_pt("local", trained.config, "--nodes", 1, "--set", "train.learning_rate=0.5")
    assert result.exit_code == 2
    assert "completed" not in result.out
    assert "train.learning_rate = 0.5" in result.err.splitlines()[-1]


def test_local_raises_nodes_max_for_its_nodes(prepared: Trained) -> None:
    """`local` raises `nodes_max` to its number of nodes, and does not change `nodes_min`."""
    config = load_config(prepared.config, ["elastic.nodes_max=2", "elastic.nodes_min=2"])
    effective = fleet_config(config, 5).elastic
    assert (effective.nodes_min, effective.nodes_max) == (2, 5)
    assert effective.join_window_s > config.elastic.join_window_s
    assert fleet_config(config, 5).fingerprint() == config.fingerprint()


def test_local_leaves_no_process_behind(prepared: Trained, tmp_path: Path) -> None:
    """Ctrl-C ends the agents and their workers, with exit code 130."""
    url = tmp_path / "run"
    options = ("--nodes", "1", "--set", f"run.url={url}", "--set", "train.steps=1000000")
    command = subprocess.Popen(
        [sys.executable, "-m", "elastic_pt", "local", str(prepared.config), *options],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline_s = time.monotonic() + WAIT_S
        while not list(url.glob("ckpt/*/manifest.json")):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        started = descendants(command.pid)
        assert len(started) >= 3, "an agent, its fork server and a worker"
        command.send_signal(signal.SIGINT)
        assert command.wait(WAIT_S) == 130
        while left := [pid for pid in started if alive(pid)]:
            assert time.monotonic() < deadline_s, left
            time.sleep(0.05)
    finally:
        command.kill()
        command.wait()


def descendants(pid: int) -> list[int]:
    """All descendants of a process."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *descendants(child)]
    return found


def alive(pid: int) -> bool:
    """Whether a process runs. A zombie does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_joining_by_an_s3_url_starts_no_thread(moto_url: str) -> None:
    """The agent must fork without threads, so a separate process reads the run's configuration from S3."""
    store = open_store(f"{moto_url}/run")
    store.create("config.toml", b'[run]\nurl = "r"\n[data]\nurl = "d"\n')
    script = (
        "import os, sys; from elastic_pt.cli.training import _configuration;"
        "config = _configuration(sys.argv[1], []); print(config.run.url, len(os.listdir('/proc/self/task')))"
    )
    joined = subprocess.run(
        [sys.executable, "-c", script, store.url], capture_output=True, text=True, timeout=WAIT_S
    )
    assert joined.stdout == f"{store.url} 1\n", joined.stderr
    missing = subprocess.run(
        [sys.executable, "-m", "elastic_pt", "run", f"{moto_url}/none"],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert (missing.returncode, missing.stdout) == (2, "")
    assert len(missing.stderr.splitlines()) == 1, missing.stderr
    assert "no run there" in missing.stderr
