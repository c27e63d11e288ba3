"""A store whose writers may not overwrite, as on Google Cloud without `storage.objects.delete`."""

import uuid
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from elastic_pt.errors import AccessDenied, AlreadyExists
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    """It refuses each write of an object that exists, whatever its condition, and all writes below `closed/`."""
    pipe_file = MemoryFileSystem.pipe_file

    def refuse(self: MemoryFileSystem, path: str, value: Any, **options: Any) -> None:
        if self.exists(path) or "/closed/" in path:
            raise PermissionError("does not have storage.objects.delete access")
        pipe_file(self, path, value, **options)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)
    return open_store(f"memory://{uuid.uuid4().hex}/run", timeout_s=5.0)


def test_a_refused_overwrite_is_a_lost_create(store: Store) -> None:
    """The loser of a race for a record reads the winner's record and goes on; the same bytes are a lost response."""
    store.create("log/1", b"winner")
    with pytest.raises(AlreadyExists):
        store.create("log/1", b"loser")
    store.create("log/1", b"winner")
    assert store.read("log/1") == b"winner"


def test_a_refused_create_of_a_new_object_stays_refused(store: Store) -> None:
    """Without the right to create at all, the error names the credentials."""
    with pytest.raises(AccessDenied, match="credentials"):
        store.create("closed/1", b"x")
