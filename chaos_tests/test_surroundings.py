"""Data, disk and program fail and are repaired: the run resumes, and a STOP by failure can be reopened."""

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from chaos_tests.conftest import StartScenario
from chaos_tests.scenario import CHECKPOINT_STEPS, PATIENCE_S, Scenario
from elastic_pt.chaos.processes import workers_of
from elastic_pt.checkpoint.footprint import footprint
from elastic_pt.cli import run_command_line
from elastic_pt.data.manifest import read_manifest
from elastic_pt.report.status import State, open_run, read_status
from elastic_pt.runlog.records import CauseKind
from elastic_pt.store.open import open_store

pytestmark = pytest.mark.chaos

KILL_STEP = CHECKPOINT_STEPS + 3
ROOM_BYTES = 12 << 10
"""Room for the small files of an agent. The control page and the header of a buffer take more."""
RESTS = 3
"""A node rests from its second failure on; this many rests show that no number of failures ends the run."""


def until_it_rests(run: Scenario, node: str) -> None:
    """Wait until the node has failed several times and `status` shows that it rests."""
    opened = open_run(run.config.run.url)
    run.until("the node rests", lambda: len(run.events(node, "node_rests")) >= RESTS)
    run.until("status says paused", lambda: read_status(opened).state is State.PAUSED)
    assert f"resting: {node} (" in read_status(opened).reason
    assert run.view().stop is None


@contextmanager
def kept_full(blob: Path) -> Iterator[None]:
    """Fill the file system of `blob`, and what others free there, until the block ends."""
    done = threading.Event()

    def fill() -> None:
        with blob.open("wb", buffering=0) as file:
            while not done.is_set():
                try:
                    file.write(bytes(4096))
                except OSError:
                    done.wait(0.001)

    filler = threading.Thread(target=fill)
    filler.start()
    try:
        yield
    finally:
        done.set()
        filler.join()
        blob.unlink()


def test_missing_data_is_retried_until_it_is_back(
    start: StartScenario, reference_digest: str, data_url: str, tmp_path: Path
) -> None:
    """F45: a worker that cannot read its data waits until the data is back; nothing fails meanwhile."""
    data = Path(shutil.copytree(data_url.removeprefix("file://"), tmp_path / "data"))
    run = start(f"data.url=file://{data}", nodes=1)
    run.until_step(KILL_STEP, nodes=1)
    away = data.rename(tmp_path / "away")
    os.kill(workers_of(run.fleet.pid("node-0"), run.mark)[0], signal.SIGKILL)
    run.until(
        "a worker waits for its data",
        lambda: any(
            "manifest.json" in each["request"] for each in run.events("node-0", "store_retry")
        ),
    )
    away.rename(data)
    run.finish()
    assert len(run.check_whole(reference_digest).generations) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_a_full_staging_directory_pauses_the_run(
    start: StartScenario, reference_digest: str, tmp_path: Path
) -> None:
    """F39: a full staging directory on the only node pauses the run; it resumes once there is room."""
    staging = tmp_path / "staging"
    staging.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", staging], check=True)
    try:
        run = start(f"checkpoint.staging={staging}", "elastic.settle_timeout_s=6.0", nodes=1)
        run.until_step(KILL_STEP, nodes=1)
        with kept_full(staging / "blob"):
            os.kill(workers_of(run.fleet.pid("node-0"), run.mark)[0], signal.SIGKILL)
            until_it_rests(run, "node-0")
        run.finish()
        run.check_whole(reference_digest)
    finally:
        run.fleet.close()
        subprocess.run(["umount", "-l", staging], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_a_node_without_room_for_the_last_checkpoint_is_blamed_alone(
    start: StartScenario, reference_digest: str, tmp_path: Path
) -> None:
    """F39: a node without room for the last checkpoint reports it; the committing node is not blamed and completes the run."""
    staging = tmp_path / "staging"
    staging.mkdir()
    run = start(
        f"checkpoint.staging={staging}",
        "elastic.nodes_max=2",
        "elastic.nodes_min=1",
        "elastic.settle_timeout_s=6.0",
        nodes=1,
    )
    # Only this node sees the small file system. It has room for the node's rows, but not for a buffer with them.
    vocabulary = read_manifest(open_store(run.config.data.url)).vocab_size
    share = footprint(run.config.model, vocabulary).checkpoint_bytes // 2
    mount = f'mount -t tmpfs -o size={share + ROOM_BYTES} tmpfs "$0" && exec "$@"'
    run.fleet.start("node-1", prefix=["unshare", "--mount", "sh", "-c", mount, str(staging)])
    run.until_step(KILL_STEP, nodes=2)
    committing = run.generation().members[0].node
    assert committing == "node-0"
    codes = run.fleet.wait(PATIENCE_S)
    assert codes["node-0"] == 0, run.log_tails()
    assert codes["node-1"] in (0, 6), run.log_tails()
    assert run.events("node-1", "no_snapshots")
    assert run.events("node-1", "checkpoint_skipped")
    whole = run.check_whole(reference_digest)
    causes = [cause for generation in whole.generations for cause in generation.causes]
    gave_up = [cause for cause in causes if cause.kind is CauseKind.GAVE_UP]
    assert gave_up
    for cause in gave_up:
        assert cause.node == "node-1"
        assert "no room for a state" in cause.detail
    assert run.events("node-0", "node_rests") == []


def test_a_failed_run_is_reopened_and_completed(
    start: StartScenario, reference_digest: str, data_url: str, tmp_path: Path
) -> None:
    """F2: on one node a repeated failure of the program stops the run after several attempts; repaired and reopened, it completes."""
    data = Path(shutil.copytree(data_url.removeprefix("file://"), tmp_path / "data"))
    whole = {path: path.read_bytes() for path in data.rglob("*.bin")}
    for path, content in whole.items():
        path.write_bytes(content[:-1000])
    run = start(f"data.url=file://{data}", nodes=1)
    assert set(run.fleet.wait(PATIENCE_S).values()) == {7}
    stop = run.view().stop
    assert stop is not None
    assert "the same failure" in stop.reason
    for path, content in whole.items():
        path.write_bytes(content)
    url = run.config.run.url
    assert run_command_line(["reopen", url, "--why", "the shards are whole again"]) == 0
    assert run.view().stop is None
    run.fleet.start("node-1")
    assert run.fleet.wait(PATIENCE_S)["node-1"] == 0, run.log_tails()
    run.check_whole(reference_digest)
    assert run_command_line(["reopen", url, "--why", "again"]) == 2
