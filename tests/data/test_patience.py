"""Waits for data: close ends them at once, what is missing is waited for, and one batch waits about as long as the limit."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from prepared_data import Prepared, cache_at, in_memory, stream_of

from elastic_pt.data.manifest import MANIFEST_KEY, blocks_key
from elastic_pt.data.patience import Patience, await_manifest
from elastic_pt.data.shards import TokenReader
from elastic_pt.errors import DataError, NotFound, StoreError
from elastic_pt.store.port import Store

WAIT_S = 60.0
LENGTH = 20
BLOCKS_SUFFIX = blocks_key("x.bin").removeprefix("x")
KINDS = {"page": ".json", "index": BLOCKS_SUFFIX, "block": ".bin"}


class Troubled:
    """A store that does something before it answers reads of some kind of key."""

    def __init__(self, store: Store, kind: str, trouble: Callable[[bytes], bytes]) -> None:
        self.store, self.url = store, store.url
        self.kind, self.trouble = kind, trouble
        self.asked = threading.Event()

    def read(self, key: str, *arguments: int) -> bytes:
        """See `Store`."""
        data = self.store.read(key, *arguments)
        if not key.endswith(KINDS[self.kind]):
            return data
        self.asked.set()
        return self.trouble(data)


def reader_of(
    prepared: Prepared, store: object, tmp_path: Path, timeout_s: float = 0.0
) -> TokenReader:
    """A reader of a store that has trouble."""
    cache = cache_at(tmp_path / "cache")
    return TokenReader(prepared.manifest, store, cache=cache, timeout_s=timeout_s)  # type: ignore[arg-type]


def missing(data: bytes) -> bytes:
    """Trouble: the object is not there."""
    raise NotFound("missing")


def test_the_manifest_is_waited_for(prepared: Prepared) -> None:
    """Data that is away while a worker starts is read when it is back, and named if it does not come back."""
    store = in_memory(prepared, "comes-back")
    content = store.read(MANIFEST_KEY)
    store.delete(MANIFEST_KEY)
    with pytest.raises(StoreError, match=r"manifest\.json: missing"):
        await_manifest(store, 0.0)
    back = threading.Timer(0.2, store.write, (MANIFEST_KEY, content))
    back.start()
    assert await_manifest(store, WAIT_S) == prepared.manifest
    back.join()


@pytest.mark.parametrize("kind", ["index", "block"])
def test_close_ends_a_batch_while_the_store_hangs(
    prepared: Prepared, tmp_path: Path, kind: str
) -> None:
    """`close` returns at once, and `windows` raises at once, though the request never ends."""
    hang = threading.Event()

    def hanging(data: bytes) -> bytes:
        hang.wait(WAIT_S)
        return data

    store = Troubled(in_memory(prepared, "hangs"), kind, hanging)
    reader = reader_of(prepared, store, tmp_path, WAIT_S)
    try:
        with ThreadPoolExecutor() as pool:
            found = pool.submit(reader.windows, [(0, 0)], LENGTH)
            assert store.asked.wait(WAIT_S)
            began_s = time.monotonic()
            reader.close()
            with pytest.raises(StoreError, match="closed"):
                found.result(WAIT_S)
            assert time.monotonic() - began_s < 5
    finally:
        hang.set()


@pytest.mark.parametrize("kind", list(KINDS))
def test_close_ends_a_batch_while_a_file_is_missing(
    prepared: Prepared, tmp_path: Path, kind: str
) -> None:
    """A reader that waits for a file ends its wait when it is closed."""
    store = Troubled(in_memory(prepared, "away"), kind, missing)
    reader = reader_of(prepared, store, tmp_path, 10 * WAIT_S)
    with ThreadPoolExecutor() as pool:
        found = pool.submit(reader.windows, [(0, 0)], LENGTH)
        assert store.asked.wait(WAIT_S)
        reader.close()
        with pytest.raises(StoreError, match="closed"):
            found.result(WAIT_S)


@pytest.mark.parametrize("kind", list(KINDS))
def test_missing_object_is_waited_for(prepared: Prepared, tmp_path: Path, kind: str) -> None:
    """A page, an index or a block that comes within the limit ends nothing."""
    left = [2]

    def twice(data: bytes) -> bytes:
        if left[0]:
            left[0] -= 1
            raise NotFound("missing")
        return data

    store = Troubled(in_memory(prepared, "comes"), kind, twice)
    with closing(reader_of(prepared, store, tmp_path, WAIT_S)) as reader:
        found = reader.windows([(0, 0)], LENGTH)[0]
    assert found.tolist() == stream_of(prepared, 0)[: LENGTH + 1].tolist()
    assert left == [0]


@pytest.mark.parametrize("kind", list(KINDS))
def test_one_batch_waits_about_as_long_as_the_limit(
    prepared: Prepared, tmp_path: Path, kind: str
) -> None:
    """Many missing files of one batch are waited for together; the error names one of them and the limit."""
    store = Troubled(in_memory(prepared, "never"), kind, missing)
    rows = [(source, row) for source in (0, 1) for row in range(200)]
    with closing(reader_of(prepared, store, tmp_path, 1.0)) as reader:
        began_s = time.monotonic()
        with pytest.raises(StoreError, match=rf"\{KINDS[kind]}: .*1"):
            reader.windows(rows, LENGTH)
        assert time.monotonic() - began_s < 3


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("times", [1, 99])
def test_damaged_object_is_read_twice(
    prepared: Prepared, tmp_path: Path, kind: str, times: int
) -> None:
    """One damaged answer costs a request; a second one is the error of that file."""
    left = [times]

    def damaged(data: bytes) -> bytes:
        if left[0]:
            left[0] -= 1
            return bytes([data[0] ^ 1]) + data[1:]
        return data

    store = Troubled(in_memory(prepared, "damaged"), kind, damaged)
    with closing(reader_of(prepared, store, tmp_path, WAIT_S)) as reader:
        if times == 1:
            found = reader.windows([(0, 0)], LENGTH)[0]
            assert found.tolist() == stream_of(prepared, 0)[: LENGTH + 1].tolist()
        else:
            with pytest.raises(DataError, match=rf"\{KINDS[kind]}"):
                reader.windows([(0, 0)], LENGTH)
            assert left == [times - 2]


def test_patience_names_the_file_and_its_trouble() -> None:
    """An error of the file system that lasts is one line, with the file and the limit."""

    def away() -> bytes:
        raise OSError(116, "Stale file handle")

    with pytest.raises(StoreError, match=r"^s3://b/x: gave up .*0\.2.*Stale file handle"):
        Patience(0.2).read("s3://b/x", away)
