"""One contract, every store: memory, a directory, moto, and a real Ceph gateway."""

import os
import sys
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from elastic_pt.errors import AlreadyExists, NotFound
from elastic_pt.store.open import open_store
from elastic_pt.store.port import CREATE_LIMIT_BYTES, Store

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
    """A range is [start, end), as in Python; beyond the object it gives the bytes that exist."""
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


def test_an_empty_object_is_an_object(store: Store) -> None:
    """Nothing written under a key still is something under that key."""
    store.write("empty", b"")
    store.create("created-empty", b"")
    for key in ("empty", "created-empty"):
        assert store.read(key) == b""
        assert store.size(key) == 0
    with pytest.raises(AlreadyExists):
        store.create("empty", b"x")


def test_what_is_not_there_is_not_found(store: Store) -> None:
    """A missing object raises on read, has no size, is not listed, and may be deleted."""
    with pytest.raises(NotFound, match="nowhere/x"):
        store.read("nowhere/x")
    with pytest.raises(NotFound):
        store.read("nowhere/x", 1, 2)
    assert store.size("nowhere/x") is None
    assert store.keys("nowhere/") == []
    store.delete("nowhere/x")


def test_a_prefix_of_keys_is_no_object(store: Store) -> None:
    """Directories do not exist: only what was written has a size or can be read."""
    store.write("folder/file", b"1")
    assert store.size("folder") is None
    with pytest.raises(NotFound):
        store.read("folder")


def test_create_gives_a_key_once(store: Store) -> None:
    """The second writer is told, and the first one's object stays."""
    store.create("log/0", b"first")
    with pytest.raises(AlreadyExists, match="log/0"):
        store.create("log/0", b"second")
    assert store.read("log/0") == b"first"


def test_create_of_the_same_bytes_again_succeeds(store: Store) -> None:
    """A writer that lost the answer to its create finds its own object and goes on."""
    store.create("log/0", b"mine")
    store.create("log/0", b"mine")
    assert store.keys("") == ["log/0"]


def test_a_deleted_key_can_be_created_again(store: Store) -> None:
    """Delete leaves nothing that a later create would trip over."""
    store.create("deep/er/key", b"1")
    store.delete("deep/er/key")
    store.delete("deep/er/key")
    assert store.size("deep/er/key") is None
    store.create("deep/er/key", b"2")
    assert store.read("deep/er/key") == b"2"


def test_write_replaces(store: Store) -> None:
    """The last write wins, also over a longer object."""
    store.write("x", b"a long first version")
    store.write("x", b"short")
    assert store.read("x") == b"short"
    assert store.size("x") == 5


def test_a_local_file_is_written_as_it_is(store: Store, tmp_path: Path) -> None:
    """A Path is the file's content; one that is not there is the caller's error, not the store's."""
    source = tmp_path / "source"
    source.write_bytes(b"content" * 1000)
    store.write("from/path", source)
    assert store.read("from/path") == source.read_bytes()
    with pytest.raises(FileNotFoundError):
        store.write("from/path", tmp_path / "missing")


def test_a_large_object_survives_being_cut_into_parts(store: Store, tmp_path: Path) -> None:
    """Objects above the size of a single request come back bit for bit, from memory and from a file."""
    data = os.urandom(2**20) * 37 + b"tail"
    source = tmp_path / "large"
    source.write_bytes(data)
    store.write("large/file", source)
    store.write("large/bytes", data)
    assert store.size("large/file") == len(data)
    assert store.read("large/file") == data
    assert store.read("large/bytes") == data
    assert (
        store.read("large/file", 16 * 2**20 - 3, 16 * 2**20 + 3)
        == data[16 * 2**20 - 3 : 16 * 2**20 + 3]
    )


def test_keys_are_listed_by_prefix_and_sorted(store: Store) -> None:
    """A prefix is a string, not a folder; keys come relative to the store and in order."""
    for key in ("log/10", "log/2", "log/1", "logs/1", "ckpt/1/a", "z"):
        store.write(key, b"1")
    assert store.keys("log/") == ["log/1", "log/10", "log/2"]
    assert store.keys("log") == ["log/1", "log/10", "log/2", "logs/1"]
    assert store.keys("log/1") == ["log/1", "log/10"]
    assert store.keys("z/") == []
    assert store.keys("") == ["ckpt/1/a", "log/1", "log/10", "log/2", "logs/1", "z"]


def test_keys_see_only_their_own_url(store: Store, url: str) -> None:
    """A neighbour whose URL starts alike stays out of the listing."""
    neighbour = open_store(url + "-2", timeout_s=30.0)
    neighbour.write("theirs", b"1")
    store.write("mine", b"1")
    assert store.keys("") == ["mine"]
    assert neighbour.keys("") == ["theirs"]
    neighbour.delete("theirs")


@pytest.mark.parametrize("key", ["", "/", "/a", "a/", "a//b", "../a", "a/../b", "a/..", "./a"])
def test_a_key_that_could_leave_the_store_is_refused(store: Store, key: str) -> None:
    """Keys stay below the URL; a wrong one is a bug of the caller and reaches no server."""
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
def test_a_prefix_that_no_key_has_is_refused(store: Store, prefix: str) -> None:
    """A prefix that cannot match is a bug of the caller, not an empty listing."""
    with pytest.raises(ValueError, match="prefix"):
        store.keys(prefix)


@pytest.mark.parametrize(("start", "end"), [(-1, None), (3, 2), (-2, -1)])
def test_a_range_that_is_none_is_refused(store: Store, start: int, end: int | None) -> None:
    """Ranges count from the start of the object; there is no counting from its end."""
    store.write("x", b"12345")
    with pytest.raises(ValueError, match="range"):
        store.read("x", start, end)


def test_create_is_for_records(store: Store) -> None:
    """What cannot be created in a single request is refused before it is sent."""
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
    """Threads take turns after every few instructions, so that a race inside this process is a race."""
    usual_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual_s)


@pytest.mark.usefixtures("eager_threads")
def test_of_racing_creators_exactly_one_wins(store: Store, url: str) -> None:
    """The fence of the whole project: one key, many writers over several clients, one winner."""
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


def test_readers_see_old_or_new(store: Store) -> None:
    """While an object is replaced over and over, every read is one whole version of it."""
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
    """A child starts with connections of its own, so a store may be opened, even used, before the fork."""
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
