"""What every test folder shares: buckets on real S3 servers, and which tests run in one worker process."""

import pytest

pytest_plugins = ["tests.services.fixtures"]

SERVERS = ("ceph", "moto")
"""Markers of tests that need a server. `--dist loadgroup` runs all tests of a server in one worker: it starts once."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of each server into one group."""
    for item in items:
        for server in SERVERS:
            if item.get_closest_marker(server):
                item.add_marker(pytest.mark.xdist_group(server))
