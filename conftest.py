"""What every test folder shares: buckets on real S3 servers, and which tests run in one worker process."""

import signal

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
