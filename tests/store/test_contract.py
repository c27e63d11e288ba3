"""The contract that every store keeps: memory, a directory, moto, and a real Ceph gateway."""

import mmap
import os
import random
import sys
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from elastic_pt.errors import AlreadyExists, NotFound
from elastic_pt.store.open import open_store
from elastic_pt.store.port import CREATE_LIMIT_BYTES, FilePart, Store

STORES = [
    "memory",
    "file",
    pytest.param("moto", marks=pytest.mark.moto),
    pytest.param("ceph", marks=pytest.mark.ceph),
]


@pytest.fixture(params=STORES)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty place in each kind of store."""
    if request.param == "memory":
        yield f"memory://{uuid.uuid4().hex}/run"
    elif request.param == "file":
        yield f"file://{tmp_path}/run"
    else:
        yield request.getfixturevalue(f"{request.param}_url") + "/run"


@pytest.fixture
def store(url: str) -> Store:
    """A client of that place."""
    return open_store(url, timeout_s=30.0)


def test_written_bytes_are_read_back_whole_and_in_ranges(store: Store) -> None:
    """A range is [start, end), as in Python; beyond the end it gives the bytes that exist."""
    data = bytes(range(256))
    store.write("a/b/c.bin", data)
    assert store.read("a/b/c.bin") == data
    assert store.read("a/b/c.bin", 0, 1) == data[:1]
    assert store.read("a/b/c.bin", 10, 20) == data[10:20]
    assert store.read("a/b/c.bin", 200) == data[200:]
    assert store.read("a/b/c.bin", 250, 1000) == data[250:]
    assert store.read("a/b/c.bin", 256, 300) == b""
    assert store.read("a/b/c.bin", 300) == b""
    assert store.read("a/b/c.bin", 7, 7) == b""
    assert store.size("a/b/c.bin") == 256


def test_empty_object_exists(store: Store) -> None:
    """An object of 0 bytes can be read, has size 0, and takes its key."""
    store.write("empty", b"")
    store.create("created-empty", b"")
    for key in ("empty", "created-empty"):
        assert store.read(key) == b""
        assert store.size(key) == 0
    with pytest.raises(AlreadyExists):
        store.create("empty", b"x")


def test_missing_object_is_not_found(store: Store) -> None:
    """A missing object raises on read, has no size and is not listed; deleting it succeeds."""
    with pytest.raises(NotFound, match="nowhere/x"):
        store.read("nowhere/x")
    with pytest.raises(NotFound):
        store.read("nowhere/x", 1, 2)
    assert store.size("nowhere/x") is None
    assert store.keys("nowhere/") == []
    store.delete("nowhere/x")


def test_prefix_of_keys_is_not_an_object(store: Store) -> None:
    """There are no directories: only a written key has a size and can be read."""
    store.write("folder/file", b"1")
    assert store.size("folder") is None
    with pytest.raises(NotFound):
        store.read("folder")


def test_second_create_of_a_key_fails(store: Store) -> None:
    """The second writer gets `AlreadyExists`, and the first one's object stays."""
    store.create("log/0", b"first")
    with pytest.raises(AlreadyExists, match="log/0"):
        store.create("log/0", b"second")
    assert store.read("log/0") == b"first"


def test_create_of_the_same_bytes_again_succeeds(store: Store) -> None:
    """A writer that lost the response to its create can repeat it."""
    store.create("log/0", b"mine")
    store.create("log/0", b"mine")
    assert store.keys("") == ["log/0"]


def test_a_deleted_key_can_be_created_again(store: Store) -> None:
    """Delete leaves nothing that makes a later create fail."""
    store.create("deep/er/key", b"1")
    store.delete("deep/er/key")
    store.delete("deep/er/key")
    assert store.size("deep/er/key") is None
    store.create("deep/er/key", b"2")
    assert store.read("deep/er/key") == b"2"


def test_write_replaces_an_object(store: Store) -> None:
    """The last write wins, also over a longer object."""
    store.write("x", b"a long first version")
    store.write("x", b"short")
    assert store.read("x") == b"short"
    assert store.size("x") == 5


def test_write_stores_the_content_of_a_local_file(store: Store, tmp_path: Path) -> None:
    """A Path stands for the content of its file; a missing file is the caller's error, not the store's."""
    source = tmp_path / "source"
    source.write_bytes(b"content" * 1000)
    store.write("from/path", source)
    assert store.read("from/path") == source.read_bytes()
    with pytest.raises(FileNotFoundError):
        store.write("from/path", tmp_path / "missing")


def test_write_stores_a_part_of_a_local_file(store: Store, tmp_path: Path) -> None:
    """A FilePart stands for its bytes alone; a file that is missing or too short is the caller's error."""
    source, page = tmp_path / "source", mmap.ALLOCATIONGRANULARITY
    content = random.Random(1).randbytes(3 * page)
    source.write_bytes(content)
    for offset, size in ((0, page), (page, 2 * page), (page, 100)):
        store.write("from/part", FilePart(source, offset, size))
        assert store.read("from/part") == content[offset : offset + size]
    with pytest.raises(ValueError, match="expected at least"):
        store.write("from/part", FilePart(source, page, 2 * page + 1))
    with pytest.raises(FileNotFoundError):
        store.write("from/part", FilePart(tmp_path / "missing", 0, 1))


def test_large_object_is_read_back_unchanged(store: Store, tmp_path: Path) -> None:
    """Objects that need several requests come back bit for bit, from memory, a file, and a part of one."""
    data = os.urandom(2**20) * 37 + b"tail"
    source = tmp_path / "large"
    source.write_bytes(data)
    store.write("large/file", source)
    store.write("large/bytes", data)
    page = mmap.ALLOCATIONGRANULARITY
    store.write("large/part", FilePart(source, page, len(data) - page))
    assert store.read("large/part") == data[page:]
    assert store.size("large/file") == len(data)
    assert store.read("large/file") == data
    assert store.read("large/bytes") == data
    assert (
        store.read("large/file", 16 * 2**20 - 3, 16 * 2**20 + 3)
        == data[16 * 2**20 - 3 : 16 * 2**20 + 3]
    )


def test_keys_are_listed_by_prefix_and_sorted(store: Store) -> None:
    """A prefix is a string, not a folder; keys are relative to the store and sorted."""
    for key in ("log/10", "log/2", "log/1", "logs/1", "ckpt/1/a", "z"):
        store.write(key, b"1")
    assert store.keys("log/") == ["log/1", "log/10", "log/2"]
    assert store.keys("log") == ["log/1", "log/10", "log/2", "logs/1"]
    assert store.keys("log/1") == ["log/1", "log/10"]
    assert store.keys("z/") == []
    assert store.keys("") == ["ckpt/1/a", "log/1", "log/10", "log/2", "logs/1", "z"]


def test_keys_list_only_their_own_url(store: Store, url: str) -> None:
    """A store with a URL that starts with the same characters is not in the listing."""
    neighbour = open_store(url + "-2", timeout_s=30.0)
    neighbour.write("theirs", b"1")
    store.write("mine", b"1")
    assert store.keys("") == ["mine"]
    assert neighbour.keys("") == ["theirs"]
    neighbour.delete("theirs")


@pytest.mark.parametrize("key", ["", "/", "/a", "a/", "a//b", "../a", "a/../b", "a/..", "./a"])
def test_key_outside_the_store_is_refused(store: Store, key: str) -> None:
    """Keys stay below the URL; an invalid one is a bug of the caller and is not sent."""
    for use in (
        store.read,
        store.size,
        store.delete,
        lambda key: store.write(key, b""),
        lambda key: store.create(key, b""),
    ):
        with pytest.raises(ValueError, match="not a key"):
            use(key)


@pytest.mark.parametrize("prefix", ["/", "../", "a/../", "a//"])
def test_invalid_prefix_is_refused(store: Store, prefix: str) -> None:
    """A prefix that cannot match is a bug of the caller, not an empty listing."""
    with pytest.raises(ValueError, match="prefix"):
        store.keys(prefix)


@pytest.mark.parametrize(("start", "end"), [(-1, None), (3, 2), (-2, -1)])
def test_invalid_range_is_refused(store: Store, start: int, end: int | None) -> None:
    """Ranges count from the start of the object, never from its end."""
    store.write("x", b"12345")
    with pytest.raises(ValueError, match="range"):
        store.read("x", start, end)


def test_create_refuses_more_bytes_than_its_limit(store: Store) -> None:
    """Data that one request cannot create is refused before it is sent."""
    with pytest.raises(ValueError, match="too many to create"):
        store.create("x", bytes(CREATE_LIMIT_BYTES + 1))


def test_names_with_unusual_characters_work(store: Store) -> None:
    """Spaces, percent signs, plus signs, equals signs and other alphabets are ordinary characters."""
    for key in ("a b/c+d=e%20f", "größe/文.json", "step=1/x#y", "q?versionId=1"):
        store.write(key, key.encode())
        assert store.read(key) == key.encode()
        assert store.size(key) == len(key.encode())
        assert key in store.keys(key[:2])


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Threads switch after a few instructions, so that threads of this process really race."""
    usual_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual_s)


@pytest.mark.usefixtures("eager_threads")
def test_exactly_one_of_several_racing_creators_wins(store: Store, url: str) -> None:
    """The log depends on this: of many writers of one key, over several clients, exactly one succeeds."""
    clients = [store, open_store(url), open_store(url)]
    for round_number in range(200 if url.startswith("memory") else 10):
        key = f"race/{round_number}"
        start = threading.Barrier(9)

        def run(number: int, key: str = key, start: threading.Barrier = start) -> bytes | None:
            mine = f"writer {number}".encode()
            start.wait(30)
            try:
                clients[number % 3].create(key, mine)
            except AlreadyExists:
                return None
            return mine

        with ThreadPoolExecutor(9) as pool:
            winners = [mine for mine in pool.map(run, range(9)) if mine is not None]
        assert len(winners) == 1
        assert {client.read(key) for client in clients} == set(winners)


def test_readers_get_the_old_or_the_new_object(store: Store) -> None:
    """While an object is replaced repeatedly, every read returns one whole version."""
    versions = [bytes([n]) * 100_000 for n in range(2)]
    store.write("x", versions[0])
    stop = threading.Event()

    def replace() -> None:
        n = 0
        while not stop.is_set():
            n += 1
            store.write("x", versions[n % 2])

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(replace)
        try:
            seen = {store.read("x") for _ in range(50)}
        finally:
            stop.set()
        writing.result()
    assert seen <= set(versions)


def test_a_store_opened_before_a_fork_works_after_it(store: Store) -> None:
    """A child opens its own connections, so a store may be opened and used before the fork."""
    store.write("before", b"parent")
    for number in range(4):
        child = os.fork()
        if child == 0:
            try:
                ok = store.read("before") == b"parent"
                store.write(f"after/{number}", b"child")
                os._exit(0 if ok else 1)
            except BaseException:
                os._exit(2)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert store.read("before") == b"parent"
    if not store.url.startswith("memory://"):
        assert store.keys("after/") == [f"after/{number}" for number in range(4)]
