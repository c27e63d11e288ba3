"""Fixtures that every test folder shares: buckets on real S3 servers."""

pytest_plugins = ["tests.services.fixtures"]
