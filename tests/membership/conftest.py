"""A run directory that counts requests, and a fleet that shares it."""

from pathlib import Path

import pytest

from elastic_pt.store.open import open_store
from tests.membership.bucket import WatchedStore
from tests.membership.fleet import Fleet


@pytest.fixture
def bucket(tmp_path: Path) -> WatchedStore:
    """A run directory."""
    return WatchedStore(open_store(f"file://{tmp_path}"))


@pytest.fixture
def fleet(bucket: WatchedStore) -> Fleet:
    """No node yet."""
    return Fleet(bucket)
