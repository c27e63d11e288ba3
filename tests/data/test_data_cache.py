"""The cache of blocks: shared by processes, verified by each, best effort, and private to the user."""

import errno
import fcntl
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from prepared_data import Prepared, cache_at, disk_bytes, in_memory, settle, shards_of, stream_of

from elastic_pt.data import cache as cache_module
from elastic_pt.data import fetching
from elastic_pt.data.cache import ShardCache, cache_directory
from elastic_pt.data.eviction import SHARD_BYTES, on_disk
from elastic_pt.data.shards import TokenReader
from elastic_pt.errors import ConfigError, DataError
from elastic_pt.store.port import Store
from elastic_pt.workers.scratch import scratch_directory
from tests.membership.bucket import WatchedStore

WAIT_S = 60.0
LENGTH = 50


def corpus_bytes(prepared: Prepared) -> int:
    """What the cache needs for all train blocks of the first source."""
    shards = shards_of(prepared, 0, "train")
    block = 2 * (prepared.manifest.block_tokens or shards[0].tokens)
    return sum(SHARD_BYTES + -(-2 * each.tokens // block) * on_disk(block) for each in shards)


def rows_of(prepared: Prepared) -> list[tuple[int, int]]:
    """All rows of the first source."""
    count = (prepared.manifest.sources[0].tokens("train") - 1) // LENGTH
    return [(0, row) for row in range(count)]


def reads_right(prepared: Prepared, reader: TokenReader, rows: list[tuple[int, int]]) -> bool:
    """Whether a reader gives the right tokens."""
    stream = stream_of(prepared, 0)
    expected = [stream[row * LENGTH : row * LENGTH + LENGTH + 1] for _, row in rows]
    return np.array_equal(reader.windows(rows, LENGTH).numpy(), np.stack(expected))


def reader_of(
    prepared: Prepared, store: Store, directory: Path, bytes_max: int = 2**30
) -> TokenReader:
    """A reader through a cache."""
    return TokenReader(prepared.manifest, store, cache=cache_at(directory, bytes_max))


def block_files(directory: Path) -> list[Path]:
    """The files with blocks in a cache."""
    return sorted(path for path in directory.glob("*/*") if path.name.replace("-", "").isdecimal())


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 0.6])
def test_reader_works_with_a_cache_smaller_than_the_corpus(
    either: Prepared, tmp_path: Path, share: float
) -> None:
    """Every row is correct and the disk holds no more than the bound, also if it is too small for any block."""
    cache_at(tmp_path).require_own()
    # Of the disk; in schema 1 the files of the cache itself are the larger part.
    bound = int(share * corpus_bytes(either)) + 16384 + (SHARD_BYTES if share else 0)
    rows = rows_of(either)
    with closing(reader_of(either, in_memory(either, "bound"), tmp_path, bound)) as reader:
        for batch in [rows[::2], rows[::-3], rows, *([row] for row in rows[::7])]:
            assert reads_right(either, reader, batch)
            settle(reader)
            assert disk_bytes(tmp_path) <= bound
    assert bool(block_files(tmp_path)) == (share > 0)


def test_bound_below_one_block_is_refused(tmp_path: Path) -> None:
    """The error names the setting and the bytes that are needed."""
    with pytest.raises(ConfigError, match=r"data\.cache_bytes = 999: .*expected at least 1000"):
        cache_at(tmp_path, 999).require(1000, "a block")


@pytest.mark.parametrize("trouble", ["mode", "link", "file", "owner"])
def test_directory_that_others_can_write_is_refused(
    prepared: Prepared, tmp_path: Path, trouble: str
) -> None:
    """A predictable name in /tmp is safe only if the directory is this user's own."""
    directory = tmp_path / "cache"
    if trouble == "link":
        (tmp_path / "elsewhere").mkdir()
        directory.symlink_to(tmp_path / "elsewhere")
    elif trouble == "file":
        directory.write_text("")
    else:
        directory.mkdir(mode=0o700)
        if trouble == "mode":
            directory.chmod(0o777)
        elif os.geteuid():
            pytest.skip("giving a directory to another user takes root")
        else:
            os.chown(directory, 12345, 12345)
    reader = reader_of(prepared, in_memory(prepared, "refused"), directory)
    with closing(reader), pytest.raises(ConfigError, match=r"data\.cache = .*expected a directory"):
        reader.windows([(0, 0)], LENGTH)


def test_files_of_earlier_versions_are_removed(tmp_path: Path) -> None:
    """They would take room that nothing counts; other files stay."""
    name = "a" * 64
    old = [
        f"{name}.tokens",
        f"{name}.blocks",
        f"{name}-{'b' * 16}.blocks",
        f"{name}.bin",
        "room.lock",
    ]
    for each in [*old, "notes.txt"]:
        (tmp_path / each).write_bytes(b"x")
    cache_at(tmp_path).require_own()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_block_with_a_wrong_hash_is_not_kept(copied: Prepared, tmp_path: Path) -> None:
    """A block with another hash is read twice, raises, and is not in the cache."""
    store = WatchedStore(in_memory(copied, "wrong"))
    key = shards_of(copied, 0, "train")[0].key
    store.write(key, b"\0" * store.size(key))  # type: ignore[operator]
    store.requests.clear()
    with (
        closing(reader_of(copied, store, tmp_path / "cache")) as reader,
        pytest.raises(DataError, match="corrupt"),
    ):
        reader.windows([(0, 0)], 20)
    assert store.requests["read shards"] == 2 + int(copied.manifest.schema == 2)
    assert not block_files(tmp_path / "cache")


@pytest.mark.parametrize(
    ("damage", "known"),
    [
        *((each, False) for each in ("flipped", "truncated", "longer", "empty")),
        *((each, True) for each in ("truncated", "empty")),
    ],
)
def test_damaged_file_in_the_cache_costs_one_fetch(
    either: Prepared, tmp_path: Path, damage: str, known: bool
) -> None:
    """A file that a crash or a disk has damaged is replaced; a reader that has verified it finds a shorter one too."""
    store = WatchedStore(in_memory(either, "damaged"))
    rows = rows_of(either)[:20]
    reader = reader_of(either, store, tmp_path)
    assert reads_right(either, reader, rows)
    settle(reader)
    if not known:
        reader.close()
        reader = reader_of(either, store, tmp_path)
    files = block_files(tmp_path)
    for path in files[::2]:
        good = path.read_bytes()
        flipped = good[:-1] + bytes([good[-1] ^ 1])
        changed = {"flipped": flipped, "truncated": good[: len(good) // 2], "longer": good + b"xx"}
        path.write_bytes(changed.get(damage, b""))
    for _ in range(2):
        assert reads_right(either, reader, rows)
        settle(reader)
    reader.close()
    for _ in range(2):
        store.requests.clear()
        with closing(reader_of(either, store, tmp_path)) as again:
            assert reads_right(either, again, rows)
            settle(again)
    assert store.requests["read shards"] == 0
    assert block_files(tmp_path) == files


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_full_or_broken_disk_ends_nothing(
    either: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """If a write to the cache fails, the verified bytes serve the batch, and nothing stays on the disk."""

    def failing(path: str, data: bytes) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cache_module, "_write", failing)
    with closing(reader_of(either, in_memory(either, "disk"), tmp_path)) as reader:
        for _ in range(2):
            assert reads_right(either, reader, rows_of(either))
        settle(reader)
    assert not block_files(tmp_path)


@pytest.mark.parametrize("why", ["locked", "read only"])
def test_damaged_file_that_cannot_be_removed_is_never_used(
    either: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """A block is verified in the file that it is read from: that it was right in another one says nothing."""
    store, rows = in_memory(either, "stays"), rows_of(either)
    with closing(reader_of(either, store, tmp_path)) as reader:
        assert reads_right(either, reader, rows)
        settle(reader)
    for path in block_files(tmp_path):
        path.write_bytes(bytes(path.stat().st_size))
    with (tmp_path / "bytes").open("r+b") as lock:
        if why == "locked":
            monkeypatch.setattr(cache_module, "_LOCK_TIMEOUT_S", 0.1)
            fcntl.flock(lock, fcntl.LOCK_EX)
        else:

            def failing(path: str) -> None:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))

            monkeypatch.setattr(cache_module.os, "unlink", failing)
        with closing(reader_of(either, store, tmp_path)) as reader:
            for _ in range(3):
                assert reads_right(either, reader, rows)
                settle(reader)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
def test_disk_smaller_than_the_bound_keeps_the_newest_blocks(
    prepared: Prepared, tmp_path: Path
) -> None:
    """On a disk that is full below the bound, older blocks make room for what is read now."""
    options = ["-t", "tmpfs", "-o", "size=600k,mode=700", "tmpfs", str(tmp_path)]
    if subprocess.run(["mount", *options], check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let a test mount")
    try:
        store = WatchedStore(in_memory(prepared, "small"))
        rows = rows_of(prepared)
        assert corpus_bytes(prepared) > 1_200_000
        with closing(reader_of(prepared, store, tmp_path)) as reader:
            for row in [*rows, *rows[-3:], *rows[-3:]]:
                assert reads_right(prepared, reader, [row])
                settle(reader)
            store.requests.clear()
            assert reads_right(prepared, reader, rows[-3:])
        assert store.requests["read shards"] == 0
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EIO])
@pytest.mark.parametrize("call", ["flock", "fcntl"])
def test_file_system_without_locks_ends_nothing(
    either: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    """Without locks the batch has its tokens all the same; no descriptor is left open."""

    def failing(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cache_module.fcntl, call, failing)
    with closing(reader_of(either, in_memory(either, "locks"), tmp_path)) as reader:
        assert reads_right(either, reader, rows_of(either))
    deadline_s = time.monotonic() + WAIT_S
    while any(str(tmp_path) in each for each in open_files()):
        assert time.monotonic() < deadline_s


def open_files() -> Iterator[str]:
    """The paths of this process's descriptors."""
    for number in os.listdir("/proc/self/fd"):
        try:
            yield os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue


@pytest.mark.parametrize("local", [False, True])
def test_few_descriptors_end_nothing(either: Prepared, tmp_path: Path, local: bool) -> None:
    """A process that may open hardly any file reads all shards: open ones are closed for others."""
    store = either.store if local else in_memory(either, "few")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(each) for each in os.listdir("/proc/self/fd"))
    with closing(reader_of(either, store, tmp_path)) as reader:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 5, hard))
        try:
            windows = [reader.windows(rows_of(either), LENGTH) for _ in range(2)]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert all((each == reader.windows(rows_of(either), LENGTH)).all() for each in windows)
        assert reads_right(either, reader, rows_of(either))


HOLDER = """
import fcntl, os, sys, time
from pathlib import Path
from elastic_pt.data.cache import ShardCache

directory, name, sha256 = sys.argv[1:]
if name == "claims":
    claim = ShardCache(Path(directory), 2**30).claimed(sha256, 0, 64, until_s=0.0)
    claim.__enter__()
else:
    file = open(f"{directory}/{name}", "a")
    fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


@contextmanager
def holder(directory: Path, name: str, sha256: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a lock of the cache."""
    command = [sys.executable, "-c", HOLDER, str(directory), name, sha256]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("name", ["bytes", "evicting", "claims"])
def test_others_go_on_if_a_process_with_a_lock_is_stopped_or_killed(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A stopped process costs the cache and no batch; when it is killed, the others use the cache again at once."""
    for module, limit in (
        (cache_module, "_LOCK_TIMEOUT_S"),
        (cache_module, "_ROOM_TIMEOUT_S"),
        (cache_module, "_PAUSE_S"),
        (fetching, "_CLAIM_TIMEOUT_S"),
    ):
        monkeypatch.setattr(module, limit, 0.2)
    cache_at(tmp_path).require_own()
    store, bound = in_memory(prepared, "stopped"), corpus_bytes(prepared) // 4
    rows = rows_of(prepared)
    with holder(tmp_path, name, shards_of(prepared, 0, "train")[0].sha256) as process:
        os.kill(process.pid, signal.SIGSTOP)
        with closing(reader_of(prepared, store, tmp_path, bound)) as reader:
            began_s = time.monotonic()
            for start in range(0, len(rows), 100):
                assert reads_right(prepared, reader, rows[start : start + 100])
            assert time.monotonic() - began_s < WAIT_S / 3
    with closing(reader_of(prepared, store, tmp_path, bound)) as reader:
        for row in rows[:5]:
            assert reads_right(prepared, reader, [row])
            settle(reader)
    assert block_files(tmp_path)


def test_second_process_waits_for_the_first_ones_fetch(either: Prepared, tmp_path: Path) -> None:
    """Blocks that another process fetches are waited for, and then read from the cache: one request."""
    store = WatchedStore(in_memory(either, "second"))
    cache = cache_at(tmp_path / "second")
    shard = shards_of(either, 0, "train")[0]
    # The first one is between its claim and its file.
    with closing(reader_of(either, store, tmp_path / "first")) as reader:
        reader.windows([(0, 0)], 20)
        reader.windows([(0, 0)], 20)
    with (
        ThreadPoolExecutor() as pool,
        closing(TokenReader(either.manifest, store, cache=cache)) as second,
    ):
        with cache.claimed(shard.sha256, 0, 1, until_s=0.0):
            store.requests.clear()
            found = pool.submit(second.windows, [(0, 0)], 20)
            place = second._find(0, "train", 0).place
            data = (either.root / shard.key).read_bytes()[: place.block_bytes]
            assert cache.keep(shard.sha256, place, "0", data)
        assert found.result(WAIT_S)[0].tolist() == stream_of(either, 0)[:21].tolist()
    # The index alone.
    assert store.requests["read shards"] == int(either.manifest.schema == 2)


def test_block_is_fetched_once_by_many_threads(either: Prepared, tmp_path: Path) -> None:
    """Readers that need the same blocks at the same time make one request for each."""
    store = WatchedStore(in_memory(either, "crowd"))
    readers = [reader_of(either, store, tmp_path) for _ in range(4)]
    fetched: list[str] = []
    whole = store.store

    class Counting:
        """Counts requests for blocks."""

        url = whole.url

        def read(self, key: str, *arguments: int) -> bytes:
            if key.endswith(".bin"):
                fetched.append(key)
            return whole.read(key, *arguments)

    store.store = Counting()  # type: ignore[assignment]
    start = threading.Barrier(8)

    def read(reader: TokenReader) -> bool:
        start.wait(WAIT_S)
        return reads_right(either, reader, [(0, 0)])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, readers * 2))
    assert len(fetched) == 1
    for reader in readers:
        reader.close()


def test_removed_cache_directory_is_created_again(either: Prepared, tmp_path: Path) -> None:
    """A person may delete the cache while a run reads through it."""
    store, directory, rows = in_memory(either, "deleted"), tmp_path / "cache", rows_of(either)
    with closing(reader_of(either, store, directory)) as reader:
        assert reads_right(either, reader, rows[: len(rows) // 2])
        removed = threading.Thread(target=shutil.rmtree, args=(directory, True))
        removed.start()
        for _ in range(3):
            assert reads_right(either, reader, rows)
        removed.join(WAIT_S)
        for _ in range(2):
            assert reads_right(either, reader, rows)
    assert block_files(directory)


def test_default_cache_is_below_the_temporary_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default is one directory per user for temporary files; a configured directory is used unchanged."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cache_directory("") == tmp_path / f"elastic-pt-tokens-{os.getuid()}"
    kept = cache_directory("") / "0"
    kept.parent.mkdir()
    kept.write_bytes(b"tokens")
    with scratch_directory(str(tmp_path)):
        assert kept.exists(), "the cleanup of scratch directories removed the cache"
    assert cache_directory("/scratch/tokens") == Path("/scratch/tokens")
    assert isinstance(ShardCache(cache_directory(""), 1), ShardCache)


CROWD = """
import sys
from pathlib import Path
import numpy as np
from elastic_pt.data.cache import ShardCache
from elastic_pt.data.lanes import Lanes
from elastic_pt.data.loader import SlotLoader
from elastic_pt.data.manifest import read_manifest
from elastic_pt.data.plan import DataPlan
from elastic_pt.data.shards import TokenReader
from elastic_pt.store.open import open_store

directory, root, seed, bound = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

class Remote:
    def __init__(self, store):
        self.store, self.url = store, "remote://data"
    def read(self, *arguments):
        return self.store.read(*arguments)

store, length = open_store(root), 150
manifest = read_manifest(store)
plain = TokenReader(manifest, store, cache=ShardCache(Path("/nowhere"), 0))
expected = [plain.stream(n, "train", 0, each.tokens("train")) for n, each in enumerate(manifest.sources)]
plan = DataPlan(manifest, length, seed, 16, Lanes(2, 3000) if seed % 2 else None)
reader = TokenReader(manifest, Remote(store), cache=ShardCache(Path(directory), bound))
slots = range(8)
batches = SlotLoader(plan, reader, slots=slots, first_step=seed, last_step=10**6, micro_batch=2, prefetch_steps=2)
for batch in batches:
    rows = plan.slot_rows(batch.step, slots, 2)
    for (source, row), window in zip(rows, batch.tokens_VBT.view(-1, length + 1), strict=True):
        assert (window == expected[source][row * length : (row + 1) * length + 1]).all(), (source, row)
    if Path(directory + "-stop").exists():
        break
batches.close()
reader.close()
"""


def test_runs_that_share_a_cache_read_the_right_tokens(prepared: Prepared, tmp_path: Path) -> None:
    """Two runs of two orders share a cache of a tenth, and processes are killed and stopped: no token is wrong."""
    bound, directory = corpus_bytes(prepared) // 10, tmp_path / "cache"
    cache_at(directory).require_own()
    draw, kills, samples = random.Random(7), 0, 0

    def start(seed: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", CROWD, str(directory), str(prepared.root)]
        return subprocess.Popen([*command, str(seed), str(bound)])

    crowd = [start(seed) for seed in (1, 1, 2, 2)]
    try:
        deadline_s, kill_s = time.monotonic() + 12, time.monotonic() + 5
        while time.monotonic() < deadline_s:
            assert all(each.poll() is None for each in crowd)
            assert disk_bytes(directory) <= bound
            samples += 1
            if time.monotonic() > kill_s:
                place = draw.randrange(3)
                crowd[place].kill()
                crowd[place].wait(WAIT_S)
                crowd[place] = start(1 + place % 2)
                kills, kill_s = kills + 1, time.monotonic() + draw.uniform(0.2, 2)
        Path(f"{directory}-stop").touch()
        assert [each.wait(WAIT_S) for each in crowd] == [0, 0, 0, 0]
    finally:
        for each in crowd:
            each.kill()
    assert kills > 2
    assert samples > 100
    assert block_files(directory)
    with (directory / "bytes").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
    assert disk_bytes(directory) <= bound
