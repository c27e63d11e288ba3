"""These tests retry a failed source without the usual pause."""

import pytest

from elastic_pt.notices import watch


@pytest.fixture(autouse=True)
def try_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits a second before a failed source is read again."""
    monkeypatch.setattr(watch, "_AGAIN_MIN_S", 0.01)
    monkeypatch.setattr(watch, "_AGAIN_MAX_S", 0.05)
