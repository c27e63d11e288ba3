"""`reopen --platform`, with real agents of two platforms: one of them uses another code path of MKL."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from command_line import CONFIG, Trained, assert_one_line_mistake, elastic_pt

WAIT_S = 120.0
OTHER = {"MKL_CBWR": "COMPATIBLE"}


@pytest.fixture
def run(prepared: Trained, tmp_path: Path) -> Path:
    """The configuration of a run that is too long to end during a test."""
    path = tmp_path / "run.toml"
    text = CONFIG.format(run=tmp_path / "run", data=prepared.data)
    path.write_text(text.replace("steps = 240", "steps = 1000000").replace("keep = 3", "keep = 2"))
    return path


def command(source: Path, node: str) -> list[str]:
    """The command that starts a node."""
    options = ["--node", node, "--address", "127.0.0.1", "--left-code", "143"]
    return [sys.executable, "-m", "elastic_pt", "run", str(source), *options]


@contextmanager
def agent(source: Path, node: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A node. At the end all its processes are killed if it still runs."""
    with (source.parent / f"{node}.log").open("wb") as output:
        started = subprocess.Popen(
            command(source, node),
            env=os.environ | environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield started
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def until_committed(url: Path, generation: int) -> None:
    """Wait until a generation has committed a checkpoint."""
    deadline_s = time.monotonic() + WAIT_S
    while not list(url.glob(f"ckpt/*-g{generation}-*/manifest.json")):
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def refused(source: Path, **environment: str) -> str:
    """Start a node that is refused; returns its error line."""
    ended = subprocess.run(
        command(source, "other"),
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert ended.returncode == 2, ended.stderr
    lines = [each for each in ended.stderr.splitlines() if each.startswith("error: ")]
    assert len(lines) == 1, ended.stderr
    return lines[0]


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch multiplies without MKL")
def test_another_platform_is_accepted_only_without_live_agents(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I9: A node with other kernels is refused by name until an operator accepts it, also after all agents are lost."""
    # A machine may have it, and the message then names both.
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    url = run.parent / "run"
    reopen = ("reopen", url, "--platform", "--why", "the old kind is gone")
    with agent(run, "old"):
        until_committed(url, 1)
        assert "environment = 'MKL_CBWR=COMPATIBLE': the run at" in refused(run, **OTHER)
        # It would have no effect: the old nodes refuse the others, and bind the run to their platform again.
        assert_one_line_mistake(
            elastic_pt(*reopen), "--platform: old still take part in", "stopped"
        )
        # A machine that cannot reach the agents sees the pulse in the bucket.
        token = (url / "secret" / "token").rename(run.parent / "token")
        assert_one_line_mistake(elastic_pt(*reopen), "agents that this machine does not reach")
        token.rename(url / "secret" / "token")
    assert "environment = " in refused(url, **OTHER)
    assert elastic_pt(*reopen).exit_code == 0
    with agent(run, "new", **OTHER) as new:
        until_committed(url, 2)
        assert "environment = ''" in refused(run)
        new.send_signal(signal.SIGTERM)
        assert new.wait(WAIT_S) == 143
    # The first node agrees with identity.json, and no agent is alive, but the log has the new platform.
    assert "environment = ''" in refused(run)
    digest, exactness = elastic_pt("digest", url).out.splitlines()
    step = int(digest.split()[0].removeprefix("step="))
    last = int(exactness.split(";")[0].removeprefix("exact up to step "))
    assert 0 < last < step
    assert "environment = 'MKL_CBWR=COMPATIBLE' after ''" in exactness
    assert "the old kind is gone" in exactness


def test_reopen_platform_is_refused_for_a_native_run(prepared: Trained, tmp_path: Path) -> None:
    """A native run is bound to no platform, so `--platform` is refused, and the error says why."""
    path = tmp_path / "run.toml"
    text = CONFIG.format(run=tmp_path / "run", data=prepared.data)
    path.write_text(text.replace("steps = 240", 'steps = 1000000\nnumerics = "native"'))
    with agent(path, "a"):
        until_committed(tmp_path / "run", 1)
    assert_one_line_mistake(
        elastic_pt("reopen", tmp_path / "run", "--platform", "--why", "x"), "'native'"
    )
