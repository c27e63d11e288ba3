"""What every test folder shares: real S3 servers, a small file system, and which tests run in one worker process."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import structlog

# A busy machine is no failure.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

pytest_plugins = ["tests.services.fixtures"]

SERVERS = ("ceph", "moto")
"""Markers of tests that need a server. `--dist loadgroup` runs all tests of a server in one worker: it starts once."""


def pytest_configure() -> None:
    """What tests and the processes that they start take over from this process."""
    # A shell's background job ignores SIGINT, and so would the processes that tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Before torch is imported. Several tests run at once on few cores: the threads of one small tensor operation wait
    # for each other, and use up the processor meanwhile. Bits may depend on their number too.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of each server into one group."""
    for item in items:
        for server in SERVERS:
            if item.get_closest_marker(server):
                item.add_marker(pytest.mark.xdist_group(server))


@pytest.fixture(autouse=True)
def events_of_all_levels() -> None:
    """A command that an earlier test ran in this process has left its configuration of events."""
    structlog.reset_defaults()


@pytest.fixture
def small_memory(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB, in memory."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    # Lazy: a worker's buffers there may still be mapped in this process.
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
