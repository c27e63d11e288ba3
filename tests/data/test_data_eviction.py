"""The bound of the cache: what goes first, what stays, and the number that is counted, also after kills."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from prepared_data import blocks_in, cache_at, disk_bytes, shard_name

from elastic_pt.data import cache as cache_module
from elastic_pt.data.blocks import Place
from elastic_pt.data.cache import ShardCache
from elastic_pt.data.eviction import INDEX, PLACE, SHARD_BYTES, Order, on_disk

WAIT_S = 60.0
BLOCK_BYTES = 4096
ON_DISK = BLOCK_BYTES + 64
OWN_BYTES = 4 * 4096
MINE = Place("mine", 0, "train", 0, 64 * BLOCK_BYTES, BLOCK_BYTES)
HELD_OUT = MINE._replace(split="held_out")
THEIRS = MINE._replace(fingerprint="theirs")
NAME, OTHER, THIRD = (shard_name(number) for number in range(3))


def room_for(shards: int, blocks: int) -> int:
    """The bound that has room for so many blocks, and no more."""
    return OWN_BYTES + shards * SHARD_BYTES + blocks * ON_DISK


def put(cache: ShardCache, name: str, numbers: range, place: Place = MINE) -> list[bool]:
    """Keep blocks, as a reader does; whether each one was kept."""
    return [
        cache.keep(name, place, str(number), b"\7" * len(place.span(number, number + 1)))
        for number in numbers
    ]


def counted(directory: Path) -> int | None:
    """The number in the file of the cache."""
    with cache_at(directory)._counted() as found:
        return found.bytes


def exact(directory: Path) -> int:
    """What the number should be, without the code under test."""
    shards = [path for path in directory.iterdir() if path.is_dir()]
    sizes = [
        path.stat().st_size for shard in shards for path in shard.iterdir() if path.name != PLACE
    ]
    return OWN_BYTES + len(shards) * 8320 + sum(-(-size // 4096) * 4096 + 64 for size in sizes)


def use(cache: ShardCache, directory: Path, name: str, age_s: float) -> None:
    """A shard was last used so long ago."""
    cache.used(name)
    used_s = time.time() - age_s
    os.utime(directory / name / PLACE, (used_s, used_s))


def test_files_on_the_disk_stay_within_the_bound(tmp_path: Path) -> None:
    """The disk holds no more than the bound, directories included, and the number is exact."""
    bound = room_for(3, 40)
    cache = cache_at(tmp_path, bound)
    for number in range(300):
        assert put(cache, shard_name(number % 5), range(number % 63, number % 63 + 2)) == [True] * 2
        assert disk_bytes(tmp_path) <= bound
        assert counted(tmp_path) == exact(tmp_path)
    assert disk_bytes(tmp_path) > bound // 2


def test_file_that_can_never_fit_is_not_kept(tmp_path: Path) -> None:
    """A bound that is far too small for one block costs the cache, and removes nothing."""
    assert put(cache_at(tmp_path), NAME, range(4)) == [True] * 4
    assert put(cache_at(tmp_path, room_for(1, 1) - 1), OTHER, range(2)) == [False] * 2
    assert len(blocks_in(tmp_path, NAME)) == 4


def test_least_recently_used_shard_is_evicted_first(tmp_path: Path) -> None:
    """A reader that knows no order evicts what was not used for the longest time."""
    cache = cache_at(tmp_path, room_for(3, 12))
    for number, age_s in enumerate((30, 90, 60)):
        put(cache, shard_name(number), range(4))
        use(cache, tmp_path, shard_name(number), age_s)
    assert put(cache, shard_name(3), range(4)) == [True] * 4
    left = [len(blocks_in(tmp_path, shard_name(number))) for number in range(4)]
    assert left[1] == 0
    assert left[0] == left[3] == 4


def ranked(source: int, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """The next step of each block of `MINE`: even blocks soon, odd ones late."""
    assert source == 0
    assert ((ends - starts) == BLOCK_BYTES // 2).all()
    number = starts * 2 // BLOCK_BYTES
    return number + 1000 * (number % 2)


def test_blocks_that_are_needed_last_are_evicted_first(tmp_path: Path) -> None:
    """With an order, the blocks of the farthest step go first; held-out ones stay."""
    cache = cache_at(tmp_path, room_for(2, 24))
    cache.order = Order("mine", 2, ranked)
    put(cache, NAME, range(16))
    put(cache, OTHER, range(8), HELD_OUT)
    for last in range(16, 22):
        assert put(cache, NAME, range(last, last + 1)) == [True]
        gone = set(range(last)) - set(blocks_in(tmp_path, NAME))
        assert all(number % 2 for number in gone)
        if last == 16:
            assert gone == set(range(15, 15 - 2 * len(gone), -2)) != set()
    assert blocks_in(tmp_path, OTHER) == list(range(8))


@pytest.mark.parametrize(("age_s", "mine_left"), [(7200.0, 20), (0.0, 16)])
def test_other_data_goes_first_only_if_it_is_idle(
    tmp_path: Path, age_s: float, mine_left: int
) -> None:
    """Idle blocks of another run go first; if that run is active, both give up about the same share."""
    cache = cache_at(tmp_path, room_for(2, 40))
    cache.order = Order("mine", 2, ranked)
    put(cache, NAME, range(20))
    put(cache, OTHER, range(20), THEIRS)
    use(cache, tmp_path, OTHER, age_s)
    smaller = cache_at(tmp_path, room_for(2, 32))
    smaller.order = cache.order
    assert put(smaller, THIRD, range(1)) == [True]
    mine, theirs = (len(blocks_in(tmp_path, name)) for name in (NAME, OTHER))
    assert mine == pytest.approx(mine_left, abs=2)
    assert mine == 20 if age_s else abs(mine - theirs) <= 3


def test_active_data_goes_if_the_own_is_not_enough(tmp_path: Path) -> None:
    """A run that starts in a full cache gets room, though it has little to give up."""
    cache = cache_at(tmp_path, room_for(2, 20))
    cache.order = Order("mine", 2, ranked)
    put(cache, OTHER, range(20), THEIRS)
    assert put(cache, NAME, range(16)) == [True] * 16


def test_shards_without_blocks_make_room(tmp_path: Path) -> None:
    """Block indexes alone do not fill a small cache for good."""
    cache = cache_at(tmp_path, room_for(4, 4))
    for number in range(20):
        cache.keep(shard_name(number), MINE, INDEX, b"\1" * 2048)
    assert put(cache, shard_name(30), range(4)) == [True] * 4
    assert disk_bytes(tmp_path) <= cache.bytes_max
    assert counted(tmp_path) == exact(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 99, b'{"size": 3}\n00000000', None])
def test_shard_whose_place_is_damaged_goes_first(tmp_path: Path, content: bytes | None) -> None:
    """A damaged or missing place stops no eviction: its blocks go before others."""
    cache = cache_at(tmp_path, room_for(2, 20))
    cache.order = Order("mine", 2, ranked)
    put(cache, NAME, range(10))
    put(cache, OTHER, range(10))
    place = tmp_path / OTHER / PLACE
    if content is None:
        place.unlink()
    else:
        place.write_bytes(content)
    assert put(cache, NAME, range(10, 18)) == [True] * 8
    assert blocks_in(tmp_path, NAME) == list(range(18))
    assert len(blocks_in(tmp_path, OTHER)) <= 2


def test_flipped_digit_in_a_place_is_found(tmp_path: Path) -> None:
    """A place that still is JSON, but of another source, would be a wrong rank: it has a checksum."""
    cache = cache_at(tmp_path, room_for(1, 8))
    cache.order = Order("mine", 2, ranked)
    put(cache, NAME, range(8))
    place = tmp_path / NAME / PLACE
    place.write_bytes(place.read_bytes().replace(b'"source": 0', b'"source": 7'))
    assert put(cache, NAME, range(8, 10)) == [True] * 2


@pytest.mark.parametrize("foreign", ["notes.txt", "99999999", "core.12-x.part", "7.tmp"])
def test_files_of_a_person_stop_nothing(tmp_path: Path, foreign: str) -> None:
    """Files that are not the cache's are no reason to fail, in a shard's directory or above."""
    cache = cache_at(tmp_path, room_for(1, 8))
    put(cache, NAME, range(1))
    for directory in (tmp_path, tmp_path / NAME):
        (directory / foreign).write_bytes(b"x")
    for number in range(40):
        assert put(cache, shard_name(number % 3), range(number, number + 1)) == [True]


KILLED = """
import os, signal, sys
from pathlib import Path
from elastic_pt.data import cache as module
from elastic_pt.data.blocks import Place

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

setattr(module, sys.argv[2], die)
cache = module.ShardCache(Path(sys.argv[1]), int(sys.argv[3]))
for number in range(4):
    cache.keep(sys.argv[4], Place("mine", 0, "train", 0, 64 * 4096, 4096), str(number), b"x" * 4096)
"""


@pytest.mark.parametrize("moment", ["_create", "_write", "evict"])
def test_killed_process_leaves_no_bytes(tmp_path: Path, moment: str) -> None:
    """Killed after it counted, while it writes, or in an eviction: its file goes, and all the room can be used."""
    bound = room_for(2, 8)
    assert put(cache_at(tmp_path, bound), NAME, range(7)) == [True] * 7
    if moment == "evict":
        assert put(cache_at(tmp_path, bound), NAME, range(7, 10)) == [True] * 3
    for _ in range(2):
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, str(tmp_path), moment, str(bound), OTHER],
            timeout=WAIT_S,
            check=False,
        )
        assert killed.returncode == -signal.SIGKILL
    assert bool(list(tmp_path.rglob("*.part"))) == (moment == "_write")
    assert disk_bytes(tmp_path) <= bound
    cache = cache_at(tmp_path, bound)
    for number in range(20):
        assert put(cache, THIRD, range(number, number + 1)) == [True]
        assert disk_bytes(tmp_path) <= bound
    assert not list(tmp_path.rglob("*.part"))
    assert counted(tmp_path) == exact(tmp_path)
    assert disk_bytes(tmp_path) > bound // 2


def test_part_of_a_running_process_stays(tmp_path: Path) -> None:
    """Only what a killed process has left is removed; a process of another container is judged by age alone."""
    cache = cache_at(tmp_path, room_for(1, 8))
    put(cache, NAME, range(4))
    part, old = (tmp_path / NAME / f"{number}.{os.getpid()}-1.part" for number in (60, 61))
    for path in (part, old):
        path.write_bytes(b"")
    os.utime(old, (1, 1))
    put(cache, NAME, range(4, 20))
    assert part.exists()
    assert not old.exists()


def test_number_is_exact_after_a_crowd(tmp_path: Path) -> None:
    """Threads that write, damage and evict the same blocks leave the number of what is on the disk."""
    bound = room_for(4, 30)
    start = threading.Barrier(8)

    def work(seed: int) -> None:
        draw = np.random.default_rng(seed)
        cache = cache_at(tmp_path, bound)
        start.wait(WAIT_S)
        for _ in range(150):
            name, number = shard_name(int(draw.integers(6))), int(draw.integers(64))
            with cache.claimed(name, number, number + 1, until_s=time.monotonic() + WAIT_S):
                put(cache, name, range(number, number + 1))
            if draw.random() < 0.1:
                cache.remove(name, str(number), BLOCK_BYTES)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert counted(tmp_path) == exact(tmp_path)
    assert disk_bytes(tmp_path) <= bound


def test_directory_of_a_shard_that_is_removed_meanwhile_costs_one_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An eviction between the first and the last name of a file is no trouble of the disk: the next block is kept."""
    cache = cache_at(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "_write", lambda path, data: os.unlink(path))
        assert put(cache, NAME, range(1)) == [False]
    assert put(cache, NAME, range(1)) == [True]


def test_blocks_stay_after_a_restart_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number may be older than the files, so they are counted; the blocks stay."""
    bound = room_for(1, 20)
    put(cache_at(tmp_path, bound), NAME, range(16))
    monkeypatch.setattr(cache_module, "_boot_id", lambda: b"another".ljust(40, b"\0"))
    assert counted(tmp_path) is None
    assert put(cache_at(tmp_path, bound), NAME, range(16, 17)) == [True]
    assert blocks_in(tmp_path, NAME) == list(range(17))
    assert counted(tmp_path) == exact(tmp_path)


@pytest.mark.parametrize("content", [b"", b"short", b"\0" * 48, None])
def test_damaged_number_is_counted_again(tmp_path: Path, content: bytes | None) -> None:
    """Without the number the files are counted."""
    put(cache_at(tmp_path), NAME, range(8))
    if content is None:
        (tmp_path / "bytes").unlink()
    else:
        (tmp_path / "bytes").write_bytes(content)
    assert put(cache_at(tmp_path, room_for(1, 9)), NAME, range(8, 9)) == [True]
    assert counted(tmp_path) == exact(tmp_path)


def test_files_that_a_person_removes_make_room(tmp_path: Path) -> None:
    """A person may remove shards: the number is corrected at the next eviction, and nothing else goes."""
    cache = cache_at(tmp_path, room_for(2, 32))
    put(cache, NAME, range(16))
    put(cache, OTHER, range(16))
    for path in (tmp_path / OTHER).iterdir():
        path.unlink()
    (tmp_path / OTHER).rmdir()
    assert put(cache, NAME, range(16, 28)) == [True] * 12
    assert blocks_in(tmp_path, NAME) == list(range(28))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_disk_that_is_full_or_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A full disk makes older blocks go; one that fails is left alone for a while. Nothing stays counted."""
    cache = cache_at(tmp_path)
    put(cache, NAME, range(32))

    def failing(path: str, data: bytes) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "_write", failing)
        assert put(cache, NAME, range(40, 41)) == [False]
    assert not list(tmp_path.rglob("*.part"))
    assert counted(tmp_path) == exact(tmp_path)
    kept = put(cache, NAME, range(40, 41)) == [True]
    assert kept == (number != errno.EIO)
    assert (len(blocks_in(tmp_path, NAME)) < 32) == (number != errno.EIO)


def test_counted_bytes_are_those_of_the_disk() -> None:
    """A file takes whole pages, and its name a part of the directory."""
    assert [on_disk(size) for size in (0, 1, 4096, 4097)] == [64, 4160, 4160, 8256]
