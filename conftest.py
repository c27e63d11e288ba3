"""What every test folder shares: real S3 servers, a small file system, and which tests run in one worker process."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest_plugins = ["tests.services.fixtures"]

SERVERS = ("ceph", "moto")
"""Markers of tests that need a server. `--dist loadgroup` runs all tests of a server in one worker: it starts once."""


def pytest_configure() -> None:
    """A shell's background job ignores SIGINT, and so would the processes that tests start and interrupt."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of each server into one group."""
    for item in items:
        for server in SERVERS:
            if item.get_closest_marker(server):
                item.add_marker(pytest.mark.xdist_group(server))


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
