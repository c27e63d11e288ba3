"""Makes room in the cache: removes the blocks that are needed last.

    files of the directory ─► a sample of the extents, ranked by when they are needed ─► the last ones unlinked

The rank of an extent is the next step that reads one of its blocks, if the process knows the order of the data; held-out blocks stay longest.
Blocks of other data go first if they were not used for a while. If they are in use, by another run on this machine,
both give up the same share.
"""

import json
import os
import random
import re
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydantic_core import from_json

from elastic_pt.data.blocks import Extent, Place

PLACE: Final = "place"
INDEX: Final = "index"
PART: Final = ".part"
SHARD_BYTES: Final = 8192 + 128
"""Counted for the directory of a shard, its entry, and the file with its place."""

_FILE_BYTES: Final = 4096
_ENTRY_BYTES: Final = 64
_SHARD: Final = re.compile("[0-9a-f]{64}")
_EXTENT: Final = re.compile(r"(\d{1,10})(?:-(\d{1,10}))?")
_WRITER: Final = re.compile(rf"[a-z0-9-]+\.(\d+)-\d+{re.escape(PART)}")
_PART_AGE_MAX_S: Final = 600.0
"""A write takes less. Its process may be in another container, so that its number tells nothing."""
_IDLE_S: Final = 600.0
"""Blocks of other data that were not used for so long go first."""
_SAMPLE: Final = 4
"""Ranked are this many times the bytes to free, in shards drawn at random: a full cache has a million blocks."""
_SAMPLE_SHARDS: Final = 64

Tokens = NDArray[np.int64]

NextStep = Callable[[int, Tokens, Tokens], Tokens]
"""(source, starts, ends) of spans of its train stream → the next step that reads any token of each span."""


def place_bytes(place: Place) -> bytes:
    """The content of the file with the place of a shard, and its checksum."""
    text = json.dumps(place._asdict()).encode()
    return b"%s\n%08x" % (text, zlib.crc32(text))


def _read_place(data: bytes) -> Place | None:
    text, _, checksum = data.rpartition(b"\n")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    try:
        return Place(**from_json(text))
    except (ValueError, TypeError):
        return None


def extent_name(first: int, end: int) -> str:
    """The name of an extent's file."""
    return str(first) if end == first + 1 else f"{first}-{end}"


def extent_of(name: str) -> Extent | None:
    """The extent whose file has that name; None for another file."""
    if not (found := _EXTENT.fullmatch(name)):
        return None
    first = int(found[1])
    return first, int(found[2] or first + 1)


def on_disk(size: int) -> int:
    """Bytes that a file of that size takes, with its entry in the directory."""
    return -(-size // _FILE_BYTES) * _FILE_BYTES + _ENTRY_BYTES


@dataclass(frozen=True)
class Order:
    """When a run needs which tokens."""

    fingerprint: str
    """Of the manifest."""
    token_bytes: int
    next_step: NextStep


@dataclass
class CachedShard:
    """The files of one shard in the cache."""

    directory: str
    place: Place | None
    """None if it cannot be read."""
    used_s: float
    """Unix time of its last use, about."""
    extents: dict[Extent, int]
    """Counted bytes of each one."""
    other_bytes: int
    """Of its other files."""
    writing: bool
    """Whether a file is being written."""

    @property
    def bytes(self) -> int:
        """Counted bytes of all files."""
        return self.other_bytes + sum(self.extents.values())


def list_files(directory: Path) -> tuple[list[CachedShard], int]:
    """All shards of a cache, and the counted bytes of what killed processes have left, which is removed."""
    found, freed = [], 0
    with os.scandir(directory) as entries:
        for entry in entries:
            if _SHARD.fullmatch(entry.name):
                with suppress(OSError):
                    shard, stale = _list_shard(entry.path)
                    found.append(shard)
                    freed += stale
    return found, freed


def _list_shard(directory: str) -> tuple[CachedShard, int]:
    place, used_s, other, freed = None, 0.0, SHARD_BYTES, 0
    with suppress(OSError, ValueError, TypeError), open(f"{directory}/{PLACE}", "rb") as file:
        place = _read_place(file.read())
        # A shard whose place cannot be read goes first.
        used_s = os.fstat(file.fileno()).st_mtime if place else 0.0
    names = os.listdir(directory)
    extents = {
        # Without a system call for each of very many files.
        found: _size_of(f"{directory}/{name}")
        if place is None
        else on_disk(len(place.span(*found)))
        for name in names
        if (found := extent_of(name)) is not None
    }
    writing = False
    for name in names:
        if name == PLACE or extent_of(name) is not None:
            continue
        path = f"{directory}/{name}"
        with suppress(FileNotFoundError):
            facts = os.lstat(path)
            writer = _WRITER.fullmatch(name)
            if writer and _is_stale(int(writer[1]), facts.st_mtime):
                os.unlink(path)
                freed += on_disk(facts.st_size)
            else:
                other, writing = other + on_disk(facts.st_size), writing or bool(writer)
    return CachedShard(directory, place, used_s, extents, other, writing), freed


def _size_of(path: str) -> int:
    """Counted bytes of a file; 0 if it was removed meanwhile."""
    try:
        return on_disk(os.lstat(path).st_size)
    except FileNotFoundError:
        return 0


def _is_stale(pid: int, changed_s: float) -> bool:
    if time.time() - changed_s > _PART_AGE_MAX_S:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def evict(found: Sequence[CachedShard], need: int, order: Order | None) -> int:
    """Remove blocks of about `need` bytes, if there are so many. The counted bytes of what was removed."""
    own = [each for each in found if _is_of(order, each)]
    others = sorted(
        (each for each in found if not _is_of(order, each)), key=lambda each: each.used_s
    )
    idle_since_s = time.time() - _IDLE_S
    idle = [each for each in others if each.used_s < idle_since_s]
    active = [each for each in others if each.used_s >= idle_since_s]
    freed = _remove_oldest(idle, need)
    own_bytes, active_bytes = (sum(each.bytes for each in group) for group in (own, active))
    if own_bytes and order is not None and need > freed:
        share = (need - freed) * active_bytes // (own_bytes + active_bytes)
        freed += _remove_oldest(active, share)
        freed += _remove_last_needed(own, need - freed, order)
    # Also if there was not enough of the own data.
    return freed + _remove_oldest(active, need - freed)


def _is_of(order: Order | None, shard: CachedShard) -> bool:
    return (
        order is not None
        and shard.place is not None
        and shard.place.fingerprint == order.fingerprint
    )


def _remove_oldest(found: Sequence[CachedShard], need: int) -> int:
    freed = 0
    for shard in found:
        for extent in list(shard.extents):
            if freed >= need:
                return freed
            freed += _remove(shard, extent)
        if freed < need and not shard.extents:
            freed += _remove_empty(shard)
    return freed


def _remove_last_needed(found: Sequence[CachedShard], need: int, order: Order) -> int:
    """Rank extents of a sample of the shards, and remove those that are needed last."""
    sample: list[tuple[CachedShard, Place]] = []
    sampled = 0
    for shard in random.sample(found, len(found)):
        if len(sample) >= _SAMPLE_SHARDS and sampled >= _SAMPLE * need:
            break
        if shard.place is not None:
            sample.append((shard, shard.place))
            sampled += shard.bytes
    extents = [(shard, extent) for shard, _ in sample for extent in shard.extents]
    if need <= 0 or not extents:
        return 0
    # One call per source: each has a fixed cost.
    next_step = np.full(len(extents), -1, dtype=np.int64)
    columns = np.array(
        [
            (place.source if place.split == "train" else -1, place.start, span.start, span.stop)
            for shard, place in sample
            for extent in shard.extents
            for span in (place.span(*extent),)
        ],
        dtype=np.int64,
    )
    source, start = columns[:, 0], columns[:, 1]
    first, end = (
        start + columns[:, 2] // order.token_bytes,
        start + columns[:, 3] // order.token_bytes,
    )
    for number in np.unique(source[source >= 0]):
        chosen = source == number
        next_step[chosen] = order.next_step(int(number), first[chosen], end[chosen])
    freed = 0
    for place in np.argsort(next_step, kind="stable")[::-1].tolist():
        if freed >= need:
            break
        freed += _remove(*extents[place])
    return freed


def _remove(shard: CachedShard, extent: Extent) -> int:
    """Unlink an extent, and with the last one the directory. The counted bytes that this frees."""
    freed = _unlink(f"{shard.directory}/{extent_name(*extent)}", shard.extents.pop(extent))
    return freed if shard.extents else freed + _remove_empty(shard)


def _remove_empty(shard: CachedShard) -> int:
    """Remove the directory of a shard that has no blocks. The counted bytes that this frees."""
    freed = 0
    if not shard.writing:
        with suppress(OSError):
            index = f"{shard.directory}/{INDEX}"
            freed += _unlink(index, _size_of(index))
        _unlink(f"{shard.directory}/{PLACE}", 0)
        with suppress(OSError):
            os.rmdir(shard.directory)
            freed += SHARD_BYTES
    return freed


def _unlink(path: str, size: int) -> int:
    try:
        os.unlink(path)
    except OSError:
        return 0
    return size
