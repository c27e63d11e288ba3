"""storage-check: gives `fenced` if create-once holds, and `unfenced` if it does not."""

import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_pt.errors import AlreadyExists, StoreError
from elastic_pt.store.check import StoreReport, check_store, is_fenced
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store
from tests.services.fixtures import point_aws_at


class Weakened:
    """A real store with one declared fault in `create`; its clients share `meeting`."""

    def __init__(self, inner: Store, create: Callable[["Weakened", str, bytes], None]) -> None:
        self.inner, self._create = inner, create
        self.read, self.write, self.size = inner.read, inner.write, inner.size
        self.keys, self.delete = inner.keys, inner.delete
        self.meeting = threading.Barrier(4)

    @property
    def url(self) -> str:
        return self.inner.url

    def create(self, key: str, data: bytes) -> None:
        self._create(self, key, data)


def look_then_write(store: Weakened, key: str, data: bytes) -> None:
    """fsspec's default for an exclusive write: all four racers check before any of them writes."""
    size = store.size(key)
    if "race" in key:
        store.meeting.wait(10)
    if size is not None and store.read(key) != data:
        raise AlreadyExists(key)
    store.write(key, data)


def ignore_the_condition(store: Weakened, key: str, data: bytes) -> None:
    """A store that ignores If-None-Match and overwrites."""
    store.write(key, data)


def refuse_everybody(store: Weakened, key: str, data: bytes) -> None:
    """A store on which a race has no winner."""
    if "race" in key:
        store.inner.create(key, b"nobody")
        raise AlreadyExists(key)
    store.inner.create(key, data)


def check(store: Store) -> StoreReport:
    return check_store(store, racers=4, rounds=2, open_client=lambda url: store)


def test_directory_is_fenced_and_left_unchanged(tmp_path: Path) -> None:
    """The report names the races and their winners, and the check leaves no object."""
    store = open_store(f"{tmp_path}/run")
    store.write("existing", b"1")
    report = check_store(store, racers=8, rounds=5)
    assert report.fenced
    assert report.verdict == "fenced"
    assert "each of 5 races" in report.reason
    assert "race of 8 writers over 4 clients: 1 winner: 5 rounds" in "\n".join(report.lines)
    assert report.lines[-1].startswith("fenced: ")
    assert store.keys("") == ["existing"]


@pytest.mark.moto
def test_moto_is_fenced(moto_url: str) -> None:
    """The light S3 server of the tests supports If-None-Match."""
    store = open_store(f"{moto_url}/run")
    assert check_store(store, rounds=3).verdict == "fenced"
    assert store.keys("") == []


@pytest.mark.ceph
def test_ceph_is_fenced(ceph_url: str) -> None:
    """On the real gateway of the tests, exactly one of many writers wins."""
    store = open_store(f"{ceph_url}/run")
    assert check_store(store, racers=16, rounds=10).verdict == "fenced"
    assert is_fenced(store).fenced
    assert store.keys("") == []


def test_memory_store_is_unfenced() -> None:
    """Memory passes every race, but no other node can read it."""
    report = is_fenced(open_store(f"memory://{uuid.uuid4().hex}"))
    assert not report.fenced
    assert "inside one process" in report.reason


@pytest.mark.parametrize(
    ("spoilt", "reason"),
    [
        (look_then_write, "2 of 2 races to create one key had 4 winners"),
        (ignore_the_condition, "create replaced an object"),
        (refuse_everybody, "2 of 2 races to create one key had 0 winners"),
    ],
)
def test_check_detects_a_store_that_breaks_create_once(
    tmp_path: Path, spoilt: Callable[[Weakened, str, bytes], None], reason: str
) -> None:
    """Each fault of `create` gives `unfenced` and the reason, and the check leaves no object."""
    store = Weakened(open_store(str(tmp_path)), spoilt)
    report = check(store)
    assert report.verdict == "unfenced"
    assert reason in report.reason
    assert report.lines[-1] == f"unfenced: {report.reason}"
    assert store.keys("") == []


def test_protocol_without_atomic_create_is_unfenced() -> None:
    """A protocol without an atomic create gets its verdict without a request."""
    report = is_fenced(open_store("http://127.0.0.1:9/run", timeout_s=0.1))
    assert report.verdict == "unfenced"
    assert "http:// has no atomic create" in report.reason


def test_unreachable_store_raises_instead_of_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused connection raises at the deadline: it does not show whether the store is fenced."""
    point_aws_at("http://127.0.0.1:9", "key", "secret", monkeypatch)
    with pytest.raises(StoreError, match=r"gave up after \d+ attempts .*Could not connect"):
        is_fenced(open_store("s3://bucket/run", timeout_s=3.0))
