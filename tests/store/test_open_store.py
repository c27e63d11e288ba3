"""URLs: which ones open, and the one-line error for the others."""

import subprocess
import sys
from pathlib import Path

import pytest

from elastic_pt.errors import ConfigError
from elastic_pt.store import open as opening
from elastic_pt.store.open import open_store


def test_a_plain_path_is_a_file_url(tmp_path: Path) -> None:
    """A directory may be given without a protocol; the store's URL has one."""
    store = open_store(f"{tmp_path}/run/")
    assert store.url == f"file://{tmp_path}/run"
    store.create("x", b"1")
    assert (tmp_path / "run" / "x").read_bytes() == b"1"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("s3://", "names no bucket; expected s3://bucket/run"),
        ("s4://bucket/run", "s4:// is unknown; expected file, memory, s3, gs or abfs"),
        ("relative/run", "is not a URL; expected s3://bucket/run or /absolute/path"),
        ("", "is not a URL"),
        ("file://relative/run", "is not an absolute path"),
    ],
)
def test_invalid_url_is_refused_at_open(url: str, told: str) -> None:
    """The error names the value and what is expected, on one line, before anything starts."""
    with pytest.raises(ConfigError) as caught:
        open_store(url)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "extra"), [("gs://bucket/run", "gcs"), ("abfs://container/run", "azure")]
)
def test_a_missing_extra_is_named(url: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a protocol without its module, the error names the extra that installs it."""
    monkeypatch.setattr(opening.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"pip install 'elastic-pt\[{extra}\]'"):
        open_store(url)


def test_other_missing_module_is_a_one_line_error() -> None:
    """fsspec lists protocols that are not installed; using one is a user's mistake as well."""
    with pytest.raises(ConfigError, match="module that is missing") as caught:
        open_store("dropbox://x/run")
    assert "\n" not in str(caught.value)


def test_protocol_without_atomic_create_refuses_to_create() -> None:
    """A check followed by a write is not atomic: such a store can hold bytes, but no run's log."""
    store = open_store("http://127.0.0.1:9/run", timeout_s=0.1)
    with pytest.raises(ConfigError, match="http:// has no atomic create"):
        store.create("log/0", b"1")
    with pytest.raises(ConfigError, match="can only be read"):
        store.delete("log/0")


def test_open_does_not_connect() -> None:
    """A fork server may hold stores, so no filesystem, loop or thread exists before the first request."""
    code = (
        "import sys, threading\n"
        "from elastic_pt.store.open import open_store\n"
        "stores = [open_store(u) for u in ('s3://bucket/run', 'memory://x/run', '/nowhere/run')]\n"
        "assert 's3fs' not in sys.modules\n"
        "assert threading.active_count() == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
