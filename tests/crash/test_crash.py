"""A share of the campaigns of `make crash`: other seeds, fewer of them."""

import subprocess
import sys
from typing import Final

import pytest

_TIMEOUT_S: Final = 280.0
ON_S3: Final = "shard.written,manifest.created,commit.appended,removal.manifest"


def campaign(*options: str) -> str:
    """Run a campaign in a process without threads. Returns what it prints; fails if a case fails."""
    command = [sys.executable, "-m", "tests.crash", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kill_at_any_failpoint_leaves_a_whole_run() -> None:
    """F33: after SIGKILL at each point the newest commit has its bits, the log has one lineage, the next fleet completes the
    run, and a lost node's peers hold a whole state."""
    found = campaign("--seeds", "1", "--first", "100", "--random", "2")
    assert " 0 failed" in found
    assert "mirror.acknowledged" in found


@pytest.mark.ceph
def test_kill_at_failpoints_on_s3_leaves_a_whole_run(ceph_url: str) -> None:
    """F33: the same on a real S3 server, for the points at which objects and records are created and removed."""
    options = (
        "--store",
        "s3",
        "--url",
        ceph_url,
        "--seeds",
        "1",
        "--first",
        "100",
        "--random",
        "1",
    )
    assert "5 passed, 0 failed" in campaign(*options, "--points", ON_S3)


def test_changed_bytes_never_become_weights() -> None:
    """F35: flips, truncations, swaps and deletions of a checkpoint, a peer's snapshot and a mapped buffer are found, or
    change no weight."""
    assert "seed 100: 1000 changes, 0 wrong" in campaign("--corruptions", "1000", "--first", "100")
