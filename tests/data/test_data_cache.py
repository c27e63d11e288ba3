"""The cache of token shards: bounded, shared by processes, verified once, and private to the user."""

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from prepared_data import Prepared, cache_at

from elastic_pt.data.cache import ShardCache, cache_directory
from elastic_pt.data.shards import TokenReader
from elastic_pt.errors import ConfigError, DataError, StoreError
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store
from elastic_pt.workers.scratch import scratch_directory
from tests.membership.bucket import WatchedStore

WAIT_S = 60.0
SHARD = b"\x01\x02" * 500


def sha256(data: bytes) -> str:
    """The hash that names a shard."""
    return hashlib.sha256(data).hexdigest()


def put(data: bytes) -> Callable[[Path], None]:
    """A download of these bytes."""

    def download(path: Path) -> None:
        path.write_bytes(data)

    return download


def never(path: Path) -> None:
    """No download is expected."""
    raise AssertionError(f"{path} is downloaded again")


def remote(prepared: Prepared, name: str) -> WatchedStore:
    """The prepared data in a store that is not on this machine's disk."""
    store: Store = open_store(f"memory://test-cache-{name}")
    for path in sorted(prepared.root.rglob("*.bin")):
        store.write(str(path.relative_to(prepared.root)), path)
    return WatchedStore(store)


def bytes_in(directory: Path) -> int:
    """Bytes of all shards in a cache."""
    return sum(path.stat().st_size for path in directory.glob("*.bin"))


def test_reader_works_with_a_cache_smaller_than_the_corpus(
    prepared: Prepared, tmp_path: Path
) -> None:
    """Every row is correct, and the cache never holds more than its bound."""
    shards = prepared.manifest.sources[0].train
    largest = 2 * max(shard.tokens for shard in shards)
    bound = 2 * largest
    assert bound < sum(2 * shard.tokens for shard in shards)
    reader = TokenReader(
        prepared.manifest, remote(prepared, "bound"), cache=cache_at(tmp_path, bound)
    )
    plain = TokenReader(prepared.manifest, prepared.store, cache=cache_at(tmp_path / "markers"))
    tokens = prepared.manifest.tokens("train")
    length = 97
    rows = [(0, row) for row in range((prepared.manifest.sources[0].tokens("train") - 1) // length)]
    assert tokens > 0
    for row in [*rows, *reversed(rows), *rows[::7]]:
        assert torch.equal(reader.windows([row], length), plain.windows([row], length))
        assert bytes_in(tmp_path) <= bound


def test_bound_below_one_shard_is_refused(tmp_path: Path) -> None:
    """The error names the setting and the bytes that are needed."""
    with pytest.raises(ConfigError, match=r"data\.cache_bytes = 999: .*expected at least 1000"):
        cache_at(tmp_path, 999).open_downloaded(sha256(SHARD), 1000, "a shard", put(SHARD))


def test_least_recently_used_unmapped_shard_is_removed_first(tmp_path: Path) -> None:
    """Room is made by removing shards that no process maps, the least recently used first."""
    cache = cache_at(tmp_path, 3000)
    shards = [bytes([number, 0]) * 500 for number in range(4)]
    held = []
    for number, data in enumerate(shards[:3]):
        held.append(cache.open_downloaded(sha256(data), 1000, "a shard", put(data)))
        os.utime(tmp_path / f"{sha256(data)}.verified", (number, number))
    os.close(held[1])
    os.close(held[2])
    os.close(cache.open_downloaded(sha256(shards[3]), 1000, "a shard", put(shards[3])))
    left = {path.stem for path in tmp_path.glob("*.bin")}
    assert left == {sha256(shards[number]) for number in (0, 2, 3)}
    os.close(held[0])


def test_shard_is_hashed_once_per_machine(
    copied: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new reader does not hash a shard again, mapped in place or downloaded, until the file changes."""
    hashed: list[str] = []
    digest = hashlib.file_digest

    def counting(file: object, name: str) -> object:
        hashed.append(name)
        return digest(file, name)  # type: ignore[arg-type]

    monkeypatch.setattr(hashlib, "file_digest", counting)
    for store in (copied.store, remote(copied, "once")):
        hashed.clear()
        for _ in range(3):
            TokenReader(copied.manifest, store, cache=cache_at(tmp_path)).windows([(0, 0)], 100)
        assert len(hashed) == 1
    shard = copied.root / copied.manifest.sources[0].train[0].key
    data = bytearray(shard.read_bytes())
    data[7] ^= 1
    shard.write_bytes(data)
    hashed.clear()
    with pytest.raises(DataError, match="corrupt"):
        TokenReader(copied.manifest, copied.store, cache=cache_at(tmp_path)).windows([(0, 0)], 100)
    assert len(hashed) == 1


@pytest.mark.parametrize("trouble", ["mode", "link", "file"])
def test_directory_that_others_can_write_is_refused(tmp_path: Path, trouble: str) -> None:
    """A predictable name in /tmp is safe only if the directory is this user's own."""
    directory = tmp_path / "cache"
    if trouble == "mode":
        directory.mkdir()
        directory.chmod(0o777)
    elif trouble == "link":
        (tmp_path / "elsewhere").mkdir()
        directory.symlink_to(tmp_path / "elsewhere")
    else:
        directory.write_text("")
    with pytest.raises(ConfigError, match=r"data\.cache = .*expected a directory"):
        cache_at(directory).open_downloaded(sha256(SHARD), 1000, "a shard", put(SHARD))


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a directory to another user takes root")
def test_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    """Another user who created the directory first cannot choose the training data."""
    directory = tmp_path / "cache"
    directory.mkdir(mode=0o700)
    os.chown(directory, 12345, 12345)
    with pytest.raises(ConfigError, match="belongs to user 12345"):
        cache_at(directory).open_downloaded(sha256(SHARD), 1000, "a shard", put(SHARD))


def test_download_with_a_wrong_hash_is_not_kept(tmp_path: Path) -> None:
    """A download with another hash raises, and its file is removed."""
    with pytest.raises(DataError, match="corrupt"):
        cache_at(tmp_path).open_downloaded(sha256(SHARD), 1000, "a shard", put(b"\0" * 1000))
    assert list(tmp_path.glob("*.bin")) == []


def test_failed_download_is_a_store_error(tmp_path: Path) -> None:
    """No space and I/O errors may pass, so they raise `StoreError`; they leave no file."""

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    cache = cache_at(tmp_path)
    with pytest.raises(StoreError, match="No space left on device"):
        cache.open_downloaded(sha256(SHARD), 1000, "a shard", fail)
    os.close(cache.open_downloaded(sha256(SHARD), 1000, "a shard", put(SHARD)))
    assert {path.suffix for path in tmp_path.iterdir()} == {".bin", ".verified", ".lock"}


KILLED = """
import os, signal, sys
from pathlib import Path
from elastic_pt.data.cache import ShardCache

def download(path):
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

ShardCache(Path(sys.argv[1]), 10_000).open_downloaded(sys.argv[2], 1000, "a shard", download)
"""


def test_next_process_repeats_a_killed_download(tmp_path: Path) -> None:
    """A process that is killed while it downloads leaves no lock and no shard; its other files are replaced."""
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), sha256(SHARD)], timeout=WAIT_S
    )
    assert killed.returncode == -signal.SIGKILL
    os.close(cache_at(tmp_path).open_downloaded(sha256(SHARD), 1000, "a shard", put(SHARD)))
    assert {path.suffix for path in tmp_path.iterdir()} == {".bin", ".verified", ".lock"}


WAITING = """
import sys
from pathlib import Path
from elastic_pt.data.cache import ShardCache

def download(path):
    print("downloads", flush=True)
    sys.stdin.readline()
    path.write_bytes(b"\\x01\\x02" * 500)

ShardCache(Path(sys.argv[1]), 10_000).open_downloaded(sys.argv[2], 1000, "a shard", download)
"""


CROWD = """
import fcntl, hashlib, os, random, sys
from pathlib import Path
from elastic_pt.data.cache import ShardCache

directory, seed = Path(sys.argv[1]), int(sys.argv[2])
source = random.Random(seed)
cache = ShardCache(directory, 8000)
for _ in range(150):
    data = bytes([source.randrange(24), 7]) * 500
    sha256 = hashlib.sha256(data).hexdigest()
    os.close(cache.open_downloaded(sha256, 1000, "a shard", lambda path: path.write_bytes(data)))
    with open(directory / "room.lock", "r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        taken = sum(path.stat().st_size for path in directory.glob("*.bin"))
    assert taken <= 8000, taken
"""


def test_processes_that_make_room_together_keep_the_bound(tmp_path: Path) -> None:
    """Four processes that each hold a shard and download another one keep a bound of eight shards."""
    crowd = [
        subprocess.Popen([sys.executable, "-c", CROWD, str(tmp_path), str(seed)])
        for seed in range(4)
    ]
    assert [each.wait(WAIT_S) for each in crowd] == [0, 0, 0, 0]
    assert {path.suffix for path in tmp_path.iterdir()} == {".bin", ".verified", ".lock"}


def test_files_of_a_killed_download_are_removed_for_room(tmp_path: Path) -> None:
    """The files of a killed download are removed when another shard needs the room."""
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), sha256(SHARD)], timeout=WAIT_S
    )
    assert killed.returncode == -signal.SIGKILL
    assert {path.suffix for path in tmp_path.iterdir()} >= {".arriving", ".room"}
    other = b"\x03\x04" * 500
    os.close(cache_at(tmp_path, 1000).open_downloaded(sha256(other), 1000, "a shard", put(other)))
    assert {path.suffix for path in tmp_path.iterdir()} == {".bin", ".verified", ".lock"}


def test_second_process_waits_for_the_first_ones_download(tmp_path: Path) -> None:
    """While one process downloads, another one that needs the same shard waits for it."""
    first = subprocess.Popen(
        [sys.executable, "-c", WAITING, str(tmp_path), sha256(SHARD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdin is not None
    assert first.stdout is not None
    assert first.stdout.readline() == "downloads\n"
    first.stdin.write("\n")
    first.stdin.flush()
    os.close(cache_at(tmp_path).open_downloaded(sha256(SHARD), 1000, "a shard", never))
    assert first.wait(WAIT_S) == 0


def test_default_cache_is_below_the_temporary_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default is one directory per user for temporary files; a configured directory is used unchanged."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cache_directory("") == tmp_path / f"elastic-pt-tokens-{os.getuid()}"
    kept = cache_directory("") / "shard.bin"
    kept.parent.mkdir()
    kept.write_bytes(b"tokens")
    with scratch_directory(str(tmp_path)):
        assert kept.exists(), "the cleanup of scratch directories removed the cache"
    assert cache_directory("/scratch/tokens") == Path("/scratch/tokens")
    assert isinstance(ShardCache(cache_directory(""), 1), ShardCache)
